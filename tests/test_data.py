"""Loading problems: the columns people have, the errors they make, nothing held out twice."""

import json

import pytest
from datasets import Dataset, DatasetDict

from opo_trl.data import (
    INSTRUCTION,
    drop_by_pass_rate,
    drop_overlapping,
    final_answer,
    hold_out,
    load_math_dataset,
    to_plain_text,
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GSM8K = [{"question": "How many?", "answer": "He has <<2+3=5>>5.\n#### 1,005"}]
MATH = [{"problem": "What is $1/9$?", "solution": "It is $\\boxed{1/9}$.", "answer": "\\dfrac{1}{9}"}]


def test_gsm8k(tmp_path):
    row = load_math_dataset(write(tmp_path / "gsm8k.jsonl", GSM8K))[0]
    prompt = [{"role": "user", "content": f"How many?\n{INSTRUCTION}"}]
    assert row == {"prompt": prompt, "solution": "1,005", "id": "0"}


def test_math_takes_the_answer_and_not_the_worked_solution(tmp_path):
    assert load_math_dataset(write(tmp_path / "math.jsonl", MATH))[0]["solution"] == "\\dfrac{1}{9}"


# A row of each dataset in the columns it is published with, written for this test: problem, answer and id to expect.
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
PUBLISHED = {
    "gsm8k": ({"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}, "1+1?", "2", "0"),
    "MATH": (
        {"problem": "1+1?", "level": "Level 1", "type": "Algebra", "solution": "So $\\boxed{\\frac{4}{2}}$."},
        "1+1?", "\\frac{4}{2}", "0",
    ),
    "MATH-500": (
        {"problem": "1+1?", "solution": "So $\\boxed{2}$.", "answer": "2", "subject": "Algebra", "level": 1,
         "unique_id": "test/algebra/1.json"},
        "1+1?", "2", "test/algebra/1.json",
    ),
    "aime_2024": (
        {"id": 60, "problem": "1+1?", "solution": "Add.", "answer": "002", "url": "u", "year": "2024"},
        "1+1?", "002", "60",
    ),
    "AIME_2024": (
        {"ID": "2024-I-1", "Problem": "1+1?", "Solution": "Add.", "Answer": 2}, "1+1?", "2", "2024-I-1",
    ),
    "AIME2025": ({"question": "1+1?", "answer": "2"}, "1+1?", "2", "0"),
    "aime_2025": ({"id": "0", "problem": "1+1?", "answer": "2", "solution": "", "url": "u", "year": "2025"},
                  "1+1?", "2", "0"),
    "amc": ({"id": 7, "problem": "1+1?", "answer": 2.0, "url": "u"}, "1+1?", "2.0", "7"),
    "SVAMP": (
        {"ID": "chal-1", "Body": "There is 1 dog and 1 cat", "Question": "How many pets?", "Equation": "( 1.0 + 1.0 )",
         "Answer": "2", "Type": "Addition", "question_concat": "There is 1 dog and 1 cat How many pets?"},
        "There is 1 dog and 1 cat. How many pets?", "2", "chal-1",
    ),
    "DeepScaleR": ({"problem": "1+1?", "answer": "2", "solution": ""}, "1+1?", "2", "0"),
    "Skywork-OR1": (
        {"data_source": "train-math-deepscaler", "prompt": [{"content": "1+1?", "role": "user"}], "ability": "math",
         "reward_model": {"ground_truth": '["\\\\frac{4}{2}"]', "style": "rule"},
         "extra_info": {"index": 12, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 3}}},
        "1+1?", "\\frac{4}{2}", "12",
    ),
    "DAPO-Math-17k": (
        {"data_source": "math_dapo", "prompt": [{"content": DAPO.format("1+1?"), "role": "user"}], "ability": "MATH",
         "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "9a9b"}},
        "1+1?", "2", "9a9b",
    ),
    "OpenR1-Math": (
        {"problem": "1+1?", "solution": "Add.", "answer": "2", "problem_type": "Algebra",
         "question_type": "math-word-problem", "source": "olympiads", "uuid": "ab-12", "generations": ["a"],
         "is_reasoning_complete": [True], "correctness_math_verify": [True],
         "messages": [{"content": "1+1?", "role": "user"}]},
        "1+1?", "2", "ab-12",
    ),
    "NuminaMath-CoT": (
        {"source": "cn_k12", "problem": "1+1?", "solution": "So $\\boxed{2}$.",
         "messages": [{"content": "1+1?", "role": "user"}]},
        "1+1?", "2", "0",
    ),
    "NuminaMath-1.5": (
        {"problem": "1+1?", "solution": "Add.", "answer": "2", "problem_type": "Algebra",
         "question_type": "math-word-problem", "problem_is_valid": "Yes", "solution_is_valid": "Yes",
         "source": "olympiads", "synthetic": False},
        "1+1?", "2", "0",
    ),
    "Big-Math": (
        {"problem": "1+1?", "answer": "2", "source": "orca_math", "domain": ["Algebra"], "llama8b_solve_rate": 0.5},
        "1+1?", "2", "0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_columns(tmp_path, name):
    row, problem, answer, row_id = PUBLISHED[name]
    path = tmp_path / "rows.parquet"
    Dataset.from_list([row]).to_parquet(path)
    expected = {"prompt": [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}], "solution": answer, "id": row_id}
    assert load_math_dataset(str(path))[0] == expected


def test_unusable_rows_are_dropped_counted_and_logged(tmp_path, caplog):
    rows = [
        {"problem": "1+1?", "answer": "2"},
        {"problem": "Prove it.", "answer": "proof"},
        {"problem": "Find it.", "answer": "notfound"},
        {"problem": "2+2?", "answer": None},
        {"problem": "3+3?", "answer": " "},
        {"problem": " 1+1?  ", "answer": "2"},
        {"problem": "4+4?", "answer": "8"},
    ]
    kept = load_math_dataset(write(tmp_path / "rows.jsonl", rows))
    assert kept["solution"] == ["2", "8"]
    assert kept["id"] == ["0", "6"]  # the numbers of the rows in the file, whatever is dropped
    assert "Dropped 5 of 7 rows of" in caplog.text
    assert "4 without an answer, 1 a duplicate" in caplog.text


def test_proofs_among_worked_solutions_have_no_answer(tmp_path):
    rows = [{"problem": f"p{i}", "solution": f"So $\\boxed{{{i}}}$."} for i in range(3)]
    rows.append({"problem": "prove", "solution": "This proves it."})
    assert load_math_dataset(write(tmp_path / "rows.jsonl", rows))["solution"] == ["0", "1", "2"]
    typed = [{"problem": "p", "answer": "2", "question_type": "math-word-problem"}]
    typed.append({"problem": "prove", "answer": "2", "question_type": "proof"})
    assert load_math_dataset(write(tmp_path / "typed.jsonl", typed))["id"] == ["0"]


def test_an_answer_must_be_one(tmp_path):
    several = {"prompt": [{"role": "user", "content": "x^2=1?"}], "reward_model": {"ground_truth": '["1", "-1"]'}}
    with pytest.raises(ValueError, match=r"at least one problem with an answer; .* has 1 without an answer"):
        load_math_dataset(write(tmp_path / "rows.jsonl", [several]))


def test_ids_that_are_not_unique_are_not_used(tmp_path):
    rows = [{"id": 3, "problem": "a", "answer": "1"}, {"id": 3, "problem": "b", "answer": "2"}]
    assert load_math_dataset(write(tmp_path / "rows.jsonl", rows))["id"] == ["0", "1"]


def problems(*texts):
    rows = [{"prompt": [{"role": "user", "content": f"{text}\n{INSTRUCTION}"}], "id": text[:1]} for text in texts]
    return Dataset.from_list(rows)


def test_overlapping_problems_are_dropped(caplog):
    train = problems(
        "A train leaves Paris at noon and arrives at six.",
        "Before that, a TRAIN leaves paris -- at noon and stops.",
        "Bare sums: 1+1?",
        "Count the trains.",
    )
    held_out = problems("A train leaves Paris at noon.", "count the trains")
    assert drop_overlapping(train, held_out, ngram_size=6)["id"] == ["B"]
    assert "Dropped 3 of 4 problems: they share 6 words in a row" in caplog.text
    # The instruction, the same in all, is no overlap; without knowing it, all would overlap.
    assert drop_overlapping(train, problems("Something else."), ngram_size=6)["id"] == ["A", "B", "B", "C"]
    with pytest.raises(ValueError, match="all 4 share 6 words"):
        drop_overlapping(train, problems("Something else."), ngram_size=6, instruction=None)
    with pytest.raises(ValueError, match="at least 1 word, got 0"):
        drop_overlapping(train, held_out, ngram_size=0)


def test_a_prompt_has_one_system_message(tmp_path):
    messages = [{"role": "user", "content": "1+1=?"}]
    user = write(tmp_path / "user.jsonl", [{"prompt": messages, "answer": "2"}])
    loaded = load_math_dataset(user, system_prompt="Be brief.")["prompt"][0]
    assert loaded == [{"role": "system", "content": "Be brief."}, *messages]
    own = write(tmp_path / "own.jsonl", [{"prompt": loaded, "answer": "2"}])
    assert load_math_dataset(own)["prompt"][0] == loaded
    with pytest.raises(ValueError, match=r"must not begin with a system message.* one does: 'Be brief.'"):
        load_math_dataset(own, system_prompt="Be brief.")


@pytest.mark.parametrize(
    ("problem", "other", "overlaps"),
    [
        ("Let $a_1, a_2, a_n$ be positive reals.", "Let $a_{1}, a_{2}, a_{n}$ be positive reals.", True),
        ("Compute $17 - 8$.", "compute 17-8", True),
        ("17+8-12=?", "17-8+12=?", False),
        ("Compute 17 \N{MINUS SIGN} 8.", "Compute 17 - 8.", True),
        ("Compute 17-8=?", "Compute 17-8?", True),
        ("Find x!", "Find x.", True),
        ("Name a well-known prime.", "Name a well known prime.", True),
        ("12 \N{MIDDLE DOT} 4", "12 \N{MINUS SIGN} 4", False),
        ("12 \N{MULTIPLICATION SIGN} 4", "12*4", True),
        ("Simplify $(3-2i)^2$.", "Simplify $(3+2i)^2$.", False),
        ("Simplify $x^2$.", "Simplify $x_2$.", False),
        ("Simplify $x_2$.", "Simplify $x_{2}$.", True),
    ],
)
def test_what_is_the_same_problem(problem, other, overlaps):
    train = problems(problem, "Something that is not in the other set.")
    assert len(drop_overlapping(train, problems(other), ngram_size=6)) == 2 - overlaps


def test_problems_without_signal_are_dropped(caplog):
    rows = problems("a", "b", "c", "d")
    rates = {"a": 0.0, "b": 0.25, "c": 1.0, "z": 0.5}
    assert drop_by_pass_rate(rows, rates)["id"] == ["b"]
    assert "Dropped 1 of 4 problems: they have no measured pass rate" in caplog.text
    assert "Dropped 2 of 3 problems: they have a pass rate outside (0, 1)" in caplog.text
    with pytest.raises(ValueError, match=r"all 3 have a pass rate outside \(0.3, 0.9\)"):
        drop_by_pass_rate(rows, rates, lowest=0.3, highest=0.9)
    with pytest.raises(ValueError, match=r"got 0\.5 and 0\.5"):
        drop_by_pass_rate(rows, rates, lowest=0.5, highest=0.5)
    with pytest.raises(ValueError, match="none is among its 4"):
        drop_by_pass_rate(rows, {"z": 0.5})


def test_columns_prompts_and_instruction_can_be_set(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"q": "2+2", "gold": 4.0, "question": "not this", "answer": "nor this"}])
    row = load_math_dataset(path, prompt_column="q", solution_column="gold", instruction="", system_prompt="Be brief.")[
        0
    ]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["prompt"][1]["content"] == "2+2"
    assert row["solution"] == "4.0"


@pytest.mark.parametrize(
    "row",
    [
        {"q": "2+2", "gold": "4", "question": "not this", "answer": "nor this"},
        {"q": "2+2", "answer": "4"},
        {"problem": "2+2", "gold": "4"},
        {"problem": "2+2", "answer": "4"},
    ],
)
def test_columns_that_are_not_required_are_replaced_by_known_ones(tmp_path, row):
    """As the columns of the training set are where an evaluation set has others."""
    path = write(tmp_path / "rows.jsonl", [row])
    columns = {"prompt_column": "q", "solution_column": "gold", "instruction": ""}
    loaded = load_math_dataset(path, require_columns=False, **columns)[0]
    assert (loaded["prompt"][0]["content"], loaded["solution"]) == ("2+2", "4")


def test_further_columns_can_be_kept(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"problem": "2+2", "answer": "4", "level": 3, "subject": None}])
    row = load_math_dataset(path, keep_columns=["subject", "level", "type"])[0]
    assert {name: row[name] for name in row if name != "prompt"} == {
        "solution": "4", "id": "0", "subject": None, "level": 3
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"must not name prompt, solution or id, .* got \['id'\]"):
        load_math_dataset(path, keep_columns=["level", "id"])


