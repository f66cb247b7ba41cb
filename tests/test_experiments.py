"""The arithmetic of `benchmarks/gradient_variance.py` and `opo_vs_grpo.py`: statistics, sweeps, intervals."""

import itertools
import json
import statistics

import pytest
import torch

import gradient_variance
import opo_vs_grpo
from gradient_variance import BASELINES, Completions, CountSketch, Prompt, compared, group_statistics, take_gradients
from measuring import interval
from opo_trl.evaluation.sampling import TransformersSampler
from opo_vs_grpo import FIRST_GRID, LEARNING_RATES, SWEEP_SEEDS, Job, choose_rates, complete
from tiny import tiny_model, tiny_tokenizer


def made_up_prompt(count=64, dimensions=5, seed=0):
    """Completions with gradients of five numbers, where longer ones have larger gradients and better rewards."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 20, (count,), generator=generator).double()
    gradients *= lengths.sqrt().unsqueeze(1)
    rewards = (torch.rand(count, generator=generator) < lengths / 25).double()
    squared_norms = gradients.square().sum(dim=1)
    facts = Completions(rewards, lengths, *(squared_norms / n for n in (2, 3, 4)), squared_norms)
    return Prompt(facts, gradients @ gradients.T), gradients


def test_gradients_are_those_of_the_summed_log_probability():
    model = tiny_model()
    prompt, completions = [5, 6, 7], [[8, 9, 1], [10, 1], [11, 12, 13, 14, 1]]
    found = take_gradients(model, prompt, completions, [1.0, 0.0, 1.0])
    expected, uncertain = [], []
    for completion in completions:
        model.zero_grad()
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(dim=-1)
        logps = log_probs[torch.arange(len(completion)), completion]
        logps.sum().backward()
        expected.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        # the score with respect to the logits is the one-hot vector minus the probabilities
        one_hot = torch.nn.functional.one_hot(torch.tensor(completion), log_probs.size(1))
        left = 1 - logps.detach().exp()
        uncertain.append([(one_hot - log_probs.detach().exp()).square().sum(), left.square().sum(), left.sum()])
    stacked = torch.stack(expected).double()
    assert torch.allclose(found.inner_products, stacked @ stacked.T, rtol=1e-4)
    assert torch.allclose(found.completions.squared_norms, stacked.square().sum(dim=1), rtol=1e-4)
    assert found.completions.lengths.tolist() == [3, 2, 5]
    weights = (found.completions.logit_norms, found.completions.uncertainties, found.completions.surprises)
    assert torch.allclose(torch.stack(weights, dim=1).float(), torch.tensor(uncertain), rtol=1e-4)


def test_hashed_gradients_keep_their_inner_products(monkeypatch):
    arguments = (tiny_model(), [5, 6, 7], [[8, 9, 1], [10, 1]], [1.0, 0.0])
    exact = take_gradients(*arguments)
    monkeypatch.setattr(gradient_variance, "LARGEST_GRADIENT", 2**13)
    hashed = take_gradients(*arguments)
    scale = exact.inner_products.diagonal().sqrt()
    assert (hashed.inner_products != exact.inner_products).any()
    error = (hashed.inner_products - exact.inner_products).abs() / torch.outer(scale, scale)
    assert error.max() < 5 / 2**6.5  # five standard deviations
    assert torch.equal(hashed.completions.squared_norms, exact.completions.squared_norms), "taken before hashing"


def test_the_sketch_is_a_signed_sum_of_rotated_pieces_that_loses_nothing(monkeypatch):
    monkeypatch.setattr(gradient_variance, "LARGEST_GRADIENT", 8)
    sketch = CountSketch(21, torch.device("cpu"))
    for place in range(21):
        found = sketch(torch.nn.functional.one_hot(torch.tensor(place), 21).float())
        assert found.abs().sum() == 1, "each entry has one place and keeps its size"
        assert found.abs().argmax() == (place % 8 + sketch.shifts[place // 8]) % 8


def test_the_sampler_draws_from_the_distribution_that_is_differentiated():
    model, tokenizer, prompt, limit = tiny_model(), tiny_tokenizer(), [5, 6, 7], 30
    seeds = list(range(40))
    sampler = TransformersSampler(model, tokenizer, max_new_tokens=limit)
    completions = [each.token_ids for each in sampler.sample([prompt] * 40, seeds)]
    zeros = [0.0] * 40
    tokens = sum(map(len, completions))
    assert take_gradients(model, prompt, completions, zeros, seeds, limit).redrawn <= 1, "rounding at most"
    with torch.no_grad():
        model.lm_head.weight *= 1.3  # another distribution, such as that of another temperature
    changed = take_gradients(model, prompt, completions, zeros, seeds, limit).redrawn
    assert changed > 0.02 * tokens


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_the_variance_is_that_of_the_groups_own_estimates(group_size, monkeypatch):
    """One partition, against the estimates themselves as vectors."""
    monkeypatch.setattr(gradient_variance, "PARTITIONS", 1)
    prompt, gradients = made_up_prompt()
    found = group_statistics(prompt, group_size, torch.Generator().manual_seed(3))
    groups = torch.randperm(64, generator=torch.Generator().manual_seed(3)).view(-1, group_size)
    half = len(groups) // 2
    for name in ("none", "group mean", "leave-one-out", "OPO"):
        group = prompt.completions.take(groups)
        advantages = group.rewards - BASELINES[name](group, 0.0)
        estimates = torch.einsum("gk,gkd->gd", advantages, gradients[groups]) / group_size
        variance, with_itself, with_gradient, of_gradients, _ = found[name].tolist()
        assert variance == pytest.approx(estimates.var(dim=0).sum().item())
        means = estimates[:half].mean(dim=0), estimates[half:].mean(dim=0)
        assert with_itself == pytest.approx((means[0] @ means[1]).item())
        true = []
        for members in (groups[:half].flatten(), groups[half:].flatten()):
            rewards = prompt.completions.rewards[members]
            others = (rewards.sum() - rewards) / (len(members) - 1)
            true.append(((rewards - others).unsqueeze(1) * gradients[members]).mean(dim=0))
        assert with_gradient == pytest.approx(((true[0] @ means[1] + true[1] @ means[0]) / 2).item())
        assert of_gradients == pytest.approx((true[0] @ true[1]).item())


def test_the_group_mean_is_leave_one_out_shrunk():
    found = group_statistics(made_up_prompt()[0], 4, torch.Generator().manual_seed(0))
    assert found["group mean"][0] * (4 / 3) ** 2 == pytest.approx(found["leave-one-out"][0].item())
    assert found["group mean"][2] * (4 / 3) == pytest.approx(found["leave-one-out"][2].item())


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_a_scale_that_is_known_is_not_measured(group_size):
    found = group_statistics(made_up_prompt()[0], group_size, torch.Generator().manual_seed(0))
    for name, scale in {"none": 1, "leave-one-out": 1, "group mean": 1 - 1 / group_size}.items():
        assert (found[name][4] / found[name][3]).item() == pytest.approx(scale, rel=1e-9)
    assert (found["optimum"][4] / found["optimum"][3]).item() == pytest.approx(1, abs=0.05), "one of 64 samples"


def test_proportional_weights_give_the_same_baseline():
    found = group_statistics(made_up_prompt()[0], 4, torch.Generator().manual_seed(0))
    for name in ("logit norm", "uncertainty", "1 - pi"):
        assert torch.allclose(found[name], found["exact"]), "made up as multiples of the squared norms"


def test_the_measured_bias_is_that_of_enumeration():
    """Two outcomes, K = 2: the mean of the estimator over all pairs, compared with the true gradient."""
    right, wrong = torch.tensor([1.0, 2.0]).double(), torch.tensor([-1.0, 1.0]).double()
    share, lengths = 0.25, {1.0: 3.0, 0.0: 1.0}
    gradient = share * right  # rewards 1 and 0; the scores' own mean is not 0 here, so the baseline matters
    centre = share * right + (1 - share) * wrong
    right, wrong = right - centre, wrong - centre  # now it is, as a score's must be
    gradient = share * right
    mean = torch.zeros(2).double()
    for pair in itertools.product([1.0, 0.0], repeat=2):
        probability = (share if pair[0] else 1 - share) * (share if pair[1] else 1 - share)
        baseline = sum(lengths[r] * r for r in pair) / sum(lengths[r] for r in pair)
        mean += probability * sum((r - baseline) * (right if r else wrong) for r in pair) / 2
    expected_scale = (mean @ gradient / (gradient @ gradient)).item()

    count = 2048
    rewards = (torch.arange(count) < share * count).double()
    gradients = torch.where(rewards.unsqueeze(1) == 1, right, wrong)
    facts = Completions(rewards, 1 + 2 * rewards, *[torch.ones(count).double()] * 4)
    found = group_statistics(Prompt(facts, gradients @ gradients.T), 2, torch.Generator().manual_seed(0))["OPO"]
    assert (found[2] / found[3]).item() == pytest.approx(expected_scale, abs=0.02)
    assert (found[4] / found[3]).item() == pytest.approx(expected_scale, abs=0.002)


def test_the_scale_varies_less_than_the_product_it_replaces(monkeypatch):
    """Of the same expectation, over samples of the same made-up prompt, with a gradient that is hard to measure."""
    monkeypatch.setattr(gradient_variance, "PARTITIONS", 4)
    measured = []
    for seed in range(200):
        found = group_statistics(made_up_prompt(seed=seed)[0], 4, torch.Generator().manual_seed(seed))["OPO"]
        measured.append(found[[2, 4, 3]])
    direct, controlled, squared = torch.stack(measured).T
    scales = direct.mean() / squared.mean(), controlled.mean() / squared.mean()
    errors = [(product - scale * squared).std() for product, scale in zip((direct, controlled), scales, strict=True)]
    assert abs(scales[0] - scales[1]) < 4 * errors[0] / 200**0.5 / squared.mean()
    assert errors[1] < 0.6 * errors[0]


def test_two_reports_agree_where_their_intervals_overlap():
    def report(low, high):
        return {"policies": {"fresh": {"scale": {"value": 1.0, "low": low, "high": high}, "seconds": 3}}}

    assert compared(report(0.9, 1.1), report(1.05, 1.2)) == (1, [])
    assert compared(report(0.9, 1.0), report(1.05, 1.2)) == (1, ["/fresh/scale"])


@pytest.fixture
def landscape(monkeypatch):
    """Runs without training: pass@1 is a given function of the variant and the rate; the jobs that ran are recorded."""
    ran = []

    def install(pass_at_1):
        def pretend(jobs, directory, processes, run):
            jobs = list(jobs)
            ran.extend(job for job in jobs if job not in ran)
            return {job: {"metrics": {"pass@1": pass_at_1(job)}} for job in jobs}

        monkeypatch.setattr(opo_vs_grpo, "complete", pretend)
        return ran

    return install


def test_a_sweep_continues_until_the_best_rate_has_neighbours_on_both_sides(landscape, tmp_path):
    peaks = {
        "opo": 1e-5,
        "opo_mean": 1e-4,
        "grpo": 3e-3,
        "grpo_no_std": 3e-5,
        "grpo_off": 3e-4,
        "opo_uncertainty": 1e-4,
    }
    distance = {rate: place for place, rate in enumerate(LEARNING_RATES)}
    ran = landscape(lambda job: 1 - abs(distance[job.learning_rate] - distance[peaks[job.variant]]) / 10)
    sweeps = choose_rates(tmp_path, processes=1, rollouts=7)
    assert {variant: sweep["best"] for variant, sweep in sweeps.items()} == peaks
    tried = {variant: {job.learning_rate for job in ran if job.variant == variant} for variant in peaks}
    assert tried["opo_mean"] == set(FIRST_GRID)
    assert tried["opo"] == {3e-6, 1e-5, *FIRST_GRID}
    assert tried["grpo"] == {*FIRST_GRID, 1e-3, 3e-3, 1e-2}
    assert all(job.split == "validation" and job.seed in SWEEP_SEEDS for job in ran)


def test_on_a_tie_the_lower_rate_is_chosen_and_a_breakdown_counts_as_zero(landscape, tmp_path, monkeypatch):
    landscape(lambda job: 0.5)
    best = {sweep["best"] for sweep in choose_rates(tmp_path, processes=1, rollouts=7).values()}
    assert best == {min(LEARNING_RATES)}, "down to the end of the list"
    assert opo_vs_grpo.score({"broke_down": "step 3"}) == 0


def test_finished_runs_are_read_and_not_run_again(tmp_path, monkeypatch):
    job = Job("opo", 1e-4, 1, "test", 7)
    (tmp_path / f"{job.name}.json").write_text(json.dumps({"job": job._asdict(), "metrics": {"pass@1": 0.25}}))
    monkeypatch.setattr(opo_vs_grpo, "ProcessPoolExecutor", None)
    assert complete([job, job], tmp_path, processes=1)[job]["metrics"]["pass@1"] == 0.25


def test_the_time_of_all_runs_is_stated(tmp_path):
    """Those of the sweep too; a run that broke down has none."""
    for number, run in enumerate(({"cpu_seconds": 5400.0}, {"cpu_seconds": 1980.0}, {"broke_down": "step 3"})):
        (tmp_path / f"{number}.json").write_text(json.dumps(run))
    assert opo_vs_grpo.cpu_hours(tmp_path) == 2.0  # of 7,380 s, to a tenth


def test_intervals_over_seeds_are_student_t():
    values = [0.61, 0.64, 0.60, 0.66]
    found = interval(values)
    half = 3.182446 * statistics.stdev(values) / 2  # t of three degrees of freedom at 97.5 %
    assert found["mean"] == pytest.approx(statistics.fmean(values))
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=1e-5)


def test_every_variant_but_the_off_policy_ones_takes_one_step_per_rollout_batch():
    for variant, (_, _, settings) in opo_vs_grpo.VARIANTS.items():
        steps = settings.get("steps_per_generation", settings["gradient_accumulation_steps"])
        expected = {"grpo_off": 2, "grpo_off_4": 4}.get(variant, 1)
        assert steps // settings["gradient_accumulation_steps"] == expected
        assert steps * settings.get("per_device_train_batch_size", 64) == 128, "completions per rollout batch"
