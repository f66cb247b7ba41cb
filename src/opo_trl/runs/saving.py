"""Saving a checkpoint: the arguments as the user set them, and a failure that all ranks raise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import TrainingArguments

from .checkpoints import latest_complete
from .ranks import any_rank


class CheckpointNotSaved(RuntimeError):
    """A checkpoint could not be saved. Raised on all ranks that can still be reached."""


def check_saving(args: TrainingArguments) -> None:
    """
    Refuse another handler of SIGTERM than [`~opo_trl.runs.preemption.Preemption`], which it would replace.

    Raises:
        ValueError: If `enable_jit_checkpoint` is set.
    """
    if args.enable_jit_checkpoint:
        raise ValueError(
            "`enable_jit_checkpoint` must be False, got True: it would replace the handler of SIGTERM that saves on "
            "all ranks together, and decide in each process by itself. Leave it out: SIGTERM already ends a run with a "
            "complete checkpoint."
        )


@contextmanager
def overridden(args: TrainingArguments, **fields: Any) -> Iterator[None]:
    """Set fields of the training arguments, and set them back at the end."""
    given = {name: getattr(args, name) for name in fields}
    for name, value in fields.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in given.items():
            setattr(args, name, value)


def on_main_process(accelerator: Accelerator, change: Callable[[Path], None], checkpoint: Path) -> None:
    """
    Change a checkpoint's directory on the main process.

    Raises:
        CheckpointNotSaved: On all ranks, if it fails.
    """
    failure = None
    if accelerator.is_main_process:
        try:
            change(checkpoint)
        except OSError as error:
            failure = error
    agree_on_saved(accelerator, checkpoint, failure)


def agree_on_saved(accelerator: Accelerator, checkpoint: Path, failure: BaseException | None) -> None:
    """
    Wait for all ranks.

    Raises:
        CheckpointNotSaved: On all ranks, if one has failed.
    """
    if any_rank(accelerator, failure is not None):
        raise not_saved(checkpoint, failure) from failure


def not_saved(checkpoint: Path, failure: BaseException | None) -> CheckpointNotSaved:
    """Return the error for a checkpoint that could not be saved, which names the one to resume from."""
    complete, _ = latest_complete(checkpoint.parent)
    return CheckpointNotSaved(
        f"{checkpoint} could not be saved: {failure or 'another rank failed, see its message'}. "
        + (f"{complete} is complete: free space and resume from it." if complete else "There is no other checkpoint.")
    )
