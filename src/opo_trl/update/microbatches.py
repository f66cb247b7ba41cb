"""
Which rows of a rollout batch share a micro-batch, and which padding is trimmed. Pure torch.

All rows of a rollout batch feed one optimizer step, so neither their order nor their grouping can change the gradient,
and a row whose advantage is 0 adds nothing to it. So rows of similar lengths share a micro-batch, uninformative rows
are left out, and every micro-batch is as wide as its own longest row. None of this is possible for a trainer that takes
several steps per batch or adds a KL term.
"""

from typing import NamedTuple

import torch

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

    Among all contiguous cuts of the sorted rows into `num_microbatches` parts whose largest part has at most `largest`
    padded tokens (or as few as any cut can have, where that is more), the one with the smallest total is found by
    dynamic programming, in O(N^2) per micro-batch.

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
    prompts, completions = prompt_lengths[order].cpu(), completion_lengths[order].clamp(min=1).cpu()
    num_cuts = min(num_microbatches, len(order))
    cost, prompt_widths, completion_widths = _padded_tokens(prompts, completions, pad_to_multiple_of or 1)
    micro_batches = [
        MicroBatch(
            order[start:end],
            int(prompt_widths[start, end - 1]),
            int(completion_widths[start, end - 1]),
        )
        for start, end in _cheapest_cut(cost, num_cuts, largest)
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
        tensor = tensor[chosen.to(tensor.device)]
        if name.startswith("prompt"):
            tensor = tensor[:, -micro_batch.prompt_width :]
        elif tensor.ndim == 2:
            tensor = tensor[:, : micro_batch.completion_width]
        part[name] = tensor
    if not micro_batch.informative:
        part["completion_mask"] = torch.zeros_like(part["completion_mask"])
    return part


def _padded_tokens(
    prompts: torch.Tensor, completions: torch.Tensor, multiple: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # (N,), (N,) -> 3 x (N, N)
    """Padded tokens and widths of the micro-batch of the sorted rows i..j, at [i, j]; infinitely many for j < i."""
    size = len(prompts)
    ahead = torch.ones(size, size, dtype=torch.bool).triu()

    def widths(lengths: torch.Tensor) -> torch.Tensor:
        longest = torch.where(ahead, lengths.expand(size, size), 0).cummax(dim=1).values if size else ahead.long()
        return (longest + multiple - 1) // multiple * multiple

    prompt_widths, completion_widths = widths(prompts), widths(completions)
    position = torch.arange(size)
    rows = position - position.unsqueeze(1) + 1
    cost = torch.where(ahead, (rows * (prompt_widths + completion_widths)).double(), torch.inf)
    return cost, prompt_widths, completion_widths


def _cheapest_cut(cost: torch.Tensor, num_cuts: int, largest: float) -> list[tuple[int, int]]:
    """Boundaries (start, end) of the cut into exactly `num_cuts` parts with the smallest total cost."""
    size = len(cost)
    # bottleneck[j]: the smallest possible largest part of the first j rows in as many parts as rounds gone by
    bottleneck = cost[0].clone() if size else cost
    for _ in range(num_cuts - 1):
        bottleneck = torch.maximum(_before(bottleneck).unsqueeze(1), cost).amin(dim=0)
    if size:
        cost = torch.where(cost <= max(largest, float(bottleneck[-1])), cost, torch.inf)
    total, choices = cost[0].clone() if size else cost, []
    for _ in range(num_cuts - 1):
        total, choice = (_before(total).unsqueeze(1) + cost).min(dim=0)
        choices.append(choice)
    bounds, end = [], size
    for choice in reversed(choices):
        start = int(choice[end - 1])
        bounds.append((start, end))
        end = start
    return [(0, end), *reversed(bounds)] if size else []


def _before(best: torch.Tensor) -> torch.Tensor:  # (N,) -> (N,)
    """Best value of the rows before i, at [i]: infinite for i = 0, since every part holds a row."""
    return torch.cat([best.new_full((1,), torch.inf), best[:-1]])
