"""The tables and the figure of docs/variance.md and long_chains.md, from the results of gradient_variance.py."""

from pathlib import Path
from typing import Any

import torch

import figures
from measuring import markdown_table

WEIGHTS = {
    "lengths": "length",
    "logit_norms": "logit norm",
    "uncertainties": "uncertainty",
    "surprises": "1 - pi",
}

COMPARED_K = "8"  # of the tables and the figure with one group size
WITHIN = ("correlation", "log_log_correlation", "log_log_slope")


def page_tables(policies: dict[str, Any]) -> dict[str, str]:
    """Every table of the page, as Markdown."""
    by_size = [
        (policy, size, found) for policy, each in policies.items() for size, found in each["group_sizes"].items()
    ]
    ratios = ("over_group_mean", "over_group_mean_at_equal_scale", "over_exact", "over_optimum")
    opo = [[policy, size, *(_cell(found["OPO"][ratio]) for ratio in ratios)] for policy, size, found in by_size]
    norms = [
        [
            policy,
            f"{each['pass@1']:.2f}",
            *(f"{each['mean_length'][kind]:.1f}" for kind in ("right", "wrong")),
            *(f"{each['mean_squared_norm'][kind]:,.0f}" for kind in ("right", "wrong")),
        ]
        for policy, each in policies.items()
    ]
    weights = [
        [
            name,
            *(
                _cell(each["squared_norm_and"][weight][measure])
                for each in policies.values()
                for measure in ("log_log_correlation", "log_log_slope")
            ),
        ]
        for weight, name in WEIGHTS.items()
    ]
    bias = [
        [
            policy,
            size,
            _cell(found["group mean"]["scale"]),
            *(_cell(found[name][part], 3 if part == "cosine" else 2)
              for name in ("OPO", "uncertainty") for part in ("scale", "cosine")),
        ]
        for policy, size, found in by_size
    ]  # fmt: skip
    heads = {
        "OPO": ["OPO / mean", "OPO / mean, at equal scale", "OPO / exact", "OPO / optimum"],
        "norms": ["pass@1", "length, right", "length, wrong", "squared norm, right", "squared norm, wrong"],
        "weights": [f"{policy}: {part}" for policy in policies for part in ("correlation", "slope")],
        "bias": ["mean: scale", "OPO: scale", "OPO: cosine", "uncertainty: scale", "uncertainty: cosine"],
    }
    return {
        "OPO": markdown_table(["policy", "K", *heads["OPO"]], opo),
        "baselines": _against_the_mean(policies, "over_group_mean_at_equal_scale"),
        "norms": markdown_table(["policy", *heads["norms"]], norms),
        "weights": markdown_table(["weight", *heads["weights"]], weights),
        "bias": markdown_table(["policy", "K", *heads["bias"]], bias),
    }


def _against_the_mean(policies: dict[str, Any], ratio: str) -> str:
    found = {policy: each["group_sizes"][COMPARED_K] for policy, each in policies.items()}
    names = next(iter(found.values()))
    rows = [[name, *(_cell(each[name][ratio]) for each in found.values())] for name in names]
    return markdown_table([f"baseline, K = {COMPARED_K}", *found], rows)


