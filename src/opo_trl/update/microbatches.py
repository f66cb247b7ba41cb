"""
Which rows of a rollout batch share a micro-batch, and which padding is trimmed. Pure torch.

All rows of a rollout batch feed one optimizer step, so neither their order nor their grouping can change the gradient,
and a row whose advantage is 0 adds nothing to it. So rows of similar lengths share a micro-batch, uninformative rows
are left out, and every micro-batch is as wide as its own longest row. None of this is possible for a trainer that takes
several steps per batch or adds a KL term.
"""

from typing import NamedTuple

import torch

from .cheapest_cut import cheapest_cut

# Share of the largest micro-batch of TRL's plan that ours may take, in padded tokens, wherever the rows allow it.
# Activations grow with it, so peak memory falls with the share; docs/update.md has what it costs in time.
MEMORY_SHARE = 0.75


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
    rank sets the time, and its rows would otherwise be those of whichever groups it happened to sample.

    Args:
        lengths (`torch.Tensor` of shape `(N,)`):
            Attended tokens of every row of the rollout batch.
        informative (`torch.Tensor` of shape `(N,)`):
            Whether the row has an advantage other than 0 and a trainable token.
        num_ranks (`int`):
            Number of data-parallel ranks.

    Returns:
        `list[torch.Tensor]`: For each rank its rows, from the longest to the shortest. Together, every informative row
        once; their numbers differ by at most one.
    """
    rows = informative.nonzero().flatten()
    ranked = rows[lengths[rows].argsort(stable=True, descending=True)]
    position = torch.arange(len(ranked))
    round_, place = position // num_ranks, position % num_ranks
    rank = torch.where(round_ % 2 == 0, place, num_ranks - 1 - place)
    return [ranked[rank == r] for r in range(num_ranks)]


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


def cut_rows(
    rows: dict[str, torch.Tensor], rank_rows: torch.Tensor, micro_batch: MicroBatch
) -> dict[str, torch.Tensor]:
    """
    Make one micro-batch of the plan.

    Args:
        rows (`dict[str, torch.Tensor]`):
            Tensors of a rollout batch, one row per completion: `prompt_*` padded on the left, other matrices on the
            right, vectors as they are.
        rank_rows (`torch.Tensor` of shape `(N,)`):
            Rows that the plan was made for, as positions in `rows`.
        micro_batch ([`MicroBatch`]):
            Part of the plan.

    Returns:
        `dict[str, torch.Tensor]`: Its rows, trimmed on both sides. A filler attends to no completion token, so that it
        neither moves the policy nor counts in any metric.
    """
    chosen = rank_rows[micro_batch.rows] if micro_batch.informative else micro_batch.rows
    part = {}
    for name, tensor in rows.items():
        if name.startswith("prompt"):  # slice before indexing, which copies
            tensor = tensor[:, -micro_batch.prompt_width :]
        elif tensor.ndim == 2:
            tensor = tensor[:, : micro_batch.completion_width]
        part[name] = tensor[chosen.to(tensor.device)]
    if not micro_batch.informative:
        part["completion_mask"] = torch.zeros_like(part["completion_mask"])
    return part
