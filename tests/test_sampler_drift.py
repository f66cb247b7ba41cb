"""A sampler that moves away from the policy in the course of a run is warned about once."""

import logging
from types import SimpleNamespace

import pytest

from opo_trl.on_policy.sampler_drift import FIRST, LAST, METRIC, SamplerDriftWarning


def warnings_of(caplog, values, tolerance=0.1, logged_before=(), main_process=True):
    callback = SamplerDriftWarning(tolerance)
    state = SimpleNamespace(
        is_world_process_zero=main_process, log_history=[{METRIC: value} for value in logged_before]
    )
    with caplog.at_level(logging.WARNING, "opo_trl"):
        callback.on_train_begin(None, state, None)
        for value in values:
            callback.on_log(None, state, None, logs={METRIC: value})
            callback.on_log(None, state, None, logs={"eval_reward": 0.5})
    return [record.getMessage() for record in caplog.records]


BF16 = [0.004, 0.009, 0.003, 0.005, 0.006]  # docs/engines.md: 0.003 to 0.01


def test_growth_is_warned_about_once_with_the_numbers(caplog):
    (message,) = warnings_of(caplog, [*BF16, 0.016, 0.02, 0.03, 0.04, 0.05])
    assert "differed by 0.016 nats per token or more" in message
    assert f"0.003 (limit: 0.015, `{METRIC}`)" in message


@pytest.mark.parametrize(
    "values",
    [
        [*BF16, *[0.01] * 20],  # rounding
        [5e-7] * FIRST + [9e-4] * 20,  # far above the first periods, and harmless
        [*BF16, *[0.02, 0.02, 0.004] * 9],  # never LAST periods in a row
        [None] * 9,
        [],
    ],
)
def test_rounding_and_single_periods_are_not(caplog, values):
    assert not warnings_of(caplog, values)


def test_a_float32_engine_that_stays_behind_shows_early(caplog):
    assert warnings_of(caplog, [5e-7, 1e-4, 5e-4, 2e-3, 3e-3, 4e-3])


def test_the_tolerance_of_the_self_test_is_a_limit_of_its_own(caplog):
    values = [0.05] * FIRST + [0.12] * LAST
    assert not warnings_of(caplog, values, tolerance=None)
    assert warnings_of(caplog, values)


def test_a_resumed_run_goes_on_from_what_its_checkpoint_has_logged(caplog):
    drifted = [0.02] * LAST
    assert not warnings_of(caplog, drifted)
    assert warnings_of(caplog, drifted[1:], logged_before=[*BF16, drifted[0]])


def test_other_processes_do_not_warn(caplog):
    assert not warnings_of(caplog, [*BF16, *[0.05] * 5], main_process=False)
