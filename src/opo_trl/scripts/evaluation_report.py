"""What an evaluation writes: summary.json, a table in Markdown, plots."""

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..evaluation import by_category, summarize, summarize_differences
from .evaluation_tables import TITLES, example_section, find_warnings, tables
from .reporting import commit

Metrics = dict[str, dict[str, float]]  # metric -> problem -> value

COLORS = ("#1f5c99", "#b3441e", "#4a8c3f", "#7a4f9e", "#c79a2b", "#5b6770")


def write_report(
    output_dir: Path,
    methods: dict[str, dict[str, Metrics]],
    checkpoints: dict[str, dict[str, dict[str, Metrics]]],
    categories: dict[str, dict[str, dict[str, str]]],
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
        categories (`dict`):
            dataset -> column -> problem id -> category.
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
            method: {
                task: {
                    name: difference._asdict()
                    for name, difference in summarize_differences(methods[method][task], found).items()
                }
                for task, found in methods[reference].items()
            }
            for method in others
        },
        "checkpoints": {
            method: {one: {task: summarize(found) for task, found in tasks.items()} for one, tasks in each.items()}
            for method, each in checkpoints.items()
        },
        "categories": _by_category(methods, categories),
        **run,
        "commit": commit(),
        "versions": {name: version(name) for name in ("opo-trl", "trl", "transformers", "torch", *sacrebleu)},
    }
    summary["warnings"] = find_warnings(summary)
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    table, examples = tables(summary, reference), example_section(summary)
    (output_dir / "table.md").write_text("\n".join(part for part in (table, examples) if part))
    print(table)
    names = "summary.json and table.md"
    if _draw(output_dir, summary):
        names = "summary.json, table.md and the plots"
    print(f"{names} are in {output_dir}", flush=True)
    return summary


def _by_category(
    methods: dict[str, dict[str, Metrics]], categories: dict[str, dict[str, dict[str, str]]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """dataset -> column -> category -> its number of problems, and the summary of each method."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for task, columns in categories.items():
        found[task] = {}
        for column, of_problem in columns.items():
            of_methods = {method: by_category(tasks[task], of_problem) for method, tasks in methods.items()}
            found[task][column] = {
                category: {
                    "problems": len(metrics["pass@1"]),
                    "models": {method: summarize(each[category]) for method, each in of_methods.items()},
                }
                for category, metrics in next(iter(of_methods.values())).items()
            }
    return found


def _draw(output_dir: Path, summary: dict[str, Any]) -> bool:
    """Draw the plots, and return whether matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("No plots: matplotlib is not installed (pip install matplotlib).")
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
