"""A streamed step has the gradient, the metrics and the failures of one that is not, against a stand-in server."""

import threading
import time

import pytest
import torch
from peft import LoraConfig
from transformers import MixtralConfig, MixtralForCausalLM
from trl.generation.vllm_client import VLLMClient

from opo_trl import OPOConfig
from opo_trl.rollouts import server_client, watched_session
from opo_trl.rollouts.server_generation import ServerError
from opo_trl.runs.guarded_functions import RewardError
from test_update import prompts
from tiny import SCRIPT, VOCABULARY, relative_error, scripted_rollout, update_of
from vllm_stand_in import vllm_stand_in
from waves_script import (
    INTERRUPTED,
    ONE_BY_ONE,
    UNEVEN,
    ScriptedServer,
    fail_in_a_wave,
    finish_in_batches,
    score,
    streaming_trainer,
)

UNINFORMATIVE = ["fifteen", "seven!"]
REORDERED = [*UNINFORMATIVE, *(prompt for prompt in SCRIPT if prompt not in UNINFORMATIVE)]
TWO_PROMPTS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(watched_session, "POLL_SECONDS", 0.2)
    with vllm_stand_in() as stand_in:
        yield stand_in


def logged(trainer):
    return next(entry for entry in trainer.state.log_history if "reward" in entry)


# ---- The gradient, and what is logged


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
@pytest.mark.parametrize("batches", [ONE_BY_ONE, UNEVEN, [list(SCRIPT)]], ids=["one by one", "uneven", "all at once"])
def test_the_gradient_is_that_of_a_step_that_is_not_streamed(tmp_path, server, loss_type, batches):
    script = ScriptedServer(server)
    plain = update_of(streaming_trainer(tmp_path / "plain", server, stream_rollouts=False, loss_type=loss_type))
    trainer = streaming_trainer(tmp_path / "streamed", server, loss_type=loss_type)
    waves = finish_in_batches(trainer, script, batches)
    assert relative_error(update_of(trainer), plain) < 2e-6
    assert [sorted(wave) for wave in waves] == [sorted(list(SCRIPT).index(p) for p in batch) for batch in batches]


def length(completions, log_metric, **kwargs):
    log_metric("length/no_answer", float(sum(len(each) < 3 for each in completions)))
    return [len(each) / 20 for each in completions]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.5},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 12, "skip_uninformative": False},
        {"gradient_accumulation_steps": 24, "per_device_train_batch_size": 1, "loss_type": "dr_grpo"},
        {"gradient_accumulation_steps": 2, "num_generations": 3, "per_device_train_batch_size": 9},
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)},
        {"baseline_weight": "uncertainty"},
        {"baseline_weight": "uncertainty", "vllm_importance_sampling_correction": False},
        {"reward_funcs": [score, length]},
        {"prompt_sampling": "informative", "shuffle_dataset": True},
    ],
    ids=["clipped", "all rows", "more micro-batches than groups", "groups of three", "LoRA", "uncertainty", "forwards",
         "two rewards", "chosen prompts"],
)  # fmt: skip
def test_a_step_is_logged_as_one_that_is_not_streamed(tmp_path, server, settings):
    script = ScriptedServer(server)
    plain = streaming_trainer(tmp_path / "plain", server, stream_rollouts=False, **settings)
    trainer = streaming_trainer(tmp_path / "streamed", server, **settings)
    finish_in_batches(trainer, script, UNEVEN)
    expected = update_of(plain)
    assert relative_error(update_of(trainer), expected) < 2e-6
    theirs, ours = logged(plain), logged(trainer)
    streamed = {"streaming/waves", "streaming/generation_seconds"}
    assert ours.keys() == theirs.keys() | streamed
    timed = {name for name in ours if "time" in name or "per_second" in name} | streamed
    for name in theirs.keys() - timed - {"opo/padding_fraction"}:  # other rows share a micro-batch
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6, nan_ok=True), name