def test_answers_are_optional_for_rewards_that_need_none(tmp_path):
    path = write(tmp_path / "some.jsonl", [{"problem": "2+2", "answer": "4"}, {"problem": "3+3", "answer": None}])
    assert load_math_dataset(path, require_solution=False)["solution"][:] == ["4", None]
    path = write(tmp_path / "none.jsonl", [{"problem": "2+2"}, {"problem": "2+2"}])
    assert load_math_dataset(path, require_solution=False)["solution"][:] == [None]
    with pytest.raises(ValueError, match="`solution_column` must name a column"):
        load_math_dataset(path)
    with pytest.raises(ValueError, match="`solution_column` must name a column"):
        load_math_dataset(path, solution_column="gold", require_solution=False)


def test_message_prompts_stay_messages(tmp_path):
    messages = [{"role": "user", "content": "2+2"}]
    path = write(tmp_path / "chat.jsonl", [{"prompt": messages, "solution": "4"}])
    assert load_math_dataset(path)[0] == {"prompt": messages, "solution": "4", "id": "0"}


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".csv"])
def test_file_formats(tmp_path, suffix):
    path, rows = tmp_path / f"file{suffix}", Dataset.from_list([{"question": "2+2", "answer": "4"}])
    {".json": rows.to_json, ".parquet": rows.to_parquet, ".csv": rows.to_csv}[suffix](path)
    assert load_math_dataset(str(path))[0]["solution"] == "4"


