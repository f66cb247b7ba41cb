"""The tables and the figure of docs/opo_vs_grpo.md, from the results of opo_vs_grpo.py."""

import statistics
from pathlib import Path
from typing import Any

import torch

import figures
from measuring import markdown_table

TITLES = {
    "opo": "OPO",
    "opo_mean": "OPO's loop, mean baseline",
    "grpo": "GRPO, on-policy",
    "grpo_no_std": "GRPO, on-policy, no std",
    "grpo_off": "GRPO, off-policy",
    "opo_uncertainty": "OPO, uncertainty",
    "grpo_off_4": "GRPO, off-policy, 4 steps",
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
    tables = {part: _results(variants, part) for part in PARTS}
    if report["baselines_at_equal_rates"]:
        tables["alone"] = _alone(report["baselines_at_equal_rates"])
    return {**tables, "sweep": markdown_table(["variant", *(f"{rate:g}" for rate in rates)], sweep)}


def _alone(baselines: dict[str, Any]) -> str:
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
    rows = [
        [rate, TITLES[variant], *(_cell(name, found, part) for name in ("pass@1", "pass@8") for part in PARTS),
         *(_cell(name, found, "over_seeds") for name in ("entropy", "kl_plain"))]
        for rate, of_rate in baselines.items()
        for variant, found in of_rate.items()
    ]  # fmt: skip
    return markdown_table(heads, rows)


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


COLOR_OF = {"grpo_off": "grpo_2_steps", "grpo_off_4": "grpo_4_steps"}


def plot(variants: dict[str, Any], path: Path) -> None:
    """Training curves, the sweep, and the final metrics with their intervals."""
    from matplotlib.lines import Line2D

    colors = {variant: figures.COLORS[COLOR_OF.get(variant, variant)] for variant in variants}
    with figures.figure(path, height=6.6) as drawn:
        above, below = drawn.subfigures(2, 1)
        curves, forests = above.subplots(1, 3), below.subplots(1, 4, sharey=True)
        selected = [found["learning_rate"] for found in variants.values()]
        for number, (variant, found) in enumerate(variants.items()):
            for axis, name in zip(curves, ("reward", "length"), strict=False):
                scale = 100 if name in PERCENT else 1
                smooth = scale * torch.tensor(found["curves"][name]).unfold(0, 10, 1).mean(dim=1)
                axis.plot(range(5, 5 + len(smooth)), smooth, color=colors[variant])
            rates = [float(rate) for rate in found["sweep"]]
            scores = [100 * statistics.fmean(each) for each in found["sweep"].values()]
            curves[2].plot(rates, scores, color=colors[variant], marker="o", ms=3)
            rate = found["learning_rate"]
            place = selected[:number].count(rate) - (selected.count(rate) - 1) / 2
            star = {"marker": "*", "ms": 11, "mec": "white", "mew": 0.6, "zorder": 4}
            curves[2].plot(
                1.25**place * rate, max(scores), color=colors[variant], **star
            )  # stars would hide each other
        curves[0].set(title="training reward (%)", xlabel="rollout batch")
        curves[1].set(title="length in training (tokens)", xlabel="rollout batch")
        curves[2].set(title="validation pass@1 (%)", xlabel="learning rate", xscale="log")
        swept = sorted({float(rate) for found in variants.values() for rate in found["sweep"]})
        curves[2].set_xticks(swept, [f"{rate:.0e}".replace("e-0", "e-") for rate in swept])
        curves[2].minorticks_off()
        titles = {"pass@1": "pass@1 (%)", "pass@8": "pass@8 (%)", "entropy": "entropy (nats)", "kl_plain": "KL (nats)"}
        for axis, (name, title) in zip(forests, titles.items(), strict=True):
            for place, (variant, found) in enumerate(variants.items()):
                each, scale = found["over_seeds"][name], (100 if name in PERCENT else 1)
                error = [[scale * (each["mean"] - each["low"])], [scale * (each["high"] - each["mean"])]]
                axis.errorbar(scale * each["mean"], -place, xerr=error, fmt="o", capsize=3, color=colors[variant])
                seeds = [scale * value for value in found["each_seed"][name]]
                axis.plot(seeds, [-place - 0.3] * len(seeds), "|", color=colors[variant], alpha=0.6)
            axis.set_title(f"test {title}")
            axis.locator_params(axis="x", nbins=3)
        forests[0].set_yticks([-place for place in range(len(variants))], [TITLES[variant] for variant in variants])
        lines = [
            *(Line2D([], [], color=color, label=TITLES[variant]) for variant, color in colors.items()),
            Line2D([], [], color=figures.GREY, ls="", marker="*", ms=11, label="selected learning rate"),
            Line2D([], [], color=figures.GREY, marker="o", label="mean and 95 % interval"),
            Line2D([], [], color=figures.GREY, ls="", marker="|", label="one seed"),
        ]
        drawn.legend(handles=lines, loc="outside upper center", ncols=3)
