"""Decisions that all ranks take together."""

import torch
from accelerate import Accelerator


def any_rank(accelerator: Accelerator, value: bool) -> bool:
    """Return whether `value` is true on any rank; all ranks call it together."""
    flag = torch.tensor(int(value), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())
