"""pass@k and its uncertainty."""

import random
from collections.abc import Sequence
from math import comb


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


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """
    Percentile bootstrap interval of a mean over problems.

    Args:
        values (`Sequence[float]`):
            One value per problem, such as its pass@1.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the interval.
        resamples (`int`, *optional*, defaults to `2000`):
            Number of bootstrap samples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        `tuple[float, float]`: Lower and upper bound.

    Raises:
        ValueError: If there is no value, or `confidence` is not between 0 and 1.
    """
    if not values or not 0 < confidence < 1:
        raise ValueError(f"An interval needs values and 0 < confidence < 1, got {len(values)} and {confidence}.")
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    tail = (1 - confidence) / 2
    return means[int(tail * resamples)], means[min(int((1 - tail) * resamples), resamples - 1)]
