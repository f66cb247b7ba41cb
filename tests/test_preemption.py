"""A SIGTERM costs nothing: the step is finished and saved, and the run goes on from there."""

import os
import signal
import threading

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from opo_trl.checkpoints import latest_complete
from opo_trl.preemption import EXIT_CODE
from test_resume import PROMPTS, STEPS, sampling_trainer
from tiny import tiny_model


class AskedInTheMiddle(TrainerCallback):
    """A scheduler that sends SIGTERM between two micro-batches of a step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_to_the_same_bits(tmp_path):
    whole = sampling_trainer(tmp_path / "whole", tiny_model(), save_strategy="no")
    whole.train()

    trainer = sampling_trainer(
        tmp_path / "asked",
        tiny_model(),
        save_strategy="no",
        callbacks=[AskedInTheMiddle(step=5)],
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:2]}),
        eval_strategy="steps",
        eval_steps=5,
    )
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == EXIT_CODE == 75
    assert signal.getsignal(signal.SIGTERM) is handler
    assert trainer.state.global_step == 5
    assert not any("eval_reward" in entry for entry in trainer.state.log_history), "no time for an evaluation"
    assert latest_complete(tmp_path / "asked") == (tmp_path / "asked" / "checkpoint-5", {})

    again = sampling_trainer(tmp_path / "asked", tiny_model(), save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


def test_training_works_where_signals_cannot_be_heard(tmp_path):
    trainer = sampling_trainer(tmp_path, tiny_model(), num_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1
