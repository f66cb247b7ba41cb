"""The rewards on the forms in which answers come. The hardening against hostile text has tests of its own."""

import pickle
import threading

import pytest

from opo_trl.data import load_math_dataset
from opo_trl.rewards import boxed_format_reward, math_verify_reward
from opo_trl.rewards.text import final_text, last_boxed


def grade(completion, solution):
    return math_verify_reward([completion], [solution])[0]


@pytest.mark.parametrize(
    ("answer", "solution"),
    [
        ("13", "13"),
        ("13.0", "13"),
        ("1,005", "1005"),
        ("-7", "-7"),
        ("0.5", "\\frac{1}{2}"),
        ("\\frac12", "\\dfrac{1}{2}"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("2\\sqrt{3}", "2\\sqrt{3}"),
        ("\\sqrt{12}", "2\\sqrt{3}"),
        ("(1, 2)", "(1,2)"),
        ("x^2+2x+1", "(x+1)^2"),
        ("\\text{Evelyn}", "\\text{Evelyn}"),
        ("27", 27.0),
        ("5", 5),
    ],
)
def test_right_answers_are_paid(answer, solution):
    assert grade(f"so the answer is \\boxed{{{answer}}}.", solution) == 1.0


@pytest.mark.parametrize(
    ("completion", "solution"),
    [
        ("\\boxed{2}", "2\\sqrt{3}"),  # a bare gold outside a box parses as 2
        ("\\boxed{14}", "13"),
        ("\\boxed{0.0000001}", "0.0000002"),  # equal once rounded to six places
        ("13", "13"),  # no box
        ("\\boxed{13", "13"),  # never closed
        ("\\boxed{}", "13"),
        ("", "13"),
        ("\\boxed{13} no, wait: \\boxed{12}", "13"),  # the last box counts
        ("<think>\\boxed{13}</think> It is 12.", "13"),  # thinking is not the answer
        ("\\boxed{" + "(" * 3_000 + "}", "13"),  # longer than any answer
    ],
)
def test_wrong_answers_are_not_paid(completion, solution):
    assert grade(completion, solution) == 0.0


def test_a_self_correction_is_read_from_its_last_box():
    assert grade("\\boxed{12}, no: \\boxed{13}", "13") == 1.0


@pytest.mark.parametrize("solution", [None, "", "  ", "$$"])
def test_without_a_solution_the_completion_is_unscorable(solution):
    assert grade("\\boxed{13}", solution) is None


@pytest.mark.parametrize("solution", ["13", "$13$", "\\boxed{13}", "so\n#### 13", "The answer is $\\boxed{13}$."])
def test_the_ways_a_solution_is_written(solution):
    assert grade("\\boxed{13}", solution) == 1.0
    assert grade("\\boxed{31}", solution) == 0.0


def test_completions_as_text_messages_and_parts():
    text = "so \\boxed{13}"
    transcript = [
        {"role": "assistant", "content": "let me ask \\boxed{1}", "tool_calls": []},
        {"role": "tool", "content": "\\boxed{2}"},
        {"role": "assistant", "content": [{"type": "text", "text": "so \\boxed{"}, {"type": "text", "text": "13}"}]},
    ]
    completions = [text, [{"role": "assistant", "content": text}], [{"content": text}], transcript]
    assert math_verify_reward(completions, ["13"] * 4) == [1.0] * 4
    assert math_verify_reward([[{"role": "assistant", "content": None}], []], ["13"] * 2) == [0.0] * 2


def test_an_answer_that_breaks_the_parser_is_wrong():
    assert grade("\\boxed{\\binom{20000}{10000}}", "13") == 0.0


def test_off_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(grade("\\boxed{\\frac{26}{2}}", "13")))
    thread.start()
    thread.join()
    assert results == [1.0]


def test_a_trl_reward_function():
    columns = {}
    rewards = math_verify_reward(
        prompts=["p", "q"],
        completions=["\\boxed{1}", "none"],
        completion_ids=[[1], [2]],
        solution=["1", "1"],
        level=[1, 2],
        trainer_state=None,
        log_extra=columns.__setitem__,
        log_metric=lambda name, value: None,
    )
    assert rewards == [1.0, 0.0]
    assert columns == {"answer": ["1", None]}
    assert pickle.loads(pickle.dumps(math_verify_reward)) is math_verify_reward


def test_last_boxed():
    assert last_boxed("a \\boxed{1} b \\boxed{\\frac{1}{2}} c") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"
    assert last_boxed("\\boxed{1} \\boxed{2") == "1"
    assert last_boxed("\\boxed{\\boxed{3}}") == "\\boxed{3}"
    assert last_boxed("no box") is None
    assert last_boxed("\\boxed{" * 50_000) is None  # one pass, whatever the policy writes


def test_final_text():
    assert final_text("<think>a</think>b</think>c") == "c"
    assert final_text([{"role": "user", "content": "x"}]) == ""


def test_boxed_format():
    completions = ["\\boxed{1}", "1", "\\boxed{}", "<think>\\boxed{1}</think>", [{"content": "\\boxed{x}"}]]
    assert boxed_format_reward(completions) == [1.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["gsm8k_test", "aime24", "amc23"])
def test_real_solutions_are_paid_when_boxed(shared_data, name):
    solutions = load_math_dataset(str(shared_data / f"{name}.jsonl"))["solution"]
    assert math_verify_reward([f"\\boxed{{{solution}}}" for solution in solutions], list(solutions)) == [1.0] * len(
        solutions
    )
