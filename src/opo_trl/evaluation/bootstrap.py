"""
The confidence interval of a mean over problems: the percentile bootstrap (Efron & Tibshirani 1993, chapter 13), and an
exact interval where all values are equal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_LARGEST_BLOCK = 4_000_000  # problems drawn at a time: 32 MB
_ROUNDING = 1e-9  # equal differences of two models, computed from different values, differ by less


class Difference(NamedTuple):
    """Mean difference between two models on the same problems, with the bounds of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """
    Percentile bootstrap interval of a mean over problems.

    Where all values are equal, as where no problem is solved, all resamples are equal, and the bootstrap interval has
    no width. With `bounds` the interval is then exact, where n is the number of *problems*: Clopper-Pearson's interval
    for 0 of n, or n of n. The samples of one problem count once, since they are not independent: a value may be a mean
    over any number of samples.

    Args:
        values (`Sequence[float]`):
            One value per problem, such as its pass@1.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the interval.
        resamples (`int`, *optional*, defaults to `2000`):
            Number of bootstrap samples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.
        bounds (`tuple[float, float]`, *optional*):
            Lowest and highest value that a problem can have, `(0, 1)` for a share. `None` if values are not bounded.

    Returns:
        `tuple[float, float]`: Lower and upper bound.

    Raises:
        ValueError: If there is no value, `confidence` is not between 0 and 1, or a value is out of `bounds`.
    """
    if not len(values) or not 0 < confidence < 1:
        raise ValueError(f"An interval needs values and 0 < confidence < 1, got {len(values)} and {confidence}.")
    rng, sample = np.random.default_rng(seed), np.asarray(values, dtype=float)
    smallest, largest = float(sample.min()), float(sample.max())
    if bounds is not None:
        if not bounds[0] <= smallest <= largest <= bounds[1]:
            raise ValueError(f"Values must be within the bounds {bounds}, got {smallest} to {largest}.")
        if largest - smallest <= _ROUNDING:
            return _interval_of_equal_values(smallest, len(sample), bounds, confidence)
    means = np.empty(resamples)
    block = max(_LARGEST_BLOCK // len(sample), 1)
    for start in range(0, resamples, block):
        drawn = rng.integers(len(sample), size=(min(block, resamples - start), len(sample)))
        means[start : start + block] = sample[drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(
    values: Sequence[float],
    reference: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
) -> Difference:
    """
    Mean of `values - reference` with an interval over problems.

    Both models answer the same problems, so what makes a problem hard for both cancels: the interval is narrower than
    those of the two means. A difference is told from chance where it leaves 0 out.

    Args:
        values (`Sequence[float]`):
            One value per problem.
        reference (`Sequence[float]`):
            The other model's values on the same problems, in the same order.
        confidence, resamples, seed:
            As in [`bootstrap_interval`].
        bounds (`tuple[float, float]`, *optional*):
            Lowest and highest value that a problem can have with either model. With them the interval is exact where
            all differences are equal, such as 0.

    Returns:
        [`Difference`]: Mean, lower and upper bound.

    Raises:
        ValueError: If the lengths differ, or as [`bootstrap_interval`] does.
    """
    if len(values) != len(reference):
        raise ValueError(
            f"A paired difference needs two values for each problem, got {len(values)} and {len(reference)}."
        )
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    of_differences = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    low, high = bootstrap_interval(differences, confidence, resamples, seed, of_differences)
    return Difference(sum(differences) / len(differences), low, high)


def _interval_of_equal_values(
    value: float, n: int, bounds: tuple[float, float], confidence: float
) -> tuple[float, float]:
    """
    Interval of the mean where n problems all have this value.

    If a problem has another value with probability p, n problems all have this one with probability (1 - p)^n, which is
    at least half of 1 - confidence only up to `other`. The mean is at most p away, times the distance to a bound.
    """
    other = 1 - ((1 - confidence) / 2) ** (1 / n)
    low, high = bounds
    return value - other * (value - low), value + other * (high - value)
