"""
Which rows of a rollout batch share a micro-batch, and which padding is trimmed. Pure torch.

All rows of a rollout batch feed one optimizer step, so neither their order nor their grouping can change the gradient,
and a row whose advantage is 0 adds nothing to it. So rows of similar lengths share a micro-batch, uninformative rows
are left out, and every micro-batch is as wide as its own longest row. None of this is possible for a trainer that takes
several steps per batch or adds a KL term.
"""

from collections import Counter
from typing import NamedTuple

import torch

from .cheapest_cut import cheapest_cut

# Share of the largest micro-batch of TRL's plan that ours may take, in padded tokens, wherever the rows allow it.
# Activations grow with it, so peak memory falls with the share; docs/update.md has what it costs in time.
MEMORY_SHARE = 0.75
# Lengths that differ by less, relative, count as equal when rows are assigned to ranks. With more, fewer rows move, but
# the ranks' micro-batches differ more, which costs time where ranks meet in each of them (ZeRO-3 and FSDP).
EQUAL_LENGTH = 0.005


class MicroBatch(NamedTuple):
    """Rows to run together, and the columns to keep: the last of the prompts, the first of the completions."""

    rows: torch.Tensor  # (B,), int64
    prompt_width: int
    completion_width: int
    informative: bool = True

    @property
    def padded_tokens(self) -> int:
        return len(self.rows) * (self.prompt_width + self.completion_width)


def assign_rows(lengths: torch.Tensor, informative: torch.Tensor, num_ranks: int) -> list[torch.Tensor]:  # (N,), (N,)
    """
    Assign the informative rows to the ranks, so that all ranks get similar lengths and similar totals.

    Rows are assigned from the longest to the shortest, back and forth over the ranks: in data parallelism the slowest
    rank sets the time, and its rows would otherwise be those of whichever groups it happened to sample. A row goes to
    the rank that has sampled it, and need not be sent there, if that changes no length in the ranks' sorted rows by
    more than `EQUAL_LENGTH`.

    Args:
        lengths (`torch.Tensor` of shape `(N,)`):
            Attended tokens of every row of the rollout batch: as many rows of each rank, one rank's after another's.
        informative (`torch.Tensor` of shape `(N,)`):
            Whether the row has an advantage other than 0 and a trainable token.
        num_ranks (`int`):
            Number of data-parallel ranks.

    Returns:
        `list[torch.Tensor]`: For each rank its rows, from the longest to the shortest, up to `EQUAL_LENGTH`. Together,
        every informative row once; their numbers differ by at most one.
    """
    tokens: list[int] = lengths.tolist()
    sampled_by = {row: row * num_ranks // len(tokens) for row in informative.nonzero().flatten().tolist()}
    # Among rows of one length, those of different ranks alternate, so that each can stay where it is.
    turns: Counter[tuple[int, int]] = Counter()
    order = []
    for row, rank in sampled_by.items():
        order.append((-tokens[row], turns[tokens[row], rank], row))
        turns[tokens[row], rank] += 1
    ranked = [row for *_, row in sorted(order)]
    rank_rows: list[list[int]] = [[] for _ in range(num_ranks)]
    ranks = list(range(num_ranks))
    for start in range(0, len(ranked), num_ranks):
        rows = dict(zip(ranks, ranked[start : start + num_ranks], strict=False))  # rank -> row; the last may lack some
        for rank, row in _keep_rows(rows, sampled_by, tokens).items():
            rank_rows[rank].append(row)
        ranks.reverse()
    return [torch.tensor(rows, dtype=torch.long) for rows in rank_rows]


def _keep_rows(rows: dict[int, int], sampled_by: dict[int, int], tokens: list[int]) -> dict[int, int]:
    """Swap rows of equal length between ranks, so that more of them are at the rank that has sampled them."""
    lengths = {rank: tokens[row] for rank, row in rows.items()}  # to keep
    kept = dict(rows)
    for rank in rows:
        own, row = sampled_by[kept[rank]], kept[rank]
        if own not in kept or sampled_by[kept[own]] == own:
            continue
        changes = (abs(tokens[row] - lengths[own]), abs(tokens[kept[own]] - lengths[rank]))
        if max(changes) <= EQUAL_LENGTH * min(lengths[own], lengths[rank]):
            kept[own], kept[rank] = row, kept[own]
    return kept


def plan_microbatches(
    prompt_lengths: torch.Tensor,
    completion_lengths: torch.Tensor,
    num_microbatches: int,
    largest: int,
    pad_to_multiple_of: int | None = None,
) -> list[MicroBatch]:  # (N,), (N,)
    """
    Cut rows, sorted by length, into micro-batches with the fewest padded tokens in all.

    Only contiguous cuts of the sorted rows into `num_microbatches` parts are considered, with at most `largest` padded
    tokens in the largest part (or as few as any cut can have, where that is more). Up to `EXACT_ROWS` rows, dynamic
    programming finds the one with the smallest total, in O(N^2) time per micro-batch and O(N^2) memory.

    With more rows, the limit on the largest part is still exact, and the total is close to the smallest one
    (`benchmarks/planning.py` measures how close): dynamic programming chooses the borders among about a thousand places
    and then moves them to better rows nearby. This takes O(N log N) memory and, for K micro-batches, O((N + K) log N)
    time.

    Args:
        prompt_lengths, completion_lengths (`torch.Tensor` of shape `(N,)`):
            *Attended* tokens of each row: tool output is attended though it is not trained.
        num_microbatches (`int`):
            How many micro-batches to make: every rank runs as many as it has accumulation steps.
        largest (`int`):
            Padded tokens that the largest micro-batch should not exceed.
        pad_to_multiple_of (`int`, *optional*):
            Round both widths up to a multiple of this.

    Returns:
        `list[MicroBatch]`, `num_microbatches` of them, the largest first, so that an OOM surfaces first. With
        fewer rows than micro-batches, the rest have `informative=False` and one row (row 0) cut to one token on each
        side: ranks that run different numbers of micro-batches would deadlock.

    Raises:
        ValueError: If the shapes differ or are not `(N,)`, or `num_microbatches` is below 1.
    """
    if prompt_lengths.ndim != 1 or prompt_lengths.shape != completion_lengths.shape or num_microbatches < 1:
        raise ValueError(
            "prompt_lengths and completion_lengths must both have the shape (N,) and num_microbatches must be at least "
            f"1, got {tuple(prompt_lengths.shape)}, {tuple(completion_lengths.shape)} and {num_microbatches}."
        )
    order = (prompt_lengths + completion_lengths).argsort(stable=True)
    multiple = pad_to_multiple_of or 1
    prompt_widths, completion_widths = (
        (lengths[order].cpu() + multiple - 1) // multiple * multiple
        for lengths in (prompt_lengths, completion_lengths.clamp(min=1))
    )
    num_cuts = min(num_microbatches, len(order))
    micro_batches = [
        MicroBatch(order[start:end], int(prompt_widths[start:end].max()), int(completion_widths[start:end].max()))
        for start, end in cheapest_cut(prompt_widths, completion_widths, num_cuts, largest)
    ]
    micro_batches.sort(key=lambda micro_batch: micro_batch.padded_tokens, reverse=True)
    filler = MicroBatch(torch.zeros(1, dtype=torch.long), 1, 1, informative=False)
    return micro_batches + [filler] * (num_microbatches - num_cuts)
