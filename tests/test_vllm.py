"""
vLLM in colocate mode, for real, on the CPU: run by `make test-vllm` in an environment of its own, skipped without vLLM.

Not run anywhere here: server mode and tensor parallelism, which need GPUs.
"""

import functools
import logging
import os
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: `make test-vllm` has an environment for it")

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaForCausalLM
from trl.generation import vllm_generation

from opo_trl import OPOTrainer
from opo_trl.evaluation.sampling import TransformersSampler, record_seed, tokenize_prompt
from opo_trl.evaluation.vllm_sampling import VllmSampler
from opo_trl.on_policy.self_test import ROWS as SELF_TEST_ROWS
from opo_trl.rewards import math_verify_reward
from opo_trl.rollouts import weight_file_worker  # noqa: F401  # on a CPU, it keeps vLLM from packing weights
from opo_trl.scripts.judging import judge
from opo_trl.scripts.policies import model_path
from opo_trl.scripts.problems import load_problems
from tiny import tiny_config

POLICY = model_path("tiny_policy")
ROWS = 256
FULL = {"learning_rate": 1e-4, "max_steps": 50}
LORA = {"learning_rate": 1e-3, "max_steps": 50, "peft_config": LoraConfig(r=8, target_modules="all-linear")}
KINDS = {"full": FULL, "LoRA": LORA}


def policy_weights(model):
    """Weights of the policy by the names of a model without an adapter, which is merged."""
    weights = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or "lora_" in name or hasattr(module, "base_layer"):
            continue  # an adapted layer's weight is that of its base layer, which comes by itself
        if name.endswith(".base_layer"):
            weight = weight + model.get_submodule(name.removesuffix(".base_layer")).get_delta_weight("default")
        name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        weights[f"{name}.weight"] = weight.detach().clone()
    return weights


def vllm_trainer(output_dir, peft_config=None, **settings):
    train, held_out = (
        load_problems("arithmetic", split, num_arithmetic=size) for split, size in (("train", 4_000), ("test", 256))
    )
    config = tiny_config(
        output_dir,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=128,
        vllm_gpu_memory_utilization=0.1,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        per_device_train_batch_size=ROWS // 2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=256,
        num_generations=8,
        num_generations_eval=1,
        max_completion_length=40,
        shuffle_dataset=True,
        warmup_steps=5,
        lr_scheduler_type="constant_with_warmup",
        **settings,
    )
    return OPOTrainer(POLICY, math_verify_reward, config, train, held_out, peft_config=peft_config)


def engine_weights(trainer):
    worker = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker
    return dict(worker.model_runner.model.named_parameters())


def fused(name):
    """Names of the policy's matrices that vLLM holds as one."""
    for fused, parts in {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.items():
        if fused in name:
            return [name.replace(fused, part) for part in parts]
    return [name]


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """What was seen in a training run with vLLM, and before and after it."""
    trainer = vllm_trainer(tmp_path_factory.mktemp(request.param), **KINDS[request.param])
    start = {name: weight.clone() for name, weight in engine_weights(trainer).items()}
    before = trainer.evaluate()
    rows = []
    hook = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].size(0)), with_kwargs=True
    )
    trainer.train()
    hook.remove()
    return SimpleNamespace(
        trainer=trainer,
        steps=[entry for entry in trainer.state.log_history if "reward" in entry],
        start=start,
        rows=sum(rows),
        before=before["eval_reward"],
        after=trainer.evaluate()["eval_reward"],  # gives the engine the last update, too
    )


def test_the_engine_holds_the_policys_weights(run):
    policy, engine = policy_weights(run.trainer.model), engine_weights(run.trainer)
    assert {part for name in engine for part in fused(name)} == policy.keys() - {"lm_head.weight"}, (
        "embeddings are tied"
    )
    for name, held in engine.items():
        expected = torch.cat([policy[part] for part in fused(name)])
        held, before = held[: len(expected)], run.start[name][: len(expected)]  # vLLM pads the vocabulary
        torch.testing.assert_close(held, expected.to(held.dtype), rtol=0, atol=0)
        trained = isinstance(run.trainer.model, LlamaForCausalLM) or "proj" in name
        assert torch.equal(held, before) != trained, name


