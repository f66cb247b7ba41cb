"""What OPO logs of one rollout batch. Pure torch, on the rewards and lengths of the whole batch."""

import torch

from .baselines import opo_advantages, optimal_baseline, takes_part


def rollout_metrics(
    rewards: torch.Tensor,
    lengths: torch.Tensor,
    length_exponent: float = 1.0,
    weights: torch.Tensor | None = None,
) -> dict[str, float]:  # (P, K), (P, K), (P, K)
    r"""
    Describe the baseline of a rollout batch.

    Args:
        rewards (`torch.Tensor` of shape `(P, K)`):
            Reward of each completion, NaN where it is unscorable.
        lengths (`torch.Tensor` of shape `(P, K)`):
            Number of trainable tokens of each completion.
        length_exponent (`float`, *optional*, defaults to `1.0`):
            As in [`~opo_trl.baselines.optimal_baseline`].
        weights (`torch.Tensor` of shape `(P, K)`, *optional*):
            What the baseline weighs completions by, where it is not their length.

    Returns:
        `dict[str, float]`, each NaN where it is undefined (no completion takes part, or nothing varies):

        - `opo/baseline`: mean of b* over groups.
        - `opo/baseline_minus_mean`: mean over groups of b* minus the plain mean reward. Below 0 where longer
          completions are the worse ones.
        - `opo/length_reward_correlation`: Pearson correlation of length and reward *within* groups, from deviations
          from each group's means, pooled.
        - `opo/informative_fraction`: share of completions whose advantage is not 0, the ones that move the policy.
        - `opo/unscorable_fraction`: share of completions for which no reward function returned a number.
        - `opo/variance_proxy`: `1 - sum_i w_i (r_i - b*)^2 / sum_i w_i (r_i - mean)^2`, the share of gradient variance
          that the theory predicts b* to save over the plain mean, with the lengths or `weights` for w. At least 0 by
          construction with `length_exponent=1`, since b* minimises the numerator: a prediction under the assumption
          that a completion's squared gradient norm grows with its weight, not evidence for it.
    """
    # (P, K) is small, and not every device has float64.
    rewards, lengths = rewards.cpu().double(), lengths.cpu().double()
    weights = lengths if weights is None else weights.cpu().double()
    active = takes_part(rewards, weights)  # (P, K)
    group = active.any(dim=1, keepdim=True)  # (P, 1)
    rewards_or_zero = torch.where(active, rewards, 0.0)
    lengths_or_zero = torch.where(active, lengths, 0.0)
    count = active.sum(dim=1, keepdim=True).clamp(min=1)
    weights_or_zero = torch.where(active, weights, 0.0)
    baseline = optimal_baseline(rewards, weights, length_exponent)  # (P, 1)
    mean = rewards_or_zero.sum(dim=1, keepdim=True) / count  # (P, 1)
    reward_deviation = torch.where(active, rewards - mean, 0.0)  # (P, K)
    length_deviation = torch.where(active, lengths - lengths_or_zero.sum(dim=1, keepdim=True) / count, 0.0)
    spread = (length_deviation.square().sum() * reward_deviation.square().sum()).sqrt()
    around_baseline = (weights_or_zero * torch.where(active, rewards - baseline, 0.0).square()).sum()
    around_mean = (weights_or_zero * reward_deviation.square()).sum()
    metrics = {
        "opo/baseline": baseline[group].mean(),
        "opo/baseline_minus_mean": (baseline - mean)[group].mean(),
        "opo/length_reward_correlation": (length_deviation * reward_deviation).sum() / spread,
        "opo/informative_fraction": (opo_advantages(rewards, weights, length_exponent) != 0).double().mean(),
        "opo/unscorable_fraction": torch.isnan(rewards).double().mean(),
        "opo/variance_proxy": 1 - around_baseline / around_mean,
    }
    return {name: value.item() for name, value in metrics.items()}
