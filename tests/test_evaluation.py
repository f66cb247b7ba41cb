"""Each metric against an independent reference: enumeration, hand-computed cases, a second implementation."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from peft import LoraConfig
from sacrebleu.metrics.bleu import BLEU
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM

from opo_trl.evaluation import (
    average,
    bootstrap_interval,
    by_category,
    distinct_n,
    majority_at_k,
    mean_pass_at_k,
    paired_difference,
    pass_at_k,
    pass_rates,
    problem_metrics,
    repeated_ngram_rate,
    self_bleu,
    sequence_kl,
    summarize,
)
from opo_trl.evaluation.sampling import TransformersSampler, record_seed, sample_completions, tokenize_prompt
from opo_trl.evaluation.scoring import score_completions
from opo_trl.evaluation.vllm_sampling import declared_ends, max_lora_rank
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


def test_pass_at_k_is_a_mean_over_problems():
    assert mean_pass_at_k([[True, False], [False, False]], [1, 2]) == {"pass@1": 0.25, "pass@2": 0.5}
    with pytest.raises(ValueError, match="at least one, got none"):
        mean_pass_at_k([], [1])


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


@pytest.mark.parametrize(("n", "confidence"), [(1, 0.95), (30, 0.95), (500, 0.9)])
def test_equal_values_have_the_interval_of_clopper_and_pearson(n, confidence):
    for solved in (0, n):
        exact = binomtest(solved, n).proportion_ci(confidence, method="exact")
        found = bootstrap_interval([float(solved > 0)] * n, confidence, bounds=(0, 1))
        assert found == pytest.approx((exact.low, exact.high), abs=1e-12)
    low, high = bootstrap_interval([0.5] * n, confidence, bounds=(0, 1))
    assert (low + high) / 2 == pytest.approx(0.5)
    assert low < 0.5 < high


@pytest.mark.parametrize("samples", [1, 8])
def test_the_interval_of_equal_values_covers_whatever_the_samples_of_a_problem_have_in_common(samples):
    """Problems that are solved always or never, where 8 samples tell no more than 1: 0 of 20 has its nominal chance."""
    _, high = bootstrap_interval([0.0] * 20, bounds=(0, 1))
    rng = random.Random(0)
    trials = [[float(rng.random() < high)] * samples for _ in range(20 * 4_000)]
    means = [sum(problem) / samples for problem in trials]
    none = sum(not any(means[i : i + 20]) for i in range(0, len(means), 20)) / 4_000
    assert none == pytest.approx(0.025, abs=0.006)
    assert high / 5 > 1 - 0.025 ** (1 / (20 * 8)), "160 independent samples would give a fifth of the width"


def test_equal_differences_have_a_width():
    nothing = paired_difference([0.0] * 30, [0.0] * 30, bounds=(0, 1))
    _, high = bootstrap_interval([0.0] * 30, bounds=(0, 1))
    assert nothing == (0.0, pytest.approx(-high), pytest.approx(high))
    everything = paired_difference([1.0] * 30, [0.0] * 30, bounds=(0, 1))
    assert everything == (1.0, pytest.approx(1 - 2 * high), 1.0)
    rounded = paired_difference([0.7, 0.4] * 15, [0.4, 0.1] * 15, bounds=(0, 1))
    assert rounded.low < 0.29 < 0.31 < rounded.high
    with pytest.raises(ValueError, match=r"within the bounds \(0, 1\), got 0.0 to 1.5"):
        bootstrap_interval([0.0, 1.5], bounds=(0, 1))


def test_the_interval_against_every_resample():
    """Three values: all 27 resamples, exactly."""
    values = [0.0, 0.3, 1.0]
    means = sorted(sum(draw) / 3 for draw in itertools.product(values, repeat=3))
    low, high = bootstrap_interval(values, confidence=0.8, resamples=200_000)
    assert low == pytest.approx(means[2], abs=1e-9)  # the lowest 10 %: 2.7 of 27
    assert high == pytest.approx(means[24], abs=1e-9)


def test_a_paired_difference_is_surer_than_two_means():
    rng = random.Random(0)
    hard = [rng.random() for _ in range(200)]
    better = [value + 0.05 + rng.gauss(0, 0.02) for value in hard]
    difference = paired_difference(better, hard)
    assert difference.mean == pytest.approx(sum(better) / 200 - sum(hard) / 200)
    assert 0.04 < difference.low < difference.mean < difference.high < 0.06
    low, high = bootstrap_interval(hard)
    assert high - low > 5 * (difference.high - difference.low)
    with pytest.raises(ValueError, match="got 3 and 2"):
        paired_difference([1, 2, 3], [1, 2])


def test_majority_against_hand_computed_votes():
    answers, correct = ["4", "5", "4", "6", None], [True, False, True, False, False]
    assert majority_at_k(answers, correct, 5) == 1.0
    assert majority_at_k(answers, correct, 1) == pytest.approx(2 / 5)
    # Pairs: 4-4 wins; 4 and another answer tie in 4 pairs; 4 with none wins in 2; the other 3 have no right answer.
    assert majority_at_k(answers, correct, 2) == pytest.approx((1 + 4 / 2 + 2) / 10)
    assert majority_at_k([None, None], [False, False], 2) == 0.0
    assert majority_at_k(["5", "5", "4"], [False, False, True], 3) == 0.0


def test_an_empty_box_has_no_vote():
    answers = [("", 0.0), ("", 0.0), ("5", 1.0), ("7", 0.0)]
    records = [record("p", sample, reward, answer=answer) for sample, (answer, reward) in enumerate(answers)]
    metrics = problem_metrics(records)
    assert (metrics["maj@4"]["p"], metrics["no-answer"]["p"]) == (0.5, 0.5)


def test_majority_over_a_sample_of_subsets_is_near_the_exact_one():
    """C(24, 3) = 2,024 subsets are enumerated; of C(24, 12) a part is drawn."""
    answers = ["right"] * 13 + ["wrong"] * 11
    correct = [answer == "right" for answer in answers]
    chance = {
        k: sum(
            math.comb(13, i) * math.comb(11, k - i) * (1.0 if 2 * i > k else 0.5 if 2 * i == k else 0.0)
            for i in range(k + 1)
            if k - i <= 11
        )
        / math.comb(24, k)
        for k in (3, 12)
    }
    assert majority_at_k(answers, correct, 3) == pytest.approx(chance[3])
    assert majority_at_k(answers, correct, 12) == pytest.approx(chance[12], abs=0.01)


def test_majority_refuses_the_impossible():
    with pytest.raises(ValueError, match="got 2 answers, 2 verdicts and k=3"):
        majority_at_k(["1", "2"], [True, False], 3)
    with pytest.raises(ValueError, match="got 2 answers, 1 verdicts"):
        majority_at_k(["1", "2"], [True], 1)


@pytest.mark.parametrize(
    ("tokens", "n", "rate"),
    [
        ("abcdefgh", 5, 0.0),
        ("aaaaaaa", 5, 2 / 3),  # three 5-grams, all the same
        ("abababab", 2, 5 / 7),  # ab and ba among seven
        ("abcd", 5, 0.0),  # too short for a 5-gram
        ("", 5, 0.0),
    ],
)
def test_repeated_ngrams_by_hand(tokens, n, rate):
    assert repeated_ngram_rate(tokens, n) == pytest.approx(rate)
    assert repeated_ngram_rate([ord(token) for token in tokens], n) == pytest.approx(rate)


def test_distinct_n_by_hand():
    assert distinct_n(["ab", "ab"], 2) == 0.5
    assert distinct_n(["abc", "abd"], 2) == pytest.approx(3 / 4)
    assert distinct_n(["ab", "cd"], 1) == 1.0
    assert distinct_n(["", "a"], 2) == 1.0
    with pytest.raises(ValueError, match="got n=0"):
        distinct_n(["ab"], 0)


def bleu(hypothesis, references):
    """Sentence BLEU by its definition (Papineni et al. 2002), for words without punctuation and no empty precision."""
    hypothesis, references = hypothesis.split(), [reference.split() for reference in references]
    logs = []
    for n in range(1, 5):
        counted = [
            Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (hypothesis, *references)
        ]
        matches = sum(min(count, max(ref[gram] for ref in counted[1:])) for gram, count in counted[0].items())
        logs.append(math.log(matches / sum(counted[0].values())))
    closest = min((abs(len(reference) - len(hypothesis)), len(reference)) for reference in references)[1]
    return min(1.0, math.exp(1 - closest / len(hypothesis))) * math.exp(sum(logs) / 4)


def test_self_bleu_against_the_definition():
    texts = [
        "we add five and six to get eleven apples",
        "we add five and six to get twelve pears and some",
        "first we add five and six to get eleven",
    ]
    expected = sum(bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)) / 3
    assert 0.1 < expected < 0.9
    assert self_bleu(texts) == pytest.approx(expected, abs=1e-6)


def test_self_bleu_is_sacrebleus_of_each_text_against_the_others():
    """Repeated words and n-grams, punctuation, an empty text, one of spaces, texts without a common n-gram."""
    rng = random.Random(0)
    words = ["add", "2", "+", "3.5,", "so", "(x)", "is"]
    for trial in range(30):
        texts = [" ".join(rng.choices(words[: 2 + trial % 6], k=rng.randint(0, 25))) for _ in range(2 + trial % 4)]
        texts += [[], ["  "], ["nothing shared here at all"]][trial % 3]
        metric = BLEU(effective_order=True)
        expected = [metric.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
        assert self_bleu(texts) == pytest.approx(sum(expected) / len(texts) / 100)


def test_self_bleu_by_hand():
    assert self_bleu(["the same four words"] * 3) == 1.0
    assert self_bleu(["a b c d", "e f g h"]) < 0.1
    # "a b c d" in "a b c d e": precisions 1, brevity exp(1 - 5/4). Reverse: 4/5, 3/4, 2/3, 1/2, no brevity penalty.
    expected = (math.exp(-1 / 4) + (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)) / 2
    assert self_bleu(["a b c d", "a b c d e"]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least two, got 1"):
        self_bleu(["alone"])


# A vocabulary of four tokens, the last of which ends a completion, and at most three tokens: 40 completions in all.
VOCABULARY, END, LONGEST, TEMPERATURE, PROMPT = 4, 3, 3, 0.7, [1, 0]


def all_completions():
    for length in range(1, LONGEST + 1):
        for body in itertools.product(range(END), repeat=length - 1):
            yield [*body, END]
            if length == LONGEST:
                yield from ([*body, token] for token in range(END))


def log_law(model, completion):
    """log-probabilities of one sequence by a plain forward, without batch, padding or cache."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + completion])).logits[0, len(PROMPT) - 1 : -1]
    return (logits.double() / TEMPERATURE).log_softmax(dim=-1)


