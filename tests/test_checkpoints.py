"""Only complete checkpoints are used, and a step with a non-finite number is not saved."""

import copy
import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOConfig

from opo_trl import OPOConfig
from opo_trl.runs.checkpoints import (
    MARKER,
    checkpoint_to_resume,
    incomplete_reason,
    latest_complete,
    mark_complete,
    unmark,
)
from opo_trl.runs.hub import UnpickledToken
from plain import PlainTrainer
from test_resume import sampling_trainer
from tiny import scripted_dataset, scripted_reward, scripted_trainer, tiny_model, tiny_tokenizer

KILLED_RUN = Path(__file__).with_name("killed_run.py")


@pytest.fixture
def checkpoints(tmp_path):
    for step in (2, 9, 10):
        (tmp_path / f"checkpoint-{step}" / "shards").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(b"w" * step)
        (tmp_path / f"checkpoint-{step}" / "shards" / "rank-1").write_bytes(b"r" * step)
    mark_complete(tmp_path / "checkpoint-2")
    mark_complete(tmp_path / "checkpoint-9")
    return tmp_path


def test_the_latest_complete_checkpoint_is_the_one_of_the_highest_step_with_a_marker(checkpoints):
    found, passed_over = latest_complete(checkpoints)
    assert found == checkpoints / "checkpoint-9"
    assert list(passed_over) == ["checkpoint-10"]
    assert "did not finish" in passed_over["checkpoint-10"]
    mark_complete(checkpoints / "checkpoint-10")
    assert latest_complete(checkpoints) == (checkpoints / "checkpoint-10", {})


def test_a_checkpoint_with_a_lost_or_cut_file_is_not_whole(checkpoints):
    (checkpoints / "checkpoint-9" / "shards" / "rank-1").unlink()
    assert incomplete_reason(checkpoints / "checkpoint-9") == "shards/rank-1 is missing"
    (checkpoints / "checkpoint-2" / "weights").write_bytes(b"w")
    assert incomplete_reason(checkpoints / "checkpoint-2") == "weights has 1 bytes instead of 2"
    found, passed_over = latest_complete(checkpoints)
    assert found is None
    assert list(passed_over) == ["checkpoint-10", "checkpoint-9", "checkpoint-2"]


def test_a_checkpoint_that_is_being_written_anew_is_not_whole(checkpoints):
    unmark(checkpoints / "checkpoint-9")
    assert incomplete_reason(checkpoints / "checkpoint-9") is not None
    assert latest_complete(checkpoints)[0] == checkpoints / "checkpoint-2"


def test_what_a_killed_save_left_is_no_part_of_the_next_one(checkpoints):
    checkpoint = checkpoints / "checkpoint-10"
    (checkpoint / f"{MARKER}.part").write_text("half a mark")
    mark_complete(checkpoint)
    assert incomplete_reason(checkpoint) is None
    assert not (checkpoint / f"{MARKER}.part").exists()


def test_a_run_that_starts_beside_the_checkpoints_of_another_says_so(tmp_path, caplog):
    for _ in range(2):
        assert "of an earlier run" not in caplog.text
        sampling_trainer(tmp_path, tiny_model(), num_steps=1).train()
    assert f"{tmp_path / 'checkpoint-1'} is of an earlier run" in caplog.text


def test_resuming_takes_the_latest_complete_checkpoint_and_says_what_it_passed_over(tmp_path, caplog):
    sampling_trainer(tmp_path, tiny_model()).train()
    (tmp_path / "checkpoint-8" / MARKER).unlink()
    (tmp_path / "checkpoint-7" / "optimizer.pt").write_bytes(b"cut")
    trainer = sampling_trainer(tmp_path, tiny_model())
    steps = []
    training_step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (
        steps.append(trainer.state.global_step) or training_step(*args, **kwargs)
    )
    trainer.train(resume_from_checkpoint=True)
    assert min(steps) == 6
    assert "checkpoint-8" in caplog.text
    assert "optimizer.pt has 3 bytes" in caplog.text
    assert incomplete_reason(tmp_path / "checkpoint-8") is None, "written anew"


