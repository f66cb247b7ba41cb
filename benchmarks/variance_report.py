"""The tables and the figure of docs/variance.md, from the results of gradient_variance.py."""

from pathlib import Path
from typing import Any

import torch

from measuring import markdown_table

WEIGHTS = {
    "lengths": "length",
    "logit_norms": "logit norm",
    "uncertainties": "uncertainty",
    "surprises": "1 - pi",
}


def page_tables(policies: dict[str, Any]) -> dict[str, str]:
    """Every table of the page, as Markdown."""
    by_size = [
        (policy, size, found) for policy, each in policies.items() for size, found in each["group_sizes"].items()
    ]
    ratios = ("over_group_mean", "over_group_mean_at_equal_scale", "over_exact", "over_optimum")
    opo = [[policy, size, *(_cell(found["OPO"][ratio]) for ratio in ratios)] for policy, size, found in by_size]
    last = [each["group_sizes"]["8"] for each in policies.values() if "8" in each["group_sizes"]]
    baselines = [
        [name, *(_cell(found[name]["over_group_mean_at_equal_scale"]) for found in last)] for name in last[0] if last
    ]
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
        "baselines": markdown_table(["baseline, K = 8", *policies], baselines),
        "norms": markdown_table(["policy", *heads["norms"]], norms),
        "weights": markdown_table(["weight", *heads["weights"]], weights),
        "bias": markdown_table(["policy", "K", *heads["bias"]], bias),
    }


def _cell(estimate: dict[str, float], digits: int = 2) -> str:
    value, low, high = (f"{estimate[part]:.{digits}f}" for part in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


COLORS = {
    "group mean": "#4a8c3f", "leave-one-out": "#5b6770", "OPO": "#1f5c99", "length^0.5": "#8fb6dd",
    "length^2": "#0c2f54", "logit norm": "#7a4f9e", "uncertainty": "#c79a2b", "exact": "#b3441e",
}  # fmt: skip


def plot(policies: dict[str, Any], completions: dict[str, Any], path: Path) -> None:
    """Variance relative to the optimum for each K, and squared gradient norms by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(policies), figsize=(4.6 * len(policies), 7), layout="constrained", squeeze=False, sharey="row"
    )
    for (upper, lower), (policy, summary) in zip(axes.T, policies.items(), strict=True):
        sizes = [int(size) for size in summary["group_sizes"]]
        for place, (name, color) in enumerate(COLORS.items()):
            found = [summary["group_sizes"][str(size)][name]["over_optimum_at_equal_scale"] for size in sizes]
            values = [each["value"] for each in found]
            error = [[e["value"] - e["low"] for e in found], [e["high"] - e["value"] for e in found]]
            x = [size * 1.03 ** (place - len(COLORS) / 2) for size in sizes]
            upper.errorbar(x, values, error, marker="o", ms=3, lw=1.2, capsize=2, label=name, color=color)
        upper.axhline(1, color="black", lw=0.8)
        upper.set_xlabel("K, completions per prompt")
        upper.set_yscale("log")
        upper.set_xscale("log", base=2)
        upper.xaxis.set_major_formatter("{x:g}")
        upper.set_title(f"{policy}: variance over the optimum's, at equal scale", fontsize=9, loc="left")
        every, generator = completions[policy], torch.Generator().manual_seed(0)
        for label, mask, color in (("right", every.rewards == 1, "#1f5c99"), ("wrong", every.rewards != 1, "#b3441e")):
            drawn = torch.randperm(int(mask.sum()), generator=generator)[:3000]
            lengths = every.lengths[mask][drawn] + 0.7 * (torch.rand(len(drawn), generator=generator) - 0.5)
            lower.scatter(lengths, every.squared_norms[mask][drawn], s=3, alpha=0.25, color=color, label=label, lw=0)
        lower.set_xlabel("length (tokens)")
        lower.set_yscale("log")
        slope = summary["squared_norm_and"]["lengths"]["log_log_slope"]["value"]
        lower.set_title(f"squared gradient norm by length, log-log slope {slope:.2f}", fontsize=9, loc="left")
    axes[0][-1].legend(fontsize=7, ncol=2, loc="upper right")
    axes[1][0].legend(fontsize=7, markerscale=4)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
