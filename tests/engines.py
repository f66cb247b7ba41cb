"""The same scripted training under every engine: what is trained, how its processes start, what they end in."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from opo_trl import OPOTrainer
from opo_trl.runs.checkpoints import latest_complete
from tiny import (
    TokenBaseline,
    relative_error,
    rollout_with_empty_completions,
    rollout_with_every_column,
    scripted_dataset,
    scripted_trainer,
    tiny_model,
)

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("engine_worker.py")
CONFIGS = ROOT / "examples" / "accelerate_configs"
PROCESSES = 2
# Besides these, "nccl": "ddp" on two GPUs.
ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}

# What a user of transformers hands to `OPOConfig(deepspeed=...)`: every number is the trainer's.
AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
AUTO_STAGES = {"zero2, auto": 2, "zero3, auto": 3}

# Five groups of four completions per step on two ranks of ten rows: the middle group is split across the ranks. The
# non-zero advantages are uneven, most of them on one rank in the first two steps: "fifteen" has none, "seven!" few.
UNEVEN = ["one", "six", "three", "fifteen", "seven!"]
UNEVEN += ["fifteen", "seven!", "six", "twenty two", "one"]
UNEVEN += ["three", "fifteen", "twenty two", "seven!", "six"]
STEPS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5, "max_steps": 3}
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-2}
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}

CASES: dict[str, dict[str, Any]] = {
    "full": STEPS,
    "full, checkpointing": {**STEPS, "gradient_checkpointing": True},
    "full, evaluated first": {**STEPS, "per_device_eval_batch_size": 12, "evaluate_first": True},
    "full, AdamW": {**STEPS, **ADAMW},
    "full, uncertainty": {**STEPS, "baseline_weight": "uncertainty"},
    "full, empty completions": {**STEPS, "rollout": rollout_with_empty_completions},
    "full, chosen prompts": {**STEPS, "prompt_sampling": "informative", "shuffle_dataset": True},
    "every column": {
        **STEPS,
        "trainer_class": TokenBaseline,
        "rollout": rollout_with_every_column,
        "rollout_importance_sampling_correction": True,
    },
    "token uncertainty": {
        **STEPS,
        "trainer_class": TokenBaseline,
        "rollout": rollout_with_every_column,
        "baseline_weight": "uncertainty",
    },
    "full, refilled": {**STEPS, "max_refill_rounds": 2},
    "LoRA": {**STEPS, "lora": LORA},
    "LoRA, checkpointing": {**STEPS, "lora": LORA, "gradient_checkpointing": True},
    "LoRA, AdamW": {**STEPS, **ADAMW, "lora": LORA},
    "DoRA": {**STEPS, "lora": {**LORA, "use_dora": True}},
    "one micro-batch": {"prompts": None, "per_device_train_batch_size": 6, "max_steps": 2},
    "dr_grpo": {"prompts": None, "per_device_train_batch_size": 6, "loss_type": "dr_grpo", "max_steps": 1},
    "idle rank": {
        "prompts": ["one", "six", "fifteen", "seven!"],
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 3,
    },
}


# Evaluations of so many problems with so many completions each, in global batches of so many rows.
EVALUATIONS = {"incomplete last batch": (4, 4, 12), "groups on two ranks": (5, 2, 6), "fewer than a batch": (1, 4, 24)}

# Of the scripts: one sets up while the other rank fails, the other continues an evaluation that was interrupted.
SETUP, EVALUATION = "setup of train_math", "evaluate_math"
TRAIN_MATH = ["--model_name_or_path", "tiny_policy", "--dataset_name", "arithmetic", "--num_train_problems", "16",
              "--num_generations", "2", "--per_device_train_batch_size", "4", "--max_completion_length", "4",
              "--max_steps", "1", "--report_to", "none"]  # fmt: skip
EVALUATE_MATH = ["--models", "tiny_policy", "--datasets", "arithmetic", "--num_problems", "16", "--num_samples", "4",
                 "--max_new_tokens", "40", "--temperature", "1.0", "--batch_size", "8", "--backend", "transformers",
                 "--base_model", "tiny_policy", "--scoring_batch_size", "16"]  # fmt: skip

# What must end both ranks with one message, though one of them alone is the cause.
STOPPED = {
    "reward fails": "The reward function 'fails_on_one_rank' failed on rank 1: OverflowError: rank 1 only",
    "async reward fails": "The reward function 'fails_later_on_one_rank' failed on rank 1: OverflowError: rank 1 only",
    "rollout fails": "The rollout function failed on rank 1: OverflowError: rank 1 only",
    "environment fails": "`reset` of the environment 'FailsOnOneRank' failed on rank 1: OverflowError: rank 1 only",
    "epoch stopped": "must step after the last of a rollout batch's 2 micro-batches, on all ranks alike: rank 0 trains "
    "micro-batch 2 and steps; rank 1 begins an epoch after micro-batch 1",
    "training stopped": "alike: rank 0 begins an epoch after micro-batch 0; rank 1 stops after micro-batch 0",
    "half a batch": "Each rank must get per_device_train_batch_size * gradient_accumulation_steps = 8 prompts for a "
    "rollout batch, got [8, 4] on the 2 rank(s)",
}

# What the self-test of a vLLM engine must find, on both ranks.
SELF_TESTS = {
    "right engine": "trained",
    "wrong engine on one rank": "of its log-probabilities are NaN (accepted: 1%)",
}
# Runs saved by one number of processes and resumed by another: the checkpoint, in the second epoch of three steps each.
RESUMED_FROM = 4

# What one rank's loss becomes, its gradient staying finite; and the other way round.
BAD_NUMBERS = {"infinite loss": float("inf"), "NaN loss": float("nan"), "NaN gradient": None}


# transformers evaluates before training under plain data parallel only, and columns are the planner's matter alone.
EVERY_ENGINE = [
    case
    for case, settings in CASES.items()
    if settings.get("gradient_accumulation_steps") == 5 and not settings.keys() & {"evaluate_first", "trainer_class"}
]


@dataclass(frozen=True)
class Outcome:
    """What a run ended in, as its main process knows it."""

    weights: dict[str, torch.Tensor]  # the trained ones, complete
    logs: list[dict[str, float]]
    engine: str  # accelerate's name of what ran
    held_share: float  # of the parameters, by one rank between steps
    checkpoints_activations: bool
    saved: Path


def scripted_model(case: str) -> Any:
    """The model of a case before training, the same in every process."""
    lora = CASES[case].get("lora")
    if lora is None:
        return tiny_model()
    model = tiny_model()
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**lora))


def trainer_of(case: str, output_dir: Path, processes: int, **engine: Any) -> OPOTrainer:
    """The trainer of a case, with the rows of all `processes` together the same."""
    settings = {"prompts": UNEVEN, **CASES[case], **engine}
    settings.pop("lora", None)
    if settings.pop("evaluate_first", False):
        settings["eval_dataset"] = scripted_dataset()
    prompts = settings.pop("prompts")
    if prompts is not None:
        settings["train_dataset"] = Dataset.from_dict({"prompt": prompts})
    settings["per_device_train_batch_size"] *= PROCESSES // processes
    trainer_class = settings.pop("trainer_class", OPOTrainer)
    trainer = scripted_trainer(output_dir, scripted_model(case), **settings)
    trainer.__class__ = trainer_class
    return trainer


def evaluating_trainer(case: str, output_dir: Path, processes: int, **engine: Any) -> OPOTrainer:
    """The trainer of an evaluation, whose scripted reward decides what is correct."""
    problems, completions, rows = EVALUATIONS[case]
    return scripted_trainer(
        output_dir,
        eval_dataset=scripted_dataset(problems),
        num_generations_eval=completions,
        per_device_eval_batch_size=rows // processes,
        pass_at_k_reward="scripted_reward",
        **engine,
    )


def train(trainer: OPOTrainer) -> None:
    """Train, after an evaluation where the case has one."""
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.train()


def trained_part(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of the weights that training may move."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value.detach().float().clone() for name, value in weights.items() if name in names}


def logged_steps(trainer: OPOTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "entropy" in entry]


def single_process(case: str, output_dir: Path) -> Outcome:
    """Train a case in this process."""
    trainer = trainer_of(case, output_dir, processes=1)
    train(trainer)
    trainer.save_model(str(output_dir / "saved"))
    model = trainer.model
    weights = trained_part(model.state_dict(), model)
    return Outcome(weights, logged_steps(trainer), "NO", 1.0, model.is_gradient_checkpointing, output_dir / "saved")


def two_processes(engine: str, cases: list[str], directory: Path, num_machines: int = 1) -> dict[str, Outcome]:
    """Train cases one after another on two processes, on as many "machines" as asked for, and read what they left."""
    check_ends(ends_of_two_processes(engine, cases, directory, num_machines))
    return {case: read_outcome(directory / case) for case in cases if (directory / case / "weights.pt").exists()}


@dataclass(frozen=True)
class End:
    """How a launcher, or a worker that forks its ranks, ended."""

    code: int
    printed: str  # by it and its ranks


def ends_of_two_processes(
    engine: str, cases: list[str], directory: Path, num_machines: int = 1, timeout: float = 400
) -> list[End]:
    """Run cases as `two_processes` does, whatever comes of them; each machine's launcher has an end of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    arguments = [str(WORKER), str(directory), *cases]
    launchers = [[*launcher, *arguments] for launcher in _launchers(engine, directory, num_machines)]
    return ends_of_ranks(launchers, _variables(engine, directory), timeout)


