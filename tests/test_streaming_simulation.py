"""The arithmetic of the simulated step: limits that any schedule keeps, and cases that can be computed by hand."""

import numpy as np
import pytest

import streaming_simulation as simulation
from streaming_simulation import PROMPT_LENGTH, WORKLOADS, decode_seconds, sample, sample_on_one, train_streamed


def test_one_request_takes_its_decoding_steps():
    (end,) = sample_on_one(np.array([1_000]))
    read = 2 * simulation.PARAMETERS * PROMPT_LENGTH / (0.5 * 989e12) / simulation.GROUP_SIZE
    assert end == pytest.approx(read + 1_000 * decode_seconds(1, PROMPT_LENGTH + 500))


def test_requests_of_one_length_end_together_and_longer_ones_later():
    ends = sample_on_one(np.array([300, 300, 40, 900]))
    assert ends[0] == ends[1]
    assert ends[2] < ends[0] < ends[3]


def test_a_request_waits_for_a_free_place(monkeypatch):
    monkeypatch.setattr(simulation, "SLOTS", 2)
    first, second, third = sample_on_one(np.array([500, 100, 10]))
    assert second < third < first, "the third starts when the second has ended"


def test_more_gpus_end_sooner_and_are_busy_no_longer_than_until_the_end():
    lengths, _ = WORKLOADS["long, 4k"].draw(0)
    few, many = sample(lengths, 4), sample(lengths, 16)
    assert many[0].max() < few[0].max()
    for (ends, busy), devices in ((few, 4), (many, 16)):
        assert ends.max() <= busy <= devices * ends.max()


@pytest.mark.parametrize("devices", [1, 3])
def test_streamed_training_ends_between_its_two_bounds(devices):
    generator = np.random.default_rng(0)
    ends, work = generator.exponential(10, 40), generator.exponential(2, 40)
    last = train_streamed(ends, work, devices)
    assert last >= max(ends.max() + work[ends.argmax()] / devices, work.sum() / devices)
    assert last <= ends.max() + work.sum() / devices + simulation.WAVE * len(ends)
    together = train_streamed(np.full(40, 7.0), work, devices)
    assert together == pytest.approx(7 + simulation.WAVE + work.sum() / devices), "one wave: nothing to overlap"


def test_waves_are_those_of_the_trainer(monkeypatch):
    """Eight groups in four micro-batches: by hand."""
    monkeypatch.setattr(simulation, "MICRO_BATCHES", 4)
    monkeypatch.setattr(simulation, "WAVE", 0.5)
    ends, work = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 20.0]), np.full(8, 3.0)
    # At 2: two groups, until 2 + 0.5 + 6 = 8.5. Then five are complete: four of them fill two micro-batches, until
    # 8.5 + 0.5 + 12 = 21. The other two are trained then, until 21 + 0.5 + 6.
    assert train_streamed(ends, work, 1) == pytest.approx(27.5)


def test_lengths_vary_between_and_within_prompts_as_stated():
    for workload in WORKLOADS.values():
        lengths, informative = workload.draw(0)
        logs = np.log(lengths[(lengths > 16).all(axis=1) & (lengths < simulation.LONGEST).all(axis=1)])
        within = logs.var(axis=1, ddof=1).mean()
        if workload.sigma < 0.8:  # the others are cut at the longest length
            assert within == pytest.approx((1 - workload.between) * workload.sigma**2, rel=0.1)
        assert informative.mean() == pytest.approx(workload.informative, abs=0.1)
