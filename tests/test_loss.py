"""The loss as a function of log-probabilities: its gradient, its value, its normaliser."""

import math

import pytest
import torch

from opo_trl.algorithm.loss import loss_normalizer, policy_gradient_loss
from opo_trl.algorithm.rollout import combine_rewards

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]])  # tool output in the last row


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_the_weighted_log_probabilities(per_token, weighted):
    generator = torch.Generator().manual_seed(0)
    logps = (-3 * torch.rand(3, 5, generator=generator)).double().requires_grad_()
    advantages = torch.randn(3, 5, generator=generator).double() if per_token else torch.tensor([0.5, -1.0, 0.25])
    weights = 3 * torch.rand(3, 5, generator=generator).double() if weighted else None
    loss = policy_gradient_loss(logps, advantages, MASK, torch.tensor(7.0), weights)
    loss.backward()
    each = advantages if per_token else advantages.unsqueeze(1)
    expected = -each * MASK * (1 if weights is None else weights) / 7
    torch.testing.assert_close(logps.grad, expected.expand(3, 5).double())
    assert loss.item() == pytest.approx(expected.sum().item()), "the value has no log-probability in it"


def test_the_value_is_zero_where_lengths_times_advantages_add_up_to_zero():
    lengths = MASK.sum(dim=1).double()  # 5, 2, 3
    rewards = torch.tensor([1.0, 0.0, 0.5]).double()
    advantages = rewards - (lengths * rewards).sum() / lengths.sum()
    loss = policy_gradient_loss(-torch.rand(3, 5).double(), advantages, MASK, lengths.sum())
    assert abs(loss.item()) < 1e-15


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_that_average_their_gradients_divide_by_the_tokens_of_all(ranks):
    lengths = torch.tensor([[5, 2, 3], [1, 0, 7]])
    assert loss_normalizer("dapo", lengths, 8, ranks).item() * ranks == pytest.approx(18)
    assert loss_normalizer("dr_grpo", lengths, 8, ranks).item() * ranks == pytest.approx(6 * 8)
    assert loss_normalizer("dapo", torch.zeros_like(lengths), 8, ranks) > 0, "nothing to train on divides by no zero"


def test_rewards_add_up_and_are_unscorable_only_where_every_function_is():
    nan = math.nan
    rewards = torch.tensor([[1.0, 2.0], [nan, 2.0], [1.0, nan], [nan, nan]])
    combined = combine_rewards(rewards, torch.tensor([1.0, 0.5]), 2)
    torch.testing.assert_close(combined, torch.tensor([[2.0, 1.0], [1.0, nan]]), equal_nan=True)
