"""
OPO against TRL on a GPU: the update, and a complete step with generation, at the shape of Qwen2.5-0.5B.

    python benchmarks/gpu.py                      # bf16, completions of up to 8,192 tokens
    python benchmarks/gpu.py --device cpu --tiny  # the same code on a CPU: a tiny model, one case, one round

Weights are random and nothing is downloaded. Lengths are log-normal, as in `update_phase.py`, in half of the groups all
rewards are equal, and both trainers get the same ones.

The update is that of `update_phase.py`: scripted rollouts, rounds that alternate between the trainers, medians of the
paired ratios, peak memory of a process of its own. A complete step generates with vLLM in colocate mode where vLLM is
installed, and with transformers otherwise, then with completions of at most 1,024 tokens. A random model ends its
completions too rarely, so that each is stopped at a length that has been drawn for it. Every run of a step is a process
of its own, in the order TRL, OPO, OPO, TRL; the first step warms up.

MFU is the FLOPs that the attended tokens of the forwards need, over the seconds and the card's peak. FLOPs and peaks
are TRL's (`compute_flops_per_token` and `get_peak_flops` in `trl/trainer/utils.py`; its table follows TorchTitan's
lookup of dense BF16 peaks): three times the forward, every token attends to all of its row, the LM head runs on every
token, padding and recomputed activations do not count. Tokens per second are the attended tokens of the rollout batch
over the seconds, with those of completions that need no forward. Peak memory is the allocator's: for an update above
the level before it, for a step of the complete process.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one card

import torch
from datasets import Dataset, disable_progress_bars
from transformers import StoppingCriteria, StoppingCriteriaList, TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import get_peak_flops

from measuring import RESULTS, hardware, markdown_table, provenance
from opo_trl import OPOTrainer
from random_models import random_model, word_tokenizer
from update_phase import (
    GROUP_SIZE,
    HEADLINE,
    PROMPT_LENGTH,
    Case,
    Clock,
    compare,
    draw_lengths,
    forwarded,
    make_config,
    memory_ratio,
    synchronise,
)

ORDER = ("trl", "opo", "opo", "trl")
WITHOUT_VLLM = 1_024  # tokens of the longest completion that transformers generates


class StopAt(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, ends: torch.Tensor) -> None:
        self.ends = ends  # (N,), tokens of prompt and completion

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # (N,)
        return input_ids.size(1) >= self.ends


class DrawnLengths:
    """Makes every generation of a trainer end its completions at drawn lengths, the same ones for either trainer."""

    def __init__(self, trainer: Any, longest: int) -> None:
        self.longest, self.calls = longest, 0
        if trainer.use_vllm:
            self.owner: Any = trainer.vllm_generation.llm
        else:
            self.owner = trainer.model
        self.generate = self.owner.generate
        self.owner.generate = self.with_vllm if trainer.use_vllm else self.with_transformers

    def draw(self, rows: int) -> torch.Tensor:  # (rows,)
        self.calls += 1
        return draw_lengths("lognormal", rows, torch.Generator().manual_seed(self.calls), self.longest)

    def with_vllm(self, prompts: list[Any], sampling_params: Any, **kwargs: Any) -> Any:
        each = []
        for length in self.draw(len(prompts)).tolist():
            each.append(sampling_params.clone())
            each[-1].max_tokens, each[-1].ignore_eos = length, True
        return self.generate(prompts, sampling_params=each, **kwargs)

    def with_transformers(self, **kwargs: Any) -> Any:
        rows, width = kwargs["input_ids"].shape
        ends = width + self.draw(rows).to(kwargs["input_ids"].device)
        return self.generate(**kwargs, stopping_criteria=StoppingCriteriaList([StopAt(ends)]))


class StepTimes(TrainerCallback):
    """What each step took and ran."""

    def __init__(self, trainer: Any, clock: Clock) -> None:
        self.trainer, self.clock, self.steps = trainer, clock, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.reset()
        synchronise(self.trainer)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise(self.trainer)
        seconds = time.perf_counter() - self.start
        self.steps.append(
            {"seconds": seconds, "update_seconds": seconds - self.clock.outside, "update_flops": self.clock.flops()}
        )


class Score:
    """Random rewards, equal ones in a share of the groups, the same ones for either trainer."""

    __name__ = "score"

    def __init__(self, uninformative: float) -> None:
        self.uninformative, self.calls, self.tokens = uninformative, 0, []

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        self.calls += 1
        self.tokens.append(sum(PROMPT_LENGTH + len(ids) for ids in completion_ids))
        generator = torch.Generator().manual_seed(self.calls)
        rewards = torch.rand(len(completion_ids) // GROUP_SIZE, GROUP_SIZE, generator=generator)
        rewards[torch.randperm(len(rewards), generator=generator)[: round(self.uninformative * len(rewards))]] = 0.5
        return rewards.flatten().tolist()


def measure_steps(kind: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of one trainer in this process: seconds, tokens and the peak of the allocator."""
    settings: dict[str, Any] = {"max_steps": args.steps + 1, "logging_steps": 1, "optim": "adamw_torch"}
    if args.vllm:
        settings |= {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": args.vllm_memory,
            "vllm_max_model_length": PROMPT_LENGTH + args.longest,
        }
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "model")
        random_model(args.model_size, PROMPT_LENGTH + args.longest).bfloat16().save_pretrained(model)
        tokenizer = word_tokenizer(pad_token="t1")  # what follows a row that was stopped is then its end
        tokenizer.save_pretrained(model)
        score = Score(case.uninformative)
        groups = case.rows // GROUP_SIZE
        prompts = [" ".join(f"t{3 + (i + j) % 250}" for j in range(PROMPT_LENGTH)) for i in range(groups)]
        trainer = {"opo": OPOTrainer, "trl": GRPOTrainer}[kind](
            str(model),
            score,
            make_config(kind, case, args, directory, **settings),
            Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
        )
        DrawnLengths(trainer, args.longest)
        times = StepTimes(trainer, Clock(trainer))
        trainer.add_callback(times)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    steps = [{**step, "tokens": tokens} for step, tokens in zip(times.steps, score.tokens, strict=True)][1:]
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    return {"steps": steps, "peak_bytes": peak}


