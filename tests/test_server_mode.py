"""
Server mode against a stand-in for vLLM's HTTP interface: TRL's own client, the package's worker, every kind of failure.

The same with a real server: test_vllm_server.py.
"""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig

from opo_trl.rollouts import server_client, watched_session, weight_file_client
from opo_trl.rollouts.server_client import ServerClient
from opo_trl.rollouts.server_generation import ServerError, ServerGeneration
from opo_trl.runs.checkpoints import latest_complete
from pages import page
from policy_engine import PolicyEngine
from tiny import scripted_trainer, tiny_model
from vllm_stand_in import Died, vllm_stand_in

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
KINDS = {"full": {}, "LoRA": {"peft_config": LORA}}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(watched_session, "POLL_SECONDS", 0.05)
    with vllm_stand_in() as stand_in:
        yield stand_in


def short_reward(completions, **kwargs):
    return [-float(len(completion)) for completion in completions]


def server_trainer(output_dir, server, **settings):
    """The directory of the weights is one level above what training saves."""
    weights = output_dir / "weights"
    weights.mkdir(exist_ok=True)
    defaults = {
        "use_vllm": True,
        "vllm_logp_tolerance": None,  # it plays a script
        "vllm_mode": "server",
        "vllm_server_base_url": server.url,
        "vllm_server_timeout": 0.0,
        "vllm_weight_transfer": "file",
        "vllm_weight_dir": str(weights),
        "reward_funcs": short_reward,
        "learning_rate": 1e-2,
        "max_steps": 3,
    }
    return scripted_trainer(output_dir / "run", rollout=None, **{**defaults, **settings})


def merged_weights(model):
    """Weights of a policy as a model without adapter has them."""
    if not hasattr(model, "merge_adapter"):
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    plain = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_" not in name
    }
    model.unmerge_adapter()
    return plain


# ---- A server that does what it is asked for


@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_is_sampled_from_the_weights_that_are_trained(tmp_path, server, kind):
    trained = []

    def reward(completions, **kwargs):  # between generation and update
        trained.append(merged_weights(trainer.model))
        return short_reward(completions)

    trainer = server_trainer(tmp_path, server, reward_funcs=reward, **KINDS[kind])
    trainer.train()
    versions = [version for version, _ in server.served]
    assert len(versions) == len(set(versions)) == 3
    for (_, served), expected in zip(server.served, trained, strict=True):
        assert served.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(served[name], weight, rtol=0, atol=1e-6, msg=name)
    assert any(not torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert list((tmp_path / "weights").iterdir()) == [], "an update leaves no file"


def test_a_slow_server_is_waited_for(tmp_path, server, monkeypatch):
    monkeypatch.setattr(server_client, "LEAST_PATIENCE", 0.2)
    server.faults["/v1/completions"] = lambda: time.sleep(0.5)
    trainer = server_trainer(tmp_path, server, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
    assert "/health" in server.asked[server.asked.index("/v1/completions") :]


def test_the_prefix_cache_is_reset_once_no_request_uses_it(tmp_path, server, monkeypatch):
    clock = SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic)
    monkeypatch.setattr(weight_file_client, "time", clock)
    answers = iter([False, False, True])
    real = server.answer
    server.answer = lambda path, body: {"success": next(answers)} if "prefix" in path else real(path, body)
    server_trainer(tmp_path, server, max_steps=1).train()
    assert server.asked.count("/reset_prefix_cache") == 3
    monkeypatch.setattr(weight_file_client, "CACHE_TIMEOUT", 0.0)
    server.answer = lambda path, body: {"success": False} if "prefix" in path else real(path, body)
    with pytest.raises(ServerError, match="failed while resetting its prefix cache: requests that keep the cache"):
        server_trainer(tmp_path, server, max_steps=1).train()


# ---- Weights of another version


def forget(server):
    """What a restart in the middle of a generation does: the answer is sampled from the weights of the start."""
    server.restart()


def take_those_of_another_run(server):
    server.worker.opo_version = "another-run-000007"


@pytest.mark.parametrize("change", [forget, take_those_of_another_run])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_generation_from_other_weights_is_refused(tmp_path, server, change, moment):
    """Whether they change before the request, or in between request and answer."""
    hooks, path = (server.faults, "/reset_prefix_cache") if moment == "before" else (server.after, "/v1/completions")
    trainer = server_trainer(tmp_path, server)
    steps = []
    hooks[path] = lambda: change(server) if len(server.served) >= 1 and steps else steps.append(1)
    with pytest.raises(ServerError, match=r"failed while generating: the policy is version .*-000001, and its workers"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert len(server.served) == (1 if moment == "before" else 2)


# ---- A server that refuses


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_update_is_raised_with_the_servers_reason_and_leaves_the_policy_as_it_was(tmp_path, server, kind):
    trainer = server_trainer(tmp_path, server, **KINDS[kind])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    def refuse():
        if list((tmp_path / "weights").glob("*.safetensors")):
            raise RuntimeError("no room for these weights")

    server.faults["/collective_rpc"] = refuse
    with pytest.raises(ServerError, match=r"failed while taking new weights: .* 500: .*no room for these weights"):
        trainer.train()
    for name, parameter in trainer.model.named_parameters():  # no adapter is left merged
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6, msg=name)
    assert list((tmp_path / "weights").iterdir()) == []
    assert server.served == []
    del server.faults["/collective_rpc"]
    trainer.train()
    assert trainer.state.global_step == 3, "what failed once may be tried again"


def test_a_worker_that_does_not_load_a_file_gives_its_reason(tmp_path, server):
    server.model.needs = {"visual.weight"}
    with pytest.raises(ServerError, match=r"failed while taking new weights: a worker has not loaded them: .*visual"):
        server_trainer(tmp_path, server).train()
    assert server.served == []


def test_a_full_disk_is_an_error_before_anything_is_sampled(tmp_path, server, monkeypatch):
    trainer = server_trainer(tmp_path, server, **KINDS["LoRA"])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    def full(directory, version, named_params):
        next(named_params)  # an adapter is merged from here on
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_file_client, "write_weights", full)
    with pytest.raises(ServerError, match=r"failed while taking new weights: OSError: .*No space left"):
        trainer.train()
    assert server.served == []
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6, msg=name)


