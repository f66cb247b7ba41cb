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
FRACTIONS = ("fraction", "_ratio", "_share", "_frequency", "frac_reward_zero_std")  # how names of fractions end
PHASES = "time/"
RATES = "tokens_per_second/"
HELD_OUT = "eval_"


class Line(NamedTuple):
    """A metric in a chart: its name in the legend, and the name of its colour."""

    metric: str
    label: str
    color: str


class Chart(NamedTuple):
    """One chart. The values of a stacked one add up; those of a fraction are between 0 and 1."""

    title: str
    unit: str
    lines: list[Line]
    stacked: bool = False
    fraction: bool = False


class Section(NamedTuple):
    """Charts under a heading, and the metrics that are not drawn because they have one value throughout."""

    title: str
    charts: list[Chart]
    constant: list[str]


def arrange(metrics: Mapping[str, Series]) -> list[Section]:
    """
    Arrange metrics in charts, a held-out metric with the training metric. A metric that never changes is in no chart.

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
        _section("Metrics", [_pair(name, metrics) for name in first], metrics),
        _section("Time per phase", phases, metrics),
        _section("All other metrics", [_pair(name, metrics) for name in others], metrics),
    ]
    return [section for section in sections if section.charts or section.constant]


def absent(metrics: Mapping[str, Series]) -> list[str]:
    """Metrics to look at first that every trainer logs and that this run has no value of."""
    own = [name for name in FIRST if not name.startswith("opo/")]
    informative = metrics.get("opo/informative_fraction")
    untrained = informative is not None and not any(informative.values)
    why = {"entropy": " (an average over trained tokens, of which there were none)"} if untrained else {}
    return [name + why.get(name, "") for name in own if metrics and name not in metrics]


def _section(title: str, charts: Sequence[Chart], metrics: Mapping[str, Series]) -> Section:
    """Take what never changes out of the charts: a chart of constants, and a phase that takes no time."""

    def is_constant(line: Line) -> bool:
        return len(set(metrics[line.metric].values)) == 1

    drawn, constant = [], []
    for chart in charts:
        dropped = [
            line for line in chart.lines if is_constant(line) and not (chart.stacked and metrics[line.metric].values[0])
        ]
        kept = [line for line in chart.lines if line not in dropped]
        lines = kept if chart.stacked or not kept else chart.lines
        constant += [line.metric for line in chart.lines if line not in lines or not kept]
        if kept:
            drawn.append(chart._replace(lines=lines))
    return Section(title, drawn, constant)


def _pair(name: str, metrics: Mapping[str, Series]) -> Chart:
    lines = [Line(name, "training", "training")] if name in metrics else []
    if HELD_OUT + name in metrics:
        lines.append(Line(HELD_OUT + name, "held-out", "held-out"))
    title = name if name in metrics else HELD_OUT + name
    values = [value for line in lines for value in metrics[line.metric].values]
    fraction = name.endswith(FRACTIONS) and min(values) >= 0 and max(values) <= 1
    return Chart(title, FIRST.get(name, ""), lines, fraction=fraction)


def _chart(title: str, unit: str, names: Sequence[str], prefix: str, stacked: bool = False) -> Chart:
    lines = [Line(name, name.removeprefix(prefix), name.removeprefix(prefix)) for name in names]
    return Chart(title, unit, lines, stacked)
