"""All ranks keep TRL's micro-batches, or none does, and all give the same reason."""

import logging

import pytest
import torch

from opo_trl.update import regrouping
from opo_trl.update.regrouping import ObstacleAgreement
from test_row_exchange import Ranks

TEXT = {"prompt_ids": torch.zeros(2, 3, dtype=torch.long), "loss_normalizer": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("obstacles", "batches", "expected"),
    [
        ([None, None], [TEXT, dict(TEXT)], None),
        ([None, "images"], [TEXT, TEXT], "images"),
        (["images", "a router"], [TEXT, TEXT], "images"),
        (
            [None, None],
            [TEXT, {**TEXT, "tool_mask": torch.ones(2, 3)}],
            "the ranks' rollout batches hold different columns",
        ),
        (
            [None, None],
            [TEXT, {**TEXT, "prompt_ids": torch.zeros(2, 3)}],
            "the ranks' rollout batches hold different columns",
        ),
    ],
)
def test_ranks_agree_by_integers_and_exchange_words_once(monkeypatch, caplog, obstacles, batches, expected):
    ranks, pickled = Ranks(2, monkeypatch), []

    def gather_object(value):
        pickled.append(value)
        return [each for values in ranks.exchange(value) for each in values]

    monkeypatch.setattr(regrouping, "gather_object", gather_object)
    monkeypatch.setattr(regrouping, "logger", logging.getLogger("regrouping"))  # accelerate's needs its state
    agreements = [ObstacleAgreement(ranks) for _ in range(2)]
    for _ in range(3):
        agreed = ranks.run(lambda rank: agreements[rank].agree(obstacles[rank], batches[rank]))
        assert agreed == [expected, expected]
    assert len(pickled) == (0 if expected is None else 2)
    assert caplog.text.count(f"has the same gradient: {expected}.") == (0 if expected is None else 2), (
        "once on each rank"
    )
