"""
Style of the figures, with one colour per variant in all of them, and the command that draws those of the pages again.

    python benchmarks/figures.py    # from the committed results, into benchmarks/results and docs/images
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import RESULTS

IMAGES = RESULTS.parents[1] / "docs" / "images"
WIDTH = 7.5  # inches; a page shows a figure at about 100 pixels per inch

# OPO is blue, GRPO orange and darker with more optimizer steps per rollout batch. They also differ in lightness.
COLORS = {
    "opo": "#1f6fb4", "opo_mean": "#3f9a54", "opo_uncertainty": "#8e5aa8",
    "opo_refill": "#4aa3dd", "opo_choose": "#12908e", "opo_both": "#0b3c6f",
    "grpo": "#e8833a", "grpo_2_steps": "#c2500c", "grpo_4_steps": "#963c06", "grpo_8_steps": "#5c2503",
    "grpo_no_std": "#b8901a", "grpo_fresh": "#6b7280",
}  # fmt: skip
GREY, BLACK = "#777777", "#222222"
STYLE = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.labelsize": 9, "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.frameon": False, "lines.linewidth": 1.5,
    "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "figure.constrained_layout.use": True, "savefig.dpi": 200,
}  # fmt: skip


@contextmanager
def figure(path: Path, height: float) -> Iterator[Any]:
    """A new figure of the pages' width, which is written to the file at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        drawn = plt.figure(figsize=(WIDTH, height))
        yield drawn
        drawn.savefig(path)
        plt.close(drawn)


def main() -> None:
    import opo_report
    import stability_report
    import time_report
    import update_phase
    import variance_report
    from opo_trl.scripts.reporting import plot_curves

    def result(name: str) -> Any:
        return json.loads((RESULTS / f"{name}.json").read_text())

    for path in RESULTS.glob("opo_vs_grpo*.json"):
        opo_report.plot(result(path.stem)["variants"], path.with_suffix(".png"))
    of_tiny = result("gradient_variance")["policies"]
    variance_report.plot(of_tiny, RESULTS / "gradient_variance.png")
    on_long_chains = result("gradient_variance-long_chains")["policies"]
    variance_report.plot(on_long_chains, RESULTS / "gradient_variance-long_chains.png")
    of_smollm2 = result("gradient_variance-smollm2")["policies"]
    variance_report.plot(of_smollm2, RESULTS / "gradient_variance-smollm2.png")
    compared = {"tiny policy": of_tiny, "long chains": on_long_chains, "SmolLM2-135M": of_smollm2}
    variance_report.plot_comparison(compared, RESULTS / "which_baseline.png")
    stability_report.plot(result("stability_map"), RESULTS / "stability_map.png")
    time_report.plot(result("time_to_accuracy"), RESULTS / "time_to_accuracy.png")
    update_phase.plot(result("update_phase")["cases"], RESULTS / "update_phase.png")
    for path in RESULTS.glob("*.png"):
        shutil.copy(path, IMAGES)
    evaluated = {name: each["test"]["pass@1"] for name, each in result("smollm2_evaluation")["models"].items()}
    first, last = (
        {"pass@1": evaluated[name]["mean"], "interval": (evaluated[name]["low"], evaluated[name]["high"])}
        for name in ("smollm2", "smollm2-opo")
    )
    plot_curves(IMAGES / "smollm2_training.png", result("smollm2_training_log"), first, last)
    summary = result("quickstart")
    before, after = (
        {"pass@1": summary[f"pass@1_{when}"], "interval": summary[f"pass@1_{when}_interval"]}
        for when in ("before", "after")
    )
    plot_curves(IMAGES / "quickstart.png", result("quickstart_log"), before, after)


if __name__ == "__main__":
    main()
