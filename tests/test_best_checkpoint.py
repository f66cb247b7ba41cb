"""The best checkpoint, how many are kept, and those that have the weights alone."""

import pytest
import torch
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback

from opo_trl.runs.checkpoints import incomplete_reason, latest_complete
from test_preemption import AskedInTheMiddle
from test_resume import sampling_trainer
from tiny import scripted_dataset, scripted_trainer, tiny_config, tiny_model

BEST = 2
REWARDS = {1: 0.2, BEST: 0.9, 3: 0.5, 4: 0.1}  # of the evaluation after each step


def rises_and_falls(completions, trainer_state, **kwargs):
    """Every completion of an evaluation has the same reward; in training they differ."""
    return [REWARDS.get(trainer_state.global_step, 0.0) + 0.01 * (i % 4) for i in range(len(completions))]


class Kept(TrainerCallback):
    """Which checkpoints there are after each save, and whether the best one is complete."""

    def __init__(self, directory):
        self.directory, self.after_each = directory, []

    def on_save(self, args, state, control, **kwargs):
        there = sorted(int(path.name.split("-")[1]) for path in self.directory.glob("checkpoint-*"))
        assert all(incomplete_reason(self.directory / f"checkpoint-{step}") is None for step in there)
        self.after_each.append(there)


def best_trainer(output_dir, **settings):
    defaults = {
        "eval_dataset": scripted_dataset(2),
        "per_device_eval_batch_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        "learning_rate": 0.1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "reward",
    }
    return scripted_trainer(output_dir, reward_funcs=rises_and_falls, **defaults | settings)


def weights_after(trainer, step):
    """Keep the weights that the model has after a step."""
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == step:
                kept.update({name: value.clone() for name, value in model.state_dict().items()})

    trainer.add_callback(Keep())
    return kept


@pytest.mark.parametrize(
    ("limit", "expected", "at_the_end", "lora"),
    [(1, [[1], [2], [2, 3], [2, 4]], [2], False), (2, [[1], [1, 2], [2, 3], [2, 4]], [2, 4], True)],
)
def test_the_best_checkpoint_is_kept_and_loaded(tmp_path, limit, expected, at_the_end, lora):
    kept = Kept(tmp_path)
    settings = {"peft_config": LoraConfig(r=2, init_lora_weights=False)} if lora else {}
    trainer = best_trainer(tmp_path, save_total_limit=limit, callbacks=[kept], **settings)
    best = weights_after(trainer, BEST)
    trainer.train()
    assert kept.after_each == expected
    assert trainer.state.best_global_step == BEST
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{BEST}")
    assert sorted(tmp_path.glob("checkpoint-*")) == [tmp_path / f"checkpoint-{step}" for step in at_the_end]
    assert latest_complete(tmp_path) == (tmp_path / f"checkpoint-{at_the_end[-1]}", {})
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, best[name]), name


def test_a_run_that_is_stopped_and_resumed_keeps_its_last_and_its_best_checkpoint(tmp_path):
    """At the end of training transformers keeps the best one alone; a stop request is no such end."""
    settings = {"save_total_limit": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    first = best_trainer(tmp_path, callbacks=[AskedInTheMiddle(step=3)], **settings)
    best = weights_after(first, BEST)
    with pytest.raises(SystemExit):
        first.train()
    assert latest_complete(tmp_path)[0] == tmp_path / "checkpoint-3"
    kept = Kept(tmp_path)
    second = best_trainer(tmp_path, callbacks=[kept], **settings)
    second.train(resume_from_checkpoint="auto")
    assert kept.after_each == [[2, 4]]
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, best[name]), name


