"""Which prompts a refill round takes, and what a step that samples in several rounds logs and divides by."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opo_trl.algorithm.loss import loss_normalizer
from opo_trl.algorithm.rollout import concatenate, estimate_advantages
from opo_trl.baselines import optimal_baseline
from opo_trl.rewards import math_verify_reward
from opo_trl.rollouts.refill_prompts import draw_order, prompts_needed, row_key
from opo_trl.rollouts.round_metrics import RoundMetrics, pool_rounds, reward_metrics


def test_an_order_depends_on_seed_step_and_round_alone():
    orders = {key: tuple(draw_order(50, *key)) for key in itertools.product((1, 2), (0, 7), (1, 2))}
    assert len(set(orders.values())) == len(orders)
    for key, order in orders.items():
        assert sorted(order) == list(range(50))
        assert order == tuple(draw_order(50, *key))
        assert order[:7] == tuple(itertools.islice(draw_order(50, *key), 7))


def test_every_order_is_equally_likely():
    counts = dict.fromkeys(itertools.permutations(range(3)), 0)
    for step in range(6000):
        counts[tuple(draw_order(3, 0, step, 1))] += 1
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 20.5  # chi squared, 5 degrees, p = 0.001


def test_the_first_rows_of_a_million_are_cheap():
    order = draw_order(10**9, 0, 0, 1)
    assert len(set(itertools.islice(order, 1000))) == 1000


@pytest.mark.parametrize(
    ("informative", "sampled", "multiple", "needed"),
    [
        (8, 8, 1, 0),  # nothing is missing
        (9, 16, 1, 0),  # a surplus
        (0, 8, 1, 8),  # nothing is known of the share
        (4, 8, 1, 8),
        (6, 8, 1, 3),  # two are missing, and three of four groups are informative
        (7, 8, 4, 4),
        (1, 8, 1, 8),  # 56 would be expected to do
        (7, 80, 2, 8),
    ],
)
def test_how_many_prompts_a_round_takes(informative, sampled, multiple, needed):
    assert prompts_needed(informative, sampled, 8, multiple) == needed


def test_what_tells_rows_apart():
    row = {"prompt": [{"role": "user", "content": "1+1"}], "solution": "2"}
    assert row_key(row) == row_key({"solution": "2", "prompt": [{"content": "1+1", "role": "user"}]})
    assert row_key(row) != row_key({**row, "solution": "3"})
    assert row_key({"prompt": object()}) == row_key({"prompt": object()}), "no address in memory: ranks must agree"


# ---- Metrics of several rounds

TERMINATED = "completions/{}_terminated_length"


def metrics_of(lengths, ended, calls, failed):
    """What TRL logs of completions of these lengths, of which some ended by themselves, with tool calls."""
    done = [length for length, end in zip(lengths, ended, strict=True) if end] or [0.0]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - sum(ended) / len(ended),
        TERMINATED.format("mean"): sum(done) / len(done),
        TERMINATED.format("min"): min(done),
        TERMINATED.format("max"): max(done),
        "tools/call_frequency": sum(calls) / len(lengths),
        "tools/failure_frequency": sum(failed) / sum(calls) if sum(calls) else 0.0,
    }


completion = st.tuples(st.integers(1, 50).map(float), st.booleans(), st.integers(0, 3), st.integers(0, 3))


@given(st.lists(st.lists(completion, min_size=1, max_size=6), min_size=1, max_size=4))
def test_rounds_are_pooled_as_if_all_had_been_one(rounds):
    def columns(rows):
        return metrics_of(*([row[i] for row in rows] for i in range(3)), [min(row[2], row[3]) for row in rows])

    pooled = pool_rounds([columns(rows) for rows in rounds], [len(rows) for rows in rounds])
    assert pooled == pytest.approx(columns([row for rows in rounds for row in rows]))


def test_a_number_that_is_undefined_in_a_round_does_not_count():
    rounds = [{"a": 1.0, "b": math.nan}, {"a": math.nan, "b": math.nan}, {"a": 4.0}]
    pooled = pool_rounds(rounds, [2, 8, 4])
    assert pooled["a"] == 3.0
    assert math.isnan(pooled["b"])


def test_what_the_mathematics_reward_counts_is_summed_over_rounds():
    """A mean would say that 8 of the 64 completions of a step in eight waves have no answer."""
    logged = {}
    math_verify_reward(completions=["no box"], solution=["1"], log_metric=logged.__setitem__)
    pooled = pool_rounds([dict.fromkeys(logged, 8.0)] * 8, [8] * 8)
    assert pooled["math_verify_reward/no_answer"] == 64
    assert pooled.pop("math_verify_reward/fast_path_share") == 8
    assert set(pooled.values()) == {64}


def test_a_step_leaves_one_number_where_its_rounds_logged_several():
    metrics = {"reward": [0.5], "num_tokens": [10]}
    step = RoundMetrics(metrics)
    for size, reward, new in ((4, 1.0, 7.0), (12, 0.0, 3.0)):
        metrics["reward"].append(reward)
        metrics.setdefault("new", []).append(new)
        metrics["num_tokens"] = [metrics["num_tokens"][0] + size]
        step.take(size)
    metrics["exact"] = []
    step.put({"exact": 2.0})
    assert metrics == {"reward": [0.5, 0.25], "num_tokens": [26], "new": [4.0], "exact": [2.0]}


def test_reward_metrics_leave_out_what_is_unscorable():
    per_func = torch.tensor([[1.0, math.nan], [0.0, math.nan], [math.nan, 3.0], [math.nan, math.nan]])
    rewards = torch.tensor([[1.0, 0.0], [6.0, math.nan]])
    metrics = reward_metrics(per_func, rewards, ["first", "second"])
    assert metrics["rewards/first/mean"] == 0.5
    assert metrics["rewards/second/mean"] == 3.0
    assert math.isnan(metrics["rewards/second/std"]), "the deviation of one number"
    assert metrics["reward"] == pytest.approx(7 / 3)
    assert metrics["reward_std"] == pytest.approx(torch.tensor([1.0, 0.0, 6.0]).std().item())


# ---- The direction and the scale of the expected gradient, by enumeration

# Two prompts; for each the responses of a small policy: probability, length, reward. P(informative) differs.
POLICY = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.85, 0.05]], dtype=torch.float64)
LENGTHS = torch.tensor([[1, 4, 2], [3, 1, 6]])
REWARDS = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
GROUP_SIZE, MAX_LENGTH = 2, 8


def every_group():
    """Probability, rollout (1, K) and summed gradient in the logits of every group of every prompt, drawn uniformly."""
    groups = []
    for prompt, (probs, lengths, rewards) in enumerate(zip(POLICY, LENGTHS, REWARDS, strict=True)):
        for responses in itertools.product(range(3), repeat=GROUP_SIZE):
            drawn = list(responses)
            rollout = estimate_advantages(
                rewards[drawn].unsqueeze(0), lengths[drawn].unsqueeze(0), lengths[drawn].unsqueeze(0), optimal_baseline
            )
            scores = torch.eye(3, dtype=torch.float64)[drawn] - probs  # (K, 3), gradient of log pi in the logits
            gradient = torch.zeros(2, 3, dtype=torch.float64)
            gradient[prompt] = rollout.advantages[0] @ scores
            groups.append((probs[drawn].prod().item() / 2, rollout, gradient))
    return groups


GROUPS = every_group()
P_INFORMATIVE = sum(chance for chance, rollout, _ in GROUPS if rollout.informative_groups.any())


def estimate(sequence, loss_type, informative_only):
    merged = concatenate([GROUPS[i][1] for i in sequence])
    total = sum(GROUPS[i][2] for i in sequence)
    lengths = merged.informative_lengths if informative_only else merged.lengths
    return total / loss_normalizer(loss_type, lengths, MAX_LENGTH, 1).double()


def expected_gradient(loss_type, num_prompts, max_rounds):
    """Of a step that is refilled, over every sequence of groups; and the chance that it has a gradient."""
    # All uninformative groups are one outcome: they are neither in the sum nor in the normaliser.
    informative = [i for i, (_, rollout, _) in enumerate(GROUPS) if rollout.informative_groups.any()]
    nothing = next(i for i in range(len(GROUPS)) if i not in informative)
    outcomes = [(GROUPS[i][0], i) for i in informative] + [(1 - P_INFORMATIVE, nothing)]
    merged = {}  # the order does not matter: (indices of the informative groups) -> chance

    def sample(chance, found, sampled, rounds_left):
        needed = prompts_needed(len(found), sampled, num_prompts) if sampled else num_prompts
        if needed == 0 or rounds_left == 0:
            merged[found] = merged.get(found, 0.0) + chance
            return
        states = {found: chance}
        for _ in range(needed):
            following = {}
            for so_far, p in states.items():
                for probability, i in outcomes:
                    key = so_far if i == nothing else tuple(sorted((*so_far, i)))
                    following[key] = following.get(key, 0.0) + p * probability
            states = following
        for state, p in states.items():
            sample(p, state, sampled + needed, rounds_left - 1)

    sample(1.0, (), 0, 1 + max_rounds)
    assert sum(merged.values()) == pytest.approx(1.0)
    gradient = sum(p * estimate(found, loss_type, informative_only=True) for found, p in merged.items() if found)
    return gradient, 1 - merged[()]


def plain_gradient(loss_type, num_prompts):
    """Of a step that is not refilled."""
    total = torch.zeros(2, 3, dtype=torch.float64)
    for sequence in itertools.product(range(len(GROUPS)), repeat=num_prompts):
        chance = math.prod(GROUPS[i][0] for i in sequence)
        total += chance * estimate(sequence, loss_type, informative_only=False)
    return total


def cosine(first, second):
    return torch.cosine_similarity(first.flatten(), second.flatten(), dim=0).item()


@pytest.mark.parametrize("max_rounds", [0, 1, 2])
def test_dr_grpo_keeps_the_direction_and_is_scaled_by_one_over_the_informative_share(max_rounds):
    """Exactly, whatever the number of rounds, where the step has a gradient at all."""
    plain = plain_gradient("dr_grpo", 2)
    refilled, has_gradient = expected_gradient("dr_grpo", 2, max_rounds)
    assert 0.1 < P_INFORMATIVE < 0.6
    assert cosine(plain, refilled) == pytest.approx(1.0, abs=1e-6)
    scale = refilled.norm() / plain.norm() / has_gradient
    assert scale.item() == pytest.approx(1 / P_INFORMATIVE, rel=1e-6)


def test_dapo_divides_by_the_tokens_of_informative_groups():
    """
    For many prompts a step: the same direction, scaled by E[tokens] / (P(informative) E[tokens | informative]).

    For few, dividing by a random number of tokens bends the expectation of either estimate a little.
    """
    tokens = sum(chance * rollout.lengths.sum() for chance, rollout, _ in GROUPS)
    informative = sum(
        chance * rollout.lengths.sum() for chance, rollout, _ in GROUPS if rollout.informative_groups.any()
    )
    mean = sum(chance * gradient for chance, _, gradient in GROUPS)
    limits = {False: mean / tokens, True: mean / informative}
    assert cosine(limits[True], limits[False]) == pytest.approx(1.0, abs=1e-6)
    assert (limits[True].norm() / limits[False].norm()).item() == pytest.approx(float(tokens / informative))
    many = [i for i, (chance, _, _) in enumerate(GROUPS) for _ in range(round(800 * chance))]
    assert len(many) == 800, "each group as often as it is expected"
    for informative_only, limit in limits.items():
        assert torch.allclose(estimate(many, "dapo", informative_only), limit, rtol=1e-6)
    few, has_gradient = expected_gradient("dapo", 2, 2)
    assert 0.95 < cosine(few, mean) < 1 - 1e-6
    assert has_gradient < 1
