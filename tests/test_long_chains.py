"""The long chains of `benchmarks/`: right solutions, disjoint splits, lengths; and what is measured on them."""

import json
import random
import re
from argparse import Namespace

import pytest
import torch

import gradient_variance
from gradient_variance import Completions, Prompt, measure, read_prompt, save_prompt
from length_statistics import by_length, describe_lengths, profile, within_groups
from long_chains import (
    BOX,
    FEWEST_OPERATIONS,
    LONGEST_SOLUTION,
    MOST_OPERATIONS,
    STYLES,
    count_tokens,
    load_long_chains,
    make_problem,
    write_solution,
)
from make_long_chains_policy import POOL, VOCABULARY, collate, make_pool, make_tokenizer
from opo_trl.scripts.arithmetic import split_of
from tasks import TASKS


def problems(count, seed=0):
    rng = random.Random(seed)
    return [make_problem(rng) for _ in range(count)]


def test_answers_are_those_of_the_expressions():
    for problem in problems(300):
        expression = re.sub("[a-p]", "", problem["problem"].removesuffix("=?"))
        assert eval(expression) == int(problem["answer"])
        assert len(problem["operations"]) == len(re.findall(r"[+-]", expression))
        assert FEWEST_OPERATIONS <= len(problem["operations"]) <= MOST_OPERATIONS


@pytest.mark.parametrize("style", STYLES)
def test_solutions_without_mistakes_are_right_in_every_step(style):
    rng = random.Random(1)
    for problem in problems(200):
        solution = write_solution(problem, rng, style, mistakes=False)
        assert solution.endswith(f"{BOX}{problem['answer']}}}")
        for left, right in re.findall(r"(\d+[+-]\d)=(\d+)", solution):
            assert eval(left) == int(right)
        first_pass = solution.split("|")[0].removesuffix(f"{BOX}{problem['answer']}}}")
        step = r"[a-p][+-]\d[,; ](\d+)" if style == "direct" else r"[a-p]\d+[+-]\d=(\d+)"
        totals = [int(result) for result in re.findall(step, first_pass)]
        running = problem["start"]
        for total, (_, signed) in zip(totals, problem["operations"], strict=True):
            running += signed
            assert total == running


@pytest.mark.parametrize("style", STYLES)
def test_solutions_with_mistakes_are_right_and_wrong_at_all_lengths(style):
    rng = random.Random(2)
    found = [(write_solution(problem, rng, style), problem["answer"]) for problem in problems(600)]
    found.sort(key=lambda pair: count_tokens(pair[0]))
    for third in (found[:200], found[200:400], found[400:]):
        right = sum(solution.endswith(f"{BOX}{answer}}}") for solution, answer in third)
        assert 60 < right < 180


def test_a_found_mistake_is_corrected_and_another_one_is_hidden():
    rng, kept = random.Random(3), 0
    for problem in problems(400):
        solution = write_solution(problem, rng, "checked")
        for result, check, redone in re.findall(r"=(\d+)\(([^)]*)\)!([a-p]\d+[+-]\d+=\d+)", solution):
            assert eval(redone[1:].replace("=", "=="))
            assert not redone.endswith(f"={result}")
            assert eval(check.replace("=", "=="))
            kept += 1
    assert kept > 50


def test_lengths_are_in_range_and_vary_within_each_problem():
    rng = random.Random(4)
    for problem in problems(100):
        lengths = [count_tokens(write_solution(problem, rng)) for _ in range(100)]
        assert min(lengths) >= 30
        assert max(lengths) <= LONGEST_SOLUTION
        assert max(lengths) > 4 * min(lengths)


def test_splits_are_disjoint_and_draws_reproducible():
    drawn = {split: set(load_long_chains(split, 500)["prompt"]) for split in ("warm_start", "train", "test")}
    for split, texts in drawn.items():
        assert {split_of(text) for text in texts} == {split}
    assert load_long_chains("test", 20)["prompt"] == load_long_chains("test", 500)["prompt"][:20]
    assert not set(load_long_chains("test", 20, seed=1)["prompt"]) & drawn["test"]
    with pytest.raises(ValueError, match="split must be one of"):
        load_long_chains("validation", 3)


def test_the_tokenizer_counts_as_the_generator_does_and_reads_back_what_it_wrote():
    tokenizer, rng = make_tokenizer(), random.Random(5)
    for problem in problems(50):
        for text in (problem["problem"], write_solution(problem, rng)):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert len(ids) + 1 == count_tokens(text)


