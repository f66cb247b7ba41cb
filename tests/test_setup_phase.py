"""Errors of the user end the scripts with their message alone; those of training keep their traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from engines import TRAIN_MATH as TRAIN
from opo_trl.runs.checkpoints import mark_complete
from opo_trl.runs.guarded_functions import RewardError
from opo_trl.scripts import evaluate_math, train_math
from opo_trl.scripts.setup_phase import ErrorOnARank, SetupPhase

EVALUATE = ["--models", "tiny_policy", "--datasets", "arithmetic", "--num_problems", "4", "--num_samples", "2",
            "--max_new_tokens", "4", "--backend", "transformers"]  # fmt: skip


WORKER = Path(__file__).with_name("setup_worker.py")
ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "examples" / "accelerate_configs" / "cpu.yaml"


def test_an_error_of_the_user_is_its_message(capsys):
    with pytest.raises(SystemExit) as exit_, SetupPhase():
        raise OSError("no such file")
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "error: no such file\nSet OPO_DEBUG=1 for the traceback.\n"


def test_a_rank_gives_the_main_process_time_to_end_the_job(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("opo_trl.scripts.setup_phase.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit), SetupPhase():
        raise OSError("no such file on this machine")
    assert waited == [5.0]
    assert capsys.readouterr().err.startswith("error on rank 3: no such file on this machine\n")
    with pytest.raises(SystemExit), SetupPhase():
        raise ErrorOnARank("raised on all ranks, so the main process prints it")
    assert waited == [5.0]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", ["1", "true"])
def test_debugging_keeps_the_traceback(monkeypatch, value):
    monkeypatch.setenv("OPO_DEBUG", value)
    with pytest.raises(ValueError, match="wrong"), SetupPhase():
        raise ValueError("wrong")


def test_other_errors_and_later_ones_keep_the_traceback():
    with pytest.raises(KeyError), SetupPhase():
        raise KeyError("a mistake of ours")
    setup = SetupPhase()
    setup.on_train_begin(None, TrainerState(), TrainerControl())
    with pytest.raises(ValueError, match="in step 3"), setup:
        raise ValueError("in step 3")
    with SetupPhase():
        pass


def test_an_error_of_training_keeps_its_traceback(tmp_path, monkeypatch):
    def reward(completions, **kwargs):
        raise ValueError("in the reward")

    monkeypatch.setattr("opo_trl.scripts.reward_functions.rewards.math_verify_reward", reward)
    with pytest.raises(RewardError, match="in the reward"), SetupPhase() as setup:
        train_math.main([*TRAIN, "--output_dir", str(tmp_path)], setup)


def test_an_error_of_sampling_keeps_its_traceback(tmp_path, monkeypatch):
    def judge(*args):
        raise ValueError("in the judge")

    monkeypatch.setattr(evaluate_math, "judge", judge)
    with pytest.raises(ValueError, match="in the judge"), SetupPhase() as setup:
        evaluate_math.main([*EVALUATE, "--output_dir", str(tmp_path)], setup)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (train_math, [*TRAIN, "--learning_rat", "1"], "did you mean --learning_rate?"),
        (train_math, [*TRAIN, "--model_name_or_path", "./no/policy"], "'./no/policy': there is no such directory"),
        (train_math, [*TRAIN, "--resume_from_checkpoint", "true"], "needs a complete checkpoint"),
        (train_math, [*TRAIN, "--dataset_name", "no.jsonl"], "no.jsonl"),
        (train_math, [*TRAIN, "--num_generations", "3"], "`num_generations` to 2 or 4"),
        (evaluate_math, [*EVALUATE, "--temperatur", "1"], "did you mean --temperature?"),
        (evaluate_math, [*EVALUATE, "--models", "outputs/no-run"], "'outputs/no-run' is not a local directory"),
        (evaluate_math, [*EVALUATE, "--models", "tiny_policy", "./no"], "'./no': there is no such directory"),
        (evaluate_math, [*EVALUATE, "--base_model", "/no/base"], "'/no/base': there is no such directory"),
    ],
)
def test_mistakes_end_both_scripts_with_one_sentence(tmp_path, capsys, script, arguments, message):
    with pytest.raises(SystemExit), SetupPhase() as setup:
        script.main([*arguments, "--output_dir", str(tmp_path / "out")], setup)
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in printed


@pytest.mark.slow
def test_two_ranks_end_with_one_message(tmp_path):
    """In processes of their own, that the launcher ends: what comes before one mistake is in test_distributed.py."""
    checkpoint = tmp_path / "run" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "scheduler.pt").touch()
    mark_complete(checkpoint)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(WORKER), str(tmp_path), *TRAIN, "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    results = [json.loads((tmp_path / f"results.{rank}").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    message, found, refused = results[0]
    assert message == "problems.jsonl is not on this machine (on rank 1)"
    assert found == str(checkpoint)
    assert "needs a complete checkpoint in" in refused
    assert run.stderr.count("did you mean --learning_rate?") == 1, run.stderr
    assert run.stdout.count("No accelerator found") == 1
    assert WORKER.name not in run.stderr.split("error: ")[0], "no traceback of ours comes before the message"


@pytest.mark.slow
def test_the_documented_launch_prints_the_message_alone(tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(CPU)]
    command = [
        *launcher,
        str(ROOT / "examples" / "train_math.py"),
        *TRAIN,
        "--output_dir",
        str(tmp_path),
        "--dataset_name",
        "no.jsonl",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "no.jsonl" in line
    assert run.stderr.endswith("Set OPO_DEBUG=1 for the traceback.\n")