def test_images_without_a_place_in_the_prompt_are_an_error_of_all_ranks():
    """TRL finds it out on the main process alone, where the others wait for the completions."""
    generation, client = object.__new__(ServerGeneration), object.__new__(ServerClient)
    client._failure, client.base_url = None, "http://server"
    generation.vllm_client, generation.accelerator = client, Accelerator(cpu=True)
    generation.processing_class = SimpleNamespace(image_token_id=7)
    two_images = {"mm_placeholders": {"image": [{}, {}]}}
    assert generation._place_features(two_images, [7, 7, 3]) is None
    with pytest.raises(ValueError, match="http://server failed while placing image features: Found 1 runs of image"):
        generation._raise_on_all_ranks()
    placed = generation._place_features(two_images, [7, 3, 7, 7])["mm_placeholders"]["image"]
    assert placed == [{"offset": 0, "length": 1}, {"offset": 2, "length": 2}]


def test_a_refused_generation_is_raised_with_the_servers_reason(tmp_path, server):
    def refuse():
        raise RuntimeError("max_tokens is too large")

    server.faults["/v1/completions"] = refuse
    with pytest.raises(ServerError, match=r"failed while generating: .*500.*max_tokens is too large"):
        server_trainer(tmp_path, server).train()
    assert server.asked.count("/v1/completions") == 1, "the same answer again helps nobody"


# ---- A server that dies


def test_a_server_that_dies_in_a_step_costs_no_checkpoint(tmp_path, server):
    trainer = server_trainer(tmp_path, server, save_strategy="steps", save_steps=1)

    def die():
        if len(server.served) == 2:
            raise Died

    server.faults["/v1/completions"] = die
    with pytest.raises(ServerError, match=r"failed while generating: .*resume_from_checkpoint='auto'"):
        trainer.train()
    assert trainer.state.global_step == 2
    checkpoint, skipped = latest_complete(tmp_path / "run")
    assert (checkpoint.name, skipped) == ("checkpoint-2", {})
    with vllm_stand_in() as anew:
        resumed = server_trainer(tmp_path, anew, save_strategy="steps", save_steps=1)
        resumed.train(resume_from_checkpoint="auto")
        assert resumed.state.global_step == 3
        assert len(anew.served) == 1


def test_a_frozen_server_ends_the_run(tmp_path, server, monkeypatch):
    """It neither answers nor closes the connection, as a machine that is gone."""
    monkeypatch.setattr(server_client, "LEAST_PATIENCE", 0.2)
    monkeypatch.setattr(watched_session, "HEALTH_TIMEOUT", 0.1)
    trainer = server_trainer(tmp_path, server)
    thaw = threading.Event()
    server.faults["/v1/completions"] = server.faults["/health"] = lambda: thaw.wait(30)
    with pytest.raises(ServerError, match=r"has not answered for 0\.2 seconds while it was at work \(ReadTimeout"):
        trainer.train()
    thaw.set()


# ---- A server that is not the policy


