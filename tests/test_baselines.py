"""The algorithm itself: identities, an oracle in plain Python, and exactness in floating point."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opo_trl.baselines import opo_advantages, optimal_baseline

REWARDS = st.one_of(st.floats(-10, 10, width=32), st.just(math.nan))
EXPONENTS = st.sampled_from([0.0, 0.5, 1.0, 1.6, 2.0])


@st.composite
def batches(draw, rewards=REWARDS):
    prompts, completions = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    size = prompts * completions
    values = draw(st.lists(rewards, min_size=size, max_size=size))
    lengths = draw(st.lists(st.integers(0, 32_768), min_size=size, max_size=size))
    return torch.tensor(values).view(prompts, completions), torch.tensor(lengths).view(prompts, completions)


def oracle_baseline(rewards, lengths, exponent):
    """Eq. 12 of the paper for one group, a loop over completions in double precision."""
    pairs = [(r, float(n) ** exponent) for r, n in zip(rewards, lengths, strict=True) if not math.isnan(r) and n > 0]
    total = sum(weight for _, weight in pairs)
    return sum(weight * r for r, weight in pairs) / total if total else 0.0


def test_worked_example():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.25, 1.0]])
    lengths = torch.tensor([[10, 20, 70], [1, 1, 2]])
    assert torch.allclose(optimal_baseline(rewards, lengths), torch.tensor([[0.1], [0.6875]]))
    expected = torch.tensor([[0.9, -0.1, -0.1], [-0.1875, -0.4375, 0.3125]])
    assert torch.allclose(opo_advantages(rewards, lengths), expected)


@given(batches(), EXPONENTS)
def test_baseline_equals_the_plain_loop(batch, exponent):
    rewards, lengths = batch
    expected = [oracle_baseline(r, n, exponent) for r, n in zip(rewards.tolist(), lengths.tolist(), strict=True)]
    assert torch.allclose(optimal_baseline(rewards, lengths, exponent).flatten(), torch.tensor(expected), atol=1e-5)


@given(batches(), EXPONENTS)
def test_nothing_is_nan_and_unscorable_rows_do_not_move(batch, exponent):
    rewards, lengths = batch
    advantages = opo_advantages(rewards, lengths, exponent)
    assert torch.isfinite(advantages).all()
    assert torch.isfinite(optimal_baseline(rewards, lengths, exponent)).all()
    assert (advantages[torch.isnan(rewards) | (lengths == 0)] == 0.0).all()


@given(batches())
def test_length_weighted_advantages_sum_to_zero_in_every_group(batch):
    rewards, lengths = batch
    weighted = opo_advantages(rewards, lengths).double() * lengths
    assert (weighted.sum(dim=1).abs() <= 1e-6 * 10 * lengths.sum(dim=1).clamp(min=1)).all()


@given(st.floats(-1e3, 1e3, width=32), st.lists(st.integers(0, 32_768), min_size=2, max_size=16), EXPONENTS)
def test_equal_rewards_give_exactly_zero(reward, lengths, exponent):
    rewards = torch.full((1, len(lengths)), reward)
    rewards[0, 0] = math.nan
    assert (opo_advantages(rewards, torch.tensor([lengths]), exponent) == 0.0).all()


def test_equal_rewards_need_the_exactness():
    """Computed naively, about two in five such groups keep a rounding residue; the clamp leaves none."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(1000, 1, generator=generator).expand(1000, 8)
    lengths = torch.randint(1, 4096, (1000, 8), generator=generator)
    naive = rewards - (rewards * lengths).sum(dim=1, keepdim=True) / lengths.sum(dim=1, keepdim=True)
    assert (naive != 0).any(dim=1).sum() > 100
    assert (opo_advantages(rewards, lengths) == 0.0).all()


@given(st.floats(-1e3, 1e3, width=32), st.integers(1, 32_768), st.integers(0, 7), EXPONENTS)
def test_a_completion_left_alone_gives_exactly_zero(reward, length, position, exponent):
    rewards = torch.full((1, 8), math.nan)
    rewards[0, position] = reward
    assert (opo_advantages(rewards, torch.full((1, 8), length), exponent) == 0.0).all()


@given(batches(rewards=st.floats(-10, 10, width=32)), st.integers(1, 32_768))
def test_equal_lengths_reduce_to_the_group_mean(batch, length):
    rewards, _ = batch
    baseline = optimal_baseline(rewards, torch.full_like(rewards, length))
    assert torch.allclose(baseline, rewards.mean(dim=1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("exponent", [0.5, 3.0, 12.0, 40.0])
@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_a_high_power_of_long_completions_is_a_baseline(exponent, unit):
    """The weights' unit cancels, so that none is too large or too small for its power."""
    rewards, lengths = torch.tensor([[0.0, 1.0, 1.0, 0.25]]), [24_576, 20_000, 3, 17]
    expected = oracle_baseline(rewards[0].tolist(), lengths, exponent)
    found = optimal_baseline(rewards, unit * torch.tensor([lengths], dtype=torch.float32), exponent)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@given(batches())
def test_exponent_zero_is_the_mean_of_what_takes_part(batch):
    rewards, lengths = batch
    trained = rewards.masked_fill(lengths == 0, math.nan)
    expected = trained.nanmean(dim=1, keepdim=True).nan_to_num(0.0)
    assert torch.allclose(optimal_baseline(rewards, lengths, 0.0), expected, atol=1e-5)


@given(batches(rewards=st.floats(-10, 10, width=32)))
def test_baseline_minimises_the_length_weighted_spread(batch):
    """Eq. 9's claim under the paper's stand-in: no other constant has a smaller sum of l (r - b)^2."""
    rewards, lengths = batch[0].double(), batch[1].double()

    def spread(baseline):
        return (lengths * (rewards - baseline).square()).sum(dim=1)

    best = optimal_baseline(rewards, lengths)
    for shift in (-0.1, 0.1):
        assert (spread(best) <= spread(best + shift) + 1e-9).all()


def test_rewards_keep_at_least_single_precision():
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    assert optimal_baseline(rewards, torch.tensor([[3000, 1]])).dtype == torch.float32
    assert opo_advantages(rewards.double(), torch.tensor([[3, 1]])).dtype == torch.float64
    assert opo_advantages(torch.tensor([[1, 0]]), torch.tensor([[3, 1]])).tolist() == [[0.25, -0.75]]


@pytest.mark.parametrize(
    ("rewards", "lengths", "message"),
    [
        ([[1.0, 0.0]], [[1], [2]], r"\(P, K\).*\(1, 2\) and \(2, 1\)"),
        ([1.0, 0.0], [1, 2], r"\(P, K\).*\(2,\)"),
        ([[math.inf, 0.0]], [[1, 2]], "must not be infinite.*inf"),
        ([[1.0, 0.0]], [[1, -2]], "must not be negative.*-2"),
    ],
)
def test_wrong_input_is_named(rewards, lengths, message):
    with pytest.raises(ValueError, match=message):
        opo_advantages(torch.tensor(rewards), torch.tensor(lengths))
