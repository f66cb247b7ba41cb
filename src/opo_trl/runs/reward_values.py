"""What a reward function may return."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


def check_reward_values(name: str, values: Any, num_completions: int) -> list[Any]:
    """
    Refuse what a reward function returned unless it is one number or `None` for each completion.

    Args:
        name (`str`):
            Name of the reward function.
        values (`Any`):
            What it returned; for an async function, the awaited result.
        num_completions (`int`):
            Number of completions that it was called with.

    Returns:
        `list[Any]`: The values, unchanged. Use it instead of `values`, which may be an iterator that is now exhausted.

    Raises:
        ValueError: If `values` is not a sequence of that length, or one of them is neither a number nor `None`.
    """
    rule = f"The reward function {name!r} must return one number or None for each of the {num_completions} completions"
    unordered = isinstance(values, str | bytes | Mapping | Set)
    if unordered or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        hint = " Does it lack a return statement?" if values is None else ""
        raise ValueError(f"{rule}, got {_short(values)}. Return a list of that length.{hint}")
    rewards = list(values)
    if len(rewards) != num_completions:
        raise ValueError(
            f"{rule}, got {len(rewards)} values. Return a list of that length, with None for a completion that cannot "
            "be scored."
        )
    for position, reward in enumerate(rewards):
        if reward is not None and not _is_number(reward):
            raise ValueError(
                f"{rule}, got {_short(reward)} for completion {position}. Convert it with float(), or return None for "
                "a completion that cannot be scored."
            )
    return rewards


def warn_of_equal_names(names: Sequence[str]) -> None:
    """Warn of reward functions with the same name, whose metrics and columns TRL puts into one."""
    equal = sorted(name for name, count in Counter(names).items() if count > 1)
    if equal:
        logger.warning(
            "Reward functions should have different names, got %s more than once: their metrics and their columns in "
            "the completions table are mixed. Give each function a `__name__` of its own.",
            " and ".join(map(repr, equal)),
        )


def _is_number(value: Any) -> bool:
    """Whether TRL can store the value as one float32."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    if not isinstance(value, Real | Decimal | np.bool_):
        return False
    try:
        float(value)
    except OverflowError:  # an integer of more than 308 digits
        return False
    return True


def _short(value: Any) -> str:
    """A value as a message shows it, with its type."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"
