"""
Time, memory and gradient of one update: TRL's GRPOTrainer against OPOTrainer on identical scripted rollouts.

    python benchmarks/update_phase.py                 # all cases
    python benchmarks/update_phase.py --quick --json  # the three headline cases, last line one JSON object
    python benchmarks/update_phase.py --quick --lm-head none         # without the LM head on either side

Both trainers get the same prompts, completions and rewards, so nothing is generated. GRPO runs with beta 0, no scaling
by the standard deviation and one iteration: the same algorithm but for the baseline, and its advantages are replaced by
OPO's, so that gradients can be compared. One measured round is every `training_step` of a rollout batch, with the time
inside generation and scoring taken out. Rounds alternate between the two trainers; speed-ups are medians of the paired
ratios. Peak memory comes from a fresh process per case: resident memory above the level before the update on a CPU
(VmHWM, reset by clear_refs), the allocator's peak on CUDA.

`--lm-head` estimates what a GPU would gain. On CUDA, TRL's fused LM head runs on the attended completion tokens alone,
on a CPU on every position, so that padding costs TRL more on a CPU than on CUDA.

With `sampler` a stub stands in for vLLM and returns log-probabilities; TRL then runs a second forward for the old
policy.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset, disable_progress_bars
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import compute_flops_per_token

import figures
from measuring import RESULTS, provenance
from opo_trl import OPOConfig, OPOTrainer
from random_models import SIZES, VOCABULARY, random_model, word_tokenizer

PROMPT_LENGTH = 32
GROUP_SIZE = 8
LM_HEADS = ("all", "completions", "none")


class Case(NamedTuple):
    """One setting of the comparison."""

    distribution: str
    uninformative: float
    rows: int = 64
    micro_batches: int = 8
    sampler: bool = False

    @property
    def name(self) -> str:
        sampler = "/sampler" if self.sampler else ""
        rows = self.rows // self.micro_batches
        return f"{self.distribution}/uninformative={self.uninformative}/micro-batch={rows}{sampler}"


DISTRIBUTIONS = ("constant", "uniform", "lognormal", "tiny_policy")
HEADLINE = [Case("lognormal", 0.5), Case("lognormal", 0.0), Case("constant", 0.0)]
CASES = [
    *(Case(distribution, share) for distribution in DISTRIBUTIONS for share in (0, 0.25, 0.5, 0.75)),
    Case("lognormal", 0.0, micro_batches=16),
    Case("lognormal", 0.5, micro_batches=64),
    Case("lognormal", 0.0, micro_batches=64),
    Case("lognormal", 0.5, sampler=True),
    Case("lognormal", 0.0, sampler=True),
]


def draw_lengths(distribution: str, rows: int, generator: torch.Generator, longest: int) -> torch.Tensor:
    """Completion lengths (N,), end token included. Log-normal: mu 5.0, sigma 0.7, clipped, for a longest of 512."""
    scale = longest / 512
    if distribution == "constant":
        return torch.full((rows,), int(200 * scale))
    if distribution == "uniform":
        return torch.randint(int(16 * scale), longest + 1, (rows,), generator=generator)
    if distribution == "lognormal":
        lengths = torch.exp(5.0 + 0.7 * torch.randn(rows, generator=generator)) * scale
        return lengths.clamp(int(16 * scale), longest).long()
    if distribution == "tiny_policy":  # the quickstart's policy before training: guesses of 4 tokens, steps of about 22
        lengths = json.loads((Path(__file__).parent / "tiny_policy_lengths.json").read_text())
        return torch.tensor(lengths)[torch.randint(len(lengths), (rows,), generator=generator)]
    raise ValueError(f"distribution must be constant, uniform, lognormal or tiny_policy, got {distribution!r}.")


def set_lm_head(positions: str) -> None:
    """
    Choose the positions that TRL's fused LM head runs on, for both trainers.

    Args:
        positions (`str`):
            `"all"`, as TRL does on a CPU; `"completions"`, the attended completion tokens alone, as it does on CUDA;
            `"none"`, for no LM head: the mean of the hidden state stands in for the log-probability, so that the
            backward pass still runs through the complete backbone.
    """
    if positions == "completions":
        trl_utils._use_triton = lambda device: True  # this name only chooses positions; the kernels have their own
    elif positions == "none":
        trl_utils._ChunkedLogProbFunction = NoLMHead


class NoLMHead:
    """Stands in for TRL's kernel of the fused LM head."""

    @staticmethod
    def apply(hidden: torch.Tensor, *args: Any) -> tuple[torch.Tensor | None, ...]:  # (N, H) -> (N,), five of them
        return hidden.float().mean(dim=-1), hidden.new_zeros(len(hidden), dtype=torch.float32), None, None, None