def sample_from(network, body):
    """Completions of the tiny policy in the form of vLLM's answer."""
    engine = PolicyEngine(body["temperature"], body["max_tokens"])
    engine.network = network
    prompts = [prompt for prompt in body["prompt"] for _ in range(body["n"])]
    _, completions, logprobs, _ = engine.generate(prompts, None, body["n"])
    choices = []
    for i, (prompt, ids, values) in enumerate(zip(prompts, completions, logprobs, strict=True)):
        tokens = [f"token_id:{token}" for token in ids]
        scores = {"tokens": tokens, "token_logprobs": [value for (value,) in values], "top_logprobs": [None] * len(ids)}
        choices.append({"index": i, "prompt_token_ids": prompt, "token_ids": ids, "logprobs": scores})
    return {"choices": choices}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_server_that_serves_another_policy_is_refused_before_the_first_step(tmp_path, server, streamed, noise):
    """It says that it has taken the weights: only its completions show that it has not."""
    real = server.answer

    def answer(path, body):
        if path != "/v1/completions":
            return real(path, body)
        network = tiny_model()
        network.load_state_dict(server.model.weights, strict=False)
        torch.manual_seed(0)
        with torch.no_grad():
            network.lm_head.weight += noise * torch.randn_like(network.lm_head.weight)
        return sample_from(network, body)

    server.answer = answer
    settings = {"vllm_logp_tolerance": 0.1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 6}
    trainer = server_trainer(tmp_path, server, max_steps=1, stream_rollouts=streamed, **settings)
    if not noise:
        trainer.train()
        assert trainer.state.global_step == 1
        return
    with pytest.raises(ValueError, match=r"must sample from the policy.*Check that the server serves this model"):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- What is refused before training


def test_a_server_without_the_extension_is_refused_with_the_flag_to_add(tmp_path, server):
    server.extension = ""
    with pytest.raises(ValueError, match=r"got 'none'\. Restart it with `--worker-extension-cls opo_trl\.rollouts\."):
        server_trainer(tmp_path, server)


def test_a_server_of_several_engines_is_refused(tmp_path, server):
    server.engines = 2
    with pytest.raises(
        ValueError, match=r"needs a server with one engine.* got `--data-parallel-size 2`\. Leave it out"
    ):
        server_trainer(tmp_path, server)


def test_a_directory_that_the_server_does_not_see_is_refused(tmp_path, server):
    server.worker.opo_read_probe = lambda path: {"probe": None}
    with pytest.raises(ValueError, match="`vllm_weight_dir` must be a directory that the server sees"):
        server_trainer(tmp_path, server)
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_directory_that_is_not_there_is_refused_before_the_model_is_looked_for(tmp_path, server):
    with pytest.raises(ValueError, match=r"`vllm_weight_dir` must be an existing directory .*it is not a directory"):
        server_trainer(tmp_path, server, model="nobody/nothing", vllm_weight_dir=str(tmp_path / "absent"))
    assert server.asked == []


@pytest.mark.parametrize("answers", [True, False])
def test_a_server_that_does_not_come_up_is_an_error_after_the_timeout(tmp_path, server, answers):
    """Also one that answers with an error: TRL would wait for it without end."""

    def refuse():
        raise RuntimeError("the engine is dead")

    server.faults["/health"] = refuse
    if not answers:
        server.stop()
    with pytest.raises(ServerError, match=r"failed while connecting: it is not up after 0 seconds"):
        server_trainer(tmp_path, server)


def test_trls_own_transfer_gets_the_same_agreement(tmp_path, server, monkeypatch):
    """It needs CUDA, so that it fails here, in the way that it fails on the main process of many."""
    monkeypatch.setattr("trl.generation.vllm_client.get_ip", lambda: "127.0.0.1", raising=False)
    real = server.answer
    config = {"vllm_config": {"weight_transfer_config": {"backend": "nccl"}, "model_config": {}}}
    server.answer = lambda path, body: (
        config if path == "/server_info" else {"world_size": 1} if "world" in path else real(path, body)
    )
    with pytest.raises(ServerError, match=r"failed while preparing the transfer of weights: NotImplementedError.*CUDA"):
        server_trainer(tmp_path, server, vllm_weight_transfer="nccl", vllm_weight_dir=None)


def test_trls_names_are_set_back(tmp_path, server):
    from trl.generation import vllm_client, vllm_generation
    from trl.trainer import grpo_trainer

    server_trainer(tmp_path, server, model=tiny_model())
    assert vllm_generation.VLLMClient is vllm_client.VLLMClient
    assert grpo_trainer.VLLMGeneration is vllm_generation.VLLMGeneration


def test_the_page_names_the_extension_that_the_server_is_asked_for(server):
    worker = type(server.worker)
    assert f"{worker.__module__}.{worker.__qualname__}" == weight_file_client.WORKER_EXTENSION
    assert f"--worker-extension-cls {weight_file_client.WORKER_EXTENSION}\n" in page("vllm")
