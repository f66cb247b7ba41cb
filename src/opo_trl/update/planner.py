"""From a rollout batch to the micro-batches of its optimizer step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from .microbatches import MEMORY_SHARE, MicroBatch, assign_rows, plan_microbatches
from .rollout_batch import ROW_TENSORS, SCALARS, loss_mask
from .row_exchange import RowExchange
from .step_plan import StepPlan


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
        rows_per_rank (`int`, *optional*):
            Rows that a rank samples without refilling: a micro-batch is limited in size by these, even if a refilled
            step holds more. `None` takes those of the batch.
    """

    micro_batches: int
    num_ranks: int = 1
    skip_uninformative: bool = True
    pad_to_multiple_of: int | None = None
    rows_per_rank: int | None = None

    def plan_step(
        self, batch: Mapping[str, Any], accelerator: Accelerator, earlier: StepPlan | None = None
    ) -> StepPlan:
        """
        Assign the informative rows to the ranks, move those that change rank, and plan this rank's micro-batches.

        All ranks call it together. They exchange the lengths of their rows, from which all derive the same assignment.

        Args:
            batch (`Mapping[str, Any]`):
                This rank's part of the rollout batch, as TRL generates and scores it.
            accelerator ([`~accelerate.Accelerator`]):
                Gathers the lengths.
            earlier ([`StepPlan`], *optional*):
                What [`plan_before_advantages`] has returned for this batch. It is kept, and gets the advantages, unless
                it leaves out a row that is informative.

        Returns:
            [`StepPlan`]: It does not refer to the batch, whose memory can be freed before the micro-batches are made.
        """
        rows = {name: batch[name] for name in ROW_TENSORS if name in batch}
        scalars = {name: batch[name] for name in SCALARS if name in batch}
        table, width, unchanged = self._exchange_lengths(
            rows, self.informative(rows), earlier is not None and earlier.made_of(rows), accelerator
        )
        if earlier is not None and unchanged and earlier.exchange.includes(table[:, 2].bool()):
            return earlier.with_advantages(rows["advantages"], scalars)
        return replace(self._plan(rows, table, width, accelerator), scalars=scalars)

    def plan_before_advantages(
        self, batch: Mapping[str, Any], chosen: torch.Tensor, accelerator: Accelerator
    ) -> StepPlan:  # (N,), bool
        """Plan the chosen rows as [`plan_step`] plans the informative ones, for forwards before these are known."""
        rows = {name: batch[name] for name in ROW_TENSORS if name in batch and name != "advantages"}
        if not self.skip_uninformative:
            chosen = torch.ones_like(chosen)
        table, width, _ = self._exchange_lengths(rows, chosen, False, accelerator)
        return replace(self._plan(rows, table, width, accelerator), source=rows)

    def informative(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:  # (N,), bool
        """Which rows must be trained: those with a non-zero advantage, or all of them."""
        advantages, mask = rows["advantages"], loss_mask(rows)
        if not self.skip_uninformative:
            return torch.ones(len(advantages), dtype=torch.bool, device=advantages.device)
        if advantages.ndim == 2:
            return ((advantages != 0) & mask.bool()).any(dim=1)
        return (advantages != 0) & mask.any(dim=1)

    def assign(self, lengths: torch.Tensor, informative: torch.Tensor) -> list[torch.Tensor]:  # (N,), (N,)
        """Return the rows of each rank, from the longest to the shortest; uninformative ones are left out."""
        return assign_rows(lengths, informative, self.num_ranks)

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

    def _exchange_lengths(
        self, rows: Mapping[str, torch.Tensor], needed: torch.Tensor, unchanged: bool, accelerator: Accelerator
    ) -> tuple[torch.Tensor, int, bool]:  # (N,) of this rank -> (N, 3) of all ranks
        """
        Gather what the assignment depends on, in one collective of integers.

        Returns:
            Attended prompt and completion tokens of every row and whether it is needed, on the CPU; the width of the
            rollout batch; and whether `unchanged` is true on all ranks.
        """
        prompts, completions = (rows[f"{side}_mask"].sum(dim=1) for side in ("prompt", "completion"))
        table = torch.stack([prompts, completions, needed.to(prompts)], dim=1).int()  # (N, 3)
        widths = table.new_tensor([[rows["prompt_ids"].size(1), rows["completion_ids"].size(1), unchanged]])
        table = torch.cat([table, widths])
        if self.num_ranks > 1:
            table = accelerator.gather(table)
        ranks = table.cpu().long().view(self.num_ranks, -1, 3)
        widths = ranks[:, -1]
        width = int(widths[:, :2].amax(dim=0).sum())
        return ranks[:, :-1].flatten(0, 1), width, bool(widths[:, 2].all())

    def _plan(
        self, rows: Mapping[str, torch.Tensor], table: torch.Tensor, width: int, accelerator: Accelerator
    ) -> StepPlan:
        prompts, completions, needed = table.unbind(dim=1)
        rank_rows = self.assign(prompts + completions, needed.bool())
        exchange = RowExchange(accelerator.process_index if self.num_ranks > 1 else 0, rank_rows, prompts, completions)
        packed = exchange.move(rows)
        sampled = min(exchange.sampled, self.rows_per_rank or exchange.sampled)
        planned = self.plan(packed.prompt_lengths, packed.completion_lengths, sampled, width)
        return StepPlan(exchange, packed, planned, scalars={}, source={})
