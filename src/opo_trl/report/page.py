"""Writes the report: one HTML file with its data and its scripts inside, which loads nothing from the network."""

import html
import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from .charts import absent, arrange
from .findings import Evidence, Finding, evaluate, find
from .groups import NO_ANSWER, Completion, Group, finite, group_rows
from .meanings import meanings
from .metrics import metric_series
from .run_files import HOW_TO_LOG_COMPLETIONS, RunFiles, choose_steps, read_run

FILE_NAME = "report.html"
MAX_COMPLETIONS = 10_000
# Settings in the header; the others are in a list that opens.
SHOWN_SETTINGS = (
    "max_completion_length", "num_generations", "temperature", "learning_rate", "loss_type", "baseline_weight",
    "length_exponent", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
)  # fmt: skip
_MISSING = (
    "The report needs the package {name}, which is not installed. Install it, or the extra `report`: pip install "
    "plotly pyarrow."
)


def write_report(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    max_completions: int = MAX_COMPLETIONS,
    steps: Iterable[int] = (),
) -> Path:
    """
    Write a report of a run, of [`OPOTrainer`] or any [`~trl.GRPOTrainer`], from the files in its `output_dir`.

    Args:
        run_dir (`str` or `Path`):
            `output_dir` of the run.
        output (`str` or `Path`, *optional*):
            File to write; by default `report.html` in `run_dir`.
        max_completions (`int`, *optional*, defaults to `10000`):
            With more completions than this, the report has those of evenly spaced steps, with the first and the last.
        steps (`Iterable[int]`, *optional*):
            Show the completions of these steps instead.

    Returns:
        `Path`: The file that was written.

    Raises:
        ValueError: If there is no such run, it has logged nothing, or `steps` has one without completions.
        ImportError: If plotly or pyarrow, which the extra `report` brings, is not installed.

    Example:

    ```python
    >>> from opo_trl.report import write_report

    >>> write_report("outputs/quickstart")
    PosixPath('outputs/quickstart/report.html')
    ```
    """
    if max_completions < 1:
        raise ValueError(f"max_completions must be at least 1, got {max_completions}. Leave it out for 10000.")
    run = read_run(run_dir)
    output = Path(output) if output is not None else run.directory / FILE_NAME
    if not output.parent.is_dir():
        raise ValueError(f"The directory of the output file must exist, got {str(output)!r}. Create it first.")
    library = _plotly()
    content = describe(run, max_completions, steps)
    output.write_text(render(content, library), encoding="utf-8")
    return output


def describe(run: RunFiles, max_completions: int = MAX_COMPLETIONS, steps: Iterable[int] = ()) -> dict[str, Any]:
    """Everything that the report of a run shows, as values that JSON can express."""
    groups, facts, notes = _read_groups(run, max_completions, steps)
    metrics = metric_series(run.log)
    given = run.settings.get("args", {})
    evidence = Evidence(metrics, groups, given.get("max_completion_length"))
    if not metrics:
        notes.append(
            "This run has no log. Call `trainer.save_state()` at the end of training, or save a checkpoint, for curves."
        )
    if run.earlier_tables:
        notes.append(
            f"{len(run.earlier_tables)} completions table(s) of an earlier run in this directory are left out: they "
            "are older than the log, which does not have their steps."
        )
    functions = list(dict.fromkeys(name for group in groups for each in group.completions for name in each.rewards))
    trained_known = any(each.reward is not None for group in groups for each in group.completions)
    return {
        "title": run.directory.resolve().name,
        "facts": [*_run_facts(run), *facts],
        "settings": {name: str(value) for name, value in sorted(given.items()) if value is not None},
        "notes": notes,
        "findings": [_finding(finding) for finding in find(evidence)],
        "rules": evaluate(evidence),
        "metrics": {name: series._asdict() for name, series in metrics.items()},
        "sections": [
            {
                "title": section.title,
                "constant": section.constant,
                "charts": [
                    {**chart._asdict(), "lines": [line._asdict() for line in chart.lines]} for chart in section.charts
                ],
            }
            for section in arrange(metrics)
        ],
        "absent": absent(metrics),
        "meanings": meanings(metrics),
        **_table_content(groups, functions, trained_known),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {**finding._asdict(), "consequences": [_finding(each) for each in finding.consequences]}


def render(content: dict[str, Any], library: str) -> str:
    """Put the content, the styles and the scripts into the page, where no text of a completion becomes markup."""
    folder = Path(__file__).parent
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "TITLE": html.escape(content["title"]),
        "STYLE": (folder / "report.css").read_text(encoding="utf-8"),
        "LIBRARY": library.replace("</script", "<\\/script"),
        "DATA": data,
        "SCRIPT": (folder / "report.js").read_text(encoding="utf-8"),
    }
    template = (folder / "report.html").read_text(encoding="utf-8")
    return re.sub(r"@(TITLE|STYLE|LIBRARY|DATA|SCRIPT)@", lambda match: parts[match[1]], template)


