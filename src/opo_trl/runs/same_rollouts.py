"""Whether a run can continue a checkpoint: what its optimizer needs is there, and its steps take the same prompts."""

import json
import logging
from pathlib import Path
from typing import Any

from .checkpoints import checkpoint_to_resume

ROLLOUTS = "opo_rollouts.json"
# transformers writes the first beside the optimizer's state, DeepSpeed the second.
_TRAINING_STATE = ("scheduler.pt", "latest")

logger = logging.getLogger(__name__)


def resumable_checkpoint(args: Any, request: str | bool | None) -> Path | None:
    """
    Find the checkpoint to resume from, as [`checkpoint_to_resume`] does, and check that this run can continue it.

    Needs neither the model nor a trainer. Call it in one process.

    Args:
        args ([`~trl.GRPOConfig`]):
            Configuration of the run.
        request (`str` or `bool`, *optional*):
            `"auto"`, `True`, a path, or `None`.

    Returns:
        `Path` or `None`: The checkpoint, `None` to start from scratch.

    Raises:
        ValueError: If the checkpoint does not exist, is incomplete, was saved without the optimizer's state, or was
            saved by a run with other rollout batches.
    """
    checkpoint = checkpoint_to_resume(request, str(args.output_dir))
    if checkpoint is not None:
        check_training_state(checkpoint)
        check_same_rollouts(checkpoint, args)
    return checkpoint


def check_training_state(checkpoint: Path) -> None:
    """
    Refuse a checkpoint that has the weights alone, which transformers would resume with a new optimizer and schedule.

    Raises:
        ValueError: If neither transformers' nor DeepSpeed's state of the optimizer and the schedule is there.
    """
    if not any((checkpoint / name).is_file() for name in _TRAINING_STATE):
        raise ValueError(
            f"Resuming needs the state of the optimizer and the learning rate schedule, which {str(checkpoint)!r} was "
            "saved without (`save_only_model=True`). To start a new run from its weights, pass it as the model, with "
            "another output_dir and without resume_from_checkpoint. Set `save_only_model=False` in runs that are to "
            "be resumed."
        )


def rollout_batches(args: Any) -> dict[str, Any]:
    """Return what decides which prompts a step takes, and the number of processes, as a checkpoint keeps it."""
    per_rollout = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    return {
        "prompts_per_rollout_batch": args.generation_batch_size // args.num_generations,
        "steps_per_rollout_batch": per_rollout,
        "processes": args.world_size,
    }


def keep_rollout_batches(checkpoint: Path, args: Any) -> None:
    """Write into a checkpoint what [`check_same_rollouts`] compares."""
    (checkpoint / ROLLOUTS).write_text(json.dumps(rollout_batches(args)))


def check_same_rollouts(checkpoint: Path, args: Any) -> None:
    """
    Refuse to resume with rollout batches of another size than the checkpoint's: the position in the data, counted in
    steps, would be another one, and some prompts of the epoch would be visited twice and others not at all.

    With another number of processes and the same rollout batches, every step takes the same prompts. The sampled
    completions are other ones, since each process has a random state of its own: this is logged.

    Args:
        checkpoint (`Path`):
            Checkpoint to resume from; one without a record, as transformers saves it, is not checked.
        args ([`~trl.GRPOConfig`]):
            Configuration of the run that resumes. `ignore_data_skip=True` starts the epoch anew and is not checked.

    Raises:
        ValueError: If the numbers differ, with both.
    """
    path = checkpoint / ROLLOUTS
    if not path.is_file():
        return
    saved, own = json.loads(path.read_text()), rollout_batches(args)
    differs = any(saved[name] != own[name] for name in own if name != "processes")
    if differs and not args.ignore_data_skip:
        raise ValueError(
            "Resuming needs rollout batches of the checkpoint's size, or some prompts would be visited twice and "
            f"others not at all: {str(checkpoint)!r} has {_described(saved)}, this run has {_described(own)}. Set "
            "`per_device_train_batch_size` and `gradient_accumulation_steps` such that their product, times the "
            "number of processes, over `num_generations` is "
            f"{saved['prompts_per_rollout_batch']}, or `ignore_data_skip=True` to start the epoch from its beginning."
        )
    if saved["processes"] != own["processes"]:
        logger.warning(
            "The checkpoint was saved by %d process(es) and is resumed by %d: each step takes the prompts that it "
            "would have taken; the sampled completions are other ones, since every process has its own random state.",
            saved["processes"],
            own["processes"],
        )


def _described(batches: dict[str, Any]) -> str:
    steps, processes = batches["steps_per_rollout_batch"], batches["processes"]
    every = "" if steps == 1 else f" every {steps:g} steps"
    return f"{batches['prompts_per_rollout_batch']} prompts per rollout batch{every} on {processes} process(es)"
