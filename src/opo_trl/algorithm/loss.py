"""OPO's loss: REINFORCE with one normaliser for the rollout batch. Pure torch."""

import torch


def policy_gradient_loss(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    normalizer: torch.Tensor,
    token_weights: torch.Tensor | None = None,
) -> torch.Tensor:  # (B, C), (B,) or (B, C), (B, C), () -> ()
    r"""
    `-sum_i sum_t A_i log pi(y_i,t) / normalizer`, the policy gradient of a micro-batch (arXiv 2505.23585, Eq. 11).

    It is written as `A exp(x - x.detach())` with `x = log pi`, whose gradient is that of `A x` and whose value is `A`.
    So the value over a step is `-sum_i l_i A_i / normalizer`, 0 by construction, and any other value reveals a mistake.

    Args:
        logps (`torch.Tensor` of shape `(B, C)`):
            Log-probabilities of the sampled tokens under the trained policy.
        advantages (`torch.Tensor` of shape `(B,)` or `(B, C)`):
            Advantage of each completion, or of each of its tokens.
        mask (`torch.Tensor` of shape `(B, C)`):
            1 for trainable tokens.
        normalizer (`torch.Tensor` of shape `()`):
            As [`loss_normalizer`] returns it.
        token_weights (`torch.Tensor` of shape `(B, C)`, *optional*):
            Importance weights that correct the sampler's numerics, constants of the gradient.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    advantages = advantages.unsqueeze(1) if advantages.ndim == 1 else advantages
    per_token_objective = advantages * torch.exp(logps - logps.detach())  # (B, C)
    if token_weights is not None:
        per_token_objective = per_token_objective * token_weights
    return -(per_token_objective * mask).sum() / normalizer


def loss_normalizer(loss_type: str, lengths: torch.Tensor, max_length: int, num_ranks: int) -> torch.Tensor:  # (P, K)
    """
    Return one normaliser for the rollout batch, so that the gradient does not depend on the micro-batches.

    Args:
        loss_type (`str`):
            `"dapo"` divides by the number of trainable tokens, `"dr_grpo"` by the number of completions times their
            largest length.
        lengths (`torch.Tensor` of shape `(P, K)`):
            Number of trainable tokens of each completion of all ranks.
        max_length (`int`):
            Largest number of tokens of a completion.
        num_ranks (`int`):
            Number of data-parallel ranks. They average their gradients, hence each rank's share of the total.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    if loss_type == "dapo":
        return lengths.sum().clamp(min=1) / num_ranks
    return torch.tensor(lengths.numel() * max_length, device=lengths.device) / num_ranks