def length_tables(policies: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/long_chains.md that docs/variance.md does not have, as Markdown."""
    shares = ("0", "0.05", "0.25", "0.5", "0.75", "0.95", "1")
    lengths = [
        [
            policy,
            *(f"{each['lengths']['quantiles'][share]:.0f}" for share in shares),
            *(f"{each['lengths']['within_prompts'][name]:.1f}" for name in ("q95_over_q05", "longest_over_shortest")),
        ]
        for policy, each in policies.items()
    ]
    ranges = [
        [
            policy,
            f"{row['shortest']:.0f} to {row['longest']:.0f}",
            str(row["completions"]),
            f"{row['pass@1']:.2f}",
            *("" if norm is None else f"{norm:,.0f}" for norm in row["squared_norm"].values()),
        ]
        for policy, each in policies.items()
        for row in each["by_length"]
    ]
    positions = [
        [policy, f"{row['from']} to {row['to'] - 1}", f"{row['tokens']:,}", f"{row['uncertainty']:.3f}"]
        for policy, each in policies.items()
        for row in each["uncertainty_by_position"]
    ]
    within = [
        [policy, name, *(_cell(each["within_groups"][weight][part]) for part in WITHIN)]
        for policy, each in policies.items()
        for weight, name in WEIGHTS.items()
    ]
    quantiles = ["shortest", *(f"{100 * float(share):.0f} %" for share in shares[1:-1]), "longest"]
    return {
        "lengths": markdown_table(
            ["policy", *quantiles, "95 % / 5 % within a prompt", "longest / shortest within a prompt"], lengths
        ),
        "ranges": markdown_table(
            ["policy", "length", "completions", "pass@1", "squared norm, right", "squared norm, wrong"], ranges
        ),
        "variances": _against_the_mean(policies, "over_group_mean"),
        "positions": markdown_table(["policy", "position", "tokens", "uncertainty per token"], positions),
        "within": markdown_table(
            ["policy", "weight, within groups", "correlation", "correlation of logarithms", "log-log slope"], within
        ),
    }


def _cell(estimate: dict[str, float], digits: int = 2) -> str:
    value, low, high = (f"{estimate[part]:.{digits}f}" for part in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


OPO = figures.COLORS["opo"]
LINES = {
    "group mean": {"color": figures.COLORS["opo_mean"], "marker": "s"},
    "leave-one-out": {"color": figures.GREY, "marker": "v"},
    "OPO": {"color": OPO, "marker": "o", "lw": 2.2},
    "length^0.5": {"color": OPO, "marker": "o", "ls": "--", "alpha": 0.6},
    "length^2": {"color": OPO, "marker": "o", "ls": ":", "alpha": 0.6},
    "logit norm": {"color": figures.COLORS["opo_choose"], "marker": "^"},
    "uncertainty": {"color": figures.COLORS["opo_uncertainty"], "marker": "D"},
    "exact": {"color": figures.BLACK, "marker": "P"},
}


def plot(policies: dict[str, Any], path: Path) -> None:
    """Variance of every baseline relative to the optimum's for each K, a panel per policy."""
    with figures.figure(path, height=3.8) as drawn:
        axes = drawn.subplots(1, len(policies), sharey=True, squeeze=False)[0]
        for axis, (policy, summary) in zip(axes, policies.items(), strict=True):
            sizes = [int(size) for size in summary["group_sizes"]]
            for place, (name, style) in enumerate(LINES.items()):
                found = [summary["group_sizes"][str(size)][name]["over_optimum_at_equal_scale"] for size in sizes]
                error = [[e["value"] - e["low"] for e in found], [e["high"] - e["value"] for e in found]]
                # shifted sideways, so that the intervals do not overlap
                x = [size * 1.04 ** (place - len(LINES) / 2) for size in sizes]
                axis.errorbar(
                    x, [e["value"] for e in found], error, label=name, **{"ms": 3.5, "elinewidth": 0.8} | style
                )
            axis.axhline(1, color=figures.GREY, lw=1)
            axis.set(title=f"{policy} policy", xlabel="K, completions per prompt", xscale="log", yscale="log")
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
        axes[0].set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes[0].set_ylabel("variance relative to the optimum's")
        drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)


COMPARED = ("OPO", "uncertainty", "none", "exact")


def plot_comparison(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Variance at equal scale relative to the plain mean's on every policy that was measured, K = 8."""
    measured = {
        f"{task}, {policy}" if len(policies) > 1 else task: found["group_sizes"][COMPARED_K]
        for task, policies in results.items()
        for policy, found in policies.items()
    }
    styles = {**LINES, "none": {"color": figures.COLORS["grpo"], "marker": "X"}}
    with figures.figure(path, height=0.9 + 0.42 * len(measured)) as drawn:
        axis = drawn.subplots()
        for place, name in enumerate(COMPARED):
            found = [each[name]["over_group_mean_at_equal_scale"] for each in measured.values()]
            error = [[one["value"] - one["low"] for one in found], [one["high"] - one["value"] for one in found]]
            y = [-row - 0.17 * (place - (len(COMPARED) - 1) / 2) for row in range(len(measured))]
            style = {"ls": "", "ms": 5, "elinewidth": 1, "label": name, **styles[name], "lw": 0}
            axis.errorbar([one["value"] for one in found], y, xerr=error, **style)
        axis.axvline(1, color=figures.GREY, lw=1)
        axis.set(xscale="log", xlim=(0.1, 6), xlabel="variance relative to the group mean's, at equal scale (K = 8)")
        axis.set_xticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
        axis.minorticks_off()
        axis.set_yticks([-row for row in range(len(measured))], list(measured))
        axis.grid(axis="y", visible=False)
        drawn.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=len(COMPARED))


def plot_norms(policies: dict[str, Any], completions: dict[str, Any], path: Path) -> None:
    """Squared gradient norm of every completion by its length, a panel per policy."""
    with figures.figure(path, height=3.2) as drawn:
        axes = drawn.subplots(1, len(policies), sharey=True, squeeze=False)[0]
        for axis, (policy, summary) in zip(axes, policies.items(), strict=True):
            every, generator = completions[policy], torch.Generator().manual_seed(0)
            right = every.rewards == 1
            for label, mask, color in (("right", right, OPO), ("wrong", ~right, figures.COLORS["grpo_2_steps"])):
                chosen = torch.randperm(int(mask.sum()), generator=generator)[:3000]
                lengths = every.lengths[mask][chosen] + 0.7 * (torch.rand(len(chosen), generator=generator) - 0.5)
                norms = every.squared_norms[mask][chosen]
                axis.scatter(lengths, norms, s=3, alpha=0.25, color=color, label=label, lw=0)
            slope = summary["squared_norm_and"]["lengths"]["log_log_slope"]["value"]
            axis.set(title=f"{policy} policy, slope {slope:.2f}", xlabel="length (tokens)", yscale="log")
        axes[0].set_ylabel("squared gradient norm")
        drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, markerscale=4)
