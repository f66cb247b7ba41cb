"""
Server mode with a real vLLM server, on the CPU: run by `make test-vllm` in an environment of its own.

The server runs on one core and the trainer on another. Not run anywhere here, since they need GPUs: TRL's own transfer
of weights, and tensor parallelism.
"""

import json
import os
import signal
import threading
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: `make test-vllm` has an environment for it")

import torch

from engines import check_ends, ends_of_ranks
from opo_trl.rewards import math_verify_reward
from opo_trl.rollouts import weight_file_client
from opo_trl.rollouts.server_generation import ServerError
from opo_trl.rollouts.weight_file import write_weights
from opo_trl.rollouts.weight_file_client import WeightFileClient
from opo_trl.runs.checkpoints import latest_complete
from opo_trl.runs.guarded_functions import RewardError
from vllm_servers import CORES, LORA, ServedPolicy, VllmServer, server_trainer

KINDS = {"full": {}, "LoRA": {"peft_config": LORA}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for all tests: each trainer sends it the weights that it starts from."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {CORES[-1]})
    torch.set_num_threads(1)
    try:
        with VllmServer(tmp_path_factory.mktemp("server") / "server.log") as running:
            yield running
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_the_served_policy_is_the_trained_one_at_every_step(tmp_path, server, kind):
    reward = ServedPolicy()
    reward.trainer = trainer = server_trainer(tmp_path, server.url, reward=reward, **KINDS[kind])
    trainer.train()
    reward.check(steps=4)
    for step in trainer.state.log_history[:4]:
        assert step["sampling/sampling_logp_difference/max"] < 1e-3
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_server_that_stands_still_for_a_while_is_waited_for(tmp_path, server):
    trainer = server_trainer(tmp_path, server.url, max_steps=2)
    request = trainer.vllm_generation.vllm_client.session.request

    def send(method, url, **kwargs):
        if url.endswith("/v1/completions"):
            server.send(signal.SIGSTOP)
            threading.Timer(7.0, server.send, (signal.SIGCONT,)).start()  # longer than it takes to ask for its health
        return request(method, url, **kwargs)

    trainer.vllm_generation.vllm_client.session.request = send
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_generation_that_the_server_refuses_ends_the_run_with_its_reason(tmp_path, server):
    trainer = server_trainer(tmp_path, server.url, max_completion_length=200)  # the server was started with 128
    with pytest.raises(ServerError, match=r"failed while generating: .*400.*max_tokens=200 cannot be greater"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_part_of_a_file_is_refused_by_the_server_which_lives_on(tmp_path, server, monkeypatch):
    def write_a_part(*args):
        path = write_weights(*args)
        path.write_bytes(path.read_bytes()[:-100])
        return path

    trainer = server_trainer(tmp_path, server.url, max_steps=1)
    monkeypatch.setattr(weight_file_client, "write_weights", write_a_part)
    with pytest.raises(ServerError, match=r"a worker has not loaded them: WeightFileError: .*cannot be read as"):
        trainer.train()
    monkeypatch.undo()
    trainer.train()
    assert trainer.state.global_step == 1


def test_weights_of_another_run_are_noticed(tmp_path, server):
    """Two runs by mistake share a server: the other one sends its weights after ours."""
    trainer = server_trainer(tmp_path, server.url)
    other = WeightFileClient(base_url=server.url, directory=tmp_path / "weights")
    sync = trainer.vllm_generation.sync_weights

    def sync_and_be_overtaken():
        sync()
        if trainer.state.global_step == 2:
            other.update_named_params([], iter(trainer.model.named_parameters()))
            assert other.take_failure() is None

    trainer.vllm_generation.sync_weights = sync_and_be_overtaken
    with pytest.raises(ServerError, match=r"the policy is version .*-000002, and its workers hold .*-000000"):
        trainer.train()
    assert trainer.state.global_step == 2


STREAMED = {"stream_rollouts": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_run_trains_what_the_policy_has_sampled(tmp_path, server, kind):
    trainer = server_trainer(tmp_path, server.url, **STREAMED, **KINDS[kind])
    trainer.train()
    steps = trainer.state.log_history[:4]
    assert all(1 <= step["streaming/waves"] <= 8 for step in steps)
    trained = [step for step in steps if step["grad_norm"] > 0]  # else all rewards were equal
    assert trained
    assert all(step["sampling/sampling_logp_difference/max"] < 1e-3 for step in trained)


def test_the_requests_of_a_streamed_step_that_fails_are_given_up(tmp_path, server):
    """Else the next run waits until the server has answered all of them before it sends its weights."""
    trainer = server_trainer(tmp_path, server.url, max_steps=1, reward=fails_once(), **STREAMED)
    with pytest.raises(RewardError, match="only once"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer.train()
    assert trainer.state.global_step == 1


def fails_once():
    calls = []

    def math_verify(completions, **columns):
        calls.append(completions)
        if len(calls) == 1:
            raise OverflowError("only once")
        return math_verify_reward(completions, **columns)

    return math_verify


def test_two_ranks_train_and_hear_the_same_when_the_server_dies_and_resume_with_a_new_one(tmp_path, server):
    def run(*cases):
        worker = [str(Path(__file__).with_name("server_worker.py")), str(tmp_path), server.url, str(server.process.pid)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *worker, *cases]
        check_ends(ends_of_ranks([launcher], {"ACCELERATE_USE_CPU": "true"}, timeout=1200))
        return [[json.loads((tmp_path / f"{case}.{rank}.json").read_text()) for rank in (0, 1)] for case in cases]

    trained, died = run("trains", "dies")
    assert trained == [{"message": "trained", "step": 2}] * 2
    assert died[0] == died[1]
    assert died[0]["step"] == 3
    assert "failed while generating: ConnectionError" in died[0]["message"]
    assert latest_complete(tmp_path / "run")[0].name == "checkpoint-3"
    server.process.wait()
    server.start()
    assert run("resumes") == [[{"message": "trained", "step": 5}] * 2]
