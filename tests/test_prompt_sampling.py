"""Which prompts are drawn: the posterior by integration, the draw by enumeration, the prior by simulation."""

import itertools
import math

import pytest
import torch
from scipy import integrate, stats

from opo_trl.rollouts.prompt_outcomes import LEAST_COUNT, PRIOR_HALF_LIFE, PromptOutcomes, informative_chance
from opo_trl.rollouts.prompt_sampling import HALF_LIFE, UNIFORM_SHARE, PromptSampling, draw_without_replacement

GROUP_SIZE = 4


def outcomes(num_prompts=6, half_life=8.0, group_size=GROUP_SIZE):
    return PromptOutcomes(num_prompts, group_size, half_life)


def add(found, groups, weights=None):
    """Add groups of rewards, None for a completion that does not take part, by the position of their prompt."""
    rewards = torch.tensor([[math.nan if r is None else r for r in group] for group in groups.values()])
    weights = torch.ones(len(groups)) if weights is None else weights
    return found.add(torch.tensor(list(groups)), rewards, ~rewards.isnan(), weights)


@pytest.mark.parametrize("group_size", [2, 8, 64])
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.2, 0.4), (3.5, 0.7), (40.0, 25.0)])
def test_the_chance_of_an_informative_group_is_the_integral_over_the_pass_rate(a, b, group_size):
    expected, _ = integrate.quad(
        lambda p: (1 - p**group_size - (1 - p) ** group_size),
        0, 1, weight="alg", wvar=(a - 1, b - 1), epsabs=0, epsrel=1e-9,
    )  # fmt: skip
    expected /= math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    exact = informative_chance(*(torch.tensor([v], dtype=torch.float64) for v in (a, b)), group_size)
    assert exact.item() == pytest.approx(expected, rel=1e-8)
    assert informative_chance(torch.tensor([a]), torch.tensor([b]), group_size).item() == pytest.approx(
        expected, abs=1e-4
    )


def test_a_posterior_is_prior_times_likelihood():
    """By integration: groups with two different prompts' rewards, and one that has not been seen."""
    found = outcomes(3)
    add(found, {0: [1.0, 0.0, 1.0, 1.0], 2: [0.0, 0.0, 0.0, 0.0]})
    prior = stats.beta(*found.prior())

    def chance(passes, failures):
        def posterior(p):
            return prior.pdf(p) * p**passes * (1 - p) ** failures

        def informative(p):
            return posterior(p) * (1 - p**GROUP_SIZE - (1 - p) ** GROUP_SIZE)

        return integrate.quad(informative, 0, 1)[0] / integrate.quad(posterior, 0, 1)[0]

    expected = [chance(3, 1), chance(0, 0), chance(0, 4)]
    assert found.chances().tolist() == pytest.approx(expected, abs=1e-4)


def population(generator, a, b, num_prompts, group_size):
    """Pass rates of prompts, and one group of rewards of each."""
    rates = torch.from_numpy(stats.beta(a, b).rvs(num_prompts, random_state=generator))
    rewards = torch.rand(num_prompts, group_size, generator=torch.Generator().manual_seed(1)) < rates.unsqueeze(1)
    return rates, rewards.float()


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.6), (2.0, 1.0)])
def test_the_prior_is_that_of_all_prompts_however_they_are_drawn(a, b):
    num_prompts = 40_000
    rates, rewards = population(3, a, b, num_prompts, GROUP_SIZE)
    found = outcomes(num_prompts)
    prompts = torch.arange(num_prompts)
    found.add(prompts, rewards, torch.ones_like(rewards, dtype=torch.bool), torch.ones(num_prompts))
    assert found.prior() == pytest.approx((a, b), rel=0.08)

    # Prompts of medium difficulty are drawn more often, and count less.
    kept = 0.1 + 0.9 * (4 * rates * (1 - rates))
    drawn = (torch.rand(num_prompts, generator=torch.Generator().manual_seed(2)) < kept).nonzero().flatten()
    weighted, unweighted = outcomes(num_prompts), outcomes(num_prompts)
    for each, weights in ((weighted, 1 / kept[drawn]), (unweighted, torch.ones(len(drawn)))):
        each.add(drawn, rewards[drawn], torch.ones(len(drawn), GROUP_SIZE, dtype=torch.bool), weights)
    assert weighted.prior() == pytest.approx((a, b), rel=0.12)
    assert sum(unweighted.prior()) > 1.5 * (a + b), "else the weights would not be needed"


def test_what_has_not_been_seen_has_the_chance_of_a_uniform_pass_rate():
    expected = 1 - 2 / (GROUP_SIZE + 1)
    assert outcomes().chances().tolist() == pytest.approx([expected] * 6)


