"""The quickstart's problems: right by arithmetic, and no problem in two splits."""

import pytest

from opo_trl.scripts.arithmetic import LARGEST_OPERAND, NUM_PROBLEMS, SPLIT_SHARES, load_arithmetic, split_of


def problems(split, size, seed=0):
    return set(load_arithmetic(split, size, seed)["problem"])


def test_warm_start_training_and_held_out_problems_are_disjoint():
    """As large as the quickstart and the warm start draw them, and with different seeds."""
    drawn = {
        "warm_start": problems("warm_start", 20_000),
        "train": problems("train", 8_000) | problems("train", 8_000, seed=1),
        "test": problems("test", 1_024) | problems("test", 1_024, seed=1),
    }
    assert not drawn["warm_start"] & drawn["train"]
    assert not drawn["warm_start"] & drawn["test"]
    assert not drawn["train"] & drawn["test"]
    for split, texts in drawn.items():
        assert {split_of(text) for text in texts} == {split}


def test_the_split_shares_hold():
    everything = [split for split in SPLIT_SHARES for _ in range(SPLIT_SHARES[split])]
    counted = [split_of(f"{a}+{b}-{c}=?") for a in range(20) for b in range(20) for c in range(20)]
    for split in SPLIT_SHARES:
        assert counted.count(split) / len(counted) == pytest.approx(everything.count(split) / 10, abs=0.02)


def test_answers_and_steps_are_right():
    for row in load_arithmetic("train", 500):
        assert eval(row["problem"].removesuffix("=?")) == int(row["answer"])
        steps = row["steps"].split(",")
        assert len(steps) == 2
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right) >= 0
        assert steps[-1].endswith(f"={row['answer']}")
        assert all(int(n) <= LARGEST_OPERAND for n in row["problem"][:-2].replace("-", "+").split("+"))


def test_the_number_of_problems():
    count = 0
    for first in range(1, LARGEST_OPERAND + 1):
        partials = [first + b for b in range(1, LARGEST_OPERAND + 1)] + [first - b for b in range(1, first + 1)]
        count += sum(LARGEST_OPERAND + min(partial, LARGEST_OPERAND) for partial in partials)
    assert count == NUM_PROBLEMS


def test_a_draw_is_reproducible_and_follows_its_seed():
    assert load_arithmetic("test", 50)["problem"] == load_arithmetic("test", 50)["problem"]
    assert problems("test", 50) != problems("test", 50, seed=1)


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        load_arithmetic("validation", 3)
    with pytest.raises(ValueError, match="at most"):
        load_arithmetic("test", 10**6)