@pytest.fixture(scope="module")
def enumerated():
    """Every completion, its exact probability under the policy, and both models' scores of it."""
    policy, base = (tiny_model(seed, vocab_size=VOCABULARY) for seed in (0, 1))
    completions = list(all_completions())
    scores = [
        score_completions(model, [PROMPT] * len(completions), completions, temperature=TEMPERATURE)
        for model in (policy, base)
    ]
    exact = [
        [log_law(model, ids)[range(len(ids)), ids].sum().item() for ids in completions] for model in (policy, base)
    ]
    return completions, scores, exact


def test_scores_against_single_forwards(enumerated):
    _, scores, exact = enumerated
    for model_scores, logps in zip(scores, exact, strict=True):
        assert [sum(score.logps) for score in model_scores] == pytest.approx(logps, abs=1e-5)
    assert sum(map(math.exp, exact[0])) == pytest.approx(1)


def test_entropy_against_enumeration(enumerated):
    """The expected sum of token entropies is the entropy of the distribution over completions."""
    _, (scores, _), (logps, _) = enumerated
    exact = -sum(math.exp(logp) * logp for logp in logps)
    expected = sum(math.exp(logp) * sum(score.entropies) for logp, score in zip(logps, scores, strict=True))
    assert exact > 0.5
    assert expected == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("estimator", ["plain", "low_variance"])