def test_an_observation_counts_half_after_its_half_life_and_is_dropped_in_the_end():
    found = outcomes(half_life=8)
    add(found, {2: [1.0, 1.0, 1.0, 0.0]})
    totals = found.totals.clone()
    for _ in range(8):
        found.forget()
    assert found.counts[:, 2].tolist() == pytest.approx([1.5, 0.5])
    assert torch.allclose(found.totals, totals * 0.5 ** (8 / PRIOR_HALF_LIFE))
    for _ in range(8 * math.ceil(math.log2(4 / LEAST_COUNT))):
        found.forget()
    assert found.counts.count_nonzero() == 0
    assert all(math.isfinite(value) and value > 0 for value in found.prior())


def test_half_of_an_observation_is_left_after_four_passes_over_the_prompts():
    sampling = PromptSampling(num_prompts=12, prompts_per_step=3, group_size=GROUP_SIZE, seed=0)
    assert sampling.outcomes.half_life == HALF_LIFE * 4


def test_general_rewards_count_groups():
    found = outcomes(4)
    informative = add(found, {0: [0.3, 0.3, 0.3, 0.3], 1: [0.3, 0.3, 0.2, 0.3], 3: [1.0, 1.0, 0.0, 1.0]})
    assert informative.tolist() == [False, True, True]
    assert not found.binary
    assert found.counts.tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]
    mean = (0.5 + 2) / (1 + 3)
    assert found.prior() == pytest.approx((2 * mean, 2 * (1 - mean))), "as strong as Beta(1, 1)"
    successes, failures = found.counts
    assert found.chances().tolist() == pytest.approx(((successes + 2 * mean) / (successes + failures + 2)).tolist())


def test_the_first_general_reward_converts_what_was_counted():
    found = outcomes(4)
    for _ in range(5):
        add(found, {0: [0.0] * 4, 1: [1.0, 0.0, 1.0, 0.0]})
    before = found.chances()
    add(found, {2: [0.5, 0.0, 0.0, 0.0]})
    assert found.counts[:, :2].sum(dim=0).tolist() == pytest.approx([5, 5])
    assert (found.counts[0] / found.counts.sum(dim=0))[:2].tolist() == pytest.approx(before[:2].tolist())
    after = found.chances()
    assert after[0] < 0.35
    assert after[1] > 0.7


def test_completions_without_a_score_are_left_out_and_prompts_without_any_sink():
    found = outcomes(4)
    informative = add(found, {0: [1.0, None, 0.0, None], 1: [None] * 4, 2: [1.0, None, None, None]})
    assert informative.tolist() == [True, False, False]
    assert found.counts.tolist() == [[1, 0, 0, 0], [1, 4, 4, 0]]
    chances = found.chances()
    assert chances[0] > chances[3] > chances[1] == chances[2]


def plackett_luce(probabilities, drawn):
    """Probability of drawing these, one after another without replacement."""
    left, found = 1.0, 1.0
    for position in drawn:
        found *= probabilities[position] / left
        left -= probabilities[position]
    return found


def test_draws_have_the_probabilities_of_one_after_another():
    probabilities = torch.tensor([0.05, 0.4, 0.2, 0.05, 0.3])
    generator, count = torch.Generator().manual_seed(0), 20_000
    drawn = [tuple(draw_without_replacement(probabilities, 2, generator).tolist()) for _ in range(count)]
    for pair in itertools.permutations(range(5), 2):
        expected = plackett_luce(probabilities.tolist(), pair)
        deviation = math.sqrt(expected * (1 - expected) / count)
        assert drawn.count(pair) / count == pytest.approx(expected, abs=4.5 * deviation), pair


def test_no_prompt_is_drawn_twice_in_a_step():
    sampling = PromptSampling(num_prompts=7, prompts_per_step=7, group_size=GROUP_SIZE, seed=0)
    draws = [tuple(sampling.draw(step)[0].prompts.tolist()) for step in range(5)]
    assert all(sorted(draw) == list(range(7)) for draw in draws)
    assert len(set(draws)) == 5


def learned_sampling(num_prompts=10, seed=0):
    """The first prompt is always solved, the second never, the third now and then; the others are new."""
    sampling = PromptSampling(num_prompts, prompts_per_step=3, group_size=GROUP_SIZE, seed=seed)
    for _ in range(20):
        rewards = torch.tensor([[1.0] * 4, [0.0] * 4, [1.0, 0.0, 0.0, 1.0]])
        draw = sampling.draw(0)[0]._replace(prompts=torch.tensor([0, 1, 2]), probabilities=torch.full((3,), 0.1))
        sampling.observe(draw, rewards, torch.ones(3, 4, dtype=torch.bool))
    return sampling


