"""Which metrics share a chart, and in what order the charts come."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .metrics import Series

# Metrics that are looked at first, with their unit.
FIRST = {
    "reward": "",
    "completions/mean_length": "tokens",
    "entropy": "nats per token",
    "grad_norm": "",
    "opo/informative_fraction": "",
    "frac_reward_zero_std": "",
    "completions/clipped_ratio": "",
    "opo/unscorable_fraction": "",
    "opo/baseline_minus_mean": "",
    "learning_rate": "",
}
PHASES = "time/"
RATES = "tokens_per_second/"
HELD_OUT = "eval_"


class Line(NamedTuple):
    """A metric in a chart: its name in the legend, and the name of its colour."""

    metric: str
    label: str
    color: str


class Chart(NamedTuple):
    """One chart. The values of a stacked one add up."""

    title: str
    unit: str
    lines: list[Line]
    stacked: bool = False


class Section(NamedTuple):
    """Charts under a heading."""

    title: str
    charts: list[Chart]


def arrange(metrics: Mapping[str, Series]) -> list[Section]:
    """
    Arrange metrics in charts: every metric is in one, a held-out one with the same of training.

    Args:
        metrics (`Mapping[str, Series]`):
            As [`metric_series`] returns them.

    Returns:
        `list[Section]` with the metrics to look at first, the time per phase, and all others. A section without charts
        is left out.
    """
    times = [name for name in metrics if name.startswith(PHASES)]
    rates = [name for name in metrics if name.startswith(RATES)]
    first = [name for name in FIRST if name in metrics or HELD_OUT + name in metrics]
    phases = [
        _chart("seconds per step, by phase", "s", times, PHASES, stacked=True),
        _chart("completion tokens per second", "tokens/s", rates, RATES),
    ]
    placed = {line.metric for name in first for line in _pair(name, metrics).lines} | {*times, *rates}
    others = dict.fromkeys(name.removeprefix(HELD_OUT) for name in metrics if name not in placed)
    sections = [
        Section("Metrics", [_pair(name, metrics) for name in first]),
        Section("Time per phase", [chart for chart in phases if chart.lines]),
        Section("All other metrics", [_pair(name, metrics) for name in others]),
    ]
    return [section for section in sections if section.charts]


def _pair(name: str, metrics: Mapping[str, Series]) -> Chart:
    lines = [Line(name, "training", "training")] if name in metrics else []
    if HELD_OUT + name in metrics:
        lines.append(Line(HELD_OUT + name, "held-out", "held-out"))
    title = name if name in metrics else HELD_OUT + name
    return Chart(title, FIRST.get(name, ""), lines)


def _chart(title: str, unit: str, names: Sequence[str], prefix: str, stacked: bool = False) -> Chart:
    lines = [Line(name, name.removeprefix(prefix), name.removeprefix(prefix)) for name in names]
    return Chart(title, unit, lines, stacked)