def test_kl_against_enumeration(enumerated, estimator):
    _, (policy, base), (policy_logps, base_logps) = enumerated
    exact = sum(math.exp(p) * (p - q) for p, q in zip(policy_logps, base_logps, strict=True))
    expected = sum(
        math.exp(logp) * sequence_kl(one.logps, other.logps, estimator)
        for logp, one, other in zip(policy_logps, policy, base, strict=True)
    )
    assert exact > 0.5
    assert expected == pytest.approx(exact, rel=1e-5)


def test_the_low_variance_estimator_deserves_its_name():
    """Close policies over two tokens: the variance of both estimators, exactly."""
    policy, base = [0.6, 0.4], [0.55, 0.45]
    variance = {}
    for estimator in ("plain", "low_variance"):
        values = [sequence_kl([math.log(p)], [math.log(q)], estimator) for p, q in zip(policy, base, strict=True)]
        mean = sum(p * value for p, value in zip(policy, values, strict=True))
        variance[estimator] = sum(p * (value - mean) ** 2 for p, value in zip(policy, values, strict=True))
        assert mean == pytest.approx(sum(p * math.log(p / q) for p, q in zip(policy, base, strict=True)))
    assert variance["low_variance"] < variance["plain"] / 100


def test_kl_of_a_policy_to_itself_is_0_and_needs_equal_lengths():
    assert sequence_kl([-1.0, -2.0], [-1.0, -2.0], "plain") == sequence_kl([-1.0, -2.0], [-1.0, -2.0]) == 0.0
    assert math.isfinite(sequence_kl([-2_000.0], [-1.0]))
    with pytest.raises(ValueError, match="got 2 and 1"):
        sequence_kl([-1.0, -2.0], [-1.0])
    with pytest.raises(ValueError, match="got 'k2'"):
        sequence_kl([-1.0], [-1.0], "k2")


