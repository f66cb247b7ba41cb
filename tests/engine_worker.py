"""
One rank of a run under an engine, started by `tests/engines.py`.

    torchrun --standalone --nproc_per_node 2 tests/engine_worker.py DIRECTORY CASE...
    ACCELERATE_USE_CPU=true python tests/engine_worker.py DIRECTORY CASE...    # forks its two ranks

Trains each case in turn and leaves in `DIRECTORY/CASE` what the main process ends with: weights gathered from all
ranks, logs, the engine that accelerate ran, and the model as `save_model` saves it.
"""

import contextlib
import errno
import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin, gather_object
from datasets import Dataset
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from transformers import TrainerCallback
from trl.trainer import grpo_trainer

from engines import (
    BAD_NUMBERS,
    CASES,
    EVALUATE_MATH,
    EVALUATION,
    EVALUATIONS,
    PROCESSES,
    RESUMED_FROM,
    SELF_TESTS,
    SETUP,
    STOPPED,
    TRAIN_MATH,
    evaluating_trainer,
    free_port,
    logged_steps,
    train,
    trained_part,
    trainer_of,
)
from opo_trl import OPOTrainer
from opo_trl.rewards import math_verify_reward
from opo_trl.scripts import evaluate_math
from opo_trl.scripts.policies import EMBEDDED_MODEL, model_path
from opo_trl.scripts.problems import load_problems
from policy_engine import PolicyEngine
from setup_worker import set_up
from test_environments import Adder
from test_resume import REFILLED, lora_model, prompts_of_each_step, sampling_trainer
from tiny import scripted_dataset, scripted_reward, scripted_rollout, scripted_trainer, tiny_config, tiny_model
from tool_turns import tool_tokenizer
from vllm_stand_in import Died, vllm_stand_in
from waves_script import (
    INTERRUPTED,
    STREAMED,
    UNEVEN,
    ScriptedServer,
    fail_in_a_wave,
    finish_in_batches,
    streaming_trainer,
)

USES_DEEPSPEED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
# accelerate passes DeepSpeed over where `use_cpu` is set, and sees one process where no backend is named;
# DS_ACCELERATOR=cpu puts it on the CPU all the same.
ENGINE: dict[str, Any] = {"use_cpu": False, "ddp_backend": "gloo"} if USES_DEEPSPEED else {}
if os.environ.get("OPO_TEST_NCCL") == "1":
    ENGINE = {"use_cpu": False}
SAVING = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 3,
    "hub_token": "hf_secret",
}


def let_fsdp_run_on_the_cpu() -> None:
    """accelerate offers FSDP on accelerators only, and falls back to plain data parallel on a CPU without a word."""
    original = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


def let_zero3_shard_tiny_weights() -> None:
    """ZeRO-3 keeps parameters below 100,000 elements whole on every rank: all that a tiny model has."""
    original = DeepSpeedPlugin.__post_init__

    def without_threshold(self: Any) -> None:
        original(self)
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = without_threshold


def held_share(model: nn.Module) -> float:
    """Share of the model's parameters that this rank holds between steps."""
    held = total = 0
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):  # FSDP2
            held += parameter.to_local().numel()
        elif hasattr(parameter, "ds_tensor") and not parameter.numel():  # ZeRO-3, not gathered just now
            held += parameter.ds_tensor.numel()
        else:
            held += parameter.numel()
        total += getattr(parameter, "ds_numel", parameter.numel())
    return held / total


def infinite_on_one_rank(completions, score, trainer_state, **kwargs):
    return [float("inf") if distributed.get_rank() == 1 and i == 2 else 0.0 for i in range(len(completions))]


def math_on_each_rank(completions, score, trainer_state, **kwargs):
    """The ranks' rewards take different ways: text alone on the first, workers and one that times out on the second."""
    right, wrong = ("7", "8") if distributed.get_rank() == 0 else ("\\sqrt{49}", "(10^{9})!")
    answers = [right if i % 2 else wrong for i in range(len(completions))]
    return math_verify_reward([f"\\boxed{{{answer}}}" for answer in answers], ["7"] * len(answers), **kwargs)


