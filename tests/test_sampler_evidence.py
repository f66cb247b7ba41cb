"""The statistic of the engine's self-test: what it must accept at a stated rate, and what it must refuse."""

import math

import pytest
import torch

from opo_trl.on_policy.sampler_evidence import FALSE_ALARM, TEMPERATURES, SamplerEvidence, compare_sampler

TOLERANCE = 0.1


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def policy(tokens, generator, scale=2.0, vocabulary=40):
    """Logits of a policy, one distribution a token; a large scale makes it confident."""
    return scale * torch.randn(tokens, vocabulary, generator=generator)


def draw(logits, generator):
    """Tokens drawn from a distribution, and their log-probabilities under it."""
    tokens = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
    return tokens.squeeze(1), logits.log_softmax(dim=-1).gather(1, tokens).squeeze(1)


def problems(evidence):
    return " | ".join(evidence.problems(TOLERANCE, 1.0))


def test_each_likelihood_ratio_has_mean_one_under_the_policy(generator):
    """By enumeration of all tokens: what bounds the rate of false alarms, whatever the distribution."""
    for scale in (0.0, 1.0, 8.0):
        logits = policy(1, generator, scale, vocabulary=9)
        ratios = [
            compare_sampler(logits, torch.tensor([token]), torch.zeros(1)).log_ratios for token in range(9)
        ]  # (V, A + 1)
        means = logits.softmax(dim=-1).double() @ torch.tensor(ratios, dtype=torch.float64).exp()
        assert means.squeeze(0).tolist() == pytest.approx([1.0] * (len(TEMPERATURES) + 1), abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_an_exact_sampler_passes_at_the_stated_rate(generator, scale):
    """Over 400 starts: the ratio exceeds 20 in at most 5 % of them, and the limit in none."""
    logits, starts = policy(120, generator, scale), 400
    found = [compare_sampler(logits, *draw(logits, generator)) for _ in range(starts)]
    exceeds = sum(evidence.log_likelihood_ratio > math.log(20) for evidence in found) / starts
    assert exceeds <= 0.05
    assert not [evidence for evidence in found if evidence.problems(TOLERANCE, 1.0)]
    assert FALSE_ALARM * starts < 0.01, "the limit is far beyond what so few starts reach"


def test_rounding_to_bf16_passes(generator):
    """An engine in bf16 against a policy in float32, with logits and differences as large as those of real models."""
    for _ in range(50):
        logits = policy(300, generator, scale=6.0)
        rounded = logits.bfloat16().float()
        evidence = compare_sampler(logits, *draw(rounded, generator))
        assert 1e-3 < evidence.difference / evidence.tokens < TOLERANCE
        assert not problems(evidence)


@pytest.mark.parametrize("factor", [1e-3, 0.5, 0.7, 1.4, 2.0, 1e3])
def test_a_wrong_temperature_shows_in_the_draws_alone(generator, factor):
    """The log-probabilities are the policy's, as an engine with `raw_logprobs` reports them at temperature 1."""
    logits = policy(800, generator)
    tokens, _ = draw(logits / factor, generator)
    reported = logits.log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    evidence = compare_sampler(logits, tokens, reported)
    assert evidence.difference == 0
    assert problems(evidence).startswith("its draws fit a temperature of")
    assert (evidence.surprise < evidence.entropy) == (factor < 1)


def test_a_temperature_that_varies_shows_in_the_draws(generator):
    """Uninitialised temperatures, some near 0 and some huge: each half by itself looks like another temperature."""
    logits = policy(400, generator, scale=4.0)
    factors = torch.where(torch.rand(400, 1, generator=generator) < 0.5, 0.01, 100.0)
    tokens, _ = draw(logits / factors, generator)
    reported = logits.log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert "one that varies" in problems(compare_sampler(logits, tokens, reported))


def test_a_sampler_that_reports_its_own_temperature_differs_in_its_log_probabilities(generator):
    logits = policy(400, generator)
    text = problems(compare_sampler(logits, *draw(logits / 0.5, generator)))
    assert "nats in the mean (accepted: 0.1)" in text
    assert "its draws fit a temperature of 0.5 better than the configured 1" in text


def test_a_stale_output_layer_is_refused(generator):
    """The same hidden states under another output layer: errors of 2 nats and more."""
    hidden, stale, new = (torch.randn(*shape, generator=generator) for shape in ((300, 16), (16, 40), (16, 40)))
    evidence = compare_sampler(hidden @ (stale + 0.5 * new), *draw(hidden @ stale, generator))
    assert "more than 1 nat off" in problems(evidence)
    assert "nats in the mean" in problems(evidence)


def test_a_few_wrong_tokens_are_refused_though_the_mean_is_small(generator):
    logits = policy(400, generator)
    tokens, reported = draw(logits, generator)
    reported[::50] -= 3.0  # 2 % of the tokens
    assert problems(compare_sampler(logits, tokens, reported)) == (
        "2.0% of its log-probabilities are more than 1 nat off (accepted: 1%)"
    )


@pytest.mark.parametrize(("every", "refused"), [(20, True), (400, False)])
def test_nan(generator, every, refused):
    logits = policy(400, generator)
    tokens, reported = draw(logits, generator)
    reported[every - 1 :: every] = math.nan
    evidence = compare_sampler(logits, tokens, reported)
    assert evidence.nan == 400 // every
    assert problems(evidence) == ("5.0% of its log-probabilities are NaN (accepted: 1%)" if refused else "")


def test_nothing_but_nan_is_refused(generator):
    logits = policy(10, generator)
    assert "100.0% of its log-probabilities are NaN" in problems(
        compare_sampler(logits, draw(logits, generator)[0], torch.full((10,), math.nan))
    )


def test_tokens_that_are_impossible_for_either_side_are_wrong(generator):
    logits = policy(50, generator)
    tokens, reported = draw(logits, generator)
    reported[0] = -math.inf
    assert "inf nats in the mean" in problems(compare_sampler(logits, tokens, reported))
    logits[1, tokens[1]] = -math.inf  # a policy that cannot have drawn the token
    tokens, reported = tokens[1:], reported[1:]
    assert "more than 1 nat off" in problems(compare_sampler(logits[1:], tokens, reported))


def test_padded_vocabulary_entries_change_nothing(generator):
    """Engines and models pad the vocabulary with entries that cannot be drawn."""
    logits = policy(50, generator)
    tokens, reported = draw(logits, generator)
    padded = torch.cat([logits, torch.full((50, 8), -math.inf)], dim=1)
    expected, found = compare_sampler(logits, tokens, reported), compare_sampler(padded, tokens, reported)
    assert found.entropy == pytest.approx(expected.entropy, rel=1e-6)
    assert found.log_ratios == pytest.approx(expected.log_ratios, rel=1e-5)


def test_evidence_of_parts_adds_up(generator):
    logits = policy(100, generator)
    tokens, reported = draw(logits, generator)
    reported[7] = math.nan
    at_once = compare_sampler(logits, tokens, reported)
    parts = [
        compare_sampler(logits[cut], tokens[cut], reported[cut]) for cut in (slice(30), slice(30, 30), slice(30, 100))
    ]
    total = parts[0] + parts[1] + parts[2]
    assert isinstance(total, SamplerEvidence)
    assert (total.tokens, total.nan, total.wrong) == (100, 1, 0)
    assert total.entropy == pytest.approx(at_once.entropy)
    assert total.log_ratios == pytest.approx(at_once.log_ratios)
