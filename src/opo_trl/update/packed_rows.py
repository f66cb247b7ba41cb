"""
Rows of a rollout batch without their padding, and the micro-batches made of them. Pure torch.

A batch comes padded to its longest row, with 8 bytes for each token id and 8 for each entry of a mask. Packed, a token
costs 4 bytes, and a mask of padding costs nothing: it is the row's length.
"""

from dataclasses import dataclass

import torch

from .microbatches import MicroBatch

PADDING_MASKS = ("prompt_mask", "completion_mask")
# Token ids fit 31 bits, and the mask of tool output holds 0 and 1.
NARROW = {"prompt_ids": torch.int32, "completion_ids": torch.int32, "tool_mask": torch.uint8}


@dataclass(frozen=True)
class PackedRows:
    """
    M rows without padding, and what makes micro-batches of them.

    Attributes:
        prompt_lengths, completion_lengths (`torch.Tensor` of shape `(M,)`):
            *Attended* tokens of each row, int64, on the CPU.
        columns (`dict[str, torch.Tensor]`):
            One number per token, all rows one after another, or one number per row; on the batch's device.
        filler (`dict[str, torch.Tensor]`):
            A micro-batch of one row of two tokens that attends to no completion token, with the types and dimensions of
            the batch: it neither moves the policy nor counts in any metric.
    """

    prompt_lengths: torch.Tensor
    completion_lengths: torch.Tensor
    columns: dict[str, torch.Tensor]
    filler: dict[str, torch.Tensor]

    def micro_batch(self, planned: MicroBatch) -> dict[str, torch.Tensor]:
        """Pad the rows of a planned micro-batch: prompts on the left, completions on the right, with zeros."""
        if not planned.informative:
            return dict(self.filler)
        return {
            name: self.columns[name][planned.rows.to(filler.device)]
            if filler.ndim == 1
            else self._pad(name, planned.rows.to(filler.device), planned)
            for name, filler in self.filler.items()
        }

    def _pad(self, name: str, rows: torch.Tensor, planned: MicroBatch) -> torch.Tensor:  # (B,) -> (B, width)
        dtype, left = self.filler[name].dtype, name.startswith("prompt")
        width = planned.prompt_width if left else planned.completion_width
        all_lengths = (self.prompt_lengths if left else self.completion_lengths).to(rows.device)  # (M,)
        lengths = all_lengths[rows].unsqueeze(1)  # (B, 1)
        place = torch.arange(width, device=rows.device) - (width - lengths if left else 0)  # (B, width), in the row
        attended = (place >= 0) & (place < lengths)
        if name in PADDING_MASKS:
            return attended.to(dtype)
        column = self.columns[name]
        if not len(column):
            return torch.zeros(attended.shape, dtype=dtype, device=rows.device)
        starts = (all_lengths.cumsum(dim=0) - all_lengths)[rows].unsqueeze(1)  # (B, 1)
        tokens = column[(starts + place).clamp(0, len(column) - 1)]  # (B, width), with other rows' where not attended
        return torch.where(attended, tokens, 0).to(dtype)


def pack_column(name: str, tensor: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """
    Take some rows of one column: `(N,)` or `(N, T)` to `(M,)` or `(sum of lengths,)`.

    Floating-point numbers stay as they are; others get the narrowest type that holds the column.
    """
    if tensor.ndim == 1:
        return tensor[rows.to(tensor.device)]
    places = token_places(rows.to(tensor.device), lengths, tensor.size(1), padded_left=name.startswith("prompt"))
    values = tensor.flatten()[places]
    return values if values.is_floating_point() else values.to(NARROW.get(name, values.dtype))


def filler_of(name: str, tensor: torch.Tensor) -> torch.Tensor:  # (N,) or (N, T) -> (1,) or (1, 1)
    """One row of one token; a copy, so that it does not keep the batch's memory."""
    if tensor.ndim == 1:
        return tensor[:1].clone()
    return (tensor[:1, -1:] if name.startswith("prompt") else tensor[:1, :1]).clone()


def token_places(
    rows: torch.Tensor, lengths: torch.Tensor, width: int, padded_left: bool = False
) -> torch.Tensor:  # (M,), (M,) -> (sum of lengths,)
    """Places of the rows' tokens in a flattened batch of this width, one row after another."""
    total, lengths = int(lengths.sum()), lengths.to(rows.device)
    first = rows * width + (width - lengths if padded_left else 0)  # (M,)
    before = lengths.cumsum(dim=0) - lengths  # (M,)
    return torch.arange(total, device=rows.device) + (first - before).repeat_interleave(lengths, output_size=total)
