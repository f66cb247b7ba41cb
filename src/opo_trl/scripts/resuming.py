"""What `--resume_from_checkpoint` stands for, decided before the model loads."""

from collections.abc import Set
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..runs.same_rollouts import resumable_checkpoint
from .setup_phase import on_all_ranks


def check_saving(args: TrainingArguments, on_command_line: Set[str]) -> str | None:
    """
    Check that a run whose arguments ask for checkpoints writes some.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The run's configuration.
        on_command_line (`Set[str]`):
            Names of the arguments on the command line. `save_steps` of a config file is not refused, so that
            `--save_strategy no` turns off the checkpoints of a recipe.

    Returns:
        `str` or `None`: A warning, or `None` if there is nothing to warn about.

    Raises:
        ValueError: If `save_steps` is on the command line and `save_strategy` is `"no"`.
    """
    if args.save_strategy != SaveStrategy.NO:
        return None
    if "save_steps" in on_command_line:
        raise ValueError(
            f"--save_steps {args.save_steps:g} needs --save_strategy steps, got save_strategy='no', which saves no "
            "checkpoint. Add --save_strategy steps, or leave out --save_steps."
        )
    if str(args.resume_from_checkpoint).lower() == "auto":
        return (
            "warning: --resume_from_checkpoint auto with save_strategy='no': the only checkpoint of this run is the "
            "one that it saves on SIGTERM. Pass --save_strategy steps --save_steps N to save regularly."
        )
    return None


def find_checkpoint(args: TrainingArguments, state: PartialState) -> str | None:
    """
    Find the checkpoint to resume from, the same on all ranks, and print which one it is.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Its `resume_from_checkpoint` is `"auto"`, `"true"`, `"false"`, a path, or `None`.
        state ([`~accelerate.PartialState`]):
            State of this process.

    Returns:
        `str` or `None`: The checkpoint, or `None` for a start from the beginning.

    Raises:
        ValueError: On all ranks, if the checkpoint that is asked for is missing or incomplete, or this run cannot
            continue it.
    """
    request = args.resume_from_checkpoint

    def look() -> Path | None:
        return resumable_checkpoint(args, request) if state.is_main_process else None

    checkpoint = broadcast_object_list([on_all_ranks(state, look)])[0]  # the main process decides
    if checkpoint is None:
        return None  # where "auto" has found none, `resumable_checkpoint` has warned of it
    state.print(f"resuming from {checkpoint}")
    return str(checkpoint)