def gpus() -> list[str]:
    """All GPUs that `make test-gpu` may use; the tests' own process sees the first one alone."""
    if named := os.environ.get("OPO_TEST_GPUS"):
        return named.split(",")
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i in range(len(listed.splitlines()))]


def _variables(engine: str, directory: Path) -> dict[str, str]:
    if engine in AUTO_STAGES:
        zero = {**AUTO["zero_optimization"], "stage": AUTO_STAGES[engine]}
        path = directory / "deepspeed.json"
        path.write_text(json.dumps({**AUTO, "zero_optimization": zero}))
        return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    if engine == "nccl":
        return {"OPO_TEST_NCCL": "1", "CUDA_VISIBLE_DEVICES": ",".join(gpus()[:PROCESSES])}
    return {"ACCELERATE_USE_CPU": "true"} if engine == "ddp" else {}


def read_outcome(folder: Path) -> Outcome:
    facts = json.loads((folder / "facts.json").read_text())
    return Outcome(weights=torch.load(folder / "weights.pt"), saved=folder / "saved", **facts)


def run_ranks(launchers: list[list[str]], variables: dict[str, str]) -> None:
    """Run launchers side by side to their end, which must be a good one."""
    check_ends(ends_of_ranks(launchers, variables))


def check_ends(ends: list[End]) -> None:
    failed = [end.printed for end in ends if end.code]
    assert not failed, failed[0][-5000:]