def test_long_rows_are_scored_in_chunks_as_in_one(monkeypatch):
    model = tiny_model()
    prompts, completions = [[5, 6, 7], [8]], [[9, 10, 11, 12, 13], [14, 15]]
    one_batch = score_completions(model, prompts, completions)
    monkeypatch.setattr("opo_trl.evaluation.scoring._POSITIONS", 4)
    for one, other in zip(one_batch, score_completions(model, prompts, completions), strict=True):
        assert other.logps == pytest.approx(one.logps, abs=1e-5)
        assert other.entropies == pytest.approx(one.entropies, abs=1e-5)
    assert [len(score.logps) for score in one_batch] == [5, 2]


def test_vllm_ends_completions_where_transformers_does(tmp_path):
    """Also where a model has no generation_config.json, as older repositories on the Hub."""
    model = tiny_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path)
    assert declared_ends(str(tmp_path)) == [7, 9]
    (tmp_path / "generation_config.json").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert declared_ends(str(tmp_path)) == loaded.generation_config.eos_token_id == [7, 9]
    loaded.generation_config.eos_token_id = 8  # the generation config decides where there is one
    loaded.save_pretrained(tmp_path)
    assert declared_ends(str(tmp_path)) == 8


def test_vllm_is_given_a_rank_that_it_allows():
    assert max_lora_rank(LoraConfig(r=4)) == 8
    assert max_lora_rank(LoraConfig(r=64)) == 64
    assert max_lora_rank(LoraConfig(r=12, rank_pattern={"q_proj": 40})) == 64
    for refused in ({"r": 600}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ValueError, match="Use the backend transformers"):
            max_lora_rank(LoraConfig(**refused))


