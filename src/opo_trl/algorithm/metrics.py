"""What OPO logs of one rollout batch. Pure torch, on the rollout of all ranks."""

import torch

from .baselines import takes_part
from .rollout import Rollout


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    r"""
    Describe the baseline of a rollout batch.

    Args:
        rollout ([`Rollout`]):
            Rewards, lengths, weights, baseline and advantages as they are trained.

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
    rewards, lengths = rollout.rewards.cpu().double(), rollout.lengths.cpu().double()
    weights = rollout.completion_weights.cpu().double()
    scored = takes_part(rewards, weights)  # (P, K)
    group = scored.any(dim=1, keepdim=True)  # (P, 1)
    count = scored.sum(dim=1, keepdim=True).clamp(min=1)
    known_rewards, known_lengths = torch.where(scored, rewards, 0.0), torch.where(scored, lengths, 0.0)
    mean = known_rewards.sum(dim=1, keepdim=True) / count  # (P, 1)
    if rollout.baseline.shape == (len(rewards), 1):
        baseline = rollout.baseline.cpu().double()  # (P, 1)
    else:  # one for each completion or token: their mean over the completions that take part
        subtracted = torch.where(scored, rewards - rollout.completion_advantages.cpu().double(), 0.0)  # (P, K)
        baseline = subtracted.sum(dim=1, keepdim=True) / count
    reward_deviation = torch.where(scored, rewards - mean, 0.0)  # (P, K)
    length_deviation = torch.where(scored, lengths - known_lengths.sum(dim=1, keepdim=True) / count, 0.0)
    spread = (length_deviation.square().sum() * reward_deviation.square().sum()).sqrt()
    around_baseline = (weights * torch.where(scored, rewards - baseline, 0.0).square()).sum()
    around_mean = (weights * reward_deviation.square()).sum()
    metrics = {
        "opo/baseline": baseline[group].mean(),
        "opo/baseline_minus_mean": (baseline - mean)[group].mean(),
        "opo/length_reward_correlation": (length_deviation * reward_deviation).sum() / spread,
        "opo/informative_fraction": rollout.informative.double().mean(),
        "opo/unscorable_fraction": torch.isnan(rewards).double().mean(),
        "opo/variance_proxy": 1 - around_baseline / around_mean,
    }
    return {name: value.item() for name, value in metrics.items()}
