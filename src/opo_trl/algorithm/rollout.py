"""What OPO computes of one rollout batch, in one place: everything that is logged or trained reads it. Pure torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from .baselines import reward_range, takes_part


@dataclass(frozen=True)
class Rollout:
    """
    One rollout batch of all ranks: P prompts with K completions each, at most T tokens long.

    Attributes:
        rewards (`torch.Tensor` of shape `(P, K)`):
            Reward of each completion, NaN where it is unscorable.
        lengths (`torch.Tensor` of shape `(P, K)`):
            Number of trainable tokens of each completion.
        weights (`torch.Tensor` of shape `(P, K)` or `(P, K, T)`):
            Weight of each completion, or of each of its tokens, in the baseline; 0 for a completion that takes no part
            in it, because it is unscorable or has no trainable token.
        baseline (`torch.Tensor` of shape `(P, 1)`, `(P, K)`, `(P, 1, T)` or `(P, K, T)`):
            Baseline of each group, completion or token, in the unit of the rewards.
        advantages (`torch.Tensor` of shape `(P, K)` or `(P, K, T)`):
            Reward minus baseline; exactly 0 for a completion that takes no part.
    """

    rewards: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor
    baseline: torch.Tensor
    advantages: torch.Tensor

    @property
    def completion_weights(self) -> torch.Tensor:  # (P, K)
        """Weight of each completion: the sum over its tokens where these are weighed one by one."""
        return sum_over_tokens(self.weights)

    @property
    def completion_advantages(self) -> torch.Tensor:  # (P, K)
        """Advantage of each completion: the mean over its trainable tokens where these have their own."""
        return self.advantages if self.advantages.ndim == 2 else self._mean_over_tokens(self.advantages)

    @property
    def completion_baselines(self) -> torch.Tensor:  # (P, K)
        """Baseline of each completion: the mean over its trainable tokens where these have their own."""
        if self.baseline.ndim == 2:
            return self.baseline.expand_as(self.rewards)
        return self._mean_over_tokens(self.baseline)

    def _mean_over_tokens(self, values: torch.Tensor) -> torch.Tensor:  # (P, 1, T) or (P, K, T) -> (P, K)
        trained = self.weights > 0  # (P, K, T)
        return (values * trained).sum(dim=2) / trained.sum(dim=2).clamp(min=1)

    def advantages_of(self, rows: slice, width: int) -> torch.Tensor:  # (N,) or (N, width)
        """Advantages of some of the P * K completions, at most `width` tokens of each where tokens have their own."""
        advantages = self.advantages.flatten(0, 1)[rows]
        return advantages[:, :width] if advantages.ndim == 2 else advantages

    @property
    def informative(self) -> torch.Tensor:  # (P, K), bool
        """Whether a completion has a non-zero advantage, and so moves the policy."""
        nonzero = self.advantages != 0
        return nonzero.any(dim=2) if nonzero.ndim == 3 else nonzero

    @property
    def informative_groups(self) -> torch.Tensor:  # (P,), bool
        """Whether any completion of a group is informative; with OPO's baseline, whether its rewards differ."""
        return self.informative.any(dim=1)

    @property
    def informative_lengths(self) -> torch.Tensor:  # (G, K)
        """Lengths of the informative groups; of all groups if none is, so that a normaliser made of them is not 0."""
        groups = self.informative_groups
        return self.lengths[groups] if groups.any() else self.lengths


def combine_rewards(
    rewards_per_func: torch.Tensor, func_weights: torch.Tensor, group_size: int
) -> torch.Tensor:  # (N, F), (F,) -> (P, K)
    """Weighted sum over the reward functions, NaN where none of them returned a number."""
    weighted = rewards_per_func * func_weights.to(rewards_per_func.device)  # (N, F), NaN for None
    unscorable = torch.isnan(weighted).all(dim=1)  # (N,)
    return torch.where(unscorable, torch.nan, weighted.nansum(dim=1)).view(-1, group_size)


