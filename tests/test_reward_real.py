"""The reward on the answers of real datasets: each is right for its own problem, and wrong for another one's."""

import json
import random
import re
from fractions import Fraction
from itertools import pairwise

import pytest

from opo_trl.rewards import math_verify_reward

pytestmark = pytest.mark.slow
COLUMNS = {
    "gsm8k_train": "answer",
    "gsm8k_test": "answer",
    "svamp": "Answer",
    "aime24": "answer",
    "amc23": "answer",
    "math_train": "answer",
    "math_test": "answer",
}
WITHOUT_ANSWER = {"math_train": 2}  # problems whose answer column is empty

# Pairs of different MATH answers that mean the same, beyond what `as_written` sees.
SAME = {
    frozenset({r"75\%", r"\frac{3}{4}"}),  # by value
    frozenset({r"20\%", r"\frac{1}{5}"}),
    frozenset({r"25\%", r"\frac{1}{4}"}),
    frozenset({r"50\%", r"\frac{1}{2}"}),
}


def load(shared_data, name):
    """The solutions as their column has them, strings, integers or floats, and the final answers in them."""
    rows = [json.loads(line) for line in (shared_data / f"{name}.jsonl").read_text().splitlines()]
    solutions = [row[COLUMNS[name]] for row in rows]
    return solutions, [str(solution).rsplit("####", 1)[-1].strip() for solution in solutions]


@pytest.mark.parametrize("name", list(COLUMNS))
def test_every_real_solution_is_paid_when_boxed_as_it_is(shared_data, name):
    solutions, finals = load(shared_data, name)
    rewards = math_verify_reward([f"\\boxed{{{final}}}" for final in finals], solutions)
    assert [reward for reward, final in zip(rewards, finals, strict=True) if final] == [1.0] * sum(map(bool, finals))
    assert [reward for reward, final in zip(rewards, finals, strict=True) if not final] == [None] * WITHOUT_ANSWER.get(
        name, 0
    )


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test", "svamp", "aime24", "amc23"])
def test_another_number_is_not_paid(shared_data, name):
    solutions, finals = load(shared_data, name)
    others = finals[1:] + finals[:1]
    values = [Fraction(final.replace(",", "")) for final in finals]
    rewards = math_verify_reward([f"\\boxed{{{other}}}" for other in others], solutions)
    expected = [float(value == other) for value, other in zip(values, values[1:] + values[:1], strict=True)]
    assert rewards == expected


def as_written(answer):
    """
    What a reader would call the same answer: an oracle of its own, without any of the package's code.

    Spaces, units, degrees, percent and dollar signs, a full stop, a name before a value and the font do not count;
    decimals and fractions of two integers count by their value.
    """
    answer = re.sub(r"\\!|\\,|\\ |\s|\{,\}|\\left|\\right|\\\$|\\?%|\^\{?\\circ\}?", "", answer)
    answer = re.sub(r"(?<=.)\\(?:text|mbox|textnormal)\{[^{}]*\}(?:\^\{?\d\}?)?", "", answer)
    answer = re.sub(r"\\[dtc]frac", r"\\frac", answer).rstrip(".,")
    answer = re.sub(r"^\\(?:text|mbox)\{\(?([^{}()]*)\)?\}$", r"\1", re.sub(r"^[a-zA-Z]=", "", answer))
    answer = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", answer)
    number = re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}", answer)
    if number:
        return Fraction(int(number[1] + "1") * int(number[2]), int(number[3]))
    if re.fullmatch(r"-?(\d{1,3}(,\d{3})+|\d*)(\.\d+)?", answer) and re.search(r"\d", answer):
        return Fraction(answer.replace(",", ""))
    return answer


def wrongly_paid(golds, pairs):
    pairs = [(gold, answer) for gold, answer in pairs if as_written(golds[gold]) != as_written(golds[answer])]
    rewards = math_verify_reward([f"\\boxed{{{golds[answer]}}}" for _, answer in pairs], [golds[g] for g, _ in pairs])
    paid = [(golds[g], golds[a]) for (g, a), reward in zip(pairs, rewards, strict=True) if reward not in (0.0, None)]
    unscored = [golds[g] for (g, a), reward in zip(pairs, rewards, strict=True) if reward is None and golds[g]]
    return len(pairs), [pair for pair in paid if frozenset(pair) not in SAME], unscored


@pytest.mark.parametrize("name", ["math_train", "math_test"])
def test_the_answer_of_another_problem_is_not_paid(shared_data, name):
    golds, _ = load(shared_data, name)
    draw = random.Random(0)
    count, paid, unscored = wrongly_paid(golds, [draw.sample(range(len(golds)), 2) for _ in range(600)])
    assert count > 500
    assert paid == []
    assert unscored == []


@pytest.mark.parametrize("name", ["math_train", "math_test"])
def test_thousands_of_answers_of_other_problems_are_not_paid(shared_data, name):
    """Any two answers, any two that are more than an integer, and each beside its neighbours in alphabetical order."""
    golds, _ = load(shared_data, name)
    draw = random.Random(1)
    pairs = [draw.sample(range(len(golds)), 2) for _ in range(4_000)]
    more = [number for number, gold in enumerate(golds) if not gold.lstrip("-").isdigit()]
    pairs += [draw.sample(more, 2) for _ in range(4_000)]
    order = sorted(range(len(golds)), key=golds.__getitem__)
    pairs += [pair for one, other in pairwise(order) for pair in ((one, other), (other, one))]
    count, paid, unscored = wrongly_paid(golds, pairs)
    assert count > 10_000
    assert paid == []
    # One answer of MATH is a piece of a sentence. It is prose, so nothing but its very words can be scored against it.
    assert all("the correct answer as we normally do" in gold for gold in unscored)
