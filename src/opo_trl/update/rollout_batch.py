"""What a rollout batch of TRL consists of, and how its tokens count."""

from collections.abc import Mapping, Sequence

import torch

# A rollout batch of text: one row per completion, or one number for the batch.
ROW_TENSORS = (
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "advantages",
    "tool_mask",
    "sampling_per_token_logps",
    "log_row",
)
SCALARS = ("num_items_in_batch", "loss_normalizer")

# What TRL's forward takes besides tokens, such as the `pixel_values` of an image batch. A test compares it with TRL's.
FORWARD_ARGUMENTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def loss_mask(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:  # (B, C)
    """1 for the tokens that the policy sampled and trains on: not padding, not tool output, not masked out."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def count_tokens(micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:  # (2,), int64
    """
    Count the tokens that are attended, and all of them with padding; fillers do not count.

    The counts stay on the device: a number read here would wait for the device once per micro-batch.
    """
    counts = []
    for part in micro_batches:
        prompts, completions = part["prompt_mask"], part["completion_mask"]
        attended = prompts.sum() + completions.sum()
        padded = torch.full_like(attended, prompts.numel() + completions.numel())
        counts.append(torch.stack([attended, padded]) * completions.any())
    return torch.stack(counts).sum(dim=0)
