"""The time to an accuracy: its problems, its clock, where a curve crosses a target, and the report."""

import json
from types import SimpleNamespace

import pytest
import torch

import opo_vs_grpo
import time_to_accuracy
from measuring import crossing
from opo_trl.scripts.arithmetic import split_of
from opo_vs_grpo import Job, complete
from time_report import (
    AXES,
    GRPO,
    TITLES,
    crossings_of,
    faster_grpo,
    geometric_interval,
    page_tables,
    plot,
    smooth,
    summarize,
    target_accuracy,
)
from time_to_accuracy import LEVELS, NUM_HELD_OUT, NUM_PROBLEMS, SEEDS, VARIANTS, Clock, held_out, mixed_problems


def test_a_curve_crosses_a_target_between_two_measurements():
    assert crossing([0, 10, 20, 30], [0.2, 0.4, 0.8, 0.6], 0.6) == pytest.approx(15)
    assert crossing([0, 10, 20], [0.2, 0.4, 0.8], 0.4) == pytest.approx(10)
    assert crossing([5, 10], [0.7, 0.2], 0.6) == 5, "it starts there"
    assert crossing([0, 10], [0.2, 0.4], 0.6) is None
    assert crossing([0, 10, 20, 30], [0.2, 0.7, 0.1, 0.9], 0.6) == pytest.approx(8), "the first time"


def test_smoothing_is_a_centred_mean_of_what_there_is():
    assert smooth([1.0, 2.0, 6.0, 4.0], 3) == pytest.approx([1.5, 3.0, 4.0, 5.0])
    assert smooth([1.0, 2.0], 1) == [1.0, 2.0]


def curve(seconds_per_step, final, accuracies=None):
    """Measurements after 0, 10, 20, 30 steps."""
    accuracies = [0.2, 0.2 + (final - 0.2) / 3, 0.2 + (final - 0.2) / 1.5, final] if accuracies is None else accuracies
    return [
        {
            "steps": 10 * at,
            "tokens": 1000 * at,
            "seconds": 10 * at * seconds_per_step,
            "cpu_seconds": 9 * at * seconds_per_step,
            "pass@1": accuracy,
        }
        for at, accuracy in enumerate(accuracies)
    ]


def finished(seconds_per_step, final):
    return {
        "curve": curve(seconds_per_step, final),
        "metrics": {"pass@1": final},
        "uninformative": [0.5, 0.4, 0.5],
    }


@pytest.fixture
def runs():
    speeds = {"grpo": 3.0, "grpo_fresh": 2.0, "opo": 1.0, "opo_refill": 0.8, "opo_choose": 0.9, "opo_both": 0.5}
    return {
        variant: [finished(speed * (1 + 0.1 * seed), 0.8) for seed in range(3)] for variant, speed in speeds.items()
    }


def test_the_target_is_a_share_of_what_the_better_grpo_gains(runs):
    runs["grpo"] = [finished(3.0, 0.6)] * 3
    runs["opo"] = [finished(3.0, 0.99)] * 3
    assert target_accuracy(runs, 0.5, 1) == pytest.approx(0.2 + 0.5 * 0.6)
    assert target_accuracy(runs, 1.0, 3) == pytest.approx((0.6 + 0.8) / 2), "the smoothed end"


def test_ratios_are_paired_by_seed_and_against_the_faster_grpo(runs):
    report = summarize(runs, [0.9], 1)
    variants = report["targets"]["0.9"]["variants"]
    for axis, expected in (("seconds", 4.0), ("cpu_seconds", 4.0), ("tokens", 1.0), ("steps", 1.0)):
        found = variants["opo_both"]["axes"][axis]["times_less_than"]["grpo_fresh"]
        assert found == {end: pytest.approx(expected) for end in ("mean", "low", "high")}, "no spread between pairs"
    assert faster_grpo(variants, "seconds") == "grpo_fresh"
    assert variants["opo_both"]["axes"]["seconds"]["times_less_than"]["grpo"]["mean"] == pytest.approx(6)
    seconds = variants["opo"]["axes"]["seconds"]["each_seed"]
    assert seconds == pytest.approx([27.0, 29.7, 32.4])


def test_a_grpo_run_that_does_not_get_there_counts_with_its_end_and_an_opo_run_gets_no_ratio(runs):
    runs["grpo_fresh"][1] = finished(2.0, 0.5)
    runs["opo_choose"][2] = finished(0.9, 0.5)
    variants = summarize(runs, [0.9], 1)["targets"]["0.9"]["variants"]
    assert variants["grpo_fresh"]["reached"] == 2
    assert variants["grpo_fresh"]["axes"]["seconds"]["each_seed"][1] == 60.0
    assert variants["opo_choose"]["reached"] == 2
    assert variants["opo_choose"]["axes"]["seconds"].keys() == {"each_seed"}
    assert "times_less_than" in variants["opo"]["axes"]["seconds"]


def test_a_run_that_broke_down_is_no_result(runs):
    runs["opo"][0] = {**runs["opo"][0], "broke_down": "step 3"}
    with pytest.raises(RuntimeError, match=r"'opo': \['step 3'\]"):
        summarize(runs, [0.9], 1)


