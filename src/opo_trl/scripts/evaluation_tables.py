"""The Markdown of an evaluation: warnings, tables of values and differences, tables per category, and examples."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..evaluation import Record, has_answer
from ..evaluation.records import SHARES

TITLES = {
    "no-answer": "no answer",
    "rep-5": "Rep-5",
    "self-bleu": "Self-BLEU",
    "distinct-2": "Distinct-2",
    "kl_plain": "KL (plain)",
    "kl_low_variance": "KL (low variance)",
}
WARN_FROM = 0.5  # share of completions, from which on pass@k is not about the model's mathematics
EXAMPLES = 3  # of each model on each dataset
_LAST_CHARACTERS = 400


def truncation_warning(share: float, max_new_tokens: int) -> str | None:
    """What to print if this share of completions was cut off, or `None` if that is not most of them."""
    if share < WARN_FROM:
        return None
    return (
        f"{_percent(share)} of the completions reached max_new_tokens={max_new_tokens} and were cut off, so pass@k "
        "depends on this limit more than on the model. Raise --max_new_tokens; if completions continue after the "
        "answer, check the model's chat template and end token."
    )


def no_answer_warning(share: float) -> str | None:
    """What to print if this share of completions has no answer, or `None` if that is not most of them."""
    if share < WARN_FROM:
        return None
    return (
        f"{_percent(share)} of the completions have no final answer in a box and count as not correct. Read the "
        "examples in table.md, and check --instruction and the model's chat template."
    )


def find_warnings(summary: dict[str, Any]) -> list[str]:
    """One sentence for each model and dataset on which most completions were cut off, or else have no answer."""
    limit = summary["arguments"]["max_new_tokens"]
    found = []
    for method, tasks in summary["models"].items():
        for task, estimates in tasks.items():
            warning = truncation_warning(estimates["truncated"]["mean"], limit)
            warning = warning or no_answer_warning(estimates["no-answer"]["mean"])
            if warning is not None:
                found.append(f"{method} on {task}: {warning}")
    return found


def examples_without_answer(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The end of the first completions without an answer, those that were not cut off first."""
    without = sorted((record for record in records if not has_answer(record)), key=lambda record: record["truncated"])
    return [
        {
            "problem": record["problem"],
            "sample": record["sample"],
            "truncated": record["truncated"],
            "tokens": len(record["token_ids"]),
            "end": record["completion"][-_LAST_CHARACTERS:],
        }
        for record in without[:EXAMPLES]
    ]


def tables(summary: dict[str, Any], reference: str) -> str:
    """Warnings, and for each dataset a table of values, one of differences, and one for each column of categories."""
    lines = [line for warning in summary["warnings"] for line in (f"**Warning:** {warning}", "")]
    arguments = summary["arguments"]
    sampling = f"temperature {arguments['temperature']:g}, top-p 1, max_new_tokens {arguments['max_new_tokens']}"
    for (task, size), samples in zip(summary["problems"].items(), arguments["num_samples"], strict=True):
        lines += [
            f"## {task}",
            "",
            f"{size} problems, {samples} samples each; {sampling}. 95 % intervals over problems.",
        ]
        lines += [""]
        lines += _table({method: tasks[task] for method, tasks in summary["models"].items()})
        differences = summary[f"difference_to_{reference}"]
        if differences:
            lines += [f"Difference to {reference}, paired by problem; bold where the interval leaves 0 out:", ""]
            lines += _table({method: tasks[task] for method, tasks in differences.items()}, mark=True)
        for column, categories in summary["categories"].get(task, {}).items():
            lines += _category_table(column, categories)
    if summary["unscorable"]:
        lines += [f"{summary['unscorable']} completions could not be scored and count as not correct.", ""]
    return "\n".join(lines)


def example_section(summary: dict[str, Any]) -> str:
    """The completions without an answer, as indented blocks."""
    lines = []
    for method, tasks in summary["examples_without_answer"].items():
        for task, examples in tasks.items():
            lines += list(_examples(method, task, examples))
    return "\n".join(["## Completions without an answer", "", *lines]) if lines else ""


def _examples(method: str, task: str, examples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for example in examples:
        how = "cut off after" if example["truncated"] else "ended after"
        name = f"{method} on {task}, problem {example['problem']}, sample {example['sample']}"
        yield from (f"{name}, {how} {example['tokens']} tokens:", "")
        yield from (f"    {line}".rstrip() for line in example["end"].splitlines() or ["(empty)"])
        yield ""


def _table(rows: dict[str, dict[str, Any]], mark: bool = False) -> list[str]:
    names = list(next(iter(rows.values())))
    headings = [
        f"{TITLES.get(name, name)} (%)" if name.startswith(SHARES) else TITLES.get(name, name) for name in names
    ]
    lines = [_row("model", *headings), f"|---|{'---|' * len(names)}"]
    for method, estimates in rows.items():
        lines.append(_row(method, *(_cell(name, estimates[name], mark) for name in names)))
    return [*lines, ""]


def _category_table(column: str, categories: dict[str, Any]) -> list[str]:
    methods = list(next(iter(categories.values()))["models"])
    lines = [f"pass@1 (%) by {column}:", "", _row(column, "problems", *methods), f"|---|---|{'---|' * len(methods)}"]
    for category, found in categories.items():
        cells = [_cell("pass@1", found["models"][method]["pass@1"], mark=False) for method in methods]
        lines.append(_row(category, str(found["problems"]), *cells))
    return [*lines, ""]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cell(name: str, estimate: dict[str, float], mark: bool) -> str:
    scale, digits = (100, 1) if name.startswith(SHARES) else (1, 1 if name == "length" else 4)
    sign = "+" if mark else ""
    mean, low, high = (f"{scale * estimate[part]:{sign}.{digits}f}" for part in ("mean", "low", "high"))
    if mark and (estimate["low"] > 0 or estimate["high"] < 0):
        mean = f"**{mean}**"
    return f"{mean} ({low} to {high})"


def _percent(share: float) -> str:
    """Rounded down, so that 100 % is all."""
    return f"{int(100 * share + 1e-9)} %"