class Script:
    """Identical rollouts for both trainers: round n has the same completions and scores for each."""

    def __init__(self, case: Case, longest: int) -> None:
        self.case, self.longest, self.round = case, longest, 0

    def draw(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.round)
        case = self.case
        lengths = draw_lengths(case.distribution, case.rows, generator, self.longest).tolist()
        groups = case.rows // GROUP_SIZE
        flat = torch.randperm(groups, generator=generator)[: round(case.uninformative * groups)].tolist()
        scores = torch.rand(case.rows, generator=generator)
        for group in flat:
            scores[group * GROUP_SIZE : (group + 1) * GROUP_SIZE] = 0.5
        ids = [[*torch.randint(3, VOCABULARY, (n - 1,), generator=generator).tolist(), 1] for n in lengths]
        prompts = torch.randint(3, VOCABULARY, (groups, PROMPT_LENGTH), generator=generator)
        return {
            "prompt_ids": prompts.repeat_interleave(GROUP_SIZE, dim=0).tolist(),
            "completion_ids": ids,
            "logprobs": [[-5.5] * len(c) for c in ids],
            "score": scores.tolist(),
        }

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        self.drawn = self.draw()
        return self.drawn


class StubEngine:
    """Stands in for TRL's vLLM engine, for the cases with a sampler: it plays the script."""

    script: Script

    def __init__(self, **kwargs: Any) -> None:
        pass

    def sync_weights(self) -> None:
        pass

    def generate(self, prompts: Any, images: Any, num_generations: int, profiler: Any = None) -> tuple[Any, ...]:
        drawn = self.script(prompts, None)
        return prompts, drawn["completion_ids"], [[[v] for v in row] for row in drawn["logprobs"]], None


def make_config(kind: str, case: Case, args: argparse.Namespace, directory: str, **overrides: Any) -> Any:
    """The same algorithm for both trainers, but for the baseline."""
    common: dict[str, Any] = {
        "output_dir": directory,
        "use_cpu": args.device == "cpu",
        "bf16": args.dtype == "bf16",
        "gradient_checkpointing": args.gradient_checkpointing,
        "per_device_train_batch_size": case.rows // case.micro_batches,
        "gradient_accumulation_steps": case.micro_batches,
        "num_generations": GROUP_SIZE,
        "max_completion_length": args.longest,
        "loss_type": "dapo",
        "max_steps": 10_000,
        "max_grad_norm": 0.0,
        "learning_rate": 0.0,
        "optim": "sgd",
        "report_to": "none",
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "use_vllm": case.sampler,
        **overrides,
    }
    if kind == "opo":
        return OPOConfig(**common)
    return GRPOConfig(**common, scale_rewards="none", beta=0.0, vllm_importance_sampling_mode="token_truncate")