def ends_of_ranks(launchers: list[list[str]], variables: dict[str, str], timeout: float = 400) -> list[End]:
    """Run launchers (arguments of Python) side by side to their end, whatever it is; a hang of one ends all of them."""
    environment = {
        **os.environ,
        **variables,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *launcher],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for launcher in launchers
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:  # a hang: ask the launcher to end its ranks, too
                process.terminate()
                process.wait(30)
    return [End(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


def check_bad_number(folder: Path) -> None:
    """One rank's second step went bad: both say so in the same words, and the first step's checkpoint is the last."""
    messages = [(folder / f"message.{rank}").read_text() for rank in range(PROCESSES)]
    assert messages[0] == messages[1]
    if folder.name == "NaN gradient":
        norms = ("nan", "inf")  # DeepSpeed calls every norm that is not finite inf
        assert any(f"Gradients must be finite: their norm is {norm} in step 2" in messages[0] for norm in norms)
    else:
        assert f"The loss must be finite: it is {BAD_NUMBERS[folder.name]} in step 2, on rank [1]" in messages[0]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert latest_complete(folder)[0] == folder / "checkpoint-1"
    saved = torch.load(folder / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert (saved.save_total_limit, saved.hub_token) == (3, None)


def relative_difference(outcome: Outcome, reference: Outcome, case: str) -> float:
    """How far two runs of a case end apart, relative to how far the reference moved."""
    model = scripted_model(case)
    start = trained_part(model.state_dict(), model)
    moved, expected = ({name: run.weights[name] - start[name] for name in run.weights} for run in (outcome, reference))
    return relative_error(moved, expected)


def loaded_difference(outcome: Outcome, case: str) -> float:
    """Largest difference between the weights a run ended in and those that `from_pretrained` reads back, relative."""
    model: Any
    if "lora" in CASES[case]:
        model = PeftModel.from_pretrained(tiny_model(), outcome.saved, is_trainable=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(outcome.saved)
    return relative_error(trained_part(model.state_dict(), model), outcome.weights)


def accelerate_config(engine: str, num_machines: int = 1) -> dict[str, Any]:
    """The shipped configuration, on two CPU processes."""
    name = f"{engine}_two_nodes" if num_machines == 2 else engine
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return {**config, "use_cpu": True, "num_processes": PROCESSES, "mixed_precision": "no"}


def _launchers(engine: str, directory: Path, num_machines: int) -> list[list[str]]:
    if engine == "ddp":
        return [[]]  # the worker forks its ranks
    # `accelerate launch` would start one process on a CPU: it leaves more to mpirun.
    if engine == "nccl" or engine in AUTO_STAGES:
        return [["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]]
    path = directory / "accelerate.yaml"
    path.write_text(yaml.safe_dump(accelerate_config(engine, num_machines)))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(path), "--main_process_port", free_port()]
    if num_machines == 1:
        return [launcher]
    return [[*launcher, "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"] for rank in range(num_machines)]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
