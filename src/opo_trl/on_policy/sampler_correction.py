"""Correcting a sampler whose numerics differ from the trained model's, such as vLLM's. Pure torch."""

from typing import NamedTuple

import torch


class SamplerCorrection(NamedTuple):
    """Weights of the tokens, and what they were made of; everything of shape `(B, C)`."""

    weights: torch.Tensor  # bounded pi / sampler
    log_ratio: torch.Tensor  # log pi - log sampler, 0 where unknown
    bounded: torch.Tensor  # bool: the ratio was outside the bounds
    known: torch.Tensor  # bool: trainable, and the sampler told its log-probability

    @property
    def kl(self) -> torch.Tensor:
        """Per-token estimate of KL(sampler || policy) on the sampler's own tokens: unbiased and never negative (k3)."""
        return self.log_ratio.exp() - 1 - self.log_ratio

    def metrics(self, loss_mask: torch.Tensor) -> list[tuple[str, str, torch.Tensor, torch.Tensor]]:
        """
        Return what to log: how far the two are apart, and the weights of the trainable tokens.

        Args:
            loss_mask (`torch.Tensor` of shape `(B, C)`):
                1 for trainable tokens.

        Returns:
            `list`: Reduction, name, values `(B, C)` and the mask `(B, C)` of the tokens that count, for each metric.
        """
        return [
            ("mean", "sampling/sampling_logp_difference/mean", self.log_ratio.abs(), self.known),
            ("max", "sampling/sampling_logp_difference/max", self.log_ratio.abs(), self.known),
            ("min", "sampling/importance_sampling_ratio/min", self.weights, loss_mask),
            ("mean", "sampling/importance_sampling_ratio/mean", self.weights, loss_mask),
            ("max", "sampling/importance_sampling_ratio/max", self.weights, loss_mask),
            ("mean", "sampling/importance_sampling_ratio/bounded_fraction", self.bounded, self.known),
            ("mean", "sampling/kl", self.kl, self.known),
        ]


def correct_sampler(
    logps: torch.Tensor,
    sampler_logps: torch.Tensor,
    loss_mask: torch.Tensor,
    low: float | None,
    high: float | None,
    mask_outside: bool,
) -> SamplerCorrection:
    """
    Token-level importance weights `pi / sampler`, truncated or masked.

    Exactly on-policy, `log pi` is the log-probability that the loss computes anyway: no second forward is needed.
    Ratios are bounded token by token, since a product over thousands of tokens leaves any bound (trl#4767, trl#4772).

    Args:
        logps (`torch.Tensor` of shape `(B, C)`):
            Log-probabilities under the trained model, detached.
        sampler_logps (`torch.Tensor` of shape `(B, C)`):
            Log-probabilities that the sampler reported; NaN where it could not: that token keeps the weight 1.
        loss_mask (`torch.Tensor` of shape `(B, C)`):
            1 for trainable tokens.
        low, high (`float`, *optional*):
            Bounds of the ratio; `None` leaves that side open.
        mask_outside (`bool`):
            Give tokens outside the bounds the weight 0 instead of the bound.

    Returns:
        [`SamplerCorrection`].
    """
    log_ratio = logps - sampler_logps
    known = loss_mask.bool() & ~torch.isnan(log_ratio)
    log_ratio = torch.where(known, log_ratio, 0.0)
    ratio = log_ratio.exp()
    weights = ratio if low is None and high is None else ratio.clamp(min=low, max=high)
    bounded = weights != ratio
    return SamplerCorrection(weights.masked_fill(bounded, 0.0) if mask_outside else weights, log_ratio, bounded, known)
