"""pass@k: the chance that at least one of k samples is correct."""

from collections.abc import Iterable, Sequence
from math import comb
from typing import Any


def pass_at_k(n: int, c: int, k: int) -> float:
    """
    Unbiased estimate of the chance that at least one of `k` samples is correct (Chen et al. 2021, arXiv 2107.03374).

    Args:
        n (`int`):
            Number of samples drawn for a problem.
        c (`int`):
            Number of correct ones among them.
        k (`int`):
            Number of tries.

    Returns:
        `float`: `1 - C(n - c, k) / C(n, k)`; `c / n` for `k=1`.

    Raises:
        ValueError: Unless `0 <= c <= n` and `1 <= k <= n`.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}.")
    return 1.0 - comb(n - c, k) / comb(n, k)


def mean_pass_at_k(correct: Sequence[Sequence[bool]], ks: Iterable[int]) -> dict[str, float]:
    """
    pass@k over problems, for several k.

    Args:
        correct (`Sequence[Sequence[bool]]` of shape `(P, K)`):
            For each problem, which of its samples are correct.
        ks (`Iterable[int]`):
            Numbers of tries.

    Returns:
        `dict[str, float]`: `{"pass@1": ..., ...}`, means over problems.

    Raises:
        ValueError: If there is no problem, or a `k` exceeds the number of samples.
    """
    if not correct:
        raise ValueError("pass@k is a mean over problems and needs at least one, got none.")
    return {
        f"pass@{k}": sum(pass_at_k(len(samples), sum(samples), k) for samples in correct) / len(correct) for k in ks
    }


class CorrectCompletions:
    """
    Collects which completions of an evaluation are correct.

    Args:
        reward (`str`, *optional*):
            Name of the reward function whose value 1 means that a completion is correct; `None` collects nothing.
    """

    def __init__(self, reward: str | None) -> None:
        self.reward = reward
        self._correct: list[list[bool]] = []  # for each problem so far

    def clear(self) -> None:
        """Begin another evaluation."""
        self._correct = []

    def add(self, rewards: Any, names: Sequence[str], group_size: int) -> None:
        """Add a batch's rewards, a tensor of shape `(N, F)`, N completions in groups and F reward functions."""
        if self.reward is not None:
            column = rewards[:, names.index(self.reward)]
            self._correct += (column == 1).view(-1, group_size).tolist()

    def pass_at_k(self, num_problems: int, group_size: int) -> dict[str, float]:
        """pass@1 to pass@`group_size` of the first `num_problems`; empty where nothing was collected."""
        correct = self._correct[:num_problems]
        return mean_pass_at_k(correct, range(1, group_size + 1)) if correct else {}
