"""What a person wants to see of an evaluation: summary.json, a table in Markdown, plots."""

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..evaluation import paired_difference, summarize
from .reporting import commit

Metrics = dict[str, dict[str, float]]  # metric -> problem -> value

PERCENT = ("pass@", "maj@", "rep-", "self-bleu", "distinct-", "truncated")
TITLES = {
    "rep-5": "Rep-5",
    "self-bleu": "Self-BLEU",
    "distinct-2": "Distinct-2",
    "kl_plain": "KL (plain)",
    "kl_low_variance": "KL (low variance)",
}
COLORS = ("#1f5c99", "#b3441e", "#4a8c3f", "#7a4f9e", "#c79a2b", "#5b6770")


def write_report(
    output_dir: Path,
    methods: dict[str, dict[str, Metrics]],
    checkpoints: dict[str, dict[str, dict[str, Metrics]]],
    **run: Any,
) -> dict[str, Any]:
    """
    Write summary.json, table.md and, where matplotlib is installed, the plots.

    Args:
        output_dir (`Path`):
            Where they go.
        methods (`dict`):
            method -> dataset -> metrics; the first method is the one that others are compared with.
        checkpoints (`dict`):
            method -> checkpoint -> dataset -> metrics, of methods that are means of several checkpoints.
        **run:
            Facts of the run for the summary.

    Returns:
        `dict`: The summary.
    """
    reference, *others = methods
    sacrebleu = ["sacrebleu"] if find_spec("sacrebleu") else []  # one sample per problem needs none
    summary = {
        "models": {
            method: {task: summarize(found) for task, found in tasks.items()} for method, tasks in methods.items()
        },
        f"difference_to_{reference}": {
            method: {task: _differences(methods[method][task], found) for task, found in methods[reference].items()}
            for method in others
        },
        "checkpoints": {
            method: {one: {task: summarize(found) for task, found in tasks.items()} for one, tasks in each.items()}
            for method, each in checkpoints.items()
        },
        **run,
        "commit": commit(),
        "versions": {name: version(name) for name in ("opo-trl", "trl", "transformers", "torch", *sacrebleu)},
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    table = _tables(summary, reference)
    (output_dir / "table.md").write_text(table)
    print(table)
    names = "summary.json and table.md"
    if _draw(output_dir, summary):
        names = "summary.json, table.md and the plots"
    print(f"{names} are in {output_dir}", flush=True)
    return summary


def _differences(metrics: Metrics, reference: Metrics) -> dict[str, dict[str, float]]:
    return {
        name: paired_difference(list(values.values()), [reference[name][problem] for problem in values])._asdict()
        for name, values in metrics.items()
    }


def _tables(summary: dict[str, Any], reference: str) -> str:
    """One table of values and one of differences per dataset."""
    lines = []
    for task, size in summary["problems"].items():
        lines += [f"## {task}", "", f"{size} problems; 95 % bootstrap intervals over problems.", ""]
        lines += _table({method: tasks[task] for method, tasks in summary["models"].items()})
        differences = summary[f"difference_to_{reference}"]
        if differences:
            lines += [f"Difference to {reference}, paired by problem; bold where the interval leaves 0 out:", ""]
            lines += _table({method: tasks[task] for method, tasks in differences.items()}, mark=True)
    if summary["unscorable"]:
        lines += [f"{summary['unscorable']} completions could not be scored and count as not correct.", ""]
    return "\n".join(lines)


def _table(rows: dict[str, dict[str, Any]], mark: bool = False) -> list[str]:
    names = list(next(iter(rows.values())))
    headings = [
        f"{TITLES.get(name, name)} (%)" if name.startswith(PERCENT) else TITLES.get(name, name) for name in names
    ]
    lines = [f"| model | {' | '.join(headings)} |", f"|---|{'---|' * len(names)}"]
    for method, estimates in rows.items():
        lines.append(f"| {method} | {' | '.join(_cell(name, estimates[name], mark) for name in names)} |")
    return [*lines, ""]


def _cell(name: str, estimate: dict[str, float], mark: bool) -> str:
    scale, digits = (100, 1) if name.startswith(PERCENT) else (1, 1 if name == "length" else 4)
    sign = "+" if mark else ""
    mean, low, high = (f"{scale * estimate[part]:{sign}.{digits}f}" for part in ("mean", "low", "high"))
    if mark and (estimate["low"] > 0 or estimate["high"] < 0):
        mean = f"**{mean}**"
    return f"{mean} ({low} to {high})"


def _draw(output_dir: Path, summary: dict[str, Any]) -> bool:
    """Draw the plots; whether matplotlib is there to do so."""
    try:
        import matplotlib
    except ImportError:
        print("No plots: matplotlib is not installed (pip install 'opo-trl[plot]').")
        return False
    matplotlib.use("Agg")
    _draw_pass_at_k(output_dir / "pass_at_k.png", summary)
    _draw_metrics(output_dir / "metrics.png", summary)
    if summary["checkpoints"]:
        _draw_steps(output_dir / "steps.png", summary)
    return True


def _draw_pass_at_k(path: Path, summary: dict[str, Any]) -> None:
    """pass@k over k, a panel per dataset."""
    axes = _panels(1, len(summary["problems"]), width=4.5, height=3.6)
    for axis, task in zip(axes[0], summary["problems"], strict=True):
        for number, (method, found) in enumerate(summary["models"].items()):
            points = {int(name[5:]): each for name, each in found[task].items() if name.startswith("pass@")}
            _points(axis, list(points), list(points.values()), method, number)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=task, xlabel="k", ylabel="pass@k")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    _save(axes, path)


