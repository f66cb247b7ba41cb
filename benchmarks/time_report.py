"""The tables and the figure of the time to an accuracy, from what time_to_accuracy.py has measured."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import COLORS, GREY, figure
from measuring import crossing, interval, markdown_table

TITLES = {
    "grpo": "GRPO",
    "grpo_fresh": "GRPO, on-policy, no std",
    "opo": "OPO",
    "opo_refill": "OPO, refilling",
    "opo_choose": "OPO, choosing prompts",
    "opo_both": "OPO, both",
}
GRPO = ("grpo", "grpo_fresh")
AXES = {"seconds": "seconds", "cpu_seconds": "CPU seconds", "tokens": "generated tokens", "steps": "optimizer steps"}

Curve = Sequence[Mapping[str, float]]


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Centred mean of `width` neighbours, of those that there are at the ends."""
    reach = width // 2
    return [statistics.fmean(values[max(at - reach, 0) : at + reach + 1]) for at in range(len(values))]


def accuracies_of(curve: Curve, width: int) -> list[float]:
    """The smoothed accuracies of a run."""
    return smooth([point["pass@1"] for point in curve], width)


def crossings_of(curve: Curve, target: float, width: int) -> dict[str, float | None]:
    """What a run took to the target, on each axis."""
    accuracies = accuracies_of(curve, width)
    return {axis: crossing([point[axis] for point in curve], accuracies, target) for axis in AXES}


def target_accuracy(runs: Mapping[str, Sequence[Mapping[str, Any]]], share: float, width: int) -> float:
    """The starting accuracy plus a share of what the better GRPO variant gains."""
    curves = {variant: [accuracies_of(run["curve"], width) for run in runs[variant]] for variant in GRPO}
    start = statistics.fmean(run["curve"][0]["pass@1"] for variant in GRPO for run in runs[variant])
    end = max(statistics.fmean(curve[-1] for curve in of_variant) for of_variant in curves.values())
    return start + share * (end - start)


def geometric_interval(values: Sequence[float]) -> dict[str, float]:
    """Geometric mean over seeds with its 95 % interval by Student's t in the logarithm."""
    return {end: math.exp(value) for end, value in interval([math.log(value) for value in values]).items()}


def summarize(runs: Mapping[str, Sequence[Mapping[str, Any]]], shares: Sequence[float], width: int) -> dict[str, Any]:
    """
    What each variant takes to the targets, and how many times less that is than GRPO takes.

    Args:
        runs (`Mapping[str, Sequence[Mapping]]`):
            Variant -> its runs, one a seed, in the same order of seeds; each with a `curve`, or `broke_down`.
        shares (`Sequence[float]`):
            Shares of GRPO's gain that make the targets; the first is the main one.
        width (`int`):
            Measurements in a mean of the smoothed curve.
    """
    broken = {
        variant: [run["broke_down"] for run in of_variant if "broke_down" in run]
        for variant, of_variant in runs.items()
    }
    if any(broken.values()):
        raise RuntimeError(f"Runs broke down at the best learning rate of their variant: {broken}")
    targets = {}
    for share in shares:
        target = target_accuracy(runs, share, width)
        found = {
            variant: [crossings_of(run["curve"], target, width) for run in of_variant]
            for variant, of_variant in runs.items()
        }
        targets[f"{share:g}"] = {"accuracy": target, "variants": _compared(found, runs)}
    return {
        "targets": targets,
        "final": {variant: [run["metrics"]["pass@1"] for run in of_variant] for variant, of_variant in runs.items()},
        "uninformative": {
            variant: [
                statistics.fmean(points) for points in zip(*(run["uninformative"] for run in of_variant), strict=True)
            ]
            for variant, of_variant in runs.items()
        },
        "curves": {
            variant: _mean_curve([run["curve"] for run in of_variant], width) for variant, of_variant in runs.items()
        },
    }


