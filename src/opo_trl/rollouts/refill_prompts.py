"""Which prompts a refill round takes: a function of seed, step and round, so that a resumed run takes the same."""

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any


def prompts_needed(informative: int, sampled: int, target: int, multiple: int = 1) -> int:
    """
    Return how many prompts the next round takes.

    As many as make up for the missing groups if the share of informative groups stays what it was in this step, and
    never more than `target`. The number depends on how many groups are informative and not on what their gradients are,
    so it does not bias the mean over informative groups.

    Args:
        informative (`int`):
            Informative groups of the step so far.
        sampled (`int`):
            Groups sampled in the step so far.
        target (`int`):
            Informative groups that the step should have.
        multiple (`int`, *optional*, defaults to `1`):
            The number is rounded up to a multiple of this, so that all ranks get equally many rows. Divides `target`.

    Returns:
        `int`: 0 if nothing is missing.
    """
    missing = target - informative
    if missing <= 0:
        return 0
    expected = -(-missing * sampled // informative) if informative else target
    return -(-min(expected, target) // multiple) * multiple


def draw_order(num_rows: int, seed: int, step: int, refill_round: int) -> Iterator[int]:
    """
    Yield each row of a dataset once, in an order that depends on seed, step and round.

    A Fisher-Yates shuffle that stores the entries that have moved and no others: the first rows of a million cost no
    more than those of a hundred.
    """
    generator = random.Random(f"{seed} {step} {refill_round}")
    moved: dict[int, int] = {}
    for position in range(num_rows):
        chosen = generator.randrange(position, num_rows)
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.pop(position, position)


def row_key(row: Mapping[str, Any]) -> str:
    """Return a key that identifies a row of a dataset by its content, the same on every rank and in every process."""
    return json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__)