def test_saved_datasets(tmp_path):
    rows = Dataset.from_list([{"question": "2+2", "answer": "4"}])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"test": rows}).save_to_disk(tmp_path / "several")
    rows.save_to_disk(tmp_path / "named.json")
    assert load_math_dataset(str(tmp_path / "named.json"))[0]["solution"] == "4"
    assert load_math_dataset(str(tmp_path / "one"))[0]["solution"] == "4"
    assert load_math_dataset(str(tmp_path / "several"), "test")[0]["solution"] == "4"
    with pytest.raises(ValueError, match=r"must be one that .*several' has, \['test'\], got 'train'"):
        load_math_dataset(str(tmp_path / "several"))


def test_missing_columns_are_named_with_those_found(tmp_path):
    path = write(tmp_path / "odd.jsonl", [{"text": "2+2", "label": "4"}])
    with pytest.raises(ValueError, match=r"`prompt_column` must name a column .*found \['text', 'label'\]"):
        load_math_dataset(path)
    with pytest.raises(ValueError, match=r"`solution_column` must name .*looked for \['gold'\]"):
        load_math_dataset(path, prompt_column="text", solution_column="gold")


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at least one row; .* has none in split 'train'"):
        load_math_dataset(write(tmp_path / "empty.jsonl", []))


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"A local dataset must exist, got 'eigne\.jsonl'"):
        load_math_dataset("eigne.jsonl")


