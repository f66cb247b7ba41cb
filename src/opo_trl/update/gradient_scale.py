"""One factor for the accumulated gradients of a step, for a normaliser that is known only once all rows are."""

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """
    Multiply gradients in place, after they are reduced and before they are clipped.

    The gradient is linear in the loss, so the result is the gradient under the other normaliser. This holds for one
    process, data parallelism and FSDP, where each rank scales its shard. DeepSpeed does not allow it.
    """
    if factor == 1.0:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