# ---- Refill rounds


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
def test_a_refilled_step_samples_and_trains_what_it_does_without_streaming(tmp_path, server, loss_type):
    script = ScriptedServer(server)
    script.finish_all()
    settings = {"max_refill_rounds": 2, "loss_type": loss_type, "train_dataset": prompts(*REORDERED), **TWO_PROMPTS}
    plain = streaming_trainer(tmp_path / "plain", server, stream_rollouts=False, **settings)
    expected = update_of(plain)
    sampled, script.requests = script.requests, []
    trainer = streaming_trainer(tmp_path / "streamed", server, **settings)
    assert relative_error(update_of(trainer), expected) < 2e-6
    assert sorted(script.requests) == sorted(sampled)
    for name in (
        "rollouts/rounds",
        "rollouts/sampled_per_trained",
        "rollouts/groups_dropped",
        "reward",
        "opo/baseline",
    ):
        assert logged(trainer)[name] == pytest.approx(logged(plain)[name]), name
    assert logged(trainer)["rollouts/rounds"] >= 1


def test_a_refill_round_starts_before_the_last_group_of_the_round_before_it_has_come(tmp_path, server):
    """Of two groups, one is not informative: however the other one turns out, two more are needed."""
    script = ScriptedServer(server)
    script.finish_all()

    def wait_for_the_refill():
        deadline = time.monotonic() + 30
        while len(script.requests) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    script.faults["one"] = wait_for_the_refill
    names = ["fifteen", "one", *(prompt for prompt in SCRIPT if prompt not in ("fifteen", "one"))]
    trainer = streaming_trainer(tmp_path, server, max_refill_rounds=1, train_dataset=prompts(*names), **TWO_PROMPTS)
    trainer.train()
    assert len(script.requests) == 4


def test_a_refill_round_that_starts_early_and_gets_the_last_prompt_of_the_dataset_counts(tmp_path, server, caplog):
    """After the first of two uninformative groups it is known to need two prompts, and one is left."""
    script = ScriptedServer(server)
    names = list(SCRIPT)[:3]
    trainer = streaming_trainer(
        tmp_path, server, max_refill_rounds=1, train_dataset=prompts(*names), **TWO_PROMPTS,
        reward_funcs=lambda completions, **kwargs: [0.4] * len(completions),
    )  # fmt: skip
    waves = finish_in_batches(trainer, script, [[name] for name in names])
    assert all((value == 0).all() for value in update_of(trainer).values())
    assert waves == [[0], [1], [2]]
    assert (logged(trainer)["rollouts/rounds"], logged(trainer)["rollouts/groups_dropped"]) == (1, 3)
    assert "none of its 3 groups is informative, after 1 refill round(s)." in caplog.text


# ---- Requests