@pytest.mark.parametrize("answer", [["95"], {"value": 95}])
def test_an_answer_of_several_values_is_refused_where_one_is_needed(tmp_path, answer):
    """As text, `['95']` would make every completion wrong."""
    path = write(tmp_path / "rows.jsonl", [{"problem": "p", "answer": answer}])
    with pytest.raises(ValueError, match=r"An answer must be a string or a number, .* has .*95.* for 'p'"):
        load_math_dataset(path)
    assert load_math_dataset(path, require_solution=False)["solution"] == [None]


def test_a_row_without_a_problem_is_dropped_and_counted(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", [{"problem": text, "answer": "1"} for text in ("p", None, " ")])
    assert len(load_math_dataset(path)) == 1
    assert "Dropped 2 of 3 rows" in caplog.text
    assert "2 without a problem" in caplog.text


def test_an_unknown_file_format_is_refused(tmp_path):
    (tmp_path / "problems.txt").write_text("2+2")
    with pytest.raises(ValueError, match=r"must be one of .*problems\.txt"):
        load_math_dataset(str(tmp_path / "problems.txt"))


def test_final_answer():
    assert final_answer("a #### b\n#### 7 ") == "7"
    assert final_answer(145.0) == "145.0"
    assert final_answer("\\frac12") == "\\frac12"
    assert final_answer("so \\boxed{1} or \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert final_answer(None) == final_answer(float("nan")) == final_answer(" Proof ") == ""


def test_held_out_problems_do_not_stay_in_training():
    rows = Dataset.from_dict({"prompt": [f"p{i % 10}" for i in range(40)], "solution": ["s"] * 40})
    train, held_out = hold_out(rows, 3, seed=0)
    assert len(held_out) == 3
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert set(train["prompt"]) | set(held_out["prompt"]) == {f"p{i}" for i in range(10)}
    with pytest.raises(ValueError, match="between 1 and 39, got 40"):
        hold_out(rows, 40, seed=0)


def test_plain_text_for_base_models():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2"}]
    rows = to_plain_text(Dataset.from_list([{"prompt": messages, "solution": "4"}]))
    assert rows[0] == {"prompt": "Be brief.\n2+2\n", "solution": "4"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("gsm8k_train", 7_473),
        ("gsm8k_test", 1_319),
        ("math_train", 7_497),  # of 7,500, two are published without an answer and one twice
        ("math_test", 5_000),
        ("aime24", 30),
        ("amc23", 40),
        ("svamp", 1_000),
    ],
)
def test_real_problems_load(shared_data, name, size):
    rows = load_math_dataset(str(shared_data / f"{name}.jsonl"))
    assert len(rows) == len(set(rows["id"])) == size
    assert all(rows["solution"])
