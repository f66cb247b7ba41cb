"""Log-probabilities of a rollout batch before its update, for weights that depend on them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .planner import UpdatePlanner
from .rollout_batch import ROW_TENSORS, loss_mask


def score_rows(
    batch: Mapping[str, Any],
    chosen: torch.Tensor,
    planner: UpdatePlanner,
    score: Callable[..., torch.Tensor],
    *,
    regroup: bool,
) -> torch.Tensor:  # (N,) -> (N, C)
    """
    Compute the log-probabilities of some of this rank's rows.

    Every rank runs the same number of forwards, whatever its rows are: under ZeRO-3 and FSDP they would deadlock.

    Args:
        batch (`Mapping[str, Any]`):
            This rank's part of the rollout batch.
        chosen (`torch.Tensor` of shape `(N,)`):
            Whether a row is needed.
        planner ([`UpdatePlanner`]):
            Cuts the chosen rows into micro-batches.
        score (`Callable`):
            Maps a micro-batch, and the `batch_size` to run it in, to its log-probabilities `(B, C)`.
        regroup (`bool`):
            Whether rows may be regrouped. If not, all of them run in TRL's micro-batches.

    Returns:
        `torch.Tensor` of shape `(N, C)`: 0 where a token is not trainable, and for rows that were not needed.
    """
    logps = torch.zeros(loss_mask(batch).shape, device=chosen.device)  # (N, C)
    rows = {name: batch[name] for name in ROW_TENSORS if name in batch}
    rows["position"] = torch.arange(len(logps), device=logps.device)
    parts: list[dict[str, Any]] = [{**batch, **rows}]
    chunk: int | None = len(logps) // planner.micro_batches
    if regroup:
        chunk, parts = None, planner.cut(rows, chosen.nonzero().flatten().cpu(), len(logps))
    with torch.no_grad():
        for part in parts:
            found = torch.where(loss_mask(part).bool(), score(part, batch_size=chunk).float(), 0.0)
            # Added, not set: a filler stands for a row that has its own place.
            logps[:, : found.size(1)].index_add_(0, part["position"], found)
    return logps