def test_a_share_is_uniform_and_the_rest_in_proportion_to_the_chances():
    sampling = learned_sampling()
    chances = sampling.outcomes.chances()
    probabilities = sampling.probabilities(chances)
    assert probabilities.sum().item() == pytest.approx(1)
    assert (probabilities >= UNIFORM_SHARE / 10).all()
    assert chances[0] < 0.05
    assert probabilities[2] > 5 * probabilities[0]
    rest = probabilities - UNIFORM_SHARE / 10
    assert torch.allclose(rest / rest[2], chances / chances[2])


def test_every_prompt_keeps_its_share_where_none_has_a_chance():
    sampling = PromptSampling(5, 2, GROUP_SIZE, seed=0)
    assert sampling.probabilities(torch.zeros(5)).tolist() == pytest.approx([0.2] * 5)
    found = sampling.probabilities(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))
    assert found.tolist() == pytest.approx([UNIFORM_SHARE / 5] * 4 + [1 - 0.8 * UNIFORM_SHARE], abs=1e-5)


def test_metrics_say_how_far_from_uniform_and_what_is_predicted():
    sampling = learned_sampling()
    q = sampling.probabilities(sampling.outcomes.chances()).double()
    draw, metrics = sampling.draw(3)
    entropy = -(q * q.log()).sum()
    assert metrics["rollouts/effective_prompts"] == pytest.approx((entropy.exp() / 10).item(), rel=1e-5)
    assert metrics["rollouts/moved_probability"] == pytest.approx(((q - 0.1).abs().sum() / 2).item(), rel=1e-5)
    assert metrics["rollouts/informative_predicted"] == pytest.approx(draw.chances.mean().item())
    assert metrics["rollouts/informative_if_uniform"] == pytest.approx(sampling.outcomes.chances().mean().item())
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0] * 4, [0.0] * 4])
    observed = sampling.observe(draw, rewards, torch.ones(3, 4, dtype=torch.bool))
    assert observed == {"rollouts/informative_groups": pytest.approx(1 / 3)}
    uniform = PromptSampling(10, 3, GROUP_SIZE, seed=0).draw(0)[1]
    assert uniform["rollouts/effective_prompts"] == pytest.approx(1)
    assert uniform["rollouts/moved_probability"] == pytest.approx(0, abs=1e-6)


def test_predictions_come_true_on_prompts_with_fixed_pass_rates():
    """Calibration over 300 steps of 16 prompts, and more informative groups than uniform draws have."""
    rates = torch.tensor([0.0, 0.03, 0.5, 0.97, 1.0]).repeat(40)
    sampling = PromptSampling(len(rates), prompts_per_step=16, group_size=8, seed=1)
    generator = torch.Generator().manual_seed(5)
    predicted, observed = [], []
    for step in range(300):
        draw, metrics = sampling.draw(step)
        rewards = (torch.rand(16, 8, generator=generator) < rates[draw.prompts].unsqueeze(1)).float()
        predicted.append(metrics["rollouts/informative_predicted"])
        observed += sampling.observe(draw, rewards, torch.ones(16, 8, dtype=torch.bool)).values()
    uniform = (1 - rates**8 - (1 - rates) ** 8).mean().item()
    late = slice(100, None)
    assert sum(observed[late]) / 200 == pytest.approx(sum(predicted[late]) / 200, abs=0.05)
    assert sum(observed[late]) / 200 > 1.6 * uniform


def test_a_draw_is_a_function_of_seed_step_and_rewards():
    first, again, other = learned_sampling(), learned_sampling(), learned_sampling(seed=1)
    draws = [first.draw(step)[0].prompts.tolist() for step in range(6)]
    torch.manual_seed(99)
    assert [again.draw(step)[0].prompts.tolist() for step in range(6)] == draws
    assert [other.draw(step)[0].prompts.tolist() for step in range(6)] != draws
    assert draws[0] != draws[1]
    fresh = PromptSampling(10, 3, GROUP_SIZE, seed=0)
    fresh.load_state_dict(first.state_dict())
    assert [fresh.draw(step)[0].prompts.tolist() for step in range(6)] == draws


def test_a_million_prompts_take_two_numbers_each():
    sampling = PromptSampling(1_000_000, prompts_per_step=512, group_size=8, seed=0)
    draw, _ = sampling.draw(0)
    assert len(set(draw.prompts.tolist())) == 512
    sampling.observe(draw, torch.zeros(512, 8), torch.ones(512, 8, dtype=torch.bool))
    state = sampling.state_dict()
    assert sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor)) <= 8_000_100
    again = set(sampling.draw(1)[0].prompts.tolist())
    assert len(again & set(draw.prompts.tolist())) < 5
