"""The word problems of SmolLM2's measurement: their answers, their splits, and the examples before them."""

import random
import re

import pytest

from opo_trl.rewards import math_verify_reward
from word_problems import EXAMPLES, load_word_problems, make_problem, make_prompt


def solve(problem):
    first, second = map(int, re.findall(r"\d+", problem))
    if "gets" in problem:
        return first + second
    return first - second if "lost" in problem else first * second


def test_answers_are_right():
    rng = random.Random(0)
    for _ in range(300):
        problem, answer = make_problem(rng)
        assert answer == solve(problem)


def test_the_examples_are_worked_rightly():
    for problem, solution in EXAMPLES:
        assert math_verify_reward([solution], [str(solve(problem))]) == [1.0]


def test_an_answer_that_an_example_has_too_is_rewarded():
    prompt = make_prompt("Ben has 4 apples and gets 5 more. How many apples does Ben have?")
    completion = [{"role": "assistant", "content": r"4 + 5 = 9. The answer is \boxed{9}."}]
    assert math_verify_reward([completion], ["9"], prompts=[prompt]) == [1.0]


def test_splits_are_disjoint_and_drawn_alike_each_time():
    train, test = (load_word_problems(split, 60) for split in ("train", "test"))
    assert not set(train["id"]) & set(test["id"])
    assert load_word_problems("test", 60)["id"] == test["id"]
    assert len(set(test["id"])) == 60
    assert test[0]["prompt"][-1] == {"role": "user", "content": test[0]["id"]}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        load_word_problems("validation", 3)
