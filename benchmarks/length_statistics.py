"""Lengths of completions, uncertainty of their tokens by position, and squared gradient norms within groups."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
POSITIONS = (0, 25, 50, 100, 150, 200, 300, 400)  # token positions that bound the ranges of the profile
LENGTH_RANGES = 4  # equal shares of all completions, by length, in which right answers are counted
WEIGHTS = ("lengths", "logit_norms", "uncertainties", "surprises")


def estimate(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, seed: int = 0) -> dict[str, float]:
    """A function of means over prompts with its bootstrap interval: `values` is (prompts, ...)."""
    rng = np.random.default_rng(seed)
    drawn = torch.from_numpy(rng.integers(len(values), size=(2_000, len(values))))
    counts = torch.stack([torch.bincount(row, minlength=len(values)) for row in drawn]).double()  # (2000, prompts)
    resampled = function((counts @ values.flatten(1)).view(-1, *values.shape[1:]) / len(values))
    low, high = np.nanquantile(resampled.numpy(), [0.025, 0.975])
    return {"value": float(function(values.mean(dim=0)[None])[0]), "low": float(low), "high": float(high)}


def describe_lengths(lengths: Sequence[torch.Tensor]) -> dict[str, Any]:
    """
    Distribution of lengths, of all completions and within prompts.

    Args:
        lengths (`Sequence[torch.Tensor]`):
            Of each prompt's completions, shape `(M,)`.

    Returns:
        `dict[str, Any]`: Quantiles; the medians over prompts of the ratio of the 95 % to the 5 % quantile, and of the
        longest to the shortest completion.
    """
    every = torch.cat(list(lengths))
    spread = torch.stack([each.quantile(0.95) / each.quantile(0.05) for each in lengths])
    extremes = torch.stack([each.max() / each.min() for each in lengths])
    return {
        "quantiles": {f"{share:g}": every.quantile(share).item() for share in QUANTILES},
        "within_prompts": {"q95_over_q05": spread.median().item(), "longest_over_shortest": extremes.median().item()},
    }


def by_length(lengths: torch.Tensor, rewards: torch.Tensor, squared_norms: torch.Tensor) -> list[dict[str, Any]]:
    """
    Pass@1 and mean squared norms of right and of wrong completions (`None` if there are none) in ranges of length.

    The ranges have equal shares of all completions; fewer where many completions have the same length.
    """
    bounds = lengths.quantile(torch.linspace(0, 1, LENGTH_RANGES + 1, dtype=lengths.dtype))
    places, right, rows = torch.bucketize(lengths, bounds[1:-1]), rewards == 1, []
    for place in range(LENGTH_RANGES):
        inside = places == place
        if not inside.any():
            continue
        rows.append(
            {
                "shortest": lengths[inside].min().item(),
                "longest": lengths[inside].max().item(),
                "completions": int(inside.sum()),
                "pass@1": right[inside].double().mean().item(),
                "squared_norm": {
                    "right": _mean(squared_norms[inside & right]),
                    "wrong": _mean(squared_norms[inside & ~right]),
                },
            }
        )
    return rows


def _mean(values: torch.Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def profile(tokens: Sequence[torch.Tensor]) -> list[dict[str, float]]:
    """Mean uncertainty `(1 - pi(y_t))^2` of tokens in ranges of positions; `tokens` are (C,), one per completion."""
    found = []
    for start, end in itertools.pairwise(POSITIONS):
        inside = torch.cat([each[start:end] for each in tokens])
        if len(inside):
            found.append({"from": start, "to": end, "tokens": len(inside), "uncertainty": inside.mean().item()})
    return found


def within_groups(weights: Sequence[torch.Tensor], squared_norms: Sequence[torch.Tensor]) -> dict[str, Any]:
    """
    Relation of the squared gradient norm to a weight within prompts, pooled: means of each prompt are removed.

    Args:
        weights, squared_norms (`Sequence[torch.Tensor]`):
            Of each prompt's completions, shape `(M,)`.

    Returns:
        `dict[str, Any]`: Correlation, and correlation and slope of the logarithms, each with its interval over prompts.
    """

    def moments(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = x - x.mean(), y - y.mean()
        return torch.stack([x * x, y * y, x * y]).mean(dim=1)

    def correlation(mean: torch.Tensor) -> torch.Tensor:
        return mean[:, 2] / (mean[:, 0] * mean[:, 1]).sqrt()

    def slope(mean: torch.Tensor) -> torch.Tensor:
        return mean[:, 2] / mean[:, 0]

    pairs = list(zip(weights, squared_norms, strict=True))
    plain = torch.stack([moments(x, y) for x, y in pairs])
    logs = torch.stack([moments(x.clamp(min=1e-12).log(), y.clamp(min=1e-12).log()) for x, y in pairs])
    return {
        "correlation": estimate(correlation, plain),
        "log_log_correlation": estimate(correlation, logs),
        "log_log_slope": estimate(slope, logs),
    }