def test_a_schedule_that_would_take_a_rising_reward_for_a_worse_one_is_refused(tmp_path):
    settings = {"metric_for_best_model": "reward", "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match=r"takes a rising 'reward' for a worse one .* got mode='min'"):
        tiny_config(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", **settings)


@pytest.mark.parametrize(
    ("settings", "last_step", "rates"),
    [
        ({"callbacks": [EarlyStoppingCallback(1)]}, BEST + 1, [0.1, 0.1, 0.1]),
        (
            {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "lr_scheduler_kwargs": {"mode": "max", "patience": 0, "factor": 0.5},
            },
            4,
            [0.1, 0.1, 0.1, 0.05],
        ),
    ],
)
def test_stopping_and_schedules_follow_the_reward(tmp_path, settings, last_step, rates):
    trainer = best_trainer(tmp_path, save_strategy="no", load_best_model_at_end=False, **settings)
    trainer.train()
    assert trainer.state.global_step == last_step
    assert [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry] == rates


def test_only_the_best_is_saved_by_that_strategy(tmp_path):
    trainer = best_trainer(tmp_path, save_strategy="best", load_best_model_at_end=False)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert all(incomplete_reason(path) is None for path in tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    "settings",
    [
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1},
        {"metric_for_best_model": "eval_loss"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
    ],
)
def test_the_loss_is_refused_as_the_measure_of_the_best_model(tmp_path, settings):
    """It is 0 by construction: rounding would choose the checkpoint."""
    with pytest.raises(ValueError, match=r"`metric_for_best_model` must be another metric, got '(eval_)?loss'"):
        tiny_config(tmp_path, **{"save_strategy": "steps", **settings})


@pytest.fixture(scope="module")
def weights_alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights-alone")
    sampling_trainer(directory, tiny_model(), num_steps=2, save_only_model=True).train()
    return directory


@pytest.mark.parametrize("request_", ["auto", True, "checkpoint-2"])
def test_resuming_from_the_weights_alone_is_refused(weights_alone, request_):
    """transformers would resume with a new optimizer and the schedule's first learning rates."""
    assert incomplete_reason(weights_alone / "checkpoint-2") is None
    request_ = str(weights_alone / request_) if request_ == "checkpoint-2" else request_
    trainer = sampling_trainer(weights_alone, tiny_model(), num_steps=3)
    with pytest.raises(ValueError, match=r"schedule, which '.*checkpoint-2' was saved without.* pass it as the model"):
        trainer.train(resume_from_checkpoint=request_)
    assert trainer.state.global_step == 0


def test_sigterm_does_not_say_that_weights_alone_can_be_resumed(tmp_path, capsys):
    callbacks = [AskedInTheMiddle(step=1)]
    trainer = sampling_trainer(tmp_path, tiny_model(), save_only_model=True, save_strategy="no", callbacks=callbacks)
    with pytest.raises(SystemExit):
        trainer.train()
    printed = capsys.readouterr().out
    assert "step 1 is saved. `save_only_model=True` saved the weights alone" in printed
    assert "Resume with" not in printed


def test_another_handler_of_sigterm_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="`enable_jit_checkpoint` must be False, got True"):
        scripted_trainer(tmp_path, model="not-there", enable_jit_checkpoint=True)


def test_resuming_with_rollout_batches_of_another_size_is_refused(tmp_path):
    """As with fewer processes and otherwise the same command: each step would take half of the prompts."""
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}
    scripted_trainer(tmp_path, max_steps=2, **settings).train()
    smaller = scripted_trainer(tmp_path, max_steps=4, per_device_train_batch_size=4, **settings)
    with pytest.raises(
        ValueError, match=r"has 2 prompts .* this run has 1 prompts .* is 2, or `ignore_data_skip=True`"
    ):
        smaller.train(resume_from_checkpoint="auto")
    assert smaller.state.global_step == 0
    smaller.args.ignore_data_skip = True
    smaller.train(resume_from_checkpoint="auto")
    assert smaller.state.global_step == 4
    cut_otherwise = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    other = scripted_trainer(tmp_path / "other", max_steps=3, **cut_otherwise, **settings)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.state.global_step == 3
