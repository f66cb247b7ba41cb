"""What is refused before, or as soon as, a run would fail because of its reward functions, model or datasets."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from opo_trl.preflight import check_reward_values


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5, None],
        (True, math.nan, -math.inf),
        [np.float32(1), np.int64(2), np.bool_(True)],
        [Fraction(1, 2), Decimal("0.5"), torch.tensor(1.0)],
        np.ones(3),
        torch.ones(3),
        torch.ones(3, 1),
        (number for number in (1.0, 2.0, 3.0)),
    ],
)
def test_numbers_and_none_are_rewards(values):
    """All of them are what TRL can store, and an iterator is not lost."""
    rewards = check_reward_values("score", values, 3)
    stored = torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float32)
    assert stored.shape == (3,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1.0", "0.0", "1.0"], r"got '1\.0' \(str\) for completion 0\. Convert it with float\(\)"),
        ([1.0, None, "unknown"], r"got 'unknown' \(str\) for completion 2"),
        ([1.0, [0.5], 0.0], r"got \[0\.5\] \(list\) for completion 1"),
        ([1.0, 1j, 0.0], r"got 1j \(complex\) for completion 1"),
        ([10**400, 1.0, 0.0], r"\.\.\. \(int\) for completion 0"),
        ([{"score": 1.0}] * 3, r"got \{'score': 1\.0\} \(dict\) for completion 0"),
        (torch.ones(4), "got 4 values"),
        (torch.ones(3, 2), r"got a Tensor of shape \(2,\) for completion 0"),
        (np.ones((3, 1)), r"got a ndarray of shape \(1,\) for completion 0"),
        ([1.0, 2.0], "got 2 values"),
        ([], "got 0 values"),
        (torch.tensor(1.0), r"got a Tensor of shape \(\)"),
        (1.0, r"got 1\.0 \(float\)"),
        (None, r"got None \(NoneType\).*lack a return statement"),
        ("yes", r"got 'yes' \(str\)"),
        ({0: 1.0, 1: 0.0, 2: 1.0}, r"\(dict\)"),
        ({1.0, 2.0, 3.0}, r"\(set\)"),
    ],
)
def test_a_reward_that_is_no_number_gets_a_sentence(values, message):
    expected = rf"'score' must return one number or None for each of the 3 completions, .*{message}"
    with pytest.raises(ValueError, match=expected):
        check_reward_values("score", values, 3)
