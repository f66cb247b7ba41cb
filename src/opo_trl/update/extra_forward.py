"""Log-probabilities of a rollout batch before its update, for weights that depend on them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .packed_rows import pack_column
from .rollout_batch import loss_mask
from .step_plan import StepPlan


def score_planned_rows(step: StepPlan, width: int, score: Callable[..., torch.Tensor]) -> torch.Tensor:  # (N, C)
    """
    Compute log-probabilities in the micro-batches of a plan, each row's on the rank that trains it.

    Every rank runs the same number of forwards, since different numbers would deadlock under ZeRO-3 and FSDP.

    Args:
        step ([`StepPlan`]):
            Rows to score.
        width (`int`):
            Completion tokens of this rank's part of the rollout batch with padding, C.
        score (`Callable`):
            Maps a micro-batch, and the `batch_size` to run it in, to its log-probabilities `(B, C)`.

    Returns:
        `torch.Tensor` of shape `(N, C)` for the rows that this rank has sampled: 0 where a token is not trainable, and
        for rows that the plan leaves out.
    """
    lengths, device = step.rows.completion_lengths, step.rows.filler["completion_ids"].device
    longest = int(lengths.max()) if len(lengths) else 0
    found = torch.zeros(len(lengths), longest, device=device)  # (M, longest), of the rows that this rank trains
    with torch.no_grad():
        for planned in step.planned:
            part = step.rows.micro_batch(planned)
            logps = torch.where(loss_mask(part).bool(), score(part, batch_size=None).float(), 0.0)
            if planned.informative:
                found[planned.rows.to(device), : logps.size(1)] = logps[:, :longest]
    packed = pack_column("completion_logps", found, torch.arange(len(lengths)), lengths)
    return step.exchange.return_tokens(packed, width)


def score_batch(batch: Mapping[str, Any], micro_batches: int, score: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Compute the log-probabilities `(N, C)` of all rows in TRL's micro-batches, where rows may not be regrouped."""
    with torch.no_grad():
        logps = score(batch, batch_size=len(batch["completion_ids"]) // micro_batches)
    return torch.where(loss_mask(batch).bool(), logps.float(), 0.0)
