"""A run in which nothing is informative is reported with its cause (issue 14, number 14)."""

import logging
from types import SimpleNamespace

import pytest

from opo_trl.rollouts.learning_signal import PATIENCE, NoSignalWarning, likeliest_cause
from tiny import scripted_rollout, scripted_trainer

ARGS = SimpleNamespace(
    max_completion_length=64, per_device_train_batch_size=4, steps_per_generation=2, max_refill_rounds=0
)
QUIET = {"opo/informative_fraction": 0.0, "opo/unscorable_fraction": 0.0, "reward": 0.0, "reward_std": 0.0}


@pytest.mark.parametrize(
    ("metrics", "cause"),
    [
        ({"completions/clipped_ratio": 1.0}, "every completion is truncated at max_completion_length=64"),
        ({"math_verify_reward/no_answer": 8.0}, r"no completion states an answer in \\boxed\{...\}"),
        ({"reward": 1.0}, "every completion is right"),
        ({"math_verify_reward/no_answer": 7.0, "completions/clipped_ratio": 0.9}, "every completion is wrong"),
        ({"opo/unscorable_fraction": 1.0, "reward": None, "reward_std": None}, "all unscorable"),
        ({"reward": 0.5, "reward_std": 0.5}, "all completions of a prompt get the same reward"),
        ({"reward": 0.3}, r"the rewards do not differ \(all are 0.3\)"),
    ],
)
def test_the_likeliest_cause_follows_from_the_metrics(metrics, cause):
    with pytest.raises(AssertionError, match=cause):
        raise AssertionError(likeliest_cause({**QUIET, **metrics}, ARGS))


def test_completions_without_a_limit_that_never_end():
    args = SimpleNamespace(**{**vars(ARGS), "max_completion_length": None})
    cause = likeliest_cause({**QUIET, "completions/clipped_ratio": 1.0, "completions/max_length": 9.0}, args)
    assert "at most 9 tokens long, although max_completion_length is None" in cause


@pytest.mark.parametrize(("no_answer", "cause"), [(23.5, "every completion is wrong"), (24.0, "no completion states")])
def test_completions_of_refill_rounds_count(no_answer, cause):
    """Three rounds of 4 groups with 4 completions each, on two ranks."""
    args = SimpleNamespace(**{**vars(ARGS), "max_refill_rounds": 2, "num_generations": 4, "world_size": 2})
    metrics = {**QUIET, "rollouts/groups_dropped": 12.0, "math_verify_reward/no_answer": no_answer}
    assert cause in likeliest_cause(metrics, args)


def warnings_of(caplog, fractions, end=False, main_process=True):
    callback, state = NoSignalWarning(), SimpleNamespace(is_world_process_zero=main_process)
    with caplog.at_level(logging.WARNING, "opo_trl"):
        callback.on_train_begin(ARGS, state, None)
        for fraction in fractions:
            callback.on_log(ARGS, state, None, logs={**QUIET, "opo/informative_fraction": fraction})
            callback.on_log(ARGS, state, None, logs={"eval_reward": 0.0})
        if end:
            callback.on_train_end(ARGS, state, None)
    return [record.getMessage() for record in caplog.records]


def test_it_warns_once_after_consecutive_periods(caplog):
    messages = warnings_of(caplog, [0.5, *[0.0] * (PATIENCE + 3), 0.5, *[0.0] * PATIENCE], end=True)
    assert len(messages) == 1
    assert messages[0].startswith(f"No completion of the last {PATIENCE} logged entries has a non-zero advantage")


def test_a_period_with_an_informative_completion_starts_the_count_anew(caplog):
    assert not warnings_of(caplog, [*[0.0] * (PATIENCE - 1), 0.1, *[0.0] * (PATIENCE - 1)], end=True)


def test_a_short_run_without_any_signal_warns_at_its_end(caplog):
    assert len(warnings_of(caplog, [0.0], end=True)) == 1


def test_other_processes_do_not_warn(caplog):
    assert not warnings_of(caplog, [0.0] * PATIENCE, main_process=False)


def test_a_run_of_truncated_completions_says_so_and_counts_no_filler(tmp_path, caplog):
    def rollout(prompts, trainer):
        output = scripted_rollout(prompts, trainer)
        ids = [(ids * 32)[:32] for ids in output["completion_ids"]]
        ids = [[token if token != 1 else 5 for token in row] for row in ids]  # no end token
        return {**output, "completion_ids": ids, "logprobs": [[0.0] * 32] * len(ids)}

    trainer = scripted_trainer(
        tmp_path, rollout=rollout, reward_funcs=lambda completions, **kwargs: [0.0] * len(completions)
    )
    trainer.train()
    assert "every completion is truncated at max_completion_length=32" in caplog.text
    trainer.args.max_completion_length = 64
    cause = likeliest_cause(trainer.state.log_history[0], trainer.args)
    assert "at most 32 tokens long, although max_completion_length is 64" in cause
    assert trainer.state.log_history[0]["opo/padding_fraction"] is None, "a filler is no padding"
