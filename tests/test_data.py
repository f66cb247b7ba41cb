"""Loading problems: the columns people have, the errors they make, nothing held out twice."""

import json

import pytest
from datasets import Dataset, DatasetDict

from opo_trl.data import INSTRUCTION, final_answer, hold_out, load_math_dataset, to_plain_text


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GSM8K = [{"question": "How many?", "answer": "He has <<2+3=5>>5.\n#### 1,005"}]
MATH = [{"problem": "What is $1/9$?", "solution": "It is $\\boxed{1/9}$.", "answer": "\\dfrac{1}{9}"}]


def test_gsm8k(tmp_path):
    row = load_math_dataset(write(tmp_path / "gsm8k.jsonl", GSM8K))[0]
    assert row == {"prompt": [{"role": "user", "content": f"How many?\n{INSTRUCTION}"}], "solution": "1,005"}


def test_math_takes_the_answer_and_not_the_worked_solution(tmp_path):
    assert load_math_dataset(write(tmp_path / "math.jsonl", MATH))[0]["solution"] == "\\dfrac{1}{9}"


def test_columns_prompts_and_instruction_can_be_set(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"q": "2+2", "gold": 4.0, "question": "not this", "answer": "nor this"}])
    row = load_math_dataset(path, prompt_column="q", solution_column="gold", instruction="", system_prompt="Be brief.")[
        0
    ]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["prompt"][1]["content"] == "2+2"
    assert row["solution"] == "4.0"


def test_message_prompts_stay_messages(tmp_path):
    messages = [{"role": "user", "content": "2+2"}]
    path = write(tmp_path / "chat.jsonl", [{"prompt": messages, "solution": "4"}])
    assert load_math_dataset(path)[0] == {"prompt": messages, "solution": "4"}


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".csv"])
def test_file_formats(tmp_path, suffix):
    path, rows = tmp_path / f"file{suffix}", Dataset.from_list([{"question": "2+2", "answer": "4"}])
    {".json": rows.to_json, ".parquet": rows.to_parquet, ".csv": rows.to_csv}[suffix](path)
    assert load_math_dataset(str(path))[0]["solution"] == "4"


def test_saved_datasets(tmp_path):
    rows = Dataset.from_list([{"question": "2+2", "answer": "4"}])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"test": rows}).save_to_disk(tmp_path / "several")
    assert load_math_dataset(str(tmp_path / "one"))[0]["solution"] == "4"
    assert load_math_dataset(str(tmp_path / "several"), "test")[0]["solution"] == "4"


def test_missing_columns_are_named_with_those_found(tmp_path):
    path = write(tmp_path / "odd.jsonl", [{"text": "2+2", "label": "4"}])
    with pytest.raises(ValueError, match=r"`prompt_column` must name a column .*found \['text', 'label'\]"):
        load_math_dataset(path)
    with pytest.raises(ValueError, match=r"`solution_column` must name .*looked for \['gold'\]"):
        load_math_dataset(path, prompt_column="text", solution_column="gold")


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at least one row; .* has none in split 'train'"):
        load_math_dataset(write(tmp_path / "empty.jsonl", []))


def test_an_unknown_file_format_is_refused(tmp_path):
    (tmp_path / "problems.txt").write_text("2+2")
    with pytest.raises(ValueError, match=r"must be one of .*problems\.txt"):
        load_math_dataset(str(tmp_path / "problems.txt"))


def test_final_answer():
    assert final_answer("a #### b\n#### 7 ") == "7"
    assert final_answer(145.0) == "145.0"
    assert final_answer("\\frac12") == "\\frac12"


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


@pytest.mark.parametrize("name", ["gsm8k_train", "math_train", "aime24", "amc23"])
def test_real_problems_load(shared_data, name):
    rows = load_math_dataset(str(shared_data / f"{name}.jsonl"))
    assert len(rows) == sum(1 for _ in (shared_data / f"{name}.jsonl").open())
    without_answer = {"math_train": 2}  # two problems of MATH are published without one
    assert sum(not solution for solution in rows["solution"]) == without_answer.get(name, 0)