def test_intervals_of_ratios_are_students_in_the_logarithm():
    found = geometric_interval([2.0, 8.0, 4.0])
    assert found["mean"] == pytest.approx(4)
    assert found["high"] / found["mean"] == pytest.approx(2 ** (4.302653 / 3**0.5), rel=1e-5)
    assert found["low"] * found["high"] == pytest.approx(16)


def test_tables_and_figure(runs, tmp_path):
    runs["opo_choose"][2] = finished(0.9, 0.5)
    report = json.loads(json.dumps(summarize(runs, [0.9, 0.5], 1)))
    tables = page_tables(report)
    assert list(tables) == ["taken at 0.9", "times less at 0.9", "taken at 0.5", "times less at 0.5"]
    assert "| OPO, both | 4.00 (4.00 to 4.00) |" in tables["times less at 0.9"]
    assert "| OPO, choosing prompts | 2 of 3 | not reached by all |" in tables["taken at 0.9"]
    assert all(TITLES[variant] in tables["taken at 0.5"] for variant in VARIANTS)
    assert not any(f"| {TITLES[variant]} |" in tables["times less at 0.5"] for variant in GRPO)
    plot(report, tmp_path / "time.png")
    assert (tmp_path / "time.png").stat().st_size > 10_000


def test_problems_of_all_difficulties_are_in_one_set_each():
    train, validation, test = mixed_problems("train", NUM_PROBLEMS), held_out("validation"), held_out("test")
    texts = [set(problems["prompt"]) for problems in (train, validation, test)]
    assert [len(each) for each in texts] == [NUM_PROBLEMS, NUM_HELD_OUT, NUM_HELD_OUT]
    assert not (texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2])
    assert {split_of(text) for text in texts[0]} == {"train"}
    assert {split_of(text) for text in texts[1] | texts[2]} == {"test"}
    assert sum(LEVELS.values()) == 1
    hardest, share = max(LEVELS.items())
    below = sorted(LEVELS)[-2]
    for problems in (train, test):
        large = [row for row in problems if max(map(int, row["prompt"][:-2].replace("-", "+").split("+"))) > below]
        assert 0.5 * share < len(large) / len(problems) <= share, hardest
    assert all(eval(row["prompt"][:-2]) == int(row["solution"]) for row in test)


class Ticks:
    """A clock that moves by a second when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_the_clock_stands_still_while_the_policy_is_measured():
    wall, cpu, model = Ticks(), Ticks(), torch.nn.Linear(1, 1)

    def measure(measured):
        assert not measured.training
        wall.now += 50
        cpu.now += 40
        return 0.5

    clock = Clock(measure, every=2, clocks=(wall, cpu))
    state = SimpleNamespace(global_step=0)
    clock.on_train_begin(None, state, None, model=model)
    for step in range(1, 6):
        wall.now += 3
        cpu.now += 2
        clock.tokens += 7
        state.global_step = step
        clock.on_step_end(None, state, None, model=model)
    assert model.training
    assert [(each["steps"], each["tokens"], each["seconds"], each["cpu_seconds"]) for each in clock.curve] == [
        (0, 0, 0, 0),
        (2, 14, 6, 4),
        (4, 28, 12, 8),
    ]
    assert crossings_of(clock.curve, 0.6, 1) == dict.fromkeys(AXES)


def test_tokens_are_counted_in_training_alone():
    trainer = SimpleNamespace(_calculate_rewards=lambda *args: len(args), model=SimpleNamespace(training=True))
    clock = Clock(None, every=1)
    clock.count_tokens(trainer)
    assert trainer._calculate_rewards([], [], [], [[1, 2, 3], [4]]) == 4
    trainer.model.training = False
    trainer._calculate_rewards([], [], [], [[1, 2, 3]])
    assert clock.tokens == 4


def test_finished_runs_are_not_run_again_and_missing_options_leave_arms_out(tmp_path, monkeypatch):
    job = Job("opo", 1e-4, SEEDS[0], "test", 4)
    (tmp_path / f"{job.name}.json").write_text(json.dumps(finished(1.0, 0.5)))
    monkeypatch.setattr(opo_vs_grpo, "ProcessPoolExecutor", None)
    assert complete([job], tmp_path, 2, time_to_accuracy.run)[job]["metrics"]["pass@1"] == 0.5
    monkeypatch.setitem(VARIANTS, "opo_refill", (*VARIANTS["opo"][:2], {"no_such_option": 1}))
    assert "opo_refill" not in time_to_accuracy.available_variants()
    assert {"grpo", "grpo_fresh", "opo", "opo_choose"} <= set(time_to_accuracy.available_variants())


def test_seeds_are_not_those_of_the_sweep_and_every_arm_samples_as_much_in_a_batch():
    assert len(SEEDS) >= 5
    assert not set(SEEDS) & set(opo_vs_grpo.SWEEP_SEEDS)
    for variant, (_, _, settings) in VARIANTS.items():
        assert settings.get("steps_per_generation", settings["gradient_accumulation_steps"]) == 2, variant
