"""
The update on a GPU: run by `make test-gpu`, skipped without one.

On CUDA the model has random weights in the shape of Qwen2.5-0.5B and completions of up to 1,300 tokens; with
OPO_TEST_SMOLLM2=FOLDER, also SmolLM2-135M from that folder. The same tests run on the CPU with a tiny model of the same
architecture, so that `make test` exercises all of them but the last two.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import is_flash_attn_2_available

from engines import gpus, relative_difference, single_process, two_processes
from opo_trl import OPOTrainer
from random_models import random_model
from test_trainer import reinforce_update, scripted_groups
from tiny import SCRIPT, relative_error, scripted_rollout, scripted_trainer, tiny_config, tiny_tokenizer

WANTED = os.environ.get("OPO_TEST_GPU") == "1"
CUDA = WANTED and torch.cuda.is_available()
NO_GPU = "needs a CUDA GPU: run `make test-gpu` on a machine that has one"
FOLDER = "OPO_TEST_SMOLLM2"
if WANTED and not CUDA:
    pytest.skip(NO_GPU, allow_module_level=True)


@dataclass(frozen=True)
class Target:
    """A device, and the model that is trained there."""

    device: str
    size: str
    repeats: int  # of every text of the script, to make it longer
    tolerance: float  # of gradients in fp32, relative

    @property
    def script(self):
        return {
            prompt * self.repeats: [(text * self.repeats, reward) for text, reward in group]
            for prompt, group in SCRIPT.items()
        }

    def model(self, attention="sdpa"):
        if self.size == "SmolLM2-135M":
            model = AutoModelForCausalLM.from_pretrained(os.environ[FOLDER], dtype=torch.float32)
        else:
            model = random_model(self.size, longest=4_096)
        model.set_attn_implementation(attention)
        return model.to(self.device)

    def tokenizer(self):
        return AutoTokenizer.from_pretrained(os.environ[FOLDER]) if self.size == "SmolLM2-135M" else tiny_tokenizer()

    def trainer(self, output_dir, attention="sdpa", prompts=None, **settings):
        script = self.script

        def rollout(prompts, trainer):
            return scripted_rollout(prompts, trainer, script)

        names = [name for name, short in zip(script, SCRIPT, strict=True) if prompts is None or short in prompts]
        return scripted_trainer(
            output_dir,
            self.model(attention),
            rollout,
            train_dataset=Dataset.from_dict({"prompt": names}),
            processing_class=self.tokenizer(),
            **{"use_cpu": self.device == "cpu", "max_completion_length": 4_096, "learning_rate": 0.0, **settings},
        )

    def oracle(self, dtype="fp32"):
        """The gradient of the script, row by row, without padding and with plain attention."""
        groups = scripted_groups(self.script, tokenizer=self.tokenizer())
        with torch.autocast(self.device, torch.bfloat16) if dtype == "bf16" else nullcontext():
            return reinforce_update(self.model("eager"), groups)


TARGETS = {
    "CPU": Target("cpu", "tiny", repeats=1, tolerance=1e-4),
    "CUDA, 0.5B": Target("cuda", "0.5b", repeats=60, tolerance=1e-3),
    "CUDA, SmolLM2-135M": Target("cuda", "SmolLM2-135M", repeats=60, tolerance=1e-3),
}
REGROUPED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6}


@pytest.fixture(params=[name for name, target in TARGETS.items() if CUDA or target.device == "cpu"])
def target(request):
    target = TARGETS[request.param]
    if target.size == "SmolLM2-135M" and FOLDER not in os.environ:
        pytest.skip(f"{FOLDER} does not name the folder of SmolLM2-135M")
    return target


class KeepGradient(TrainerCallback):
    """Keeps the gradient of the last step, with the sign of an ascent."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradient = {
            name: torch.zeros_like(p) if p.grad is None else -p.grad.detach().clone()
            for name, p in model.named_parameters()
        }