def test_a_named_checkpoint_must_have_what_its_marker_lists(tmp_path):
    """As after half a download; without a marker, whoever names it is believed."""
    sampling_trainer(tmp_path, tiny_model(), num_steps=2).train()
    checkpoint = tmp_path / "checkpoint-1"
    scheduler = (checkpoint / "scheduler.pt").read_bytes()
    (checkpoint / "scheduler.pt").unlink()
    trainer = sampling_trainer(tmp_path, tiny_model(), num_steps=2)
    with pytest.raises(ValueError, match=r"checkpoint-1': scheduler.pt is missing. Copy or download it again"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "scheduler.pt").write_bytes(scheduler)
    (checkpoint / MARKER).unlink()
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2


def test_without_a_complete_checkpoint_resuming_is_refused(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"needs a complete checkpoint in .*checkpoint-3: .* is missing.*Use .*'auto'"):
        scripted_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_one_command_starts_a_run_and_resumes_it(tmp_path, caplog):
    """As a job scheduler repeats it: at first there is nothing, then an incomplete save, then a complete one."""

    def run(num_steps):
        caplog.clear()
        trainer = sampling_trainer(tmp_path, tiny_model(), num_steps=num_steps)
        started_at = []
        trainer.add_callback(StartedAt(started_at))
        trainer.train(resume_from_checkpoint="auto")
        return started_at

    assert run(num_steps=1) == [0]
    assert f"No complete checkpoint in '{tmp_path}': training starts from scratch." in caplog.text
    marker = tmp_path / "checkpoint-1" / MARKER
    marker.unlink()
    assert run(num_steps=2) == [0]
    assert f"(checkpoint-1: {MARKER} is missing: the save did not finish): training starts from scratch" in caplog.text
    assert run(num_steps=3) == [2]
    assert "starts from scratch" not in caplog.text


class StartedAt(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def test_what_to_resume_from_is_known_without_a_trainer(checkpoints):
    assert checkpoint_to_resume("auto", checkpoints) == checkpoint_to_resume(True, checkpoints)
    assert checkpoint_to_resume(True, str(checkpoints)) == checkpoints / "checkpoint-9"
    assert checkpoint_to_resume(str(checkpoints / "checkpoint-2"), "elsewhere") == checkpoints / "checkpoint-2"
    assert checkpoint_to_resume("auto", checkpoints / "not there yet") is None
    for nothing in (None, False, ""):
        assert checkpoint_to_resume(nothing, checkpoints) is None


@pytest.mark.parametrize("with_marker", [True, False])
def test_a_checkpoint_that_lacks_something_is_refused_by_name(checkpoints, with_marker):
    named = checkpoints / ("checkpoint-9" if with_marker else "checkpoint-10")
    missing = "weights" if with_marker else "trainer_state.json"
    (named / "weights").unlink()
    with pytest.raises(ValueError, match=rf"needs a complete checkpoint, got '{named}': {missing} is missing\. Copy"):
        checkpoint_to_resume(str(named), checkpoints)


def test_a_marker_that_is_cut_off_is_not_believed(checkpoints):
    marker = checkpoints / "checkpoint-9" / MARKER
    marker.write_bytes(marker.read_bytes()[:20])
    assert incomplete_reason(checkpoints / "checkpoint-9") == f"{MARKER} cannot be read"
    assert latest_complete(checkpoints)[0] == checkpoints / "checkpoint-2"


def test_a_directory_that_does_not_exist_is_refused_before_training(tmp_path):
    trainer = scripted_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"must be a checkpoint's directory, got 'checkpoint-400', which is not a"):
        trainer.train(resume_from_checkpoint="checkpoint-400")
    assert trainer.state.global_step == 0


def test_the_last_checkpoint_is_deleted_only_when_the_next_is_whole(tmp_path, monkeypatch):
    """With `save_total_limit=1`, there are two checkpoints while the second is written."""
    there = []

    def look(checkpoint):
        there.append({path.name for path in tmp_path.glob("checkpoint-*")})
        mark_complete(checkpoint)

    monkeypatch.setattr("opo_trl.runs.reliable_runs.mark_complete", look)
    sampling_trainer(tmp_path, tiny_model(), save_total_limit=1).train()
    assert there[1] == {"checkpoint-1", "checkpoint-2"}
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_the_saved_arguments_are_those_of_the_user_without_the_token(tmp_path):
    trainer = sampling_trainer(tmp_path, tiny_model(), num_steps=4, save_total_limit=2, hub_token="hf_secret")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert {path.name for path in tmp_path.iterdir()} >= {"checkpoint-3", "checkpoint-4", "saved"}
    for folder in ("checkpoint-3", "checkpoint-4", "saved"):
        saved = torch.load(tmp_path / folder / "training_args.bin", weights_only=False)
        assert (type(saved), saved.save_total_limit, saved.hub_token) == (OPOConfig, 2, None)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]
    assert (trainer.args.save_total_limit, trainer.args.hub_token) == (2, "hf_secret")
    assert type(trainer.args.hub_token) is str


