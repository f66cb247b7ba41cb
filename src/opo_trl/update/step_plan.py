"""What a rank trains in an optimizer step, and how it is cut."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .microbatches import MicroBatch
from .packed_rows import PackedRows, filler_of
from .row_exchange import RowExchange


@dataclass(frozen=True)
class StepPlan:
    """
    The rows that this rank trains in an optimizer step, and the micro-batches that they are cut into.

    Attributes:
        exchange ([`RowExchange`]):
            Where each row of the step is sampled and where it is trained.
        rows ([`PackedRows`]):
            Those that this rank trains.
        planned (`list[MicroBatch]`):
            How they are cut, the largest micro-batch first.
        scalars (`dict[str, torch.Tensor]`):
            What all micro-batches share, such as the normaliser of the loss.
        source (`dict[str, torch.Tensor]`):
            The tensors of this rank's part of the rollout batch, of a plan made before the advantages were known; else
            empty, so that their memory can be freed.
    """

    exchange: RowExchange
    rows: PackedRows
    planned: list[MicroBatch]
    scalars: dict[str, torch.Tensor]
    source: dict[str, torch.Tensor]

    def micro_batches(self) -> list[dict[str, torch.Tensor]]:
        """Make this rank's micro-batches, the largest first."""
        return [{**self.rows.micro_batch(part), **self.scalars} for part in self.planned]

    def made_of(self, rows: Mapping[str, torch.Tensor]) -> bool:
        """Whether the plan was made of these tensors, advantages aside: a subclass may have replaced one since."""
        names = rows.keys() - {"advantages"}
        return names == self.source.keys() and all(rows[name] is self.source[name] for name in names)

    def with_advantages(self, advantages: torch.Tensor, scalars: dict[str, torch.Tensor]) -> "StepPlan":
        """Complete a plan made before the advantages were known. All ranks call it together."""
        columns = {**self.rows.columns, "advantages": self.exchange.move_column("advantages", advantages)}
        filler = {**self.rows.filler, "advantages": filler_of("advantages", advantages)}
        return replace(self, rows=replace(self.rows, columns=columns, filler=filler), scalars=scalars, source={})