def compare_steps(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of both trainers, from processes of their own."""
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], "opo": []}
    for kind in ORDER[: 2 * args.repeats]:
        flags = [*forwarded(args), f"--steps={args.steps}", f"--vllm-memory={args.vllm_memory}"]
        command = [sys.executable, __file__, "--step-of", kind, json.dumps(case), *flags, *["--vllm"] * args.vllm]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"a step of {kind} failed:\n{run.stderr[-5000:]}")
        runs[kind].append(json.loads(run.stdout.splitlines()[-1]))
    result: dict[str, Any] = {"case": case.name, "longest": args.longest, "generated_by": generator_name(args)}
    for kind, measured in runs.items():
        steps = [step for run in measured for step in run["steps"]]
        sums = {name: sum(step[name] for step in steps) for name in steps[0]}
        result |= {
            f"{kind}_seconds": statistics.median(step["seconds"] for step in steps),
            f"{kind}_update_seconds": statistics.median(step["update_seconds"] for step in steps),
            f"{kind}_tokens": sums["tokens"],
            f"{kind}_tokens_per_second": sums["tokens"] / sums["seconds"],
            f"{kind}_update_flops_per_second": sums["update_flops"] / sums["update_seconds"],
            f"{kind}_peak_bytes": max((run["peak_bytes"] for run in measured if run["peak_bytes"]), default=None),
        }
    result["speedup"] = result["trl_seconds"] / result["opo_seconds"]
    result["update_speedup"] = result["trl_update_seconds"] / result["opo_update_seconds"]
    return result


def generator_name(args: argparse.Namespace) -> str:
    return "vLLM, colocate" if args.vllm else "transformers"


def with_mfu(result: dict[str, Any], peak: float | None) -> dict[str, Any]:
    """Add `mfu` beside every number of FLOPs per second; `None` where the card's peak is unknown."""
    found = {name: value for name, value in result.items() if name.endswith("flops_per_second")}
    return {
        **result,
        **{name.replace("flops_per_second", "mfu"): peak and value / peak for name, value in found.items()},
    }


def table(report: dict[str, Any]) -> str:
    """Both parts of a report, as a page of docs can hold them."""
    rows = []
    for result in report["update"]:
        rows.append([f"update, {result['case']}", f"{result['speedup']:.2f}x"])
        for kind in ("opo", "trl"):
            rows[-1] += cells(result, kind, f"{kind}_mfu")
    for result in report["step"]:
        rows.append([f"step, {result['case']}, {result['generated_by']}", f"{result['speedup']:.2f}x"])
        for kind in ("opo", "trl"):
            rows[-1] += cells(result, kind, f"{kind}_update_mfu")
    heads = ["", "speed-up"]
    for kind in ("OPO", "TRL"):
        heads += [f"{kind}: s", "tokens/s", "MFU of the update", "peak GB"]
    return markdown_table(heads, rows)


def cells(result: dict[str, Any], kind: str, mfu: str) -> list[str]:
    peak = result[f"{kind}_peak_bytes"]
    return [
        f"{result[f'{kind}_seconds']:.2f}",
        f"{result[f'{kind}_tokens_per_second']:.0f}",
        "" if result[mfu] is None else f"{100 * result[mfu]:.1f} %",
        "" if peak is None else f"{peak / 1e9:.1f}",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--model-size", choices=["tiny", "0.5b", "1.5b"], default="0.5b")
    parser.add_argument("--longest", type=int, default=8_192, help="longest completion, in tokens")
    parser.add_argument("--rounds", type=int, default=5, help="measured updates per trainer and case")
    parser.add_argument("--steps", type=int, default=3, help="measured steps per process")
    parser.add_argument("--repeats", type=int, choices=[1, 2], default=2, help="processes per trainer for the steps")
    parser.add_argument("--vllm-memory", type=float, default=0.3, help="vLLM's share of the GPU's memory")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short completions, to try the script")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results, named after the card")
    parser.add_argument("--step-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--vllm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lm-head", default="all", help=argparse.SUPPRESS)
    parser.add_argument("--gradient-checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found; --device cpu --tiny tries the script without one")
    args.gradient_checkpointing, args.memory_repeats = True, 1
    if args.tiny:
        args.model_size, args.longest, args.rounds, args.steps, args.repeats = "tiny", 64, 1, 1, 1
    if args.output is None:
        card = re.sub(r"\W+", "-", hardware().lower()).strip("-")
        args.output = Path("outputs", "gpu-tiny.json") if args.tiny else RESULTS / f"gpu-{card}.json"
    return args


def main() -> None:
    args = parse()
    disable_progress_bars()
    if args.step_of:
        kind, case = args.step_of
        print(json.dumps(measure_steps(kind, Case(*json.loads(case)), args)))
        return

    peak = get_peak_flops(hardware(), "bfloat16") if args.device == "cuda" and args.dtype == "bf16" else None
    report: dict[str, Any] = {
        **provenance(),
        "settings": {"model": args.model_size, "dtype": args.dtype, "longest": args.longest, "peak_flops": peak},
        "update": [],
        "step": [],
    }
    for case in HEADLINE[:1] if args.tiny else HEADLINE:
        report["update"].append(with_mfu({**compare(case, args), **memory_ratio(case, args)}, peak))
        print(table(report), flush=True)
    args.vllm = args.device == "cuda" and importlib.util.find_spec("vllm") is not None
    if not args.vllm:
        args.longest = min(args.longest, WITHOUT_VLLM)
    for case in HEADLINE[: 1 if args.tiny else 2]:
        report["step"].append(with_mfu(compare_steps(case, args), peak))
        print(table(report), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
