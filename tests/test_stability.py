"""The stability map: its runs, what counts as a collapse, the band of rates that work, and the report."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import stability_map
from opo_vs_grpo import LEARNING_RATES
from stability_map import (
    CONTROLS,
    MAIN,
    RATES,
    SEEDS,
    START,
    Job,
    Row,
    batch_means,
    complete_map,
    jobs_of,
    read,
    summarize,
    variant_of,
)
from stability_report import TITLES, band, block_means, page_tables, plot

ROWS = [*MAIN, *CONTROLS]
ORIGIN = {"commit": "abc", "hardware": "a processor", "versions": {"torch": "2"}}


def test_the_grid_is_run_seed_by_seed_and_has_no_run_twice():
    jobs = jobs_of(MAIN, RATES, SEEDS, 200)
    assert len({job.name for job in jobs}) == len(jobs) == 75
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    assert {job.steps for job in jobs if job.variant == "opo"} == {1}, "OPOTrainer refuses more"


@pytest.mark.parametrize("row", ROWS)
def test_rows_differ_in_steps_and_not_in_rollouts(row, tmp_path):
    _, config_class, settings = variant_of(row)
    config = config_class(str(tmp_path), num_generations=8, use_cpu=True, bf16=False, **settings)
    fresh = row.steps if row.variant == "grpo_fresh" else 1  # rollout batches per 128 completions
    assert config.generation_batch_size * fresh == 128
    assert config.steps_per_generation // config.gradient_accumulation_steps * fresh == row.steps
    assert (config.beta, config.entropy_coef) == (0.0, 0.0)
    if row.variant == "opo":
        assert (config.epsilon, config.scale_rewards) == (None, "none")
    else:
        assert (config.epsilon, config.scale_rewards) == (0.2, "none" if row.variant == "grpo_no_std" else "group")


@pytest.fixture
def failing_run(monkeypatch):
    """Train with a stand-in that raises, and whose only weight has a given value."""

    def train(error, weight):
        def raise_it():
            raise error

        model = torch.nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(weight)
        entries = [{"reward": 0.5, "entropy": 0.1, "completions/mean_length": 9.0, "grad_norm": math.nan}]
        trainer = SimpleNamespace(
            train=raise_it, model=model, state=SimpleNamespace(global_step=7, log_history=entries)
        )
        monkeypatch.setattr(stability_map, "build_trainer", lambda *args, **kwargs: trainer)
        return stability_map.train(Job("grpo", 1, 1e-3, 11, 200))

    return train


@pytest.mark.parametrize(
    ("error", "weight"),
    [
        (RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"), 1.0),
        (ValueError("Gradients must be finite: their norm is nan"), 1.0),
        (RuntimeError("index out of range"), math.nan),
    ],
)
def test_numbers_that_are_not_finite_are_a_result(failing_run, error, weight):
    found = failing_run(error, weight)
    assert found["broke_down"] == f"step 7: {type(error).__name__}: {error}"
    assert found["curves"]["reward"] == [0.5]
    assert found["curves"]["grad_norm"] == [None], "a file without NaN"
    assert "metrics" not in found
    assert stability_map.pass_at_1(found) == 0


def test_any_other_error_is_raised(failing_run):
    with pytest.raises(ValueError, match="a mistake"):
        failing_run(ValueError("a mistake"), 1.0)


def test_curves_have_a_point_for_each_128_completions():
    logged = [{"reward": 0.5, "entropy": 1.0}, {"entropy": 2.0}, {"reward": 0.25, "entropy": math.nan}, {"entropy": 1}]
    assert batch_means(logged, "reward", 2) == [0.5, 0.25]
    assert batch_means(logged, "entropy", 2) == [1.5, None]
    assert block_means([[1.0, 2.0, 3.0], [2.0, None]], block=2) == [pytest.approx(5 / 3, abs=1e-4), 3.0]


def test_a_band_is_interpolated_between_the_rates():
    found = band({1e-5: 0.4, 1e-4: 0.6, 1e-3: 0.6, 1e-2: 0.2}, 0.5)
    assert found["rates"] == [1e-4, 1e-3]
    assert found["low"] == pytest.approx(10**-4.5)
    assert found["high"] == pytest.approx(10**-2.75)
    assert found["width"] == pytest.approx(10**1.75)
    assert not found["low_open"]
    assert not found["high_open"]


def test_a_band_that_ends_with_what_was_tried_is_open_and_none_is_none():
    found = band({1e-5: 0.6, 1e-4: 0.4}, 0.5)
    assert (found["low"], found["low_open"], found["high_open"]) == (1e-5, True, False)
    assert band({1e-5: 0.4}, 0.5)["rates"] == []
    assert band({1e-6: 0.6, 1e-5: 0.4, 1e-4: 0.6, 1e-3: 0.6}, 0.5)["rates"] == [1e-4, 1e-3], "neighbours only"


PEAKS = {1: 3e-5, 2: 3e-5, 4: 1e-5, 8: 1e-5}


def pretended(job):
    """A run whose pass@1 falls by 20 points with each rate away from the peak, and which breaks down at 1e-3."""
    curves = {name: [0.5, 0.25] for name in stability_map.CURVES}
    found = {"job": job._asdict(), "provenance": ORIGIN, "cpu_seconds": 36.0, "curves": curves}
    if job.learning_rate == 1e-3:
        return {**found, "broke_down": "step 3: ValueError: not finite"}
    if job == START:
        accuracy = 0.4
    else:
        away = abs(LEARNING_RATES.index(job.learning_rate) - LEARNING_RATES.index(PEAKS[job.steps]))
        accuracy = max(0.7 - 0.2 * away, 0.1) + 0.001 * (job.seed - 12)
    metrics = dict.fromkeys(("pass@8", "entropy", "kl_plain", "length", "truncated"), 0.05)
    return {**found, "metrics": {**metrics, "pass@1": accuracy}}


def test_rows_that_work_at_an_edge_get_more_rates_and_controls_come_last():
    order = []

    def finish(jobs):
        order.extend(jobs)
        return {job: pretended(job) for job in jobs}

    scores, results = complete_map(200, finish)
    assert order[0] == START
    assert order[1:76] == jobs_of(MAIN, RATES, SEEDS, 200)
    assert {job.variant for job in order[76:] if job.learning_rate in RATES} == {row.variant for row in CONTROLS}
    assert min(scores[Row("grpo", 1)]) == 1e-5, "does not work there"
    assert min(scores[Row("grpo", 4)]) == 3e-6
    assert min(scores[Row("grpo", 8)]) == 3e-6
    assert min(scores[Row("grpo_fresh", 4)]) == 3e-6
    assert len(order) == len(set(order)) == len(results)


@pytest.fixture
def report():
    return json.loads(
        json.dumps(summarize(*complete_map(200, lambda jobs: {job: pretended(job) for job in jobs}), rollouts=200))
    )


def test_the_report_holds_every_row_and_where_it_comes_from(report):
    assert list(report["rows"]) == list(TITLES)
    assert report["threshold"] == pytest.approx(0.9 * 0.7)
    assert (report["commit"], report["hardware"], report["versions"]) == ("abc", "a processor", {"torch": "2"})
    assert report["cpu_hours"] == pytest.approx(0.01 * (report["runs"] + 1), abs=0.01)
    row = report["rows"]["opo-1"]
    assert row["band"]["rates"] == [3e-5]
    assert (row["best_rate"], row["highest_rate_without_collapse"]) == (3e-5, 3e-4)
    assert row["cells"]["0.0003"]["collapsed"] == [False] * 3
    assert row["cells"]["0.001"]["broke_down"] == ["step 3: ValueError: not finite"] * 3
    assert len(row["band_each_seed"]) == len(SEEDS)


def test_a_collapse_is_below_half_of_the_starting_accuracy():
    def cell(scores):
        runs = [pretended(Job("opo", 1, 3e-5, seed, 200)) for seed in SEEDS]
        return stability_map.summarize_cell(runs, scores, 0.5 * 0.4)["collapsed"]

    assert cell([0.199, 0.2, 0.7]) == [True, False, False]


def test_tables_and_figure_of_a_report(report, tmp_path):
    tables = page_tables(report)
    assert "| OPO, 1 step | 3e-5 | 2.0e-5 to 4.6e-5 | 2.2x |" in tables["bands"]
    assert "0.0 (0.0 to 0.0), 3 collapsed" in tables["pass@1"]
    assert all(title in table for table in tables.values() for title in TITLES.values())
    plot(report, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000


def test_a_report_of_unfinished_runs_is_refused(tmp_path):
    (tmp_path / f"{START.name}.json").write_text(json.dumps(pretended(START)))
    with pytest.raises(FileNotFoundError, match=r"75 of 75 are not in .*opo-1-1e-05-11-200.*without --report"):
        complete_map(200, lambda jobs: read(jobs, tmp_path))


def test_runs_of_different_versions_are_not_mixed():
    def finish(jobs):
        return {job: {**pretended(job), "provenance": {**ORIGIN, "versions": {"torch": str(job.seed)}}} for job in jobs}

    with pytest.raises(ValueError, match="same versions"):
        summarize(*complete_map(200, finish), rollouts=200)
