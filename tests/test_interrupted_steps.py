"""A step that was left in its middle does not make the next one off-policy (issue 14, numbers 3 and 4)."""

import pytest
import torch
from transformers import Trainer, TrainerCallback

from opo_trl import OPOTrainer
from test_resume import prompts_of_each_step, sampling_trainer
from test_trainer import reinforce_update, scripted_groups
from tiny import relative_error, scripted_dataset, scripted_rollout, scripted_trainer, tiny_model, update_of

HALVES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}  # two prompts a step


class Stop(Exception):
    pass


class OnFirstSubstep(TrainerCallback):
    """Does something once, between the two micro-batches of a step."""

    def __init__(self, what, at_step=0):
        self.what, self.at_step, self.done = what, at_step, False

    def on_substep_end(self, args, state, control, **kwargs):
        if not self.done and state.global_step == self.at_step:
            self.done = True
            self.what(control)


def raise_stop(control):
    raise Stop


def stop_epoch(control):
    control.should_epoch_stop = True


@pytest.mark.parametrize("interrupt", [Stop, KeyboardInterrupt])
def test_training_again_after_an_interrupt_is_exactly_on_policy(tmp_path, interrupt):
    def leave(control):
        raise interrupt

    trainer = scripted_trainer(tmp_path, callbacks=[OnFirstSubstep(leave)], **HALVES)
    with pytest.raises(interrupt):
        trainer.train()
    update = update_of(trainer)
    assert relative_error(update, reinforce_update(tiny_model(), scripted_groups()[:2])) < 1e-5
    assert abs(trainer.state.log_history[0]["loss"]) < 1e-6


def test_an_epoch_that_ends_in_the_middle_of_a_step_leaves_nothing_to_the_next(tmp_path):
    """Three steps an epoch: the first ends after half a step, and the second starts with its own first step."""
    callbacks = [OnFirstSubstep(stop_epoch)]
    trainer = scripted_trainer(tmp_path, callbacks=callbacks, num_train_epochs=2, max_steps=-1, **HALVES)
    trainer.args.learning_rate = 1e-3  # rates of 1 would leave the next step nothing to compare
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert trainer.state.global_step == len(steps) == 3
    assert all(abs(step["loss"]) < 1e-6 for step in steps)
    expected = reinforce_update(tiny_model(), scripted_groups()[:2])
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
    assert steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-4), "the first half's gradient must be gone"


def test_a_step_out_of_place_is_raised_before_the_optimizer_moves(tmp_path):
    trainer = scripted_trainer(tmp_path, max_steps=2, callbacks=[OnFirstSubstep(lambda control: shift())], **HALVES)

    def shift():
        trainer._step += 1

    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(RuntimeError, match="must step after the last of a rollout batch's 2 micro-batches"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_a_second_run_gives_the_engine_the_weights_that_it_starts_from(tmp_path):
    """TRL sends weights to vLLM when the number of the step has changed, and each run starts at 0."""

    class Engine:
        syncs = 0

        def sync_weights(self):
            self.syncs += 1

    trainer = scripted_trainer(tmp_path)
    trainer.use_vllm, trainer._last_loaded_step, trainer.vllm_generation = True, -1, Engine()
    trainer.train()
    trainer.train()
    assert trainer.vllm_generation.syncs == 2


def test_after_the_best_weights_are_loaded_the_engine_gets_them(tmp_path, monkeypatch):
    """An evaluation at the last step has sent that step's weights, under the number that the best ones have now."""
    trainer = scripted_trainer(tmp_path)
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: None)
    trainer.use_vllm, trainer._last_loaded_step = True, 0
    trainer._load_best_model()
    assert trainer._last_loaded_step != trainer.state.global_step


def test_after_averaged_weights_are_evaluated_the_engine_gets_the_trained_ones(tmp_path):
    """A schedule-free optimizer swaps them in for an evaluation, without a step of its own."""

    class Averaging(torch.optim.SGD):
        shift = 0.0

        def eval(self):
            self._move(1.0)

        def train(self):
            self._move(0.0)

        def _move(self, shift):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data += shift - self.shift
            self.shift = shift

    class Engine:
        def sync_weights(self):
            self.weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]

    sampled = []

    def rollout(prompts, trainer):
        same = all(map(torch.equal, trainer.vllm_generation.weights, trainer.model.parameters()))
        sampled.append((trainer.model.training, same))
        return scripted_rollout(prompts, trainer)

    model = tiny_model()
    trainer = scripted_trainer(
        tmp_path, model, rollout=rollout, optimizers=(Averaging(model.parameters(), lr=0.1), None), max_steps=3,
        eval_dataset=scripted_dataset(2), eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.use_vllm, trainer._last_loaded_step, trainer.vllm_generation = True, -1, Engine()
    trainer.train()
    assert sampled == [(True, True), (False, True)] * 3


def test_an_epoch_that_is_stopped_at_a_step_is_followed_by_another_order(tmp_path):
    class StopEpoch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    trainer = sampling_trainer(
        tmp_path, tiny_model(), num_steps=-1, num_train_epochs=4, save_strategy="no", callbacks=[StopEpoch()]
    )
    prompts = prompts_of_each_step(trainer)
    trainer.train()
    uninterrupted = sampling_trainer(tmp_path, tiny_model(), num_steps=12, save_strategy="no")
    expected = prompts_of_each_step(uninterrupted)
    uninterrupted.train()
    assert prompts == expected[::3], "the first step of each epoch"
    assert len(set(prompts)) > 1


def test_a_reward_that_failed_leaves_no_half_a_table(tmp_path):
    fails = iter([True, False])

    def reward(completions, score, log_extra, log_metric, **kwargs):
        log_extra("length", [len(text) for text in completions])
        log_metric("calls", 1.0)
        if next(fails):
            raise Stop
        return score

    trainer = scripted_trainer(tmp_path, reward_funcs=reward, log_completions=True, num_completions_to_print=1)
    with pytest.raises(RuntimeError, match="Stop"):
        trainer.train()
    trainer.train()
    assert len(trainer._logs["extra"]["length"]) == 8


def test_a_rollout_batch_of_another_size_is_refused(tmp_path):
    class HalfBatches(OPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions(inputs[: len(inputs) // 2])

    trainer = scripted_trainer(tmp_path)
    trainer.__class__ = HalfBatches
    with pytest.raises(ValueError, match=r"= 8 prompts for a rollout batch, got \[4\] on the 1 rank"):
        trainer.train()