def test_a_token_is_kept_out_of_the_arguments_of_a_plain_grpo_run(tmp_path):
    config = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, num_generations=4, hub_token="hf_secret")
    trainer = PlainTrainer(
        tiny_model(),
        scripted_reward,
        config,
        train_dataset=scripted_dataset(),
        processing_class=tiny_tokenizer(),
    )
    trainer.save_model(str(tmp_path / "saved"))
    saved = tmp_path / "saved" / "training_args.bin"
    assert b"hf_secret" not in saved.read_bytes()
    assert type(torch.load(saved, weights_only=False)) is GRPOConfig
    assert trainer.args.hub_token == "hf_secret"


def test_a_token_can_be_used_and_copied_while_it_is_kept_out_of_a_pickle():
    """An upload that starts meanwhile sends it."""
    token = UnpickledToken("hf_secret")
    assert token == "hf_secret"
    assert f"Bearer {token}" == "Bearer hf_secret"
    assert copy.deepcopy({"token": token}) == copy.copy({"token": token}) == {"token": "hf_secret"}
    assert pickle.loads(pickle.dumps({"token": token})) == {"token": None}


def test_a_full_disk_is_said_and_costs_no_checkpoint(tmp_path):
    trainer = sampling_trainer(tmp_path, tiny_model(), save_total_limit=1)
    save = trainer._save_optimizer_and_scheduler

    def run_out_of_space(output_dir):
        save(output_dir)
        if trainer.state.global_step == 3:
            (Path(output_dir) / "optimizer.pt").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer._save_optimizer_and_scheduler = run_out_of_space
    with pytest.raises(RuntimeError, match=r"checkpoint-3 could not be saved: .*No space.*checkpoint-2 is complete"):
        trainer.train()
    assert latest_complete(tmp_path)[0] == tmp_path / "checkpoint-2"
    again = sampling_trainer(tmp_path, tiny_model())
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_training_before_anything_changes(tmp_path, max_grad_norm, value):
    trainer = scripted_trainer(tmp_path, max_grad_norm=max_grad_norm, save_strategy="steps", save_steps=1, max_steps=3)
    trainer.model.lm_head.weight.register_hook(
        lambda gradient: gradient * (value if trainer.state.global_step == 1 else 1.0)
    )
    with pytest.raises(ValueError, match=f"Gradients must be finite: their norm is {value} in step 2"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert latest_complete(tmp_path)[0] == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("skip_uninformative", [True, False])
def test_a_token_that_the_policy_calls_impossible_stops_training(tmp_path, skip_uninformative):
    """Its log-probability is -inf: the loss is not a number, also where the row's advantage is 0."""
    trainer = scripted_trainer(
        tmp_path,
        skip_uninformative=skip_uninformative,
        per_device_train_batch_size=24,
        save_strategy="steps",
        save_steps=1,
    )
    logps_and_entropies = trainer._get_per_token_logps_and_entropies

    def with_an_impossible_token(*args, **kwargs):
        logps, *rest = logps_and_entropies(*args, **kwargs)
        rows = torch.zeros_like(logps)
        rows[0 if skip_uninformative else uninformative_row] = -torch.inf
        return logps + rows, *rest

    compute_loss = trainer._compute_loss

    def look_for_an_uninformative_row(model, inputs):
        nonlocal uninformative_row
        uninformative_row = (inputs["advantages"] == 0).nonzero()[0, 0] if not skip_uninformative else None
        return compute_loss(model, inputs)

    uninformative_row = None
    trainer._get_per_token_logps_and_entropies = with_an_impossible_token
    trainer._compute_loss = look_for_an_uninformative_row
    with pytest.raises(ValueError, match=r"The loss must be finite: it is nan in step 1, on rank \[0\]"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_metric_that_is_not_a_number_stops_nothing(tmp_path):
    """A step of which no completion could be scored has no mean reward. Files stay JSON, and the run can be resumed."""

    def unscored_in_the_second_step(completions, score, trainer_state, **kwargs):
        return [None] * len(score) if trainer_state.global_step == 1 else score

    settings = {"reward_funcs": unscored_in_the_second_step, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    scripted_trainer(tmp_path, **settings).train()
    state = (tmp_path / "checkpoint-2" / "trainer_state.json").read_text()
    history = json.loads(state, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["log_history"]
    assert history[1]["reward"] is None
    assert history[1]["grad_norm"] == 0
    again = scripted_trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 3


def test_under_fp16_the_loss_scale_deals_with_large_gradients(tmp_path, monkeypatch):
    """Such a step is left out and the scale lowered, until it is below 1: then the gradient itself is bad."""
    trainer = scripted_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    infinite = torch.tensor(torch.inf)
    assert trainer._get_grad_norm(trainer.model, infinite) == torch.inf
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    with pytest.raises(ValueError, match="their norm is inf in step 1"):
        trainer._get_grad_norm(trainer.model, infinite)
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "no")
    with pytest.raises(ValueError, match="their norm is -1"):  # older DeepSpeed's word for a norm that is not finite
        trainer._get_grad_norm(trainer.model, torch.tensor(-1.0))


def test_a_marker_that_cannot_be_written_is_said_and_costs_no_checkpoint(tmp_path, monkeypatch):
    def fail_at_the_third(checkpoint):
        if checkpoint.name == "checkpoint-3":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        mark_complete(checkpoint)

    monkeypatch.setattr("opo_trl.runs.reliable_runs.mark_complete", fail_at_the_third)
    with pytest.raises(RuntimeError, match=r"checkpoint-3 could not be saved: .*quota.*checkpoint-2 is complete"):
        sampling_trainer(tmp_path, tiny_model(), save_total_limit=1).train()
    assert latest_complete(tmp_path)[0] == tmp_path / "checkpoint-2"


def run_until_killed(output_dir, kill_in_save=None, kill_after=None, **variables):
    """One attempt of a run that resumes if it can: the exit status, and the output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILL_IN_SAVE": str(kill_in_save or ""), **variables}
    process = subprocess.Popen(
        [sys.executable, str(KILLED_RUN), str(output_dir)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if kill_after is not None and lines.count("step\n") == kill_after[0]:
            time.sleep(kill_after[1])
            process.send_signal(signal.SIGKILL)
    return process.wait(), "".join(lines)


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_in_the_same_bits(tmp_path):
    """Four times inside a save, at files that come early, in the middle and last; six times after a random while."""
    status, printed = run_until_killed(tmp_path / "undisturbed")
    assert status == 0, printed
    moments = random.Random(0)
    for kill_in_save in ("config.json:2", "tokenizer_config.json:1", "trainer_state.json:2", f"{MARKER}:1"):
        status, printed = run_until_killed(tmp_path / "killed", kill_in_save=kill_in_save)
        assert status == -signal.SIGKILL, printed
        assert latest_complete(tmp_path / "killed")[1], "a checkpoint was left unfinished"
    for _ in range(6):
        moment = moments.randint(1, 3), moments.uniform(0, 0.05)  # steps, and seconds on top
        assert run_until_killed(tmp_path / "killed", kill_after=moment)[0] == -signal.SIGKILL
    status, printed = run_until_killed(tmp_path / "killed")
    assert status == 0, printed
    expected, actual = (torch.load(tmp_path / name / "final.pt") for name in ("undisturbed", "killed"))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_plain_grpo_run_killed_in_a_save_ends_bitwise_identical(tmp_path):
    status, printed = run_until_killed(tmp_path / "undisturbed", PLAIN="1")
    assert status == 0, printed
    for kill_in_save in ("trainer_state.json:2", f"{MARKER}:1"):
        status, printed = run_until_killed(tmp_path / "killed", kill_in_save=kill_in_save, PLAIN="1")
        assert status == -signal.SIGKILL, printed
    status, printed = run_until_killed(tmp_path / "killed", PLAIN="1")
    assert status == 0, printed
    expected, actual = (torch.load(tmp_path / name / "final.pt") for name in ("undisturbed", "killed"))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
