"""Metrics over all micro-batches of a step, each a sum over tokens and their number. Pure torch."""

from collections.abc import Callable

import torch


class StepStatistics:
    """
    Gathers per-token values over the micro-batches of a step and reduces them once, over all ranks.

    Micro-batches hold different numbers of tokens, and ranks different numbers of rows: a mean per micro-batch,
    averaged afterwards, would be biased, and gathering row by row would not even have matching shapes. So a mean is one
    sum and one count over the step, and an extreme one number per rank. Every rank must add the same names.
    """

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}  # name -> (2,): sum and count
        self._maxima: dict[str, torch.Tensor] = {}  # name -> (); a minimum is the maximum of the negated values

    def add(self, reduction: str, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Add to the `"mean"`, `"max"` or `"min"` called `name`."""
        {"mean": self.add_mean, "max": self.add_max, "min": self.add_min}[reduction](name, values, mask)

    def add_mean(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the values (B, C) where `mask` (B, C) is not 0 to the mean `name`."""
        mask = mask.bool()
        self.add_ratio(name, torch.where(mask, values, 0).float().sum(), mask.sum())

    def add_ratio(self, name: str, numerator: torch.Tensor, denominator: torch.Tensor) -> None:
        """Add to the numerator and the denominator of the mean `name`; both are scalars."""
        total = torch.stack([numerator.float(), denominator.float()])
        self._totals[name] = self._totals[name] + total if name in self._totals else total

    def add_max(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the values (B, C) where `mask` (B, C) is not 0 to the maximum `name`."""
        largest = torch.where(mask.bool(), values, -torch.inf).amax().float()
        self._maxima[name] = torch.maximum(self._maxima[name], largest) if name in self._maxima else largest

    def add_min(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the values (B, C) where `mask` (B, C) is not 0 to the minimum `name`."""
        self.add_max(f"-{name}", -values, mask)

    def reduce(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """
        Return every metric over all ranks, NaN where no token was counted, and start anew.

        Args:
            gather (`Callable`):
                Concatenates a (1, M) tensor of every rank into (W, M): one collective for all metrics.
        """
        totals, maxima, self._totals, self._maxima = self._totals, self._maxima, {}, {}
        if not totals and not maxima:
            return {}
        local = torch.cat([*(totals[name] for name in totals), *(maxima[name].view(1) for name in maxima)])
        ranks = gather(local.unsqueeze(0)).cpu().double()  # (W, M)
        sums, largest = (
            ranks[:, : 2 * len(totals)].sum(dim=0).tolist(),
            ranks[:, 2 * len(totals) :].amax(dim=0).tolist(),
        )
        metrics = {
            name: total / count if count else float("nan")
            for name, total, count in zip(totals, sums[::2], sums[1::2], strict=True)
        }
        for name, value in zip(maxima, largest, strict=True):
            value = float("nan") if value == -float("inf") else value
            metrics[name.removeprefix("-")] = -value if name.startswith("-") else value
        return metrics
