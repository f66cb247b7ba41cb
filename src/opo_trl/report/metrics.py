"""The curves of a run, from the log of its trainer."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from .groups import finite

# Logged once, at the end of training or of an evaluation, or no measurement.
NOT_CURVES = {
    "step", "epoch", "total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second",
}  # fmt: skip


class Series(NamedTuple):
    """The values of one metric, with the optimizer steps at which they were logged."""

    steps: list[int]
    values: list[float]


def metric_series(log: Iterable[dict[str, Any]]) -> dict[str, Series]:
    """
    Collect the metrics of a log.

    Args:
        log (`Iterable[dict[str, Any]]`):
            `log_history` of a trainer.

    Returns:
        `dict[str, Series]`: Each metric that has a finite number, in the order of its first one. An entry where a
        metric is missing or None has no point.
    """
    found: dict[str, Series] = {}
    for entry in log:
        for name, logged in entry.items():
            value = None if name in NOT_CURVES or isinstance(logged, bool | list | dict) else finite(logged)
            if value is not None and "step" in entry:
                steps, values = found.setdefault(name, Series([], []))
                steps.append(entry["step"])
                values.append(value)
    return found


def first_quarter(values: list[float]) -> float:
    """Mean of the first quarter of some values, at least one."""
    part = values[: max(1, len(values) // 4)]
    return sum(part) / len(part)


def last_quarter(values: list[float]) -> float:
    """Mean of the last quarter of some values, at least one."""
    part = last_part(values)
    return sum(part) / len(part)


def last_part(values: list[float]) -> list[float]:
    """The last quarter of some values, at least one."""
    return values[-max(1, len(values) // 4) :]
