"""Metrics of a step do not depend on how its tokens were spread over micro-batches and ranks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opo_trl.update.step_statistics import StepStatistics


def alone(tensor):
    return tensor


@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=6), min_size=1, max_size=6), st.data())
def test_any_cut_gives_the_mean_and_extremes_over_tokens(parts, data):
    statistics, counted = StepStatistics(), []
    for part in parts:
        mask = data.draw(st.lists(st.booleans(), min_size=len(part), max_size=len(part)))
        counted += [value for value, keep in zip(part, mask, strict=True) if keep]
        for add, name in ((statistics.add_mean, "mean"), (statistics.add_max, "max"), (statistics.add_min, "min")):
            add(name, torch.tensor([part]), torch.tensor([mask]).int())
    metrics = statistics.reduce(alone)
    if not counted:
        assert all(math.isnan(value) for value in metrics.values())
        return
    assert metrics["mean"] == pytest.approx(sum(counted) / len(counted), abs=1e-4)
    assert (metrics["max"], metrics["min"]) == (max(counted), min(counted))


def test_ranks_are_weighted_by_their_tokens():
    def rank(values):
        statistics = StepStatistics()
        statistics.add_mean("m", torch.tensor([values]), torch.ones(1, len(values)))
        statistics.add_min("n", torch.tensor([values]), torch.ones(1, len(values)))
        sent = []
        statistics.reduce(lambda tensor: sent.append(tensor) or tensor)
        return statistics, sent[0]

    _, first = rank([1.0])
    statistics, second = rank([4.0, 5.0, 6.0])
    statistics.add_mean("m", torch.tensor([[1.0]]), torch.ones(1, 1))
    statistics.add_min("n", torch.tensor([[1.0]]), torch.ones(1, 1))
    assert statistics.reduce(lambda _: torch.cat([first, second])) == {"m": 4.0, "n": 1.0}


def test_reducing_starts_anew():
    statistics = StepStatistics()
    statistics.add_mean("m", torch.ones(1, 1), torch.ones(1, 1))
    assert statistics.reduce(alone) == {"m": 1.0}
    assert statistics.reduce(alone) == {}


def test_values_that_are_not_counted_may_be_anything():
    statistics = StepStatistics()
    statistics.add_mean("m", torch.tensor([[math.nan, 2.0]]), torch.tensor([[0, 1]]))
    assert statistics.reduce(alone) == {"m": 2.0}