def test_batches_of_the_warm_start_have_labels_on_the_solutions_and_problems_of_their_split():
    tokenizer, batches = make_tokenizer(), make_pool(0, 0)
    assert len(batches) == POOL
    assert batches == make_pool(0, 0)
    assert batches != make_pool(0, POOL)
    batch = collate(batches[0])
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert (labels[labels != -100] == ids[labels != -100]).all()
        text = tokenizer.decode(ids[ids != VOCABULARY.index("<pad>")])
        problem, solution = text.split("?", 1)
        assert split_of(f"{problem}?") == "warm_start"
        assert tokenizer.decode(labels[labels != -100]) == solution


def made_up_prompts(exponent, count=40, samples=32):
    """Squared norms that are a power of the length in each prompt, and larger for prompts with short completions."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        scale = 1 + 9 * torch.rand(1, generator=generator, dtype=torch.float64)
        lengths = scale * (1 + 4 * torch.rand(samples, generator=generator, dtype=torch.float64))
        found.append((lengths, scale**-3 * lengths**exponent))
    return [list(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.6])
def test_the_slope_within_groups_ignores_what_differs_between_them(exponent):
    found = within_groups(*made_up_prompts(exponent))
    assert found["log_log_slope"]["value"] == pytest.approx(exponent)
    assert found["log_log_correlation"]["value"] == pytest.approx(1)
    assert found["correlation"]["value"] > 0


def test_lengths_are_described_by_quantiles_and_ranges():
    lengths = torch.arange(1, 101).double()
    found = describe_lengths([lengths, lengths])
    assert found["quantiles"]["0"] == 1
    assert found["quantiles"]["1"] == 100
    assert found["within_prompts"]["longest_over_shortest"] == 100
    right = (lengths % 2 == 0).double()
    rows = by_length(lengths, right, lengths + right)
    assert [(row["shortest"], row["longest"], row["completions"]) for row in rows] == [
        (1, 25, 25), (26, 50, 25), (51, 75, 25), (76, 100, 25),
    ]  # fmt: skip
    assert rows[0]["pass@1"] == 12 / 25
    assert rows[0]["squared_norm"] == {"right": 14.0, "wrong": 13.0}, "2 to 24 in steps of 2, plus 1; 1 to 25"


def test_the_profile_averages_tokens_of_a_range_of_positions():
    tokens = [torch.cat([torch.full((25,), 0.5), torch.full((10,), 0.1)]), torch.full((5,), 0.3)]
    first, second = profile(tokens)
    assert first["tokens"] == 30
    assert first["uncertainty"] == pytest.approx((25 * 0.5 + 5 * 0.3) / 30)
    assert (second["from"], second["to"], second["tokens"]) == (25, 50, 10)


def test_a_stored_prompt_is_read_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([3, 1, 4, 1, 5, 9]).double()
    facts = Completions(*(lengths + i for i in range(len(Completions._fields))))._replace(lengths=lengths)
    tokens = [torch.rand(int(length), generator=generator) for length in lengths]
    stored = Prompt(facts, gradients @ gradients.T, tokens, redrawn=2)
    save_prompt(stored, tmp_path / "one.npz")
    found = read_prompt(tmp_path / "one.npz")
    assert all(torch.equal(one, other) for one, other in zip(found.completions, facts, strict=True))
    assert torch.allclose(found.inner_products, stored.inner_products, rtol=1e-6)
    assert found.redrawn == 2
    for one, other in zip(found.tokens, tokens, strict=True):
        assert torch.allclose(one, other, atol=1e-3)


@pytest.mark.slow
def test_a_measurement_resumes_from_the_prompts_that_are_stored(tmp_path, monkeypatch):
    arguments = Namespace(
        task="arithmetic", dataset=None, prompts=2, samples=8, max_new_tokens=40, batch_size=8, seed=0, raw_dir=tmp_path
    )
    first, _ = measure("fresh", TASKS["arithmetic"].policy, arguments)
    assert len(list(tmp_path.glob("fresh/*.npz"))) == 2
    taken, take_prompt = [], gradient_variance.take_prompt
    monkeypatch.setattr(gradient_variance, "take_prompt", lambda *given: taken.append(given) or take_prompt(*given))
    second, _ = measure("fresh", TASKS["arithmetic"].policy, arguments)
    assert not taken
    for summary in (first, second):
        del summary["seconds"], summary["cpu_seconds"]
    assert json.dumps(first) == json.dumps(second), "as text: with two prompts some estimates are not a number"
    arguments.prompts = 3
    measure("fresh", TASKS["arithmetic"].policy, arguments)
    assert len(taken) == 1
