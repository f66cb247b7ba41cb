"""The files of a run that a report reads: the log of the trainer, and TRL's completions tables."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SETTINGS = "training_args.json"
LOGS = ("trainer_state.json", "log.json")
HOW_TO_LOG_COMPLETIONS = (
    "This run has no completions tables. Train with `log_completions=True` (`--log_completions` on the command line) "
    "to see the completions here; `num_completions_to_print=0` keeps TRL from printing them as well."
)


@dataclass(frozen=True)
class RunFiles:
    """
    What a run left.

    Attributes:
        directory (`Path`):
            The run's `output_dir`.
        log_file (`Path`, *optional*):
            Where the log was found.
        log (`list[dict[str, Any]]`):
            `log_history` of the trainer's state: a dictionary for each time that it logged.
        max_steps (`int`, *optional*):
            Optimizer steps that the run was to take, where the log has them.
        tables (`dict[int, Path]`):
            Completions tables by step, in order.
        earlier_tables (`tuple[int, ...]`):
            Steps of tables that an earlier run in this directory has left, which are not among `tables`.
        settings (`dict[str, Any]`):
            What [`~opo_trl.report.run_settings.RunSettings`] has written; empty for a plain `GRPOTrainer`.
    """

    directory: Path
    log_file: Path | None
    log: list[dict[str, Any]]
    max_steps: int | None
    tables: dict[int, Path]
    earlier_tables: tuple[int, ...]
    settings: dict[str, Any]

    @property
    def reward_names(self) -> list[str]:
        """Reward functions of the run, from the names of its metrics."""
        names = [re.fullmatch(r"(?:eval_)?rewards/(.+)/mean", name) for entry in self.log for name in entry]
        return list(dict.fromkeys(name[1] for name in names if name))


class _Log(NamedTuple):
    path: Path | None
    modified: int  # nanoseconds
    entries: list[dict[str, Any]]
    max_steps: int | None


def read_run(directory: str | Path) -> RunFiles:
    """
    Find the files of a run.

    The log is in `trainer_state.json`, as [`~transformers.Trainer.save_state`] and every checkpoint write it, or in the
    `log.json` of `train_math.py`. Of several logs of one run, the one that reaches the latest step is read.

    A directory may hold files of earlier runs. The log is then that of the run that has logged last, by the time of
    modification of its file; where the times are equal, as in a copy, the one that reaches the latest step. A
    completions table that is older than the log, of a step that the log does not have, is left out.

    Args:
        directory (`str` or `Path`):
            `output_dir` of the run.

    Returns:
        [`RunFiles`]

    Raises:
        ValueError: If there is no such directory, a log cannot be read, or the run has logged nothing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"RUN_DIR must be the output_dir of a run, got {str(directory)!r}, which is no directory.")
    checkpoints = sorted(directory.glob("checkpoint-*/trainer_state.json"), key=_checkpoint_step)
    # The furthest and the newest one: the first may be of an earlier run, and a copy may have other times.
    chosen = [*checkpoints[-1:], *sorted(checkpoints, key=_modified)[-1:]]
    found = [path for path in [*(directory / name for name in LOGS), *dict.fromkeys(chosen)] if path.is_file()]
    logs = [_read_log(path) for path in found]
    tables = {
        int(match[1]): path
        for path in sorted((directory / "completions").glob("completions_*.parquet"))
        if (match := re.fullmatch(r"completions_(\d+)\.parquet", path.name))
    }
    if not tables and not any(log.entries for log in logs):
        raise ValueError(
            f"RUN_DIR must be the output_dir of a run that has logged, got {str(directory)!r}, which has none of "
            f"{', '.join(LOGS)}, checkpoint-*/trainer_state.json and completions/completions_*.parquet with a logged "
            "step. Call `trainer.save_state()` at the end of training, or save a checkpoint."
        )
    log = _latest_log(logs)
    earlier = _earlier_tables(tables, log)
    kept = {step: tables[step] for step in sorted(tables) if step not in earlier}
    return RunFiles(directory, log.path, log.entries, log.max_steps, kept, earlier, _read_settings(directory))


def choose_steps(tables: dict[int, int], max_completions: int, steps: Iterable[int] = ()) -> list[int]:
    """
    Choose the steps whose completions a report has.

    Args:
        tables (`dict[int, int]`):
            Number of completions of each step that has a table.
        max_completions (`int`):
            With more completions than this, as many evenly spaced steps as fit, with the first and the last.
        steps (`Iterable[int]`, *optional*):
            Choose these instead.

    Returns:
        `list[int]`, in ascending order. At least one step if there is any.

    Raises:
        ValueError: If a step that is asked for has no table.
    """
    logged = sorted(tables)
    wanted = sorted(set(steps))
    missing = [step for step in wanted if step not in tables]
    if missing:
        raise ValueError(
            f"--steps must be steps with a completions table, got {', '.join(map(str, missing))}. "
            f"{_describe_steps(logged)}"
        )
    if wanted or sum(tables.values()) <= max_completions:
        return wanted or logged
    count = max(1, min(len(logged), max_completions // max(tables.values())))
    if count == 1:
        return logged[-1:]
    return [logged[round(i * (len(logged) - 1) / (count - 1))] for i in range(count)]


def _latest_log(logs: Iterable[_Log]) -> _Log:
    """
    Take the longest log of the run that has logged last.

    A log that is the beginning of another one is of the same run, such as that of a checkpoint. Times, which copying a
    directory may change, decide only between runs.
    """
    longest: list[tuple[_Log, list[str]]] = []
    for log in sorted(logs, key=lambda each: len(each.entries), reverse=True):
        lines = [json.dumps(entry, sort_keys=True) for entry in log.entries]  # as text, since NaN differs from itself
        if not any(others[: len(lines)] == lines for _, others in longest):
            longest.append((log, lines))
    latest = max(longest, key=lambda each: (each[0].modified, _last_step(each[0].entries)), default=None)
    return _Log(None, 0, [], None) if latest is None else latest[0]


def _earlier_tables(tables: Mapping[int, Path], log: _Log) -> tuple[int, ...]:
    """Steps of the tables that are older than the log and whose step it does not have: a run logs before it writes."""
    if not log.entries:
        return ()
    logged = {0, *(entry.get("step") for entry in log.entries)}  # 0: training starts a new log, after any evaluation
    return tuple(step for step, path in tables.items() if step not in logged and _modified(path) < log.modified)


def _describe_steps(logged: Sequence[int]) -> str:
    if not logged:
        return HOW_TO_LOG_COMPLETIONS
    shown = [str(step) for step in logged]
    listed = shown if len(shown) <= 20 else [*shown[:10], "...", *shown[-9:]]
    return f"This run has tables of the steps {', '.join(listed)}."


def _read_log(path: Path) -> _Log:
    content = _read_json(path)
    if isinstance(content, list):  # log.json
        content = {"log_history": content}
    return _Log(path, _modified(path), content.get("log_history", []), content.get("max_steps"))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} must be JSON that a trainer has written, got a file that cannot be read: {error}. Remove it to "
            "build the report from the run's other files."
        ) from error


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / SETTINGS
    content = _read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _last_step(log: Sequence[dict[str, Any]]) -> int:
    return max((entry.get("step", 0) for entry in log), default=-1)


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns


def _checkpoint_step(path: Path) -> int:
    number = path.parent.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
