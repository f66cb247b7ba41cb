"""That a rollout batch is complete, and the optimizer steps once, after its last micro-batch, on all ranks."""

import torch
from accelerate import Accelerator


def check_rollout_size(accelerator: Accelerator, rows: int, expected: int) -> None:
    """
    Raise on all ranks unless every rank has the rows of a rollout batch that the configuration says.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Its processes agree.
        rows (`int`):
            Prompts that this rank got, each repeated for its completions.
        expected (`int`):
            `per_device_train_batch_size * gradient_accumulation_steps`.

    Raises:
        ValueError: With the numbers of all ranks.
    """
    received = accelerator.gather(torch.tensor([rows], device=accelerator.device)).tolist()
    if any(size != expected for size in received):
        raise ValueError(
            "Each rank must get per_device_train_batch_size * gradient_accumulation_steps = "
            f"{expected} prompts for a rollout batch, got {received} on the {len(received)} rank(s). Remove what "
            "changes the data loader's batch size, such as a custom sampler, data loader or accelerator_config."
        )


def check_position(accelerator: Accelerator, trained: int, per_step: int, next_is: str = "micro-batch") -> None:
    """
    Raise on all ranks if they are at different positions, or if the optimizer would step at a wrong one.

    All ranks call this before every micro-batch and at the end of every epoch. A rank that has left an epoch alone,
    because a callback has stopped it there, meets the others, which are at their next micro-batch, in this very call.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Its `sync_gradients` is whether the optimizer steps after the coming micro-batch; its processes agree.
        trained (`int`):
            Micro-batches that this rank has trained.
        per_step (`int`):
            Micro-batches in a rollout batch.
        next_is (`str`, *optional*, defaults to `"micro-batch"`):
            What this rank does next: train a `"micro-batch"`, begin an `"epoch"`, or `"stop"`.

    Raises:
        RuntimeError: With the positions of all ranks.
    """
    kinds = ("micro-batch", "epoch", "stop")
    here = (trained % per_step, int(accelerator.sync_gradients), kinds.index(next_is))
    ranks = [here]
    if accelerator.num_processes > 1:
        gathered = accelerator.gather(torch.tensor(ranks, device=accelerator.device))  # (W, 3)
        ranks = [(position, steps, kind) for position, steps, kind in gathered.tolist()]
    out_of_place = next_is == "micro-batch" and any(steps != (at == per_step - 1) for at, steps, _ in ranks)
    if out_of_place or len({(at, kind) for at, _, kind in ranks}) > 1:
        words = ("trains micro-batch {}", "begins an epoch after micro-batch {}", "stops after micro-batch {}")
        listed = "; ".join(
            f"rank {rank} {words[kind].format(at + (kind == 0))}{' and steps' if steps and kind == 0 else ''}"
            for rank, (at, steps, kind) in enumerate(ranks)
        )
        raise RuntimeError(
            f"The optimizer must step after the last of a rollout batch's {per_step} micro-batches, on all ranks "
            f"alike: {listed}. A callback has stopped one rank alone, or an overridden training loop has ended a step "
            "early. Let callbacks stop epochs and training on all ranks, in `on_step_end`."
        )
