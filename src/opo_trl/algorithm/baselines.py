"""
The optimal reward baseline of OPO (arXiv 2505.23585), and the baselines that it is compared with.

    b*(x) = sum_i l_i r_i / sum_i l_i        optimal reward baseline (Eq. 12)
    A_i   = r_i - b*(x)                      no division by a standard deviation

The exact optimum (Eq. 9) weighs each reward by the squared norm of its completion's score, |grad log pi(y_i|x)|^2; the
paper takes the completion length l_i in its place, because that norm grows with the number of summed token gradients.

A baseline maps rewards (P, K) and weights (P, K) to (P, 1) or (P, K), as [`OPOTrainer.baseline`] does. A weight of 0
marks a completion that takes no part.
"""

import torch


def optimal_baseline(
    rewards: torch.Tensor, lengths: torch.Tensor, length_exponent: float = 1.0
) -> torch.Tensor:  # (P, K), (P, K) -> (P, 1)
    r"""
    Length-weighted mean reward of each group (arXiv 2505.23585, Eq. 10 and 12).

    A completion takes part if it was scored and has a token to train on: a NaN reward or a length of 0 gives it
    weight 0. A group in which no completion takes part has the baseline 0.

    Args:
        rewards (`torch.Tensor` of shape `(P, K)`):
            Reward of each of the K completions of each of the P prompts. NaN marks an unscorable completion.
        lengths (`torch.Tensor` of shape `(P, K)`):
            Number of *trainable* tokens of each completion: tool output and masked-out completions do not count. Or
            another weight, such as [`token_uncertainty`].
        length_exponent (`float`, *optional*, defaults to `1.0`):
            Power of the length in the weight. `1.0` is OPO; `0.0` is the plain group mean.

    Returns:
        `torch.Tensor` of shape `(P, 1)`, in the unit of the rewards and in at least float32. It lies within the range
        of the rewards that take part, exactly: where these are all equal, it is that reward to the last bit.

    Raises:
        ValueError: If the shapes differ or are not `(P, K)`, a reward is infinite, or a length is negative.
    """
    if rewards.ndim != 2 or rewards.shape != lengths.shape:
        raise ValueError(
            "rewards and lengths must both have the shape (P, K), one row per prompt and one column per completion, "
            f"got {tuple(rewards.shape)} and {tuple(lengths.shape)}."
        )
    if torch.isinf(rewards).any() or (lengths < 0).any():
        raise ValueError(
            "rewards must not be infinite (NaN marks an unscorable one) and lengths must not be negative, got "
            f"rewards {rewards.tolist()} and lengths {lengths.tolist()}."
        )
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    active = takes_part(rewards, lengths)  # (P, K)
    lengths = lengths.to(rewards.dtype)
    if length_exponent not in (0, 1):  # high powers of thousands of tokens overflow; b* does not depend on the unit
        lengths = lengths / torch.where(active, lengths, 0.0).amax(dim=1, keepdim=True)
    weights = torch.where(active, lengths**length_exponent, 0.0)  # (P, K)
    total_weight = weights.sum(dim=1, keepdim=True)  # (P, 1)
    weighted_sum = (weights * torch.where(active, rewards, 0.0)).sum(dim=1, keepdim=True)  # (P, 1)
    # A weighted mean lies between the smallest and the largest of its values. Rounding can push it outside by the last
    # bit, and would leave an advantage of 1e-8 (a full forward and backward) where no completion is informative.
    lowest, highest = reward_range(rewards, active)  # (P, 1)
    baseline = (weighted_sum / total_weight).clamp(min=lowest, max=highest)
    return torch.where(total_weight > 0, baseline, 0.0)


