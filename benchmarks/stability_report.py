"""The bands, tables and figure of the stability page, from the results of stability_map.py."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from figures import COLORS, GREY, figure
from measuring import markdown_table

TITLES = {
    "opo-1": "OPO, 1 step",
    "grpo-1": "GRPO, 1 step",
    "grpo-2": "GRPO, 2 steps",
    "grpo-4": "GRPO, 4 steps",
    "grpo-8": "GRPO, 8 steps",
    "grpo_no_std-1": "GRPO without std, 1 step",
    "grpo_fresh-4": "GRPO, 4 steps, fresh batches",
}
FROM_METRICS = ("pass@8", "entropy", "kl_plain", "length", "truncated")
BLOCK = 10  # rollout batches per point of the curves in the result file


def band(curve: Mapping[float, float], threshold: float) -> dict[str, Any]:
    """
    The longest run of neighbouring rates that reach the threshold; of two equally long ones the lower.

    Args:
        curve (`Mapping[float, float]`):
            Pass@1 by learning rate.
        threshold (`float`):
            Pass@1 from which a rate works.

    Returns:
        `dict`: `rates` of the band; its interpolated edges `low` and `high`, `None` without a band; `low_open` and
        `high_open`, whether the curve ends inside the band; `width`, the ratio of the edges, 1 without a band.
    """
    rates = sorted(curve)
    runs = [list(run) for works, run in groupby(rates, lambda rate: curve[rate] >= threshold) if works]
    if not runs:
        return {"rates": [], "low": None, "high": None, "low_open": False, "high_open": False, "width": 1.0}
    inside = max(runs, key=len)
    first, last = rates.index(inside[0]), rates.index(inside[-1])
    low = _crossing(curve, rates[first - 1], inside[0], threshold) if first else inside[0]
    high = _crossing(curve, rates[last + 1], inside[-1], threshold) if last + 1 < len(rates) else inside[-1]
    return {
        "rates": inside,
        "low": low,
        "high": high,
        "low_open": first == 0,
        "high_open": last + 1 == len(rates),
        "width": high / low,
    }


def _crossing(curve: Mapping[float, float], outside: float, inside: float, threshold: float) -> float:
    """Rate at which pass@1 crosses the threshold, linear in pass@1 and in the logarithm of the rate."""
    share = (threshold - curve[outside]) / (curve[inside] - curve[outside])
    return math.exp((1 - share) * math.log(outside) + share * math.log(inside))


def summarize_cell(
    runs: Sequence[Mapping[str, Any]], scores: Sequence[float], collapsed_below: float
) -> dict[str, Any]:
    """The entry of one cell in the result file: a value per seed, and curves averaged over seeds."""
    pairs = list(zip(runs, scores, strict=True))
    return {
        "pass@1": list(scores),
        "collapsed": ["broke_down" in run or score < collapsed_below for run, score in pairs],
        "broke_down": [run.get("broke_down") for run in runs],
        **{name: [run["metrics"][name] if "metrics" in run else None for run in runs] for name in FROM_METRICS},
        "training": {
            "grad_norm": [_mean(run["curves"]["grad_norm"]) for run in runs],
            "ratio_clipped": [_mean(run["curves"]["ratio_clipped"]) for run in runs],
            "lowest_entropy": [min(_known(run["curves"]["entropy"]), default=None) for run in runs],
        },
        "curves": {name: block_means([run["curves"][name] for run in runs]) for name in ("reward", "entropy")},
    }


def block_means(curves: Sequence[Sequence[float | None]], block: int = BLOCK) -> list[float | None]:
    """Mean over seeds and over `block` rollout batches; `None` values are ignored."""
    length = max(len(curve) for curve in curves)
    means = [_mean([v for curve in curves for v in curve[at : at + block]]) for at in range(0, length, block)]
    return [None if mean is None else round(mean, 4) for mean in means]


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None


def summarize_row(cells: Mapping[float, Mapping[str, Any]], threshold: float) -> dict[str, Any]:
    """Band of a row, for the mean over seeds and for each seed, and the highest rate without a collapse."""
    means = {rate: statistics.fmean(cell["pass@1"]) for rate, cell in cells.items()}
    seeds = len(next(iter(cells.values()))["pass@1"])
    best = max(means, key=lambda rate: (means[rate], -rate))
    unharmed = []
    for rate in sorted(cells):
        if any(cells[rate]["collapsed"]):
            break
        unharmed.append(rate)
    return {
        "band": band(means, threshold),
        "band_each_seed": [
            band({rate: cell["pass@1"][seed] for rate, cell in cells.items()}, threshold) for seed in range(seeds)
        ],
        "best_rate": best,
        "best_pass@1": means[best],
        "highest_rate_without_collapse": max(unharmed, default=None),
        "collapsed_runs": sum(sum(cell["collapsed"]) for cell in cells.values()),
        "runs": seeds * len(cells),
        "cells": {f"{rate:g}": cells[rate] for rate in sorted(cells)},
    }


def page_tables(report: Mapping[str, Any]) -> dict[str, str]:
    """Every table of results on the page, as Markdown."""
    rows = report["rows"]
    rates = sorted({float(rate) for row in rows.values() for rate in row["cells"]})
    heads = ["", *(_rate(rate) for rate in rates)]

    def by_rate(cell_text: Any) -> str:
        lines = [
            [TITLES[name], *(cell_text(row["cells"][f"{r:g}"]) if f"{r:g}" in row["cells"] else "" for r in rates)]
            for name, row in rows.items()
        ]
        return markdown_table(heads, lines)

    return {
        "bands": _bands(rows),
        "pass@1": by_rate(_accuracy),
        "entropy": by_rate(lambda cell: _number(_mean(cell["entropy"]), 3)),
        "kl": by_rate(lambda cell: _number(_mean(cell["kl_plain"]), 3)),
        "ratio_clipped": by_rate(lambda cell: _number(_mean(cell["training"]["ratio_clipped"]), 2, 100)),
    }


def _bands(rows: Mapping[str, Any]) -> str:
    heads = [
        "", "rates that work", "band", "width", "width, each seed", "best pass@1 (%)", "at rate",
        "highest rate without a collapsed run", "collapsed runs",
    ]  # fmt: skip
    lines = []
    for name, row in rows.items():
        found, unharmed = row["band"], row["highest_rate_without_collapse"]
        lines.append(
            [
                TITLES[name],
                ", ".join(_rate(rate) for rate in found["rates"]) or "none",
                f"{_edge(found, 'low')} to {_edge(found, 'high')}" if found["rates"] else "none",
                _width(found),
                ", ".join(_width(each) for each in row["band_each_seed"]),
                f"{100 * row['best_pass@1']:.1f}",
                _rate(row["best_rate"]),
                "none" if unharmed is None else _rate(unharmed),
                f"{row['collapsed_runs']} of {row['runs']}",
            ]
        )
    return markdown_table(heads, lines)


def _edge(found: Mapping[str, Any], side: str) -> str:
    bound = {"low": "≤ ", "high": "≥ "}[side] if found[f"{side}_open"] else ""
    return bound + _rate(found[side], digits=1)


def _rate(rate: float, digits: int = 0) -> str:
    return f"{rate:.{digits}e}".replace("e-0", "e-")


def _width(found: Mapping[str, Any]) -> str:
    if not found["rates"]:
        return "none"
    return f"{'≥ ' if found['low_open'] or found['high_open'] else ''}{found['width']:.1f}x"


def _accuracy(cell: Mapping[str, Any]) -> str:
    """Mean with the lowest and highest seed, and the number of collapsed runs."""
    mean, low, high = (100 * of(cell["pass@1"]) for of in (statistics.fmean, min, max))
    fallen = sum(cell["collapsed"])
    return f"{mean:.1f} ({low:.1f} to {high:.1f})" + (f", {fallen} collapsed" if fallen else "")


def _number(value: float | None, digits: int, scale: float = 1) -> str:
    return "" if value is None else f"{scale * value:.{digits}f}"


STYLES: dict[str, dict[str, Any]] = {
    "opo-1": {"color": COLORS["opo"], "marker": "o", "lw": 2.4, "zorder": 4},
    "grpo-1": {"color": COLORS["grpo"], "marker": "s"},
    "grpo-2": {"color": COLORS["grpo_2_steps"], "marker": "^"},
    "grpo-4": {"color": COLORS["grpo_4_steps"], "marker": "D"},
    "grpo-8": {"color": COLORS["grpo_8_steps"], "marker": "v"},
    "grpo_no_std-1": {"color": COLORS["grpo_no_std"], "marker": "P", "ls": "--"},
    "grpo_fresh-4": {"color": COLORS["grpo_fresh"], "marker": "X", "ls": "--"},
}


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Final pass@1 by learning rate with the spread over seeds and collapsed runs, and the entropy at the end."""
    from matplotlib.lines import Line2D

    with figure(path, height=7.6) as drawn:
        upper, lower = drawn.subplots(2, 1, sharex=True)
        for place, (name, row) in enumerate(report["rows"].items()):
            # shifted sideways, so that the error bars of the rows do not overlap
            x = [float(rate) * 1.025 ** (place - (len(report["rows"]) - 1) / 2) for rate in row["cells"]]
            style = {"ms": 5, "lw": 1.6, "capsize": 2, "elinewidth": 1, "label": TITLES[name], **STYLES[name]}
            upper.errorbar(x, *_means_and_spread(row, "pass@1", 100), **style)
            lower.errorbar(x, *_means_and_spread(row, "entropy", 1), **style)
            for at, cell in zip(x, row["cells"].values(), strict=True):
                fallen = [100 * score for score, lost in zip(cell["pass@1"], cell["collapsed"], strict=True) if lost]
                upper.plot([at] * len(fallen), fallen, "x", color="black", ms=5, mew=1.1, zorder=5)
        grey = {"color": GREY, "lw": 1}
        upper.axhline(100 * report["threshold"], ls="--", **grey)
        upper.axhline(100 * report["start"]["pass@1"], ls=":", **grey)
        lower.axhline(report["start"]["entropy"], ls=":", **grey)
        rates = sorted({float(rate) for row in report["rows"].values() for rate in row["cells"]})
        lower.set(xscale="log", xlabel="learning rate", ylabel="entropy at the end (nats per token)")
        lower.set_xticks(rates, [_rate(rate) for rate in rates])
        lower.minorticks_off()
        upper.set(ylabel="final pass@1, held-out problems (%)")
        lines = [
            *upper.get_legend_handles_labels()[0],
            Line2D([], [], ls="--", label="works: 90 % of the best cell", **grey),
            Line2D([], [], ls=":", label="starting policy", **grey),
            Line2D([], [], ls="", color="black", marker="x", label="collapsed run"),
        ]
        drawn.legend(handles=lines, loc="outside upper center", ncols=3)


def _means_and_spread(row: Mapping[str, Any], metric: str, scale: float) -> tuple[list[float], list[list[float]]]:
    """Mean over seeds by rate, and the distances of the lowest and the highest seed from it."""
    known = [[scale * value for value in _known(cell[metric])] or [math.nan] for cell in row["cells"].values()]
    means = [statistics.fmean(values) for values in known]
    pairs = list(zip(means, known, strict=True))
    # The mean of equal values may differ from them by a rounding error, hence max(..., 0.0).
    below = [max(mean - min(values), 0.0) for mean, values in pairs]
    return means, [below, [max(max(values) - mean, 0.0) for mean, values in pairs]]