def sum_over_tokens(weights: torch.Tensor) -> torch.Tensor:  # (P, K) or (P, K, T) -> (P, K)
    """Weight of each completion, from those of completions or of their tokens."""
    return weights.sum(dim=2) if weights.ndim == 3 else weights


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Join the groups of several rollouts, in their order. All of them come from the same kind of baseline."""

    def joined(name: str) -> torch.Tensor:
        parts = [getattr(rollout, name) for rollout in rollouts]
        if parts[0].ndim == 3:  # a value for each token
            width = max(part.size(2) for part in parts)
            parts = [nn.functional.pad(part, (0, width - part.size(2))) for part in parts]
        return torch.cat(parts)

    return Rollout(**{field.name: joined(field.name) for field in fields(Rollout)})


def estimate_advantages(
    rewards: torch.Tensor,
    lengths: torch.Tensor,
    weights: torch.Tensor,
    baseline: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Rollout:  # (P, K), (P, K), (P, K) or (P, K, T)
    """
    Subtract a baseline from the rewards.

    Args:
        rewards (`torch.Tensor` of shape `(P, K)`):
            Reward of each completion, NaN where it is unscorable.
        lengths (`torch.Tensor` of shape `(P, K)`):
            Number of trainable tokens of each completion.
        weights (`torch.Tensor` of shape `(P, K)` or `(P, K, T)`):
            Weight of each completion, or of each of its tokens.
        baseline (`Callable`):
            Maps rewards `(P, K)` and weights to the baseline. Both are 0 for a completion that takes no part, so that
            weighted sums need no mask. With weights `(P, K)` it returns `(P, 1)` or `(P, K)`; with weights `(P, K, T)`
            it may return `(P, 1, T)` or `(P, K, T)`, too.

    Returns:
        [`Rollout`]. Where all rewards of a group are equal, an advantage that differs from 0 by rounding alone is 0, so
        that it costs no forward and backward pass.

    Raises:
        ValueError: If the baseline is no tensor of such a shape, or is not finite.
    """
    scored = takes_part(rewards, sum_over_tokens(weights))  # (P, K)
    lowest, highest = reward_range(rewards, scored)  # (P, 1)
    known = torch.where(scored, rewards, 0.0)
    used = torch.where(scored.unsqueeze(2) if weights.ndim == 3 else scored, weights, 0)
    subtracted = baseline(known, used)
    _check_baseline(subtracted, used)
    equal = lowest == highest  # (P, 1)
    if subtracted.ndim == 3:
        known, scored, equal = known.unsqueeze(2), scored.unsqueeze(2), equal.unsqueeze(2)
    advantages = torch.where(scored, known - subtracted, 0.0)
    rounding = 8 * torch.finfo(advantages.dtype).eps * known.abs()
    advantages = torch.where(equal & (advantages.abs() <= rounding), 0.0, advantages)
    if advantages.ndim == 3:  # where no token is trained, a baseline says nothing
        advantages = torch.where(used > 0, advantages, 0.0)
    return Rollout(rewards, lengths, used, subtracted, advantages)


def _check_baseline(baseline: torch.Tensor, weights: torch.Tensor) -> None:
    prompts, group_size, *tokens = weights.shape
    allowed = [(prompts, 1), (prompts, group_size)] + [(prompts, size, *tokens) for size in (1, group_size) if tokens]
    is_tensor = isinstance(baseline, torch.Tensor)
    if not is_tensor or tuple(baseline.shape) not in allowed:
        raise ValueError(
            f"A baseline must be a tensor of one of the shapes {', '.join(map(str, allowed))}: one number for each "
            f"prompt or completion{', or each of its tokens' if tokens else ''}; got "
            f"{tuple(baseline.shape) if is_tensor else type(baseline)}. Keep the dimensions in sums and means "
            "(`keepdim=True`), and take `.values` of a median."
        )
    if not baseline.isfinite().all():
        raise ValueError(
            f"A baseline must be finite, got {int((~baseline.isfinite()).sum())} of {baseline.numel()} numbers that "
            "are not. Guard divisions: the weights of a group are all 0 where no completion takes part."
        )
