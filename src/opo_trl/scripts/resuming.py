"""What `--resume_from_checkpoint` stands for, decided before the model loads."""

from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from ..runs.same_rollouts import resumable_checkpoint
from .setup_phase import on_all_ranks


def find_checkpoint(args: TrainingArguments, state: PartialState) -> str | None:
    """
    Find the checkpoint to resume from, the same on all ranks, and print what was found.

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
    if checkpoint is not None:
        state.print(f"resuming from {checkpoint}")
    elif str(request).lower() == "auto":
        state.print(f"no complete checkpoint in {args.output_dir}: starting from the beginning")
    return None if checkpoint is None else str(checkpoint)