def build(kind: str, case: Case, args: argparse.Namespace, directory: str) -> tuple[Any, Script]:
    """A trainer whose rollouts are scripted, and its script."""
    script = Script(case, args.longest)
    if case.sampler:
        import trl.trainer.grpo_trainer as module  # the stub has to stand where TRL looks for its engine

        StubEngine.script = script
        module.VLLMGeneration = StubEngine

    def score(completions: list[Any], **kwargs: Any) -> list[float]:
        return script.drawn["score"]

    trainer = {"opo": OPOTrainer, "trl": GRPOTrainer}[kind](
        random_model(args.model_size, args.longest + PROMPT_LENGTH),
        score,
        make_config(kind, case, args, directory),
        Dataset.from_dict({"prompt": ["t3 " * PROMPT_LENGTH] * (case.rows // GROUP_SIZE)}),
        processing_class=word_tokenizer(),
        rollout_func=None if case.sampler else script,
    )
    trainer.model.train()
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = case.micro_batches
    return trainer, script


class Clock:
    """Takes the time inside generation and scoring out of a measurement, and counts what the forwards run on."""

    def __init__(self, trainer: Any) -> None:
        self.config = trainer.model.config
        self.reset()
        for name in ("_generate", "_calculate_rewards"):
            setattr(trainer, name, self.excluding(getattr(trainer, name)))
        trainer.model.register_forward_pre_hook(self.count, with_kwargs=True)

    def reset(self) -> None:
        self.outside, self.rows, self.padded = 0.0, 0, 0
        self.forwards: list[tuple[torch.Tensor, bool]] = []  # attended tokens of the rows (B,); with a backward pass?

    def excluding(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.outside += time.perf_counter() - start
            return result

        return timed

    def count(self, module: Any, args: Any, kwargs: Any) -> None:
        if not kwargs.get("fused_lm_head"):
            return  # generation
        self.rows += kwargs["input_ids"].size(0)
        self.padded += kwargs["input_ids"].numel()
        self.forwards.append((kwargs["attention_mask"].sum(dim=1), torch.is_grad_enabled()))  # read after the timing

    def real(self) -> int:
        """Attended tokens of all forwards."""
        return sum(int(lengths.sum()) for lengths, _ in self.forwards)

    def flops(self) -> float:
        """
        FLOPs that the attended tokens need, as TRL counts them: forward and backward are three times the forward, every
        token attends to all of its row, the LM head runs on each; neither padding nor recomputed activations count.
        """
        return sum(
            length * compute_flops_per_token(self.config, length) * (1 if backward else 1 / 3)
            for lengths, backward in self.forwards
            for length in lengths.tolist()
        )


def run_round(trainer: Any, script: Script, clock: Clock, number: int) -> dict[str, Any]:
    """All training steps of one rollout batch; returns time and counts."""
    script.round = number
    clock.reset()
    trainer.model.zero_grad()
    trainer._step = 0
    steps = trainer.args.gradient_accumulation_steps
    rows = [trainer.train_dataset[i // GROUP_SIZE] for i in range(script.case.rows)]
    synchronise(trainer)
    start = time.perf_counter()
    for step in range(steps):
        trainer.accelerator.gradient_state._set_sync_gradients(step == steps - 1)
        trainer.training_step(trainer.model, rows, None)
    synchronise(trainer)
    elapsed = time.perf_counter() - start - clock.outside
    trainer._metrics["train"].clear()
    counts = {"rows": clock.rows, "padded": clock.padded, "real": clock.real(), "flops": clock.flops()}
    sampled = script.case.rows * PROMPT_LENGTH + sum(len(ids) for ids in script.drawn["completion_ids"])
    return {"seconds": elapsed, "sampled": sampled, **counts}


def synchronise(trainer: Any) -> None:
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def gradient(trainer: Any) -> torch.Tensor:
    return torch.cat(
        [p.grad.detach().float().flatten().cpu() for p in trainer.model.parameters() if p.grad is not None]
    )


def give_opo_advantages(trainer: Any) -> None:
    """Make TRL's trainer take the gradient of OPO's advantages, so that the two can be compared to the last bit."""
    from opo_trl.baselines import opo_advantages

    original = trainer._generate_and_score_completions

    def replaced(inputs: Any) -> Any:
        output = original(inputs)
        lengths = output["completion_mask"].sum(dim=1).view(-1, GROUP_SIZE)
        script = StubEngine.script if trainer.use_vllm else trainer.rollout_func
        rewards = torch.tensor(script.drawn["score"], device=lengths.device).view(-1, GROUP_SIZE)
        output["advantages"] = opo_advantages(rewards, lengths).flatten()
        return output

    trainer._generate_and_score_completions = replaced


def compare(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Alternate rounds of both trainers on the same rollouts."""
    with tempfile.TemporaryDirectory() as directory:
        trainers = {}
        for kind in ("trl", "opo"):
            trainer, script = build(kind, case, args, directory)
            if kind == "trl":
                give_opo_advantages(trainer)
            trainers[kind] = (trainer, script, Clock(trainer))
        rounds: dict[str, list[dict[str, Any]]] = {"trl": [], "opo": []}
        errors, ratios = [], []
        for number in range(args.rounds + 1):
            order = ("trl", "opo") if number % 2 else ("opo", "trl")
            gradients = {}
            for kind in order:
                if case.sampler:
                    StubEngine.script = trainers[kind][1]
                result = run_round(*trainers[kind], number)
                gradients[kind] = gradient(trainers[kind][0])
                if number:  # the first round warms up
                    rounds[kind].append(result)
            errors.append(float((gradients["opo"] - gradients["trl"]).norm() / gradients["trl"].norm()))
            if number:
                ratios.append(rounds["trl"][-1]["seconds"] / rounds["opo"][-1]["seconds"])
        rounding = {}
        if args.dtype == "bf16" and args.model_size == "toy":  # keeps ten gradients
            rounding = rounding_errors(trainers, case, args, directory)
    sums = {kind: {key: sum(r[key] for r in rounds[kind]) for key in rounds[kind][0]} for kind in rounds}
    return {
        "case": case.name,
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "trl_seconds": statistics.median(r["seconds"] for r in rounds["trl"]),
        "opo_seconds": statistics.median(r["seconds"] for r in rounds["opo"]),
        "gradient_error": max(errors),
        **rounding,
        "token_efficiency": sums["opo"]["real"] / sums["opo"]["padded"],
        "trl_token_efficiency": sums["trl"]["real"] / sums["trl"]["padded"],
        "rows_forward": sums["opo"]["rows"] / len(ratios),
        "trl_rows_forward": sums["trl"]["rows"] / len(ratios),
        **{
            f"{kind}_{name}_per_second": sums[kind][counted] / sums[kind]["seconds"]
            for kind in sums
            for name, counted in (("tokens", "sampled"), ("flops", "flops"))
        },
    }


def rounding_errors(trainers: dict[str, Any], case: Case, args: argparse.Namespace, directory: str) -> dict[str, float]:
    """Relative distances in bf16: to the fp32 gradient, and between shuffles of TRL's own."""
    exact = argparse.Namespace(**{**vars(args), "dtype": "fp32"})
    trainer, script = build("opo", case, exact, directory)
    run_round(trainer, script, Clock(trainer), args.rounds)
    reference = gradient(trainer)

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).norm() / reference.norm())

    gradients: dict[str, list[torch.Tensor]] = {"trl": [], "opo": []}
    for kind in gradients:
        for seed in range(4):
            torch.manual_seed(seed)  # TRL shuffles its rows anew
            if case.sampler:
                StubEngine.script = trainers[kind][1]
            run_round(*trainers[kind], args.rounds)
            gradients[kind].append(gradient(trainers[kind][0]))
    trl = gradients["trl"]
    return {
        "opo_to_fp32": max(distance(g, reference) for g in gradients["opo"]),
        "trl_to_fp32": max(distance(g, reference) for g in trl),
        "trl_shuffles_apart": max(distance(a, b) for i, a in enumerate(trl) for b in trl[:i]),
    }


def measure_memory(kind: str, case: Case, args: argparse.Namespace) -> int:
    """Peak memory of one update above the level before it, in bytes; in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        trainer, script = build(kind, case, args, directory)
        clock = Clock(trainer)
        for p in trainer.model.parameters():  # gradient buffers belong to any update: not part of the comparison
            p.grad = torch.zeros_like(p)
        trainer.model.zero_grad = lambda *a, **k: None
        script.longest = 64  # a round of short rows first: what a first call loads is not the update's memory
        run_round(trainer, script, clock, 0)
        script.longest = args.longest
        gc.collect()
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run_round(trainer, script, clock, 1)
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        run_round(trainer, script, clock, 1)
        return resident("VmHWM") - before


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory_ratio(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of OPO's update over TRL's, from fresh processes, the median of `memory_repeats` each."""
    if args.device == "cuda":  # what the comparison has left in the cache
        gc.collect()
        torch.cuda.empty_cache()
    peaks = {}
    for kind in ("trl", "opo"):
        command = [sys.executable, __file__, "--memory-of", kind, json.dumps(case), *forwarded(args)]
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
        results = [
            int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1])
            for _ in range(args.memory_repeats)
        ]
        peaks[kind] = statistics.median(results)
    return {"memory_ratio": peaks["opo"] / peaks["trl"], "trl_peak_bytes": peaks["trl"], "opo_peak_bytes": peaks["opo"]}


def forwarded(args: argparse.Namespace) -> list[str]:
    flags = [
        f"--{name.replace('_', '-')}={getattr(args, name)}"
        for name in ("device", "dtype", "model_size", "longest", "lm_head")
    ]
    return flags + (["--gradient-checkpointing"] if args.gradient_checkpointing else [])


def table(results: list[dict[str, Any]]) -> str:
    heads = f"{'speed-up':>9}{'memory':>8}{'efficiency':>12}{'TRL':>6}{'rows':>7}{'TRL':>6}{'gradient error':>16}"
    rows = [f"{'case':52}{heads}"]
    for r in results:
        rows.append(
            f"{r['case']:52}{r['speedup']:8.2f}x{r['memory_ratio']:7.2f}x{r['token_efficiency']:12.3f}"
            f"{r['trl_token_efficiency']:6.2f}{r['rows_forward']:7.1f}{r['trl_rows_forward']:6.0f}"
            f"{r['gradient_error']:16.1e}"
        )
    return "\n".join(rows)


LINES = {
    "constant": ("constant", {"color": figures.GREY, "marker": "s"}),
    "uniform": ("uniform", {"color": figures.COLORS["opo_refill"], "marker": "^"}),
    "lognormal": ("log-normal", {"color": figures.COLORS["opo"], "marker": "o"}),
    "tiny_policy": ("tiny policy", {"color": figures.COLORS["opo_mean"], "marker": "D"}),
}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Speed-up and memory of micro-batches of 8 rows by the share of uninformative groups, a line per distribution."""
    found = {r["case"]: r for r in results}
    with figures.figure(path, height=3.6) as drawn:
        left, right = drawn.subplots(1, 2)
        for distribution, (label, style) in LINES.items():
            cases = [case for case in CASES if case == Case(distribution, case.uninformative) and case.name in found]
            x, each = [100 * case.uninformative for case in cases], [found[case.name] for case in cases]
            error = [[abs(r["speedup_range"][end] - r["speedup"]) for r in each] for end in (0, 1)]
            left.errorbar(x, [r["speedup"] for r in each], error, label=label, capsize=2, elinewidth=0.8, **style)
            right.plot(x, [r["memory_ratio"] for r in each], **style)
        for axis, title in (
            (left, "speed-up of the update against TRL's (x)"),
            (right, "peak memory relative to TRL's"),
        ):
            axis.axhline(1, color=figures.GREY, lw=1)
            axis.set(title=title, xlabel="uninformative groups (%)", xticks=[0, 25, 50, 75], ylim=(0, None))
        drawn.legend(title="lengths", loc="outside upper center", ncols=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--model-size", choices=SIZES, default="toy")
    parser.add_argument("--longest", type=int, default=512, help="longest completion, in tokens")
    parser.add_argument(
        "--lm-head", choices=LM_HEADS, default="all",
        help="positions that the LM head runs on, in both trainers: all of them, as TRL does on a CPU; the attended "
        "completion tokens, as it does on CUDA; or none",
    )  # fmt: skip
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds per trainer and case")
    parser.add_argument("--memory-repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="only the three headline cases")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--output", type=Path, help="JSON file; by default one in benchmarks/results named by settings")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    disable_progress_bars()
    if args.memory_of:
        kind, case = args.memory_of
        set_lm_head(args.lm_head)
        print(measure_memory(kind, Case(*json.loads(case)), args))
        return

    set_lm_head(args.lm_head)
    if args.output is None:
        settings = [args.device, args.dtype, args.model_size, f"lm-head-{args.lm_head}"] + ["quick"] * args.quick
        defaults = [*(parser.get_default(name) for name in ("device", "dtype", "model_size")), "lm-head-all"]
        args.output = RESULTS / ("-".join(["update_phase", *(s for s in settings if s not in defaults)]) + ".json")

    results = []
    for case in HEADLINE if args.quick else CASES:
        result = {**compare(case, args), **memory_ratio(case, args)}
        results.append(result)
        print(table([result]).splitlines()[-1] if len(results) > 1 else table([result]), flush=True)
    report = {
        **provenance(),
        "settings": {
            "model": args.model_size,
            "dtype": args.dtype,
            "gradient_checkpointing": args.gradient_checkpointing,
            "lm_head": args.lm_head,
        },
        "cases": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    plot(results, args.output.with_suffix(".png"))
    print(f"written to {args.output} and {args.output.with_suffix('.png').name}")
    if args.json:
        print(json.dumps({r["case"]: r for r in results}))


if __name__ == "__main__":
    main()
