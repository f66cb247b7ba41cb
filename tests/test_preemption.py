"""On SIGTERM the step is finished and saved, and a resumed run continues from there."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from forking_run import CHECKS
from opo_trl.runs.checkpoints import latest_complete
from opo_trl.runs.preemption import EXIT_CODE, Preemption
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
    uninterrupted = sampling_trainer(tmp_path / "uninterrupted", tiny_model(), save_strategy="no")
    uninterrupted.train()

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
    expected = uninterrupted.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


def test_strategies_by_epoch_neither_evaluate_nor_save_again(tmp_path):
    """transformers ends an epoch, with what these strategies ask for, wherever a callback stops training."""
    saved = []

    class Saved(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append(state.global_step)

    strategies = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = sampling_trainer(
        tmp_path,
        tiny_model(),
        callbacks=[AskedInTheMiddle(step=5), Saved()],
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:2]}),
        **strategies,
    )
    with pytest.raises(SystemExit):
        trainer.train()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert (evaluated, saved) == ([3], [3, 5])


def test_training_works_where_signals_cannot_be_heard(tmp_path):
    trainer = sampling_trainer(tmp_path, tiny_model(), num_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


@pytest.mark.slow
def test_sigterm_ends_the_processes_that_a_reward_forks_and_still_stops_the_run(tmp_path):
    """The handler is inherited by a fork; a child that kept it would never end. Orphans of a hang are killed here."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forking_run.py")), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        pytest.fail(f"the run hangs after:\n{printed}")
    assert [line for line in printed.splitlines() if line in {check.__name__ for check in CHECKS}] == [
        check.__name__ for check in CHECKS
    ], printed
    assert process.returncode == EXIT_CODE, printed
    assert latest_complete(tmp_path) == (tmp_path / "checkpoint-2", {})


@pytest.mark.parametrize("earlier", [signal.SIG_DFL, signal.SIG_IGN, lambda signum, frame: None])
def test_a_forked_child_has_the_handler_that_was_there_before_training(earlier):
    def handler_in_child():
        child = os.fork()
        if child == 0:
            os._exit(0 if signal.getsignal(signal.SIGTERM) is handler else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    preemption = Preemption(lambda asked: asked)
    original = signal.signal(signal.SIGTERM, earlier)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with preemption.listening():
            with Preemption(lambda asked: asked).listening():  # a trainer within a trainer's callback
                assert handler_in_child() == 0
            assert handler_in_child() == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.asked
        assert signal.getsignal(signal.SIGTERM) is handler
        handler = signal.SIG_DFL
        signal.signal(signal.SIGTERM, handler)
        assert handler_in_child() == 0, "after training a child keeps what it inherits"
    finally:
        signal.signal(signal.SIGTERM, original)
