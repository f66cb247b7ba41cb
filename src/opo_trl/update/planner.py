"""From a rollout batch to the micro-batches of its optimizer step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from .microbatches import MEMORY_SHARE, MicroBatch, assign_rows, cut_rows, plan_microbatches
from .rollout_batch import ROW_TENSORS, SCALARS, loss_mask


@dataclass(frozen=True)
class UpdatePlanner:
    """
    Assigns the rows of a rollout batch to ranks and cuts each rank's into micro-batches.

    All rows feed one optimizer step, so this cannot change the gradient, only what it costs.

    Args:
        micro_batches (`int`):
            Micro-batches that every rank runs in a step.
        num_ranks (`int`, *optional*, defaults to `1`):
            Number of data-parallel ranks.
        skip_uninformative (`bool`, *optional*, defaults to `True`):
            Whether completions with an advantage of 0 are left out.
        pad_to_multiple_of (`int`, *optional*):
            Round the widths of micro-batches up to a multiple of this.
    """

    micro_batches: int
    num_ranks: int = 1
    skip_uninformative: bool = True
    pad_to_multiple_of: int | None = None

    def plan_step(self, batch: Mapping[str, Any], accelerator: Accelerator) -> list[dict[str, Any]]:
        """
        Make this rank's micro-batches of the step. All ranks call it together.

        Args:
            batch (`Mapping[str, Any]`):
                This rank's part of the rollout batch, as TRL generates and scores it.
            accelerator ([`~accelerate.Accelerator`]):
                Moves rows between ranks.

        Returns:
            `list[dict[str, Any]]`: `micro_batches` of them, the largest first.
        """
        rows = {name: batch[name] for name in ROW_TENSORS if name in batch}
        if self.num_ranks > 1:  # a rank may be assigned any row
            for name in rows:
                if rows[name].ndim == 2:
                    left = name.startswith("prompt")
                    rows[name] = accelerator.pad_across_processes(rows[name], dim=1, pad_first=left)
                rows[name] = accelerator.gather(rows[name])
        lengths = (rows["prompt_mask"].sum(dim=1) + rows["completion_mask"].sum(dim=1)).cpu()
        informative = self.informative(rows).cpu()
        rank_rows = self.assign(lengths, informative)[accelerator.process_index]
        scalars = {name: batch[name] for name in SCALARS if name in batch}
        return [{**part, **scalars} for part in self.cut(rows, rank_rows, len(batch["advantages"]))]

    def informative(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:  # (N,), bool
        """Which rows must be trained: those with a non-zero advantage, or all of them."""
        if not self.skip_uninformative:
            return torch.ones(len(rows["advantages"]), dtype=torch.bool)
        advantages, mask = rows["advantages"], loss_mask(rows)
        if advantages.ndim == 2:
            return ((advantages != 0) & mask.bool()).any(dim=1)
        return (advantages != 0) & mask.any(dim=1)

    def assign(self, lengths: torch.Tensor, informative: torch.Tensor) -> list[torch.Tensor]:  # (N,), (N,)
        """Return the rows of each rank, from the longest to the shortest; uninformative ones are left out."""
        return assign_rows(lengths, informative, self.num_ranks)

    def cut(
        self, rows: Mapping[str, torch.Tensor], rank_rows: torch.Tensor, sampled: int
    ) -> list[dict[str, torch.Tensor]]:
        """
        Cut some of the rows into micro-batches.

        Args:
            rows (`Mapping[str, torch.Tensor]`):
                Tensors of a rollout batch, one row per completion.
            rank_rows (`torch.Tensor` of shape `(M,)`):
                Rows to cut, as positions in `rows`.
            sampled (`int`):
                Rows that each rank has sampled, by which the size of a micro-batch is limited.
        """
        plan = self.plan(
            rows["prompt_mask"].sum(dim=1).cpu()[rank_rows],
            rows["completion_mask"].sum(dim=1).cpu()[rank_rows],
            sampled,
            rows["prompt_ids"].size(1) + rows["completion_ids"].size(1),
        )
        return [cut_rows(dict(rows), rank_rows, micro_batch) for micro_batch in plan]

    def plan(
        self, prompt_lengths: torch.Tensor, completion_lengths: torch.Tensor, sampled: int, width: int
    ) -> list[MicroBatch]:  # (M,), (M,)
        """Plan micro-batches no larger than `MEMORY_SHARE` of TRL's, which hold `sampled` rows of `width` tokens."""
        return plan_microbatches(
            prompt_lengths,
            completion_lengths,
            self.micro_batches,
            largest=int(MEMORY_SHARE * (sampled // self.micro_batches) * width),
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