def record(problem, sample, reward, **others):
    defaults = {
        "solution": "4",
        "completion": f"it is {sample}",
        "token_ids": [1, 2, 3, 4, 5, 6][: 2 + sample],
        "truncated": False,
        "answer": str(sample),
    }
    return {"problem": problem, "sample": sample, "reward": reward, **defaults, **others}


def test_metrics_of_records():
    records = [
        record("a", 1, 0.0, truncated=True, entropy=3.0, kl_plain=1.0, kl_low_variance=2.0),
        record("a", 0, 1.0, entropy=1.0, kl_plain=0.0, kl_low_variance=0.5),
        record("b", 0, None, entropy=1.0, kl_plain=0.0, kl_low_variance=0.0),
        record("b", 1, 0.0, entropy=1.5, kl_plain=0.5, kl_low_variance=0.0),
    ]
    metrics = problem_metrics(records)
    assert metrics["pass@1"] == {"a": 0.5, "b": 0.0} == pass_rates(records)
    assert metrics["pass@2"] == {"a": 1.0, "b": 0.0}
    assert metrics["maj@2"] == {"a": 0.5, "b": 0.0}
    assert metrics["length"] == {"a": 2.5, "b": 2.5}
    assert metrics["truncated"] == {"a": 0.5, "b": 0.0}
    assert metrics["no-answer"] == {"a": 0.0, "b": 0.0}
    assert metrics["entropy"] == {"a": 4 / 5, "b": 2.5 / 5}
    assert metrics["kl_plain"] == {"a": 1 / 5, "b": 0.5 / 5}
    assert metrics["kl_low_variance"] == {"a": 0.5, "b": 0.0}
    assert metrics["distinct-2"]["a"] == pytest.approx(2 / 3)  # 12, and 12 23
    summary = summarize(metrics)
    assert summary["pass@1"]["mean"] == 0.25
    assert summary["pass@1"]["low"] == 0.0
    assert summary["pass@1"]["high"] == 0.5


def test_one_sample_has_no_self_bleu_and_no_vote():
    assert problem_metrics([record("a", 0, 1.0)]).keys() == {"pass@1", "length", "truncated", "no-answer", "rep-5"}


def test_completions_without_an_answer_are_counted_in_records_with_and_without_a_verdict():
    records = [
        record("a", 0, 1.0, verdict="right"),
        record("a", 1, 0.0, verdict="no answer", answer=None),
        record("a", 2, 0.0, verdict="no answer", answer=r"\text{}"),  # a box with nothing in it that can be read
        record("a", 3, None, verdict="unusable solution", answer=" "),
        record("b", 0, 0.0, answer=None),  # as written before records had a verdict
        *(record("b", sample, 0.0, answer="5") for sample in (1, 2, 3)),
    ]
    assert problem_metrics(records)["no-answer"] == {"a": 0.75, "b": 0.25}


def test_a_model_that_solves_nothing_has_an_interval():
    summary = summarize(problem_metrics([record(str(problem), 0, 0.0) for problem in range(30)]))
    assert summary["pass@1"]["mean"] == summary["pass@1"]["low"] == 0.0
    assert summary["pass@1"]["high"] == pytest.approx(1 - 0.025 ** (1 / 30))
    assert summary["length"]["low"] == summary["length"]["high"] == 2.0, "lengths are not bounded"


def test_problems_are_divided_by_category():
    metrics = problem_metrics([record(problem, 0, float(problem != "b")) for problem in "abcd"])
    found = by_category(metrics, {"a": "Level 10", "b": "Level 2", "c": "Level 10", "d": "(none)"})
    assert list(found) == ["(none)", "Level 2", "Level 10"]
    assert found["Level 10"]["pass@1"] == {"a": 1.0, "c": 1.0}
    assert found["Level 2"]["pass@1"] == {"b": 0.0}
    assert all(each.keys() == metrics.keys() for each in found.values())


