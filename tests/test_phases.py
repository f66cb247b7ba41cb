"""The phases of a step in every log: what each measures, and that together they are the step."""

import io
from contextlib import redirect_stdout
from time import perf_counter
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from opo_trl.runs.phases import StepPhases
from opo_trl.scripts.reporting import ConsoleProgress
from test_trainer import expected_advantages
from test_update import StubEngine, script_reward
from tiny import SCRIPT, scripted_dataset, scripted_reward, scripted_rollout, scripted_trainer

TIMES = ["time/generate", "time/score", "time/sync_weights", "time/update"]


class Clock:
    """A clock that only moves where it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("opo_trl.runs.phases.perf_counter", lambda: self.now)

    def moved_by(self, function, seconds):
        def moving(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        moving.__name__ = function.__name__
        return moving


def logged_steps(trainer):
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def test_each_phase_has_its_own_seconds_and_tokens(tmp_path, monkeypatch):
    """Two steps of four micro-batches each: generation and scoring happen once a step, the loss four times."""
    clock = Clock(monkeypatch)
    trainer = scripted_trainer(
        tmp_path,
        rollout=clock.moved_by(scripted_rollout, 8.0),
        reward_funcs=clock.moved_by(scripted_reward, 2.0),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=2,
    )
    trainer._compute_loss = clock.moved_by(trainer._compute_loss, 1.0)
    trainer.train()
    script = list(SCRIPT.values())
    for step, log in enumerate(logged_steps(trainer)):
        assert [log[name] for name in TIMES] == [8.0, 2.0, 0.0, 4.0]
        texts = [text for rows in script[2 * step : 2 * step + 2] for text, _ in rows]
        assert log["tokens_per_second/generated"] * 8.0 == pytest.approx(sum(len(text) + 1 for text in texts))
        trained = sum(len(text) + 1 for text in texts if expected_advantages()[text] != 0)
        assert log["tokens_per_second/trained"] * 4.0 == pytest.approx(trained)
        assert 0 < trained <= sum(len(text) + 1 for text in texts)


def test_the_weights_of_vllm_are_a_phase_of_their_own(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(StubEngine, "sync_weights", clock.moved_by(StubEngine.sync_weights, 16.0))
    monkeypatch.setattr(StubEngine, "generate", clock.moved_by(StubEngine.generate, 8.0))
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", StubEngine)
    trainer = scripted_trainer(
        tmp_path, rollout=None, reward_funcs=script_reward, use_vllm=True, max_steps=2, vllm_logp_tolerance=None
    )
    trainer.train()
    for log in logged_steps(trainer):
        assert [log[name] for name in TIMES] == [8.0, 0.0, 16.0, 0.0]


def test_an_evaluation_between_two_steps_is_in_neither(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    trainer = scripted_trainer(
        tmp_path,
        rollout=clock.moved_by(scripted_rollout, 8.0),
        eval_dataset=scripted_dataset(2),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        max_steps=2,
    )
    trainer.train()
    assert [log["time/generate"] for log in logged_steps(trainer)] == [8.0, 8.0]
    assert [sum(log[name] for name in TIMES) for log in logged_steps(trainer)] == [8.0, 8.0]
    assert not any(name.startswith("eval_time") for entry in trainer.state.log_history for name in entry)


def test_a_phase_that_raises_is_left(monkeypatch):
    clock = Clock(monkeypatch)
    phases = StepPhases({})

    def fails():
        clock.now += 1
        raise OverflowError

    with pytest.raises(OverflowError):
        phases.measured("generate", fails)()
    with phases.measure("score"):
        clock.now += 2
    assert (phases._seconds["generate"], phases._seconds["score"], phases._running) == (1, 2, [])


class WallClock(TrainerCallback):
    """Seconds from the beginning of each step to its log."""

    def on_train_begin(self, *args, **kwargs):
        self.steps = []

    def on_step_begin(self, *args, **kwargs):
        self.start = perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            self.steps.append(perf_counter() - self.start)


def test_the_phases_of_a_step_add_up_to_it(tmp_path):
    wall = WallClock()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 12, "max_steps": 2}
    trainer = scripted_trainer(tmp_path, callbacks=[wall], **settings)
    trainer.train()
    for seconds, log in zip(wall.steps, logged_steps(trainer), strict=True):
        phases = [log[name] for name in TIMES]
        assert 0.5 * seconds < sum(phases) <= seconds
        assert all(phase > 0 for phase in phases if phase is not phases[2])
        assert phases[2] == 0.0


def test_the_console_shows_them():
    logs = {
        "reward": 0.5,
        **dict(zip(TIMES, (1.25, 0.125, 0.0, 2.5), strict=True)),
        "tokens_per_second/generated": 2957.6,
    }
    state = SimpleNamespace(is_world_process_zero=True, global_step=1, max_steps=2)
    console = ConsoleProgress()
    with redirect_stdout(io.StringIO()) as printed:
        console.on_train_begin(None, state, None)
        console.on_log(None, state, None, logs)
    heading, line = printed.getvalue().splitlines()
    assert heading.split()[-2:] == ["generate/score/sync/update", "tok/s"]
    assert line.split()[-2:] == ["1.2/0.12/0/2.5s", "2958"]