def test_each_prompt_has_a_request_and_a_resumed_run_sends_the_same(tmp_path, server):
    script = ScriptedServer(server)
    script.finish_all()
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3, **TWO_PROMPTS}
    streaming_trainer(tmp_path, server, **settings).train()
    requests, script.requests = script.requests, []
    assert len(requests) == 6
    resumed = streaming_trainer(tmp_path, server, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert sorted(script.requests) == sorted(requests[2:])


def test_a_request_asks_for_what_trls_client_asks_for(tmp_path, server, monkeypatch):
    """`submit` writes the request that TRL's `generate` posts for one prompt."""
    script = ScriptedServer(server)
    script.finish_all()
    asked = []
    answer = server.answer

    def record(path, body):
        asked.extend([body] if path == "/v1/completions" else [])
        return answer(path, body)

    server.answer = record
    monkeypatch.setattr(server_client.ServerClient, "_check_policy", lambda self: None)
    trainer = streaming_trainer(tmp_path, server, temperature=0.7, generation_kwargs={"stop_token_ids": [5]})
    client = trainer.vllm_generation.vllm_client
    post, posted = VLLMClient._post, []
    monkeypatch.setattr(VLLMClient, "_post", lambda self, url, json: posted.append(json) or post(self, url, json=json))
    prompt = trainer.processing_class("six")["input_ids"]
    trainer.vllm_generation.generate([prompt] * 4, None, 4)
    trainer.vllm_generation.submit([prompt] * 4, 4)
    client._stream.wait()
    client.end_stream()
    theirs, ours = asked
    assert ours == theirs == posted[0]


# ---- Failures


@pytest.mark.parametrize("case", INTERRUPTED)
def test_a_step_that_fails_in_a_wave_leaves_nothing_to_the_next_one(tmp_path, server, case):
    script = ScriptedServer(server)
    plain = update_of(streaming_trainer(tmp_path / "plain", server, stream_rollouts=False))
    trainer = streaming_trainer(tmp_path / "streamed", server)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    finish_in_batches(trainer, script, UNEVEN)
    fail_in_a_wave(case, trainer, server, script)
    message = INTERRUPTED[case].replace("rank 1", "rank 0")
    with pytest.raises((ServerError, RewardError)) as raised:
        trainer.train()
    assert message in str(raised.value)
    assert trainer.state.global_step == 0
    assert any(p.grad is not None and p.grad.any() for p in trainer.model.parameters()), "in the middle of the step"
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.vllm_generation.vllm_client._stream is None, "the requests are given up"
    if "dies" not in case:
        script.finish_all()
        assert relative_error(update_of(trainer), plain) < 2e-6


def test_a_frozen_server_ends_the_run(tmp_path, server, monkeypatch):
    monkeypatch.setattr(server_client, "LEAST_PATIENCE", 0.2)
    monkeypatch.setattr(watched_session, "HEALTH_TIMEOUT", 0.1)
    trainer = streaming_trainer(tmp_path, server)
    thaw = threading.Event()
    server.faults["/v1/completions"] = server.faults["/health"] = lambda: thaw.wait(30)
    with pytest.raises(ServerError, match=r"has not answered for 0\.2 seconds while it was at work \(ReadTimeout"):
        trainer.train()
    thaw.set()


# ---- What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_vllm": False}, "`vllm_mode` 'server', got `use_vllm=False`"),
        ({"vllm_mode": "colocate"}, "got `use_vllm=True` and `vllm_mode='colocate'`"),
        ({"gradient_accumulation_steps": 1}, "`gradient_accumulation_steps` must be at least 2, got 1"),
        ({"torch_compile": True}, "`stream_rollouts` must be False with it, got True"),
    ],
)
def test_settings_without_a_step_to_stream_are_refused(tmp_path, settings, message):
    given = {"use_vllm": True, "vllm_mode": "server", "gradient_accumulation_steps": 2, **settings}
    with pytest.raises(ValueError, match=message):
        OPOConfig(str(tmp_path), stream_rollouts=True, bf16=False, use_cpu=True, **given)


def test_deepspeed_is_refused_where_the_gradient_must_be_scaled(tmp_path, monkeypatch):
    config = OPOConfig(
        str(tmp_path), bf16=False, use_cpu=True, use_vllm=True, vllm_mode="server", gradient_accumulation_steps=2,
        loss_type="dr_grpo",
    )  # fmt: skip
    config.deepspeed_plugin, config.stream_rollouts = object(), True
    config.check_contract()
    config.max_refill_rounds = 1
    with pytest.raises(ValueError, match="`max_refill_rounds` must be 0 under DeepSpeed, got 1"):
        config.check_contract()
    config.max_refill_rounds, config.loss_type = 0, "dapo"
    with pytest.raises(ValueError, match="`loss_type` must be 'dr_grpo' under DeepSpeed, got 'dapo'"):
        config.check_contract()


def add(a: int, b: int) -> int:
    """
    Add.

    Args:
        a: First.
        b: Second.
    """
    return a + b


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"tools": [add]}, "tools"), ({"environment_factory": object}, "environment_factory")],
)
def test_completions_of_several_turns_are_refused(tmp_path, server, arguments, name):
    with pytest.raises(ValueError, match=f"`{name}` generates in other ways: it must be None"):
        streaming_trainer(tmp_path, server, **arguments)


def test_a_rollout_function_is_refused(tmp_path, server):
    with pytest.raises(ValueError, match="`rollout_func` generates in other ways"):
        streaming_trainer(tmp_path, server, rollout=scripted_rollout)


def test_a_router_loss_is_refused(tmp_path, server):
    config = MixtralConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        output_router_logits=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="`stream_rollouts` must be False, since the router's auxiliary loss"):
        streaming_trainer(tmp_path, server, model=MixtralForCausalLM(config))