def test_metrics_need_complete_records():
    with pytest.raises(ValueError, match=r"got \[1, 2\] for 2 problems"):
        problem_metrics([record("a", 0, 1.0), record("b", 0, 1.0), record("b", 1, 1.0)])
    with pytest.raises(ValueError, match=r"got \[\] for 0 problems"):
        problem_metrics([])


def test_checkpoints_are_averaged_problem_by_problem():
    one, two = (problem_metrics([record("a", 0, reward), record("b", 0, 1.0)]) for reward in (0.0, 1.0))
    assert average([one, two, two])["pass@1"] == {"a": pytest.approx(2 / 3), "b": 1.0}
    with pytest.raises(ValueError, match=r"of 2 problems and .* of 1"):
        average([one, problem_metrics([record("a", 0, 1.0)])])


def test_samples_follow_the_policy_and_leave_the_callers_random_state():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.update(top_k=3, typical_p=0.2, no_repeat_ngram_size=1, suppress_tokens=[5, 6, 7, 8, 9])
    own = model.generation_config
    state = torch.get_rng_state()
    drawn = sample_completions(
        model, tokenizer, ["one"], num_samples=4_000, max_new_tokens=1, temperature=0.8, batch_size=1_000
    )[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is own
    with torch.no_grad():
        expected = (model(**tokenizer(["one"], return_tensors="pt")).logits[0, -1] / 0.8).softmax(dim=-1)
    frequencies = Counter(completion.token_ids[0] for completion in drawn)
    for token in expected.topk(10).indices.tolist():
        assert frequencies[token] / len(drawn) == pytest.approx(expected[token].item(), abs=0.035)
    assert sum(abs(frequencies[token] / 4_000 - p) for token, p in enumerate(expected.tolist())) / 2 < 0.05


def test_samples_come_in_the_order_of_the_prompts():
    model, tokenizer = tiny_model(), tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    prompts = [[{"role": "user", "content": "a" * n}] for n in (1, 5, 3)]
    model.generation_config.eos_token_id = None
    groups = sample_completions(model, tokenizer, prompts, num_samples=2, max_new_tokens=5, batch_size=4, seed=3)
    assert [len(group) for group in groups] == [2, 2, 2]
    assert all(1 <= len(completion.token_ids) <= 5 for group in groups for completion in group)
    assert all(c.truncated == (c.token_ids[-1] != tokenizer.eos_token_id) for group in groups for c in group)


@pytest.mark.parametrize(("declared", "ends"), [(None, []), (7, [7]), ([9, 8], [8, 9])])
def test_a_tokenizer_without_an_end_token_leaves_the_models_own(declared, ends):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = declared
    sampler = TransformersSampler(model, tokenizer, max_new_tokens=40, temperature=1.0)
    prompts = [tokenize_prompt(tokenizer, text) for text in ("one", "twenty two", "seven!")]
    for completion in sampler.sample(prompts, [1, 2, 3]):
        assert completion.truncated == (completion.token_ids[-1] not in ends)
        assert not set(completion.token_ids[:-1]) & set(ends)
        assert len(completion.token_ids) == 40 or not completion.truncated


def test_what_a_row_samples_depends_on_its_seed_alone():
    """Neither the other rows, nor the order, nor padding: alone, in a batch and in another one."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    sampler = TransformersSampler(model, tokenizer, max_new_tokens=12, temperature=1.5)
    prompts = [tokenize_prompt(tokenizer, text) for text in ("one", "twenty two", "seven!", "six")]
    seeds = [record_seed(0, "dataset", i) for i in range(4)]
    together = sampler.sample(prompts, seeds)
    assert [sampler.sample([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)] == together
    assert sampler.sample(prompts[2:0:-1], seeds[2:0:-1]) == together[2:0:-1]
    assert len({tuple(c.token_ids) for c in sampler.sample([prompts[0]] * 4, seeds)}) == 4
    with pytest.raises(ValueError, match=r"above 0, got 0"):
        TransformersSampler(model, tokenizer, max_new_tokens=1, temperature=0)