def run_scripted(case: str, folder: Path) -> None:
    """Train a scripted case, and leave its weights, gathered from all ranks."""
    trainer = trainer_of(case, folder, PROCESSES, **ENGINE)
    train(trainer)
    trainer.save_model(str(folder / "saved"))
    leave(trainer, folder)


def run_generating(folder: Path) -> None:
    """Nothing scripted: load the tiny policy from its folder, sample, score, train, evaluate and save."""
    train, test = (load_problems("arithmetic", split, num_arithmetic=32) for split in ("train", "test"))
    config = tiny_config(
        folder,
        **ENGINE,
        max_steps=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=16,
        eval_on_start=True,
        max_completion_length=40,
        optim="adamw_torch",
        learning_rate=1e-4,
        max_grad_norm=1.0,
    )
    trainer = OPOTrainer(model_path(EMBEDDED_MODEL), math_verify_reward, config, train, test)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(folder / "saved"))
    leave(trainer, folder)


def run_evaluation(case: str, folder: Path) -> None:
    """Evaluate only, and leave the metrics."""
    trainer = evaluating_trainer(case, folder, PROCESSES, **ENGINE)
    metrics = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        (folder / "metrics.json").write_text(json.dumps(metrics))


def fail_on_one_rank():
    if distributed.get_rank() == 1:
        raise OverflowError("rank 1 only")


def fails_on_one_rank(completions, score, **kwargs):
    fail_on_one_rank()
    return score


async def fails_later_on_one_rank(completions, score, **kwargs):
    return fails_on_one_rank(completions, score)


def rollout_that_fails_on_one_rank(prompts, trainer):
    fail_on_one_rank()
    return scripted_rollout(prompts, trainer)


class FailsOnOneRank(Adder):
    def reset(self, **kwargs):
        fail_on_one_rank()


class StopOnOneRank(TrainerCallback):
    """The second rank stops its epoch in the middle of the second step, or training at the end of the first."""

    def __init__(self, case):
        self.case = case

    def on_substep_end(self, args, state, control, **kwargs):
        if distributed.get_rank() == 1 and state.global_step == 1 and self.case == "epoch stopped":
            control.should_epoch_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        if distributed.get_rank() == 1 and self.case == "training stopped":
            control.should_training_stop = True


