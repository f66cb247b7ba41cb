"""The logged description of a rollout batch, against loops over groups."""

import math

import torch
from hypothesis import assume, given

from opo_trl.algorithm import metrics as algorithm_metrics
from opo_trl.algorithm.rollout import estimate_advantages
from opo_trl.baselines import optimal_baseline
from test_baselines import batches, oracle_baseline

NAN = math.nan


def rollout_metrics(rewards, lengths):
    return algorithm_metrics.rollout_metrics(estimate_advantages(rewards, lengths, lengths, optimal_baseline))


def groups_of(rewards, lengths):
    """Scored and trainable (reward, length) pairs of each group that has any."""
    groups = [
        [(r, n) for r, n in zip(group_r, group_n, strict=True) if not math.isnan(r) and n > 0]
        for group_r, group_n in zip(rewards.tolist(), lengths.tolist(), strict=True)
    ]
    return [group for group in groups if group]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_worked_example():
    rewards = torch.tensor([[1.0, 0.0, NAN], [0.5, 0.5, 0.5]])
    lengths = torch.tensor([[30, 10, 50], [5, 6, 0]])
    metrics = rollout_metrics(rewards, lengths)
    assert metrics["opo/baseline"] == mean([0.75, 0.5])
    assert metrics["opo/baseline_minus_mean"] == mean([0.25, 0.0])
    assert metrics["opo/informative_fraction"] == 2 / 6
    assert metrics["opo/unscorable_fraction"] == 1 / 6
    # around b*: 30 * 0.25^2 + 10 * 0.75^2 = 7.5; around the mean: 40 * 0.5^2 = 10
    assert math.isclose(metrics["opo/variance_proxy"], 0.25)
    # length deviations +-10 and +-0.5, reward deviations +-0.5 and 0
    assert math.isclose(metrics["opo/length_reward_correlation"], 10.0 / math.sqrt((200 + 0.5) * 0.5))


@given(batches())
def test_against_loops(batch):
    rewards, lengths = batch
    groups = groups_of(rewards, lengths)
    assume(groups)
    metrics = rollout_metrics(rewards, lengths)
    baselines = [oracle_baseline(*zip(*group, strict=True), 1.0) for group in groups]
    means = [mean(r for r, _ in group) for group in groups]
    assert math.isclose(metrics["opo/baseline"], mean(baselines), abs_tol=1e-6)
    gap = mean(b - m for b, m in zip(baselines, means, strict=True))
    assert math.isclose(metrics["opo/baseline_minus_mean"], gap, abs_tol=1e-6)

    around_baseline = sum(n * (r - b) ** 2 for g, b in zip(groups, baselines, strict=True) for r, n in g)
    around_mean = sum(n * (r - m) ** 2 for g, m in zip(groups, means, strict=True) for r, n in g)
    if around_mean > 1e-6:
        assert math.isclose(metrics["opo/variance_proxy"], 1 - around_baseline / around_mean, abs_tol=1e-5)


@given(batches())
def test_variance_proxy_is_never_negative_for_opo(batch):
    proxy = rollout_metrics(*batch)["opo/variance_proxy"]
    assert math.isnan(proxy) or proxy >= -1e-9


@given(batches())
def test_correlation_lies_between_minus_one_and_one(batch):
    correlation = rollout_metrics(*batch)["opo/length_reward_correlation"]
    assert math.isnan(correlation) or abs(correlation) <= 1 + 1e-9


def test_correlation_ignores_differences_between_groups():
    """Long prompts with high rewards beside short ones with low rewards: no correlation within any group."""
    rewards = torch.tensor([[10.0, 11.0, 10.0, 11.0], [0.0, 1.0, 0.0, 1.0]])
    lengths = torch.tensor([[100, 100, 110, 110], [1, 1, 2, 2]])
    assert rollout_metrics(rewards, lengths)["opo/length_reward_correlation"] == 0.0


def test_a_batch_without_anything_to_learn_is_undefined_not_wrong():
    metrics = rollout_metrics(torch.full((2, 3), NAN), torch.ones(2, 3))
    assert math.isnan(metrics["opo/baseline"])
    assert math.isnan(metrics["opo/variance_proxy"])
    assert metrics["opo/informative_fraction"] == 0.0
    assert metrics["opo/unscorable_fraction"] == 1.0
