"""Moves rows from the ranks that sampled them to the ranks that train them: only those that change rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import distributed

from .packed_rows import PADDING_MASKS, PackedRows, filler_of, pack_column, token_places


@dataclass(frozen=True)
class RowExchange:
    """
    Where the rows of a rollout batch are sampled and where they are trained.

    All ranks hold the same values except `rank`, so each knows what the others send it. A row moves without its
    padding. If every row stays on its rank, nothing is sent.

    Args:
        rank (`int`):
            This rank.
        rank_rows (`list[torch.Tensor]`):
            For each rank the rows that it trains, as positions in the rollout batch of all ranks.
        prompt_lengths, completion_lengths (`torch.Tensor` of shape `(N,)`):
            Attended tokens of every row of the rollout batch of all ranks, on the CPU. Each rank has sampled as many
            rows as the others, one rank's after another's.
    """

    rank: int
    rank_rows: list[torch.Tensor]
    prompt_lengths: torch.Tensor
    completion_lengths: torch.Tensor

    @property
    def sampled(self) -> int:
        """Rows that each rank has sampled."""
        return len(self.prompt_lengths) // len(self.rank_rows)

    def moving(self, source: int, target: int) -> torch.Tensor:
        """Rows that the rank `source` has sampled and `target` trains; none where they are the same."""
        rows = self.rank_rows[target]
        return rows[(rows // self.sampled == source) & (source != target)]

    @cached_property
    def kept(self) -> torch.Tensor:
        """Rows that this rank has sampled and trains."""
        rows = self.rank_rows[self.rank]
        return rows[rows // self.sampled == self.rank]

    @cached_property
    def sent(self) -> list[torch.Tensor]:
        """For each rank, the rows that it gets from this one."""
        return [self.moving(self.rank, target) for target in range(len(self.rank_rows))]

    @cached_property
    def received(self) -> list[torch.Tensor]:
        """For each rank, the rows that this one gets from it."""
        return [self.moving(source, self.rank) for source in range(len(self.rank_rows))]

    @cached_property
    def order(self) -> torch.Tensor:
        """Rows that this rank trains, in the order in which they are packed."""
        return torch.cat([self.kept, *self.received])

    @cached_property
    def anything_moves(self) -> bool:
        """Whether any rank sends a row to another."""
        return any(bool((rows // self.sampled != rank).any()) for rank, rows in enumerate(self.rank_rows))

    def includes(self, rows: torch.Tensor) -> bool:  # (N,), bool
        """Whether all of these rows are trained by some rank."""
        assigned = torch.zeros_like(rows)
        assigned[torch.cat(self.rank_rows)] = True
        return bool(assigned[rows].all())

    def move(self, batch: Mapping[str, torch.Tensor]) -> PackedRows:
        """Send this rank's rows to where they are trained, and return those that it trains, in the `order`."""
        columns = {name: self.move_column(name, batch[name]) for name in batch if name not in PADDING_MASKS}
        filler = {name: filler_of(name, tensor) for name, tensor in batch.items()}
        filler["completion_mask"].zero_()
        return PackedRows(self.prompt_lengths[self.order], self.completion_lengths[self.order], columns, filler)

    def move_column(self, name: str, tensor: torch.Tensor) -> torch.Tensor:  # (N,) or (N, T) of this rank
        """Move one column of the batch: numbers of the rows that this rank trains, packed, in the `order`."""
        lengths = self._lengths(name, tensor)
        first = self.rank * self.sampled
        kept = pack_column(name, tensor, self.kept - first, lengths[self.kept])
        if not self.anything_moves:
            return kept
        sent_rows = torch.cat(self.sent)
        sent = pack_column(name, tensor, sent_rows - first, lengths[sent_rows])
        return torch.cat([kept, _exchange(sent, _sizes(lengths, self.sent), _sizes(lengths, self.received))])

    def return_tokens(self, values: torch.Tensor, width: int) -> torch.Tensor:  # (sum of lengths,) -> (N, width)
        """Send a number for each completion token back to where its row was sampled; 0 for rows that nobody trains."""
        lengths = self.completion_lengths
        kept, moved = values.split([int(lengths[self.kept].sum()), int(lengths[self.order[len(self.kept) :]].sum())])
        if self.anything_moves:
            kept = torch.cat([kept, _exchange(moved, _sizes(lengths, self.received), _sizes(lengths, self.sent))])
        rows = torch.cat([self.kept, *self.sent])
        places = token_places((rows - self.rank * self.sampled).to(values.device), lengths[rows], width)
        found = torch.zeros(self.sampled * width, dtype=values.dtype, device=values.device)
        found[places] = kept
        return found.view(self.sampled, width)

    def _lengths(self, name: str, tensor: torch.Tensor) -> torch.Tensor:  # (N,), of all ranks
        """How many numbers of a column belong to each row."""
        if tensor.ndim == 1:
            return torch.ones_like(self.prompt_lengths)
        return self.prompt_lengths if name.startswith("prompt") else self.completion_lengths


def _sizes(lengths: torch.Tensor, rows: list[torch.Tensor]) -> list[int]:
    return [int(lengths[each].sum()) for each in rows]


def _exchange(sent: torch.Tensor, sent_sizes: list[int], received_sizes: list[int]) -> torch.Tensor:
    received = sent.new_empty(sum(received_sizes))
    distributed.all_to_all_single(received, sent, received_sizes, sent_sizes)
    return received
