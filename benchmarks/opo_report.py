"""The tables and the figure of docs/opo_vs_grpo.md, from the results of opo_vs_grpo.py."""

import statistics
from pathlib import Path
from typing import Any

import torch

from measuring import markdown_table

TITLES = {
    "opo": "OPO",
    "opo_mean": "OPO's loop, mean baseline",
    "grpo": "GRPO, on-policy",
    "grpo_no_std": "GRPO, on-policy, no std",
    "grpo_off": "GRPO, off-policy",
    "opo_uncertainty": "OPO, uncertainty",
}

PARTS = ("over_seeds", "difference_to_opo")
PERCENT = {"pass@1", "pass@8", "rep-5", "self-bleu", "truncated", "gradient_clipped", "ratio_clipped", "reward"}
COLUMNS = {
    "reward": "training reward, last 20 (%)",
    "pass@1": "pass@1 (%)",
    "pass@8": "pass@8 (%)",
    "length": "length",
    "entropy": "entropy",
    "kl_plain": "KL",
    "rep-5": "Rep-5 (%)",
    "self-bleu": "Self-BLEU (%)",
    "grad_norm": "gradient norm",
    "gradient_clipped": "norm clipped (%)",
    "ratio_clipped": "ratio clipped (%)",
}


def page_tables(report: dict[str, Any]) -> dict[str, str]:
    """Every table of results on the page, as Markdown."""
    variants = report["variants"]
    rates = sorted({float(rate) for found in variants.values() for rate in found["sweep"]})
    sweep = []
    for variant, found in variants.items():
        scores = [", ".join(f"{100 * score:.1f}" for score in found["sweep"].get(f"{rate:g}", [])) for rate in rates]
        chosen = rates.index(found["learning_rate"])
        sweep.append([TITLES[variant], *(f"**{each}**" if i == chosen else each for i, each in enumerate(scores))])
    alone = [
        [rate, TITLES[variant], *(_cell(name, found, part) for name in ("pass@1", "pass@8") for part in PARTS),
         *(_cell(name, found, "over_seeds") for name in ("entropy", "kl_plain"))]
        for rate, of_rate in report["baselines_at_equal_rates"].items()
        for variant, found in of_rate.items()
    ]  # fmt: skip
    heads = [
        "rate",
        "baseline",
        "pass@1 (%)",
        "difference to OPO's",
        "pass@8 (%)",
        "difference to OPO's",
        "entropy",
        "KL",
    ]
    return {
        **{part: _results(variants, part) for part in PARTS},
        "alone": markdown_table(heads, alone),
        "sweep": markdown_table(["variant", *(f"{rate:g}" for rate in rates)], sweep),
    }


def _results(variants: dict[str, Any], part: str) -> str:
    rows = [
        [TITLES[variant], f"{found['learning_rate']:g}", *(_cell(name, found, part) for name in COLUMNS)]
        for variant, found in variants.items()
        if part in found
    ]
    return markdown_table(["variant", "learning rate", *COLUMNS.values()], rows)


def _cell(name: str, found: dict[str, Any], part: str) -> str:
    """A mean with its interval, or an empty cell; a difference is bold where the interval excludes 0."""
    if part not in found:
        return ""
    estimate, scale = found[part][name], 100 if name in PERCENT else 1
    digits, sign = 1 if scale == 100 or name == "length" else 3, "+" if part == "difference_to_opo" else ""
    mean, low, high = (f"{scale * estimate[end]:{sign}.{digits}f}" for end in ("mean", "low", "high"))
    outside = sign and (estimate["low"] > 0 or estimate["high"] < 0)
    return f"{f'**{mean}**' if outside else mean} ({low} to {high})"


COLORS = {
    "opo": "#1f5c99",
    "opo_mean": "#4a8c3f",
    "grpo": "#b3441e",
    "grpo_no_std": "#c79a2b",
    "grpo_off": "#7a4f9e",
    "opo_uncertainty": "#1aa0a0",
}


def plot(variants: dict[str, Any], path: Path) -> None:
    """Training curves, the sweep, and the final metrics with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(15, 6.2), layout="constrained")
    for variant, found in variants.items():
        for axis, name in zip(axes[0], ("reward", "length"), strict=False):
            curve = torch.tensor(found["curves"][name])
            smooth = curve.unfold(0, 10, 1).mean(dim=1)
            axis.plot(range(5, 5 + len(smooth)), smooth, color=COLORS[variant], label=TITLES[variant], lw=1.4)
        rates = [float(rate) for rate in found["sweep"]]
        scores = [statistics.fmean(each) for each in found["sweep"].values()]
        axes[0][2].plot(rates, scores, color=COLORS[variant], marker="o", ms=3, lw=1.2)
        axes[0][2].plot(found["learning_rate"], max(scores), color=COLORS[variant], marker="*", ms=11)
    axes[0][0].set_title("training reward (mean of 10 batches)", fontsize=10, loc="left")
    axes[0][1].set_title("completion length in training (tokens)", fontsize=10, loc="left")
    axes[0][2].set_title("validation pass@1 by learning rate", fontsize=10, loc="left")
    axes[0][2].set_xscale("log")
    for axis in axes[0][:2]:
        axis.set_xlabel("rollout batch")
    axes[0][0].legend(fontsize=7)
    panels = ["pass@1", "pass@8", "length", "entropy", "kl_plain"]
    for axis, name in zip([axes[0][3], *axes[1]], panels, strict=True):
        for place, (variant, found) in enumerate(variants.items()):
            each, scale = found["over_seeds"][name], (100 if name in PERCENT else 1)
            error = [[scale * (each["mean"] - each["low"])], [scale * (each["high"] - each["mean"])]]
            axis.errorbar(scale * each["mean"], -place, xerr=error, fmt="o", capsize=3, color=COLORS[variant])
            seeds = [scale * value for value in found["each_seed"][name]]
            axis.plot(seeds, [-place - 0.25] * len(seeds), "|", color=COLORS[variant], alpha=0.5)
        axis.set_yticks([-i for i in range(len(variants))], [TITLES[variant] for variant in variants], fontsize=7)
        axis.set_title(f"test {COLUMNS[name]}", fontsize=10, loc="left")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