def _read_groups(
    run: RunFiles, max_completions: int, steps: Iterable[int]
) -> tuple[list[Group], list[tuple[str, str]], list[str]]:
    """Groups of the chosen steps, with facts and notes about the choice."""
    steps = list(steps)
    if not run.tables:
        choose_steps({}, max_completions, steps)
        return [], [], [HOW_TO_LOG_COMPLETIONS]
    parquet = _parquet()
    sizes = {step: _read_table(parquet.read_metadata, path).num_rows for step, path in run.tables.items()}
    chosen = choose_steps(sizes, max_completions, steps)
    groups = list(
        chain.from_iterable(
            group_rows(_read_table(parquet.read_table, run.tables[step]).to_pylist(), run.reward_names)
            for step in chosen
        )
    )
    shown, total = sum(sizes[step] for step in chosen), sum(sizes.values())
    of_all = "" if shown == total else f" (of {total} at {len(sizes)} steps)"
    facts = [("completions", f"{shown} at {len(chosen)} step{'s' * (len(chosen) != 1)}{of_all}")]
    texts = {str(completion.messages) for group in groups for completion in group.completions}
    return groups, [*facts, ("different completions", f"{len(texts)} of {shown}")], []


def _run_facts(run: RunFiles) -> list[tuple[str, str]]:
    last = max((entry.get("step", 0) for entry in run.log), default=None)
    facts = [] if last is None else [("last logged step", f"{last}{f' of {run.max_steps}' if run.max_steps else ''}")]
    if run.reward_names:
        facts.append(("reward functions", ", ".join(run.reward_names)))
    seconds = next((entry["train_runtime"] for entry in reversed(run.log) if "train_runtime" in entry), None)
    if seconds is not None:
        facts.append(("training time since the last start", f"{seconds:.{0 if seconds >= 10 else 1}f} s"))
    if run.log_file is not None:
        facts.append(("log", str(run.log_file.relative_to(run.directory))))
        written = datetime.fromtimestamp(run.log_file.stat().st_mtime).astimezone()
        facts.append(("logged until", f"{written:%Y-%m-%d %H:%M %Z}"))
    return [("directory", str(run.directory.resolve())), *facts, *_setting_facts(run.settings)]


def _setting_facts(settings: dict[str, Any]) -> list[tuple[str, str]]:
    values = {name: settings.get(name) for name in ("model", "dataset", "prompts")}
    values |= {name: settings.get("args", {}).get(name) for name in SHOWN_SETTINGS}
    versions = " ".join(f"{name} {number}" for name, number in settings.get("versions", {}).items())
    facts = [(name, str(value)) for name, value in values.items() if value not in (None, "")]
    return [*facts, *([("versions", versions)] if versions else [])]


def _table_content(groups: Sequence[Group], functions: Sequence[str], trained_known: bool) -> dict[str, Any]:
    completions = [completion for group in groups for completion in group.completions]
    # By what none_positive and all_equal are judged: the trained reward, and each function where there are several.
    judges: list[str | None] = [None] if trained_known or not functions else []
    judges += [name for name in functions if len(functions) > 1]
    return {
        "functions": functions,
        "judges": ["trained reward" if judge is None else judge for judge in judges],
        "extras": list(
            dict.fromkeys(name for each in completions for name, value in each.extra.items() if value is not None)
        ),
        "has": {
            "reward": trained_known,
            "advantage": any(completion.advantage is not None for completion in completions),
            "length": any(completion.length is not None for completion in completions),
            "baseline": any(completion.baseline is not None for completion in completions),
            "solution": any(group.solution is not None for group in groups),
            "truncated": any(completion.truncated is not None for completion in completions),
            "verdict": any(completion.verdict is not None for completion in completions),
            "logps": any(completion.logps is not None for completion in completions),
        },
        "groups": [
            {
                "step": group.step,
                "split": group.split,
                "prompt": group.prompt,
                "solution": group.solution,
                "none_positive": [group.none_positive(judge) for judge in judges],
                "all_equal": [group.all_equal(judge) for judge in judges],
                "rows": [_row(completion, functions) for completion in group.completions],
            }
            for group in groups
        ],
    }


def _row(completion: Completion, functions: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "messages": completion.messages,
        "rewards": [completion.rewards.get(name) for name in functions],
        "reward": completion.reward,
        "advantage": completion.advantage,
        "length": completion.length,
        "baseline": completion.baseline,
        "truncated": completion.truncated,
        "unscorable": completion.unscorable,
        "no_answer": completion.verdict == NO_ANSWER,
        "extra": {name: str(value) for name, value in completion.extra.items() if value is not None},
    }
    if completion.tokens is not None and completion.logps is not None:
        row |= {"tokens": completion.tokens, "logps": [_rounded(value) for value in completion.logps]}
    return row


def _rounded(value: float | None) -> float | None:
    known = finite(value)
    return None if known is None else round(known, 4)


def _plotly() -> str:
    """The source of plotly.js that the package plotly brings."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(_MISSING.format(name="plotly")) from error
    return str(get_plotlyjs())


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(_MISSING.format(name="pyarrow")) from error
    return parquet


def _read_table(read: Callable[[Path], Any], path: Path) -> Any:
    """Read a completions table; TRL writes it in place, so a run that was killed may have left half of one."""
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(
            f"{path} must be a complete table of completions, got a file that cannot be read: {error}. Remove it to "
            "build the report from the run's other files."
        ) from error
