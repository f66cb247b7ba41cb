"""pass@k against enumeration, intervals against their coverage, sampling against the policy."""

import itertools
import random

import pytest
import torch

from opo_trl.evaluation import bootstrap_interval, pass_at_k
from opo_trl.evaluation.sampling import sample_completions
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_against_enumeration(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    with pytest.raises(ValueError, match=f"got n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = random.Random(1)
    covered = 0
    for trial in range(100):
        values = [float(rng.random() < 0.3) for _ in range(100)]
        low, high = bootstrap_interval(values, 0.9, resamples=300, seed=trial)
        covered += low <= 0.3 <= high
    assert 80 <= covered <= 98


def test_the_interval_needs_values():
    with pytest.raises(ValueError, match="got 0 and"):
        bootstrap_interval([])
    assert bootstrap_interval([0.5] * 10) == (0.5, 0.5)


def test_samples_follow_the_policy_and_leave_the_callers_random_state():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.update(top_k=3, typical_p=0.2)  # a leak here would change what is measured
    state = torch.get_rng_state()
    drawn = sample_completions(
        model, tokenizer, ["one"], num_samples=4_000, max_new_tokens=1, temperature=0.8, batch_size=1_000
    )[0]
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        expected = (model(**tokenizer(["one"], return_tensors="pt")).logits[0, -1] / 0.8).softmax(dim=-1)
    for token in expected.topk(5).indices.tolist():
        text = tokenizer.decode([token], skip_special_tokens=True)
        frequency = sum(completion.text == text for completion in drawn) / len(drawn)
        if text:
            assert frequency == pytest.approx(expected[token].item(), abs=0.035)


def test_samples_come_in_the_order_of_the_prompts_whatever_the_batch():
    model, tokenizer = tiny_model(), tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    prompts = [[{"role": "user", "content": "a" * n}] for n in (1, 5, 3)]
    model.generation_config.eos_token_id = None
    groups = sample_completions(model, tokenizer, prompts, num_samples=2, max_new_tokens=5, batch_size=4, seed=3)
    assert [len(group) for group in groups] == [2, 2, 2]
    assert groups == sample_completions(
        model, tokenizer, prompts, num_samples=2, max_new_tokens=5, batch_size=4, seed=3
    )
    assert all(1 <= completion.num_tokens <= 5 for group in groups for completion in group)