def test_log_probabilities_arrive_and_the_mismatch_is_logged(run):
    """Small, since the engine runs the same weights in the same dtype, and not 0, since it computes them otherwise."""
    learning = [step for step in run.steps if step["opo/informative_fraction"] > 0]
    assert len(learning) > 0.9 * len(run.steps)
    for step in learning:
        assert 0 < step["sampling/sampling_logp_difference/mean"] < 1e-4
        assert abs(step["sampling/kl"]) < 1e-5  # rounding, and so of either sign
        assert step["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)


def test_no_old_policy_forward_runs(run):
    """Each informative row runs once, plus a filler for a micro-batch without any; TRL would run each row twice."""
    informative = sum(round(step["opo/informative_fraction"] * ROWS) for step in run.steps)
    assert 0 <= run.rows - informative - SELF_TEST_ROWS <= 2 * len(run.steps)


def test_the_policy_improves(run):
    assert run.after > run.before + 0.1


def test_an_interrupted_generation_leaves_nothing_to_the_next(run, monkeypatch):
    """vLLM's engine continues the requests of an interrupted generation unless they are aborted."""
    generation, engine = run.trainer.vllm_generation, run.trainer.vllm_generation.llm.llm_engine
    step, steps = engine.step, iter(range(3))

    def interrupted():
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step()

    run.trainer.model.eval()
    prompts = [run.trainer.processing_class("12+3=?")["input_ids"]] * 8
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generation.generate(prompts, None, 1)
    assert not engine.has_unfinished_requests()
    assert len(generation.generate(prompts[:2], None, 1)[1]) == 2


def test_an_engine_left_behind_shows_in_the_mismatch(tmp_path, caplog):
    """An engine that never gets a new weight: before the first step it is the policy, and later it is warned about."""
    trainer = vllm_trainer(tmp_path, **{**LORA, "max_steps": 30})
    trainer.vllm_generation.sync_weights = lambda: None
    trainer.train()
    last = [entry["sampling/kl"] for entry in trainer.state.log_history if "reward" in entry][-5:]
    assert all(kl is None or kl > 0.01 for kl in last)
    assert any(kl is not None for kl in last)
    assert caplog.text.count("The sampler moves away from the policy") == 1


def train_and_be_refused(trainer, match):
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=match) as refused:
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    return str(refused.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_test_accepts_a_right_engine_and_refuses_wrong_ones(tmp_path, caplog, dtype):
    trainer = vllm_trainer(tmp_path, **{**FULL, "max_steps": 2}, vllm_dtype=dtype)
    engine = trainer.vllm_generation
    assert str(engine.llm.llm_engine.model_config.dtype) == f"torch.{dtype}"
    assert ("computes in bfloat16 and the trainer in float32" in caplog.text) == (dtype == "bfloat16")
    with caplog.at_level(logging.INFO, "opo_trl"):
        trainer.train()
    assert "Self-test of the vLLM engine passed" in caplog.text

    engine.temperature = 0.3
    assert "its draws fit a temperature of" in train_and_be_refused(trainer, "must sample from the policy")
    engine.temperature = 1.0

    sync_weights = engine.sync_weights

    def sync_and_perturb():
        sync_weights()
        with torch.no_grad():
            layer = engine_weights(trainer)["model.embed_tokens.weight"]  # tied to the output layer
            layer.add_(torch.randn(layer.shape).to(layer) * 0.5 * layer.std())

    engine.sync_weights = sync_and_perturb
    assert "its log-probabilities differ" in train_and_be_refused(trainer, "must sample from the policy")
    engine.sync_weights = sync_weights
    trainer.train()


def test_evaluation_samples_from_the_policy():
    """Rewards by vLLM against those by transformers, and the same tokens for the same seeds."""
    problems = load_problems("arithmetic", "test", num_arithmetic=64)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    samples = [(problem, sample) for problem in problems for sample in range(4)]
    prompts = [tokenize_prompt(tokenizer, problem["prompt"]) for problem, _ in samples]
    seeds = [record_seed("vllm", i) for i in range(len(prompts))]
    settings = {"max_new_tokens": 40, "temperature": 1.0}
    by_vllm = VllmSampler(POLICY, tokenizer, dtype="float32", enforce_eager=True, max_model_len=64, **settings).sample(
        prompts, seeds
    )
    model = LlamaForCausalLM.from_pretrained(POLICY)
    by_transformers = TransformersSampler(model, tokenizer, **settings).sample(prompts, seeds)
    pass_rate, expected = (
        sum(record["reward"] for record in judge(samples, completions)) / len(samples)
        for completions in (by_vllm, by_transformers)
    )
    assert pass_rate == pytest.approx(expected, abs=0.12)  # 256 samples each
    assert all(completion.token_ids[-1] == tokenizer.eos_token_id for completion in by_vllm if not completion.truncated)
    assert len({tuple(completion.token_ids) for completion in by_vllm}) > 64


# The last test: it imports numba, after which vLLM 0.31 cannot start another engine in this process.
def test_the_self_test_refuses_the_speculative_decoding_of_this_build(tmp_path, monkeypatch):
    """vllm-cpu 0.31 checks drafts at temperatures that it has not initialised. TRL has no setting for it."""
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    monkeypatch.setattr(vllm_generation, "LLM", functools.partial(vllm_generation.LLM, speculative_config=drafts))
    trainer = vllm_trainer(tmp_path, **{**FULL, "max_steps": 1})
    train_and_be_refused(trainer, "must sample from the policy")