def opo_advantages(
    rewards: torch.Tensor, lengths: torch.Tensor, length_exponent: float = 1.0
) -> torch.Tensor:  # (P, K), (P, K) -> (P, K)
    r"""
    Advantages of OPO, `r - b*`: the reward minus the optimal baseline of its group, not divided by anything.

    In every group `sum_i l_i A_i = 0` (with `length_exponent=1`), so a loss that sums token terms has the value 0 by
    construction; its gradient is what counts.

    Args:
        rewards, lengths, length_exponent:
            As in [`optimal_baseline`].

    Returns:
        `torch.Tensor` of shape `(P, K)`. Exactly 0.0, not a rounding residue, for a completion that takes no part
        (unscorable, or nothing to train on) and wherever the rewards that take part are all equal or only one is left.

    Raises:
        ValueError: As in [`optimal_baseline`].
    """
    advantages = rewards - optimal_baseline(rewards, lengths, length_exponent)
    return torch.where(takes_part(rewards, lengths), advantages, 0.0)


def takes_part(rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:  # (P, K), (P, K) -> (P, K), bool
    """Whether a completion counts: it was scored, and it has a token to train on."""
    return ~torch.isnan(rewards) & (lengths > 0)


def reward_range(
    rewards: torch.Tensor, scored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # (P, K), (P, K) -> (P, 1), (P, 1)
    """Smallest and largest reward of each group's scored completions; infinite and minus infinite where none is."""
    lowest = torch.where(scored, rewards, torch.inf).amin(dim=1, keepdim=True)
    highest = torch.where(scored, rewards, -torch.inf).amax(dim=1, keepdim=True)
    return lowest, highest


def no_baseline(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:  # (P, K), (P, K) -> (P, 1)
    """Plain REINFORCE: the advantage is the reward."""
    return torch.zeros_like(rewards[:, :1])


def group_mean(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:  # (P, K), (P, K) -> (P, 1)
    """Unweighted mean reward of each group, the baseline of GRPO."""
    return optimal_baseline(rewards, weights, length_exponent=0.0)


def leave_one_out(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:  # (P, K), (P, K) -> (P, K)
    """
    Mean reward of the *other* completions of the group, which does not bias the gradient.

    Args:
        rewards (`torch.Tensor` of shape `(P, K)`):
            Reward of each completion.
        weights (`torch.Tensor` of shape `(P, K)`):
            0 for a completion that takes no part; other values do not matter.

    Returns:
        `torch.Tensor` of shape `(P, K)`. A completion that takes part alone is its own baseline: there is nothing to
        compare it with.
    """
    scored = takes_part(rewards, weights)  # (P, K)
    known = torch.where(scored, rewards, 0.0)
    others = scored.sum(dim=1, keepdim=True) - scored.int()  # (P, K)
    mean = (known.sum(dim=1, keepdim=True) - known) / others.clamp(min=1)
    return torch.where(others > 0, mean, known)


def token_uncertainty(logps: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:  # (B, C), (B, C) -> (B,)
    r"""
    `sum_t (1 - pi(y_t))^2`, a weight in place of the length: confident tokens contribute almost no gradient.

    The squared norm of a token's score with respect to the logits, `(1 - pi(y_t))^2 + sum_{v != y_t} pi(v)^2` (the
    weight of arXiv 2602.07078), is between once and twice this, which takes the tokens' own log-probabilities alone.
    """
    return uncertainties(logps, loss_mask).sum(dim=1)


def uncertainties(logps: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:  # (B, C), (B, C) -> (B, C)
    """`(1 - pi(y_t))^2` of each trainable token, 0 for the others."""
    return torch.expm1(logps.float()).square() * loss_mask


def surprise(logps: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:  # (B, C), (B, C) -> (B,)
    """`sum_t (1 - pi(y_t))`, whose expectation over `y_t` is that of the squared norm of the score."""
    return -(torch.expm1(logps.float()) * loss_mask).sum(dim=1)


def logit_norm(log_probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:  # (C, V), (C,) -> ()
    """`sum_t (1 - 2 pi(y_t) + sum_v pi(v)^2)`, the squared norm of the score in the logits (arXiv 2602.07078)."""
    probabilities = log_probs.exp()
    own = probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return (1 - 2 * own + probabilities.square().sum(dim=1)).sum()
