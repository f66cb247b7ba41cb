"""Two processes make the update of one, for real: gloo on the CPU, started by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed_worker import CASES
from tiny import relative_error, scripted_trainer, tiny_model

WORKER = Path(__file__).with_name("distributed_worker.py")


def run_two_processes(output, case):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*command, str(WORKER), str(output), case],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:  # a hang: end the ranks too, not only their launcher
            process.terminate()
            process.wait(30)
    assert process.returncode == 0, printed[-3000:]


def moved(state):
    return {name: value - state[name] for name, value in tiny_model().state_dict().items()}


@pytest.mark.parametrize("case", sorted(CASES))
def test_two_processes_equal_one(tmp_path, case):
    run_two_processes(tmp_path / "two.pt", case)
    settings = dict(CASES[case])
    settings["per_device_train_batch_size"] *= 2
    one = scripted_trainer(tmp_path, **settings)
    one.train()
    assert relative_error(moved(torch.load(tmp_path / "two.pt")), moved(one.model.state_dict())) < 1e-5
    two_logs = json.loads((tmp_path / "two.json").read_text())
    one_logs = [entry for entry in one.state.log_history if "entropy" in entry]
    for two_log, one_log in zip(two_logs, one_logs, strict=True):
        for name, value in one_log.items():
            if name.startswith("opo/") or name in ("reward", "entropy", "grad_norm"):
                assert two_log[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_an_infinite_reward_on_one_rank_stops_both_with_the_same_message(tmp_path):
    run_two_processes(tmp_path / "message", "infinite")
    messages = [(tmp_path / f"message.{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "'infinite_on_one_rank' returned inf for row 10 of the rollout batch" in messages[0]
