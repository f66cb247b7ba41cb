"""Generated arithmetic with worked solutions: the problems of the quickstart.

A problem is a sum of three numbers such as `17+8-12=?`. It is worked from left to right, and no partial result is
negative. Every problem belongs to exactly one split, decided by a hash of its text, so that the problems that warm the
tiny policy up, the ones that OPO trains on and the ones that measure pass@1 are disjoint by construction
(`tests/test_arithmetic.py` holds it to that).
"""

import hashlib
import random
from collections.abc import Callable
from typing import Any

from datasets import Dataset

LARGEST_OPERAND = 49
NUM_PROBLEMS = 296_499  # distinct problems in all
SPLIT_SHARES = {"warm_start": 6, "train": 3, "test": 1}  # tenths of all problems


def split_of(problem: str) -> str:
    """Return the one split that `problem` belongs to."""
    tenth = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8], "big") % 10
    for split, share in SPLIT_SHARES.items():
        if tenth < share:
            return split
        tenth -= share
    raise AssertionError("SPLIT_SHARES must add up to 10")


def share_of(split: str) -> int:
    """Tenths of all problems that are in a split; a `ValueError` if there is no such split."""
    if split not in SPLIT_SHARES:
        raise ValueError(f"split must be one of {sorted(SPLIT_SHARES)}, got {split!r}.")
    return SPLIT_SHARES[split]


def draw_distinct(
    split: str, size: int, seed: str, draw: Callable[[random.Random], tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """
    Draw `size` distinct problems of one split.

    Args:
        split (`str`):
            `"warm_start"`, `"train"` or `"test"`.
        size (`int`):
            Number of problems.
        seed (`str`):
            Seed of the draw.
        draw (`Callable`):
            Draws one problem, of any split: its text, and its row.

    Returns:
        `list[dict]`: The rows, in the order of the draw.

    Raises:
        ValueError: If there is no such split.
    """
    share_of(split)  # refuses an unknown split, which would have no problems to draw
    rng = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < size:
        problem, row = draw(rng)
        if split_of(problem) == split:
            rows.setdefault(problem, row)
    return list(rows.values())


def make_problem(rng: random.Random, largest: int = LARGEST_OPERAND) -> dict[str, str]:
    """Draw one problem with operands up to `largest`, its worked solution and its answer."""
    result = rng.randint(1, largest)
    problem, steps = str(result), []
    for _ in range(2):
        sign = rng.choice("+-") if result else "+"
        operand = rng.randint(1, largest if sign == "+" else min(result, largest))
        partial = result + operand if sign == "+" else result - operand
        problem += f"{sign}{operand}"
        steps.append(f"{result}{sign}{operand}={partial}")
        result = partial
    return {"problem": f"{problem}=?", "steps": ",".join(steps), "answer": str(result)}


def load_arithmetic(split: str, size: int, seed: int = 0) -> Dataset:
    """
    Generate `size` distinct problems of one split.

    Args:
        split (`str`):
            `"warm_start"`, `"train"` or `"test"`.
        size (`int`):
            Number of problems, at most half of those in the split.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw. The split of a problem does not depend on it.

    Returns:
        [`~datasets.Dataset`] with the columns `problem` (`17+8-12=?`), `steps` (`17+8=25,25-12=13`), `answer` (`13`).

    Raises:
        ValueError: If there is no such split, or it is too small for `size` distinct problems.
    """
    limit = NUM_PROBLEMS * share_of(split) // 20
    if size > limit:
        raise ValueError(f"size must be at most {limit} for the split {split!r}, got {size}.")

    def draw(rng: random.Random) -> tuple[str, dict[str, Any]]:
        row = make_problem(rng)
        return row["problem"], row

    return Dataset.from_list(draw_distinct(split, size, f"{split}-{seed}", draw))