def _draw_metrics(path: Path, summary: dict[str, Any]) -> None:
    """Every other metric with its interval, a row per dataset."""
    models, tasks, names = summary["models"], list(summary["problems"]), _other_metrics(summary)
    height = 0.9 + (0.9 + 0.3 * len(models)) * len(tasks)
    axes = _panels(len(tasks), len(names), width=2.2, height=height / len(tasks), sharey=True)
    for row, task in zip(axes, tasks, strict=True):
        for axis, name in zip(row, names, strict=True):
            for number, found in enumerate(models.values()):
                each = found[task][name]
                error = [[each["mean"] - each["low"]], [each["high"] - each["mean"]]]
                axis.errorbar(each["mean"], -number, xerr=error, fmt="o", capsize=3, color=COLORS[number % len(COLORS)])
            axis.set_title(TITLES.get(name, name), fontsize=9, loc="left")
            axis.set_yticks([-i for i in range(len(models))], list(models), fontsize=8)
            axis.tick_params(axis="x", labelsize=8)
            axis.margins(y=0.3)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(task, fontsize=8)
    _save(axes, path)


def _draw_steps(path: Path, summary: dict[str, Any]) -> None:
    """Metrics over the optimizer steps of the checkpoints that were averaged, a row per dataset."""
    tasks, names = list(summary["problems"]), ["pass@1", *_other_metrics(summary)]
    numbers = {method: number for number, method in enumerate(summary["models"])}
    axes = _panels(len(tasks), len(names), width=2.6, height=2.4)
    for row, task in zip(axes, tasks, strict=True):
        for axis, name in zip(row, names, strict=True):
            for method, each in summary["checkpoints"].items():
                steps = [int(one.rsplit("-", 1)[1]) for one in each]
                _points(axis, steps, [one[task][name] for one in each.values()], method, numbers[method])
            axis.set_title(TITLES.get(name, name), fontsize=9, loc="left")
            axis.set_xlabel("optimizer step", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(task, fontsize=8)
    axes[0][0].legend(fontsize=8)
    _save(axes, path)


def _other_metrics(summary: dict[str, Any]) -> list[str]:
    first = next(iter(summary["models"].values()))
    return [name for name in next(iter(first.values())) if not name.startswith(("pass@", "maj@"))]


def _panels(rows: int, columns: int, *, width: float, height: float, **options: Any) -> Any:
    """Axes of a new figure, whose panels have this size in inches."""
    from matplotlib import pyplot as plt

    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)[1]


def _save(axes: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure = axes[0][0].figure
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _points(axis: Any, x: list[int], estimates: list[dict[str, float]], label: str, number: int) -> None:
    means = [each["mean"] for each in estimates]
    errors = [[each["mean"] - each["low"] for each in estimates], [each["high"] - each["mean"] for each in estimates]]
    axis.errorbar(x, means, errors, marker="o", ms=4, capsize=3, label=label, color=COLORS[number % len(COLORS)])