class HalfABatchOnOneRank(OPOTrainer):
    def _generate_and_score_completions(self, inputs):
        return super()._generate_and_score_completions(inputs[: len(inputs) // (1 + distributed.get_rank())])


def run_stopped(case: str, folder: Path) -> None:
    """One rank alone fails, or leaves the common path: leave each rank's message."""
    rewards = {"reward fails": fails_on_one_rank, "async reward fails": fails_later_on_one_rank}
    rollouts = {"rollout fails": rollout_that_fails_on_one_rank, "environment fails": None}
    environment: dict[str, Any] = {
        "environment_factory": FailsOnOneRank,
        "processing_class": tool_tokenizer(),
        "train_dataset": Dataset.from_list([{"prompt": [{"role": "user", "content": "go"}]}] * 6),
    }
    trainer = scripted_trainer(
        folder,
        rollout=rollouts.get(case, scripted_rollout),
        **(environment if case == "environment fails" else {}),
        reward_funcs=[scripted_reward, rewards.get(case, scripted_reward)],
        callbacks=[StopOnOneRank(case)],
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        max_steps=-1,
        learning_rate=1e-3,
        **ENGINE,
    )
    if case == "half a batch":
        trainer.__class__ = HalfABatchOnOneRank
    leave_refusal(trainer, folder)


def run_self_test(case: str, folder: Path) -> None:
    """An engine that draws from the policy, or on the second rank reports NaN: leave each rank's message."""
    grpo_trainer.VLLMGeneration = PolicyEngine
    trainer = scripted_trainer(
        folder,
        rollout=None,
        reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
        use_vllm=True,
        temperature=0.8,
        **ENGINE,
    )
    if distributed.get_rank() == 1 and case == "wrong engine on one rank":
        trainer.vllm_generation.nan_every = 5
    leave_refusal(trainer, folder)


def run_streamed_evaluation(folder: Path) -> None:
    """A streamed evaluation set on two ranks has no length: leave the metrics."""
    trainer = scripted_trainer(
        folder,
        eval_dataset=scripted_dataset(4).to_iterable_dataset(),
        per_device_eval_batch_size=8,
        pass_at_k_reward="scripted_reward",
        **ENGINE,
    )
    metrics = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        (folder / "metrics.json").write_text(json.dumps(metrics))


def run_resumed(case: str, folder: Path) -> None:
    """Save with two processes what one resumes, or resume what one has saved: leave the prompts of each step."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **ENGINE}
    trainer = sampling_trainer(folder, tiny_model(), **settings)
    own = prompts_of_each_step(trainer)
    checkpoint = folder.parent / "saved by one" / f"checkpoint-{RESUMED_FROM}"
    trainer.train(resume_from_checkpoint=str(checkpoint) if case == "resumed by two" else None)
    ranks = gather_object([own])
    if trainer.accelerator.is_main_process:
        steps = [[prompt for rank in step for prompt in rank] for step in zip(*ranks, strict=True)]
        (folder / "prompts.json").write_text(json.dumps(steps))


def run_refused(case: str, folder: Path) -> None:
    """Training that must not begin, or must end on all ranks alike: leave each rank's message."""
    if case == "infinite on one rank":
        trainer = scripted_trainer(folder, reward_funcs=[scripted_reward, infinite_on_one_rank], **ENGINE)
    elif case == "evaluated first":
        trainer = scripted_trainer(folder, eval_dataset=scripted_dataset(), per_device_eval_batch_size=12, **ENGINE)
        trainer.evaluate()
    else:
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "3"  # what accelerate passes on of its configuration
        trainer = scripted_trainer(folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, **ENGINE)
        del os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"]
    leave_refusal(trainer, folder)


def run_against_server(case: str, folder: Path) -> None:
    """A server that both ranks generate with, which the main process alone talks to: leave each rank's message."""
    (folder / "weights").mkdir(exist_ok=True)
    with vllm_stand_in() as server:
        trained: list[dict[str, torch.Tensor]] = []

        def reward(completions, **kwargs):
            trained.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
            return [-float(len(completion)) for completion in completions]

        def die():
            if "dies" in case and len(server.served) == 1:
                raise Died

        def refuse():
            if "refuses" in case and list((folder / "weights").glob("*-000001.safetensors")):
                raise RuntimeError("no room for these weights")

        def restart():
            if "restarts" in case and len(server.served) == 2:
                server.restart()

        server.faults |= {"/v1/completions": die, "/collective_rpc": refuse}
        server.after["/v1/completions"] = restart
        server.extension = "" if "extension" in case else server.extension
        settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url, **ENGINE}
        settings |= {"vllm_weight_transfer": "file", "vllm_weight_dir": str(folder / "weights"), "learning_rate": 1e-2}
        settings["vllm_logp_tolerance"] = None  # it plays a script
        message = "trained"
        try:
            trainer = scripted_trainer(folder, rollout=None, reward_funcs=reward, **{**SAVING, **settings})
            trainer.train()
        except (ValueError, RuntimeError) as error:
            message = str(error)
        rank = distributed.get_rank()
        (folder / f"message.{rank}").write_text(message)
        if rank == 0:
            torch.save([weights for _, weights in server.served], folder / "served.pt")
        torch.save(trained, folder / f"trained.{rank}.pt")


def run_streamed(case: str, folder: Path) -> None:
    """A streamed step of uneven waves: leave its weights, or each rank's message and those of a second attempt."""
    with vllm_stand_in() as server:
        script = ScriptedServer(server)
        try:
            trainer = streaming_trainer(folder, server, **STREAMED.get(case, {}), **ENGINE)
        except ValueError as refusal:
            (folder / f"message.{os.environ['RANK']}").write_text(str(refusal))
            return
        waves = finish_in_batches(trainer, script, UNEVEN)
        if case in INTERRUPTED:
            fail_in_a_wave(case, trainer, server, script)
            leave_refusal(trainer, folder)
            if "dies" in case:
                return
            script.finish_all()
            if trainer.is_fsdp_enabled:
                (folder / "again").mkdir(exist_ok=True)
                leave_refusal(trainer, folder / "again")
                return
        trainer.train()
        (folder / f"waves.{distributed.get_rank()}").write_text(json.dumps(waves))
        leave(trainer, folder)


def leave_refusal(trainer: OPOTrainer, folder: Path) -> None:
    """Train, and leave each rank's message."""
    try:
        trainer.train()
        message = "trained"
    except (ValueError, RuntimeError) as error:
        message = str(error)
    (folder / f"message.{trainer.accelerator.process_index}").write_text(message)


class AskedOnOneRank(TrainerCallback):
    """SIGTERM reaches the second rank alone, in the middle of the fifth step of three an epoch."""

    def on_substep_end(self, args, state, control, **kwargs):
        if distributed.get_rank() == 1 and state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


def run_preempted(case: str, folder: Path) -> None:
    """Leave on each rank how a run that was asked to stop ended, and whether going on gave the undisturbed bits."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no", **ENGINE}
    if "refilled" in case:
        settings |= REFILLED
    settings |= {"prompt_sampling": "informative"} if "chosen" in case else {}
    make_model = lora_model if "LoRA" in case else tiny_model
    whole = sampling_trainer(folder / "whole", make_model(), **settings)
    whole.train()
    asked = sampling_trainer(folder / "asked", make_model(), callbacks=[AskedOnOneRank()], **settings)
    try:
        asked.train()
        code = None
    except SystemExit as ended:
        code = ended.code
    again = sampling_trainer(folder / "asked", make_model(), **settings)
    again.train(resume_from_checkpoint="auto")
    expected = whole.model.state_dict()
    same = all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
    try:
        again.train(resume_from_checkpoint="not-there")
        refusal = None
    except ValueError as error:
        refusal = str(error)
    outcome = {"code": code, "step": asked.state.global_step, "same bits": same, "last step": again.state.global_step}
    outcome["refills"] = any(entry.get("rollouts/rounds") for entry in again.state.log_history)
    outcome["refusal"] = refusal
    (folder / f"ended.{asked.accelerator.process_index}").write_text(json.dumps(outcome))


class NaNGradient(torch.autograd.Function):
    """A loss that looks well, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def run_bad_number(case: str, folder: Path) -> None:
    """In the second step, one of the second rank's micro-batches goes bad: leave each rank's message."""
    trainer = scripted_trainer(folder, **SAVING, **ENGINE)
    compute_loss = trainer._compute_loss

    def go_bad(model, inputs):
        loss = compute_loss(model, inputs)
        if distributed.get_rank() == 1 and trainer._step == 3:  # two micro-batches a step
            return NaNGradient.apply(loss) if case == "NaN gradient" else loss + BAD_NUMBERS[case]
        return loss

    trainer._compute_loss = go_bad
    leave_refusal(trainer, folder)


def run_out_of_space(case: str, folder: Path) -> None:
    """The disk of one rank is full in the second step's save: leave each rank's message."""
    trainer = scripted_trainer(folder, **SAVING, **ENGINE)
    save, full_rank = torch.save, int(case[-1])

    def fail(state, path, *args, **kwargs):
        if distributed.get_rank() == full_rank and "checkpoint-2" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(state, path, *args, **kwargs)

    torch.save = fail
    try:
        trainer.train()
    except RuntimeError as error:
        (folder / f"message.{distributed.get_rank()}").write_text(str(error))
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise  # the other rank waits in a collective for as long as this one lives
    finally:
        torch.save = save


def run_setup(folder: Path) -> None:
    """Set `train_math.py` up on both ranks: leave what each attempt came to, and what each rank printed."""
    rank = os.environ["RANK"]  # there may be no process group yet
    with (folder / f"printed.{rank}").open("w") as printed, contextlib.redirect_stdout(printed):
        set_up(folder, [*TRAIN_MATH, "--output_dir", str(folder / "out")])


def run_math_reward(folder: Path) -> None:
    """A reward that works differently on each rank must log alike on all: leave what each rank logged."""
    trainer = scripted_trainer(folder, reward_funcs=math_on_each_rank, log_completions=True, **ENGINE)
    trainer.train()
    metrics = {name: value for name, value in trainer.state.log_history[0].items() if name.startswith(("math", "rew"))}
    columns = {"verdicts": "verdict", "answers": "answer"}
    logged = {"metrics": metrics} | {name: list(trainer._logs["extra"][key]) for name, key in columns.items()}
    (folder / f"logged.{trainer.accelerator.process_index}").write_text(json.dumps(logged))


def leave(trainer: OPOTrainer, folder: Path) -> None:
    """Write what a trainer ended with: all ranks take part, the main process writes."""
    share = held_share(trainer.model)
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # what FSDP and ZeRO-3 have sharded
    if not trainer.accelerator.is_main_process:
        return
    torch.save(trained_part(gathered, trainer.model), folder / "weights.pt")
    facts = {
        "engine": trainer.accelerator.distributed_type.value,
        "held_share": share,
        "checkpoints_activations": trainer.model.is_gradient_checkpointing,
        "logs": logged_steps(trainer),
    }
    (folder / "facts.json").write_text(json.dumps(facts))


def main() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_fsdp_run_on_the_cpu()
    if USES_DEEPSPEED:
        let_zero3_shard_tiny_weights()
    directory = Path(sys.argv[1])
    gc.freeze()  # what has been imported stays, and the collections below need not look at it
    for case in sys.argv[2:]:
        folder = directory / case
        folder.mkdir(parents=True, exist_ok=True)
        if case in CASES:
            run_scripted(case, folder)
        elif case in EVALUATIONS:
            run_evaluation(case, folder)
        elif case == SETUP:
            run_setup(folder)
        elif case == EVALUATION:
            evaluate_math.main([*EVALUATE_MATH, "--output_dir", str(folder)])
        elif case == "generating":
            run_generating(folder)
        elif case == "math reward":
            run_math_reward(folder)
        elif case.startswith("preempted"):
            run_preempted(case, folder)
        elif case in STOPPED:
            run_stopped(case, folder)
        elif case in SELF_TESTS:
            run_self_test(case, folder)
        elif case in ("saved by two", "resumed by two"):
            run_resumed(case, folder)
        elif case == "streamed evaluation":
            run_streamed_evaluation(folder)
        elif case in BAD_NUMBERS:
            run_bad_number(case, folder)
        elif case.startswith("streamed"):
            run_streamed(case, folder)
        elif case.startswith("server"):
            run_against_server(case, folder)
        elif case.startswith("full disk"):
            run_out_of_space(case, folder)
        else:
            run_refused(case, folder)
        # The next case gets an engine of its own: accelerate keeps the first plugin it has seen.
        gc.collect()
        AcceleratorState._reset_state()
        GradientState._reset_state()


def run_rank(rank: int) -> None:
    """Run one of the ranks that `fork_ranks` starts."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    main()


def fork_ranks() -> None:
    """Start the ranks as forks of this process, so that the imports, which take the longest, run once."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = start_processes(run_rank, nprocs=PROCESSES, join=False, start_method="fork")
    # After a hang: a rank that waits in a collective handles no other signal.
    signal.signal(signal.SIGTERM, lambda *_: [process.kill() for process in ranks.processes])
    while not ranks.join():
        pass


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        fork_ranks()