def _compared(
    found: Mapping[str, Sequence[Mapping[str, float | None]]], runs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    variants: dict[str, Any] = {}
    # A GRPO run that does not get there counts with what it took until its end.
    reference = {
        variant: [_with_end(*pair) for pair in zip(found[variant], runs[variant], strict=True)] for variant in GRPO
    }
    for variant, of_variant in found.items():
        variants[variant] = {"reached": sum(each["steps"] is not None for each in of_variant), "axes": {}}
        for axis in AXES:
            values = [each[axis] for each in reference.get(variant, of_variant)]
            entry: dict[str, Any] = {"each_seed": values}
            if all(value for value in values):
                entry["over_seeds"] = geometric_interval(values)
                entry["times_less_than"] = {
                    grpo: geometric_interval([theirs[axis] / own for theirs, own in zip(each, values, strict=True)])
                    for grpo, each in reference.items()
                }
            variants[variant]["axes"][axis] = entry
    return variants


def _with_end(found: Mapping[str, float | None], run: Mapping[str, Any]) -> dict[str, float]:
    """What a run took to the target, or until its end."""
    return {axis: run["curve"][-1][axis] if value is None else value for axis, value in found.items()}


def _mean_curve(curves: Sequence[Curve], width: int) -> dict[str, list[float]]:
    smoothed = [accuracies_of(curve, width) for curve in curves]
    means = {axis: [statistics.fmean(p[axis] for p in points) for points in zip(*curves, strict=True)] for axis in AXES}
    return {**means, "pass@1": [statistics.fmean(points) for points in zip(*smoothed, strict=True)]}


def faster_grpo(variants: Mapping[str, Any], axis: str) -> str:
    """The GRPO variant that takes less on an axis."""
    return min(GRPO, key=lambda variant: variants[variant]["axes"][axis]["over_seeds"]["mean"])


def page_tables(report: Mapping[str, Any]) -> dict[str, str]:
    """Tables of every target: what each variant takes, and how many times less than GRPO."""
    tables = {}
    for share, target in report["targets"].items():
        variants = target["variants"]
        taken, times = [], []
        for variant, found in variants.items():
            seeds = len(found["axes"]["steps"]["each_seed"])
            title, reached = TITLES[variant], f"{found['reached']} of {seeds}"
            taken.append([title, reached, *(_cell(found["axes"][axis].get("over_seeds"), ",.0f") for axis in AXES)])
            if variant not in GRPO:
                ratios = [found["axes"][axis].get("times_less_than", {}) for axis in AXES]
                cells = [
                    _cell(ratio.get(faster_grpo(variants, axis)), ".2f")
                    for ratio, axis in zip(ratios, AXES, strict=True)
                ]
                times.append([title, *cells])
        heads = list(AXES.values())
        tables[f"taken at {share}"] = markdown_table(["variant", "runs that reach it", *heads], taken)
        tables[f"times less at {share}"] = markdown_table(
            ["variant", *(f"{head}, GRPO / variant" for head in heads)], times
        )
    return tables


def final_table(report: Mapping[str, Any]) -> str:
    """The learning rate of every variant, and its accuracy, time and uninformative groups at the end of training."""
    rows = []
    for variant, final in report["final"].items():
        curve, equal = report["curves"][variant], report["uninformative"][variant]
        rows.append([
            TITLES[variant], f"{report['sweeps'][variant]['best']:g}",
            _cell(interval([100 * each for each in final]), ".1f"),
            *(f"{curve[axis][-1]:,.0f}" for axis in ("seconds", "tokens", "steps")),
            f"{100 * statistics.fmean(equal):.0f} %",
        ])  # fmt: skip
    heads = ["variant", "learning rate", "pass@1 (%)", "seconds", "generated tokens", "optimizer steps",
             "groups with equal rewards"]  # fmt: skip
    return markdown_table(heads, rows)


def _cell(estimate: Mapping[str, float] | None, form: str) -> str:
    if estimate is None:
        return "not reached by all"
    return f"{estimate['mean']:{form}} ({estimate['low']:{form}} to {estimate['high']:{form}})"


COLOR_OF = {"grpo": "grpo_2_steps", "grpo_fresh": "grpo_no_std"}


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Held-out pass@1 by seconds, tokens and steps, with the main target, and the share of uninformative groups."""
    target = next(iter(report["targets"].values()))["accuracy"]
    with figure(path, height=5.6) as drawn:
        panels = drawn.subplots(2, 2).flatten()
        for variant, curve in report["curves"].items():
            color = COLORS[COLOR_OF.get(variant, variant)]
            for panel, axis in zip(panels, ("seconds", "tokens", "steps"), strict=False):
                scale = 1000 if axis == "tokens" else 1
                places = [place / scale for place in curve[axis]]
                panel.plot(places, curve["pass@1"], color=color, label=TITLES[variant])
            panels[3].plot(smooth(report["uninformative"][variant], 11), color=color)
        for panel, axis in zip(panels, ("seconds", "tokens", "steps"), strict=False):
            panel.axhline(target, color=GREY, lw=1, ls=":")
            panel.set(title="held-out pass@1", xlabel="thousand generated tokens" if axis == "tokens" else AXES[axis])
        panels[3].set(title="share of groups with equal rewards", xlabel="rollout batch")
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
