"""The files of a run that a report reads: the log of the trainer, and TRL's completions tables."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        settings (`dict[str, Any]`):
            What [`~opo_trl.report.run_settings.RunSettings`] has written; empty for a plain `GRPOTrainer`.
    """

    directory: Path
    log_file: Path | None
    log: list[dict[str, Any]]
    max_steps: int | None
    tables: dict[int, Path]
    settings: dict[str, Any]

    @property
    def reward_names(self) -> list[str]:
        """Reward functions of the run, from the names of its metrics."""
        names = [re.fullmatch(r"(?:eval_)?rewards/(.+)/mean", name) for entry in self.log for name in entry]
        return list(dict.fromkeys(name[1] for name in names if name))


def read_run(directory: str | Path) -> RunFiles:
    """
    Find the files of a run.

    The log is in `trainer_state.json`, as [`~transformers.Trainer.save_state`] and every checkpoint write it, or in the
    `log.json` of `train_math.py`. Where there are several, the one that reaches the latest step is read.

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
    newest = sorted(directory.glob("checkpoint-*/trainer_state.json"), key=_checkpoint_step)[-1:]
    found = [path for path in [*(directory / name for name in LOGS), *newest] if path.is_file()]
    logs = [(path, *_read_log(path)) for path in found]
    tables = {
        int(match[1]): path
        for path in sorted((directory / "completions").glob("completions_*.parquet"))
        if (match := re.fullmatch(r"completions_(\d+)\.parquet", path.name))
    }
    if not tables and not any(log for _, log, _ in logs):
        raise ValueError(
            f"RUN_DIR must be the output_dir of a run that has logged, got {str(directory)!r}, which has none of "
            f"{', '.join(LOGS)}, checkpoint-*/trainer_state.json and completions/completions_*.parquet with a logged "
            "step. Call `trainer.save_state()` at the end of training, or save a checkpoint."
        )
    log_file, log, max_steps = max(logs, key=lambda each: _last_step(each[1]), default=(None, [], None))
    return RunFiles(directory, log_file, log, max_steps, dict(sorted(tables.items())), _read_settings(directory))


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


def _describe_steps(logged: Sequence[int]) -> str:
    if not logged:
        return HOW_TO_LOG_COMPLETIONS
    shown = [str(step) for step in logged]
    listed = shown if len(shown) <= 20 else [*shown[:10], "...", *shown[-9:]]
    return f"This run has tables of the steps {', '.join(listed)}."


def _read_log(path: Path) -> tuple[list[dict[str, Any]], int | None]:
    content = _read_json(path)
    if isinstance(content, list):  # log.json
        return content, None
    return content.get("log_history", []), content.get("max_steps")


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


def _checkpoint_step(path: Path) -> int:
    number = path.parent.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