def gradient_of(trainer):
    keep = KeepGradient()
    trainer.add_callback(keep)
    trainer.train()
    return keep.gradient


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_gradient_is_the_oracles(tmp_path, target, dtype):
    """In bf16 it may be as far from the single-precision one as the oracle itself is when it is run in bf16."""
    exact = target.oracle()
    trainer = target.trainer(tmp_path, bf16=dtype == "bf16", **REGROUPED)
    assert trainer.accelerator.device.type == target.device
    error = relative_error(gradient_of(trainer), exact)
    if dtype == "fp32":
        assert error < target.tolerance
    else:
        rounding = relative_error(target.oracle("bf16"), exact)
        assert 1e-4 < rounding < 0.2
        assert error < 1.5 * rounding


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_of_fillers_only_has_no_gradient(tmp_path, target, dtype):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "bf16": dtype == "bf16"}
    trainer = target.trainer(tmp_path, prompts=["fifteen", "seven!"], **settings)
    assert all((value == 0).all() for value in gradient_of(trainer).values())
    assert trainer.state.log_history[0]["entropy"] is None


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_trimming_changes_nothing(tmp_path, target, attention):
    """Against micro-batches as TRL cuts them, all of one width; FlashAttention has no fp32."""
    flash = attention == "flash_attention_2"
    if flash and not (target.device == "cuda" and is_flash_attn_2_available()):
        pytest.skip("needs a CUDA GPU and flash-attn")
    gradients, widths = [], []
    for obstacle in (None, "a comparison"):
        trainer = target.trainer(tmp_path, attention, bf16=flash, **REGROUPED)
        trainer._obstacle = lambda batch, obstacle=obstacle: obstacle
        widths.append(set())
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: widths[-1].add(kwargs["input_ids"].size(1)), with_kwargs=True
        )
        gradients.append(gradient_of(trainer))
    assert len(widths[0]) > len(widths[1]) == 1
    assert min(widths[0]) < max(widths[0]) <= max(widths[1])
    if flash:
        exact = target.oracle()
        trimmed, padded = (relative_error(gradient, exact) for gradient in gradients)
        assert trimmed < 1.5 * padded < 0.3
    else:
        assert relative_error(*gradients) < target.tolerance


RANKS = ["full", "full, checkpointing", "LoRA", "idle rank"]


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        pytest.param("ddp", "MULTI_CPU", marks=pytest.mark.slow),
        pytest.param(
            "nccl",
            "MULTI_GPU",
            marks=pytest.mark.skipif(not CUDA or len(gpus()) < 2, reason="needs two CUDA GPUs"),
        ),
    ],
)
def test_two_ranks_equal_one_process(tmp_path, engine, name):
    runs = two_processes(engine, RANKS, tmp_path)
    for case, two in runs.items():
        assert two.engine == name
        assert relative_difference(two, single_process(case, tmp_path / "one" / case), case) < 1e-4, case
    assert list(runs) == RANKS


@pytest.mark.skipif(not CUDA, reason=NO_GPU)
def test_colocated_vllm_samples_from_the_trained_policy(tmp_path):
    """The first step moves the policy far, so that in the second an engine with the old weights would be seen."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    folder = str(tmp_path / "model")
    random_model("0.5b", longest=256).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = tiny_config(
        tmp_path,
        use_cpu=False,
        bf16=True,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.2,
        vllm_max_model_length=256,
        max_completion_length=64,
        optim="adamw_torch",
        learning_rate=1e-3,
        max_steps=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
    )
    trainer = OPOTrainer(folder, lengths_reward, config, Dataset.from_dict({"prompt": list(SCRIPT)}))
    text = torch.arange(3, 60, device="cuda")[None]
    start = token_logps(trainer.model, text)
    trainer.train()
    differences = [
        entry["sampling/sampling_logp_difference/mean"] for entry in trainer.state.log_history if "reward" in entry
    ]
    moved = float((token_logps(trainer.model, text) - start).abs().mean())
    assert len(differences) == 2
    assert moved > 0.3
    assert max(differences) < 0.1


def lengths_reward(completion_ids, **kwargs):
    """Not equal within a group, whatever a random model writes."""
    return [float(sum(ids) % 7) for ids in completion_ids]


@torch.no_grad()
def token_logps(model, ids):
    return model(ids).logits.float().log_softmax(dim=-1)[0, :-1].gather(1, ids[0, 1:, None])
