"""A loss or a gradient that is not finite stops the run on all ranks, before anything of its step is saved."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn


class FiniteSteps:
    """
    Sums the losses of a step's micro-batches, and raises on all ranks where they or the gradients are not finite.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Its processes agree.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.loss = torch.zeros(())  # of this rank's micro-batches in the step so far

    def add(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss: a sum with a number that is not finite is not finite, either."""
        self.loss = self.loss + loss.float()

    def take(self) -> torch.Tensor:
        """Return the sum, and start the next step's."""
        loss, self.loss = self.loss, torch.zeros(())
        return loss

    def check_loss(self, step: int) -> None:
        """
        Refuse the step's loss on all ranks if it is not finite on any.

        Raises:
            ValueError: With the loss and the ranks.
        """
        losses = self.accelerator.gather(self.take().reshape(1).to(self.accelerator.device))  # (W,)
        bad_ranks = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad_ranks:
            what = f"The loss must be finite: it is {losses[bad_ranks[0]].item()}"
            raise _not_finite(what, step, f"on rank {bad_ranks}")

    def check_gradients(self, model: nn.Module, grad_norm: Any, step: int) -> None:
        """
        Refuse gradients whose norm, which is that of all ranks, is not finite.

        Raises:
            ValueError: With the norm, and the parameters whose gradients are not finite.
        """
        # Under fp16 a gradient too large for the loss scale is not bad: the step is skipped and the scale lowered.
        # DeepSpeed stops by itself when its scale can fall no further. It has called a norm that is not finite -1.
        if grad_norm is None or 0 <= grad_norm < math.inf or self._scales_loss():
            return
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        # Scaling by a norm that is not finite spreads it over all parameters: then they tell nothing.
        where = f"in {bad}" if 0 < len(bad) < len(gradients) else ""
        raise _not_finite(f"Gradients must be finite: their norm is {float(grad_norm)}", step, where)

    def _scales_loss(self) -> bool:
        """Whether there is a loss scale that can still be lowered."""
        if self.accelerator.mixed_precision != "fp16":
            return False
        return self.accelerator.scaler is None or self.accelerator.scaler.get_scale() >= 1


def _not_finite(what: str, step: int, where: str) -> ValueError:
    return ValueError(
        f"{what} in step {step}{where and f', {where}'}. Nothing of this step is saved. Resume from the last "
        "checkpoint with a lower learning rate, or with another dtype."
    )
