"""
OPO and GRPO: six variants with the same problems, the same rollout budget and several seeds.

    python benchmarks/opo_vs_grpo.py    # 116 runs of at least 45 s, one per core; resumes where it stopped
    python benchmarks/opo_vs_grpo.py --task long_chains    # 82 runs of 2 to 26 minutes; 7.6 hours of CPU time in all

| variant         | trainer     | baseline                  | divided by std | steps per rollout batch          |
|-----------------|-------------|---------------------------|----------------|----------------------------------|
| opo             | OPOTrainer  | b*                        | no             | 1                                |
| opo_mean        | OPOTrainer  | group mean                | no             | 1                                |
| grpo            | GRPOTrainer | group mean                | yes            | 1                                |
| grpo_no_std     | GRPOTrainer | group mean                | no             | 1                                |
| grpo_off        | GRPOTrainer | group mean                | yes            | 2, clip 0.2, entropy bonus 0.001 |
| opo_uncertainty | OPOTrainer  | weighted by uncertainty   | no             | 1                                |
| grpo_off_4      | GRPOTrainer | group mean                | yes            | 4, clip 0.2, entropy bonus 0.001 |

The task `arithmetic`, the tiny policy of the quickstart, has all variants but grpo_off_4. The task `long_chains`
(`long_chains.py`) has all but grpo_no_std. `EXPERIMENTS` has what differs between the tasks.

grpo_off is the off-policy variant of the paper's experiment A. opo_uncertainty was added after gradient_variance.py had
been run and before anything was measured on test problems. Everything else is the same for all variants: the starting
policy, the order of the problems, 128 completions per rollout batch, Adam, the length limit, gradient norm clipping.

The following was decided before any run:

1. Each variant has its own learning rate. The rates of `FIRST_GRID` are run with the seeds `SWEEP_SEEDS`. While the
   best rate is the lowest or the highest one tried, the next rate of `LEARNING_RATES` on that side is added.
2. The best rate has the highest mean pass@1 on *validation* problems at the end of training; on a tie, the lower rate.
   A run that breaks down counts as 0.
3. Every variant is then trained with its best rate and other seeds, and measured on *test* problems, which were not
   used to choose anything: `NUM_SAMPLES` completions each. Every metric of the table is computed from them.
4. Intervals are Student's t over seeds; differences to `opo` are paired by seed. All variants are reported.

Added when the results were known, in addition to the comparison above and not in place of it: the three baselines of
OPOTrainer at equal rates (`equal_rates`), with the same seeds and problems, because the rule selected different
rates.

The task `long_chains` keeps rules 1 to 4, with five seeds, 128 validation and 128 test problems and 50 rollout batches
per run; its numbers were decided before any run on it, and there are no runs at equal rates. All variants sample in
stages (`staged_sampling.py`), which changes what is computed for a completion only after its end.

Each finished run is a file in `--output_dir`. When all runs are finished, results/opo_vs_grpo.json and .png are
written; for another task, with its name.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # runs are parallel, one per core

ROOT = Path(__file__).resolve().parents[1]
import torch
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from measuring import RESULTS, interval, keep_freed_memory, provenance, sample_records
from opo_report import page_tables, plot
from opo_trl import OPOConfig, OPOTrainer
from opo_trl.evaluation import problem_metrics
from opo_trl.rewards import math_verify_reward
from staged_sampling import rollouts_of
from tasks import TASKS

POLICY = TASKS["arithmetic"].policy
LEARNING_RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_GRID = (3e-5, 1e-4, 3e-4)
SWEEP_SEEDS = (101, 102)
NUM_TEST = 256  # problems of the task `arithmetic`
NUM_SAMPLES = 8  # completions per problem, in training and in the measurements
REFERENCE = "opo"
BASELINE_VARIANTS = ("opo", "opo_mean", "opo_uncertainty")

# A rollout batch is 16 problems x 8 completions; an on-policy step accumulates gradients over its two halves.
ON_POLICY = {"gradient_accumulation_steps": 2}
VARIANTS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "opo": (OPOTrainer, OPOConfig, ON_POLICY),
    "opo_mean": (OPOTrainer, OPOConfig, {**ON_POLICY, "length_exponent": 0.0}),
    "grpo": (GRPOTrainer, GRPOConfig, {**ON_POLICY, "scale_rewards": "group"}),
    "grpo_no_std": (GRPOTrainer, GRPOConfig, {**ON_POLICY, "scale_rewards": "none"}),
    "grpo_off": (
        GRPOTrainer,
        GRPOConfig,
        {
            "gradient_accumulation_steps": 1,
            "steps_per_generation": 2,
            "scale_rewards": "group",
            "epsilon": 0.2,
            "entropy_coef": 0.001,
        },
    ),
    "opo_uncertainty": (OPOTrainer, OPOConfig, {**ON_POLICY, "baseline_weight": "uncertainty"}),
    "grpo_off_4": (
        GRPOTrainer,
        GRPOConfig,
        {
            "per_device_train_batch_size": 32,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": 4,
            "scale_rewards": "group",
            "epsilon": 0.2,
            "entropy_coef": 0.001,
        },
    ),
}


class Experiment(NamedTuple):
    """What differs between the tasks."""

    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    held_out: int  # problems for validation, and as many for the test
    rollouts: int  # rollout batches per run
    equal_rates: tuple[float, ...]  # at which the baselines of OPOTrainer are also compared


EXPERIMENTS = {
    "arithmetic": Experiment(
        ("opo", "opo_mean", "grpo", "grpo_no_std", "grpo_off", "opo_uncertainty"),
        (1, 2, 3, 4, 5, 6, 7, 8),
        NUM_TEST,
        200,
        (3e-5, 1e-4),
    ),
    "long_chains": Experiment(
        ("opo", "opo_mean", "opo_uncertainty", "grpo", "grpo_off", "grpo_off_4"), (1, 2, 3, 4, 5), 128, 50, ()
    ),
}
METRICS = ("pass@1", "pass@8", "length", "entropy", "kl_plain", "kl_low_variance", "rep-5", "self-bleu", "truncated")
TRAINING = ("grad_norm", "gradient_clipped", "ratio_clipped")
MAX_GRAD_NORM = 1.0
MAX_COMPLETION_LENGTH = TASKS["arithmetic"].max_completion_length


class Job(NamedTuple):
    """One training run, and the split on which it is evaluated."""

    variant: str
    learning_rate: float
    seed: int
    split: str  # "validation" or "test"
    rollouts: int
    task: str = "arithmetic"

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.learning_rate:g}-{self.seed}-{self.split}-{self.rollouts}"


def held_out(split: str, task: str = "arithmetic") -> Any:
    """Validation or test problems: disjoint from each other and from the training problems."""
    size = EXPERIMENTS[task].held_out
    first = 0 if split == "validation" else size
    return TASKS[task].load("test", 2 * size).select(range(first, first + size))


def make_trainer(job: Job, directory: str) -> Any:
    """The trainer of a variant, with the settings that all variants share."""
    settings = VARIANTS[job.variant][2]
    steps = job.rollouts * settings.get("steps_per_generation", 2) // settings["gradient_accumulation_steps"]
    return build_trainer(
        VARIANTS[job.variant], directory, task=job.task, seed=job.seed, learning_rate=job.learning_rate, max_steps=steps
    )


def build_trainer(
    variant: tuple[type, type, dict[str, Any]],
    directory: str,
    *,
    max_steps: int,
    problems: Any = None,
    task: str = "arithmetic",
    **settings: Any,
) -> Any:
    """
    A trainer: shared settings, then those of the variant, then those of the run.

    On the task's problems unless others are given.
    """
    trainer_class, config_class, of_variant = variant
    shared = {
        "max_steps": max_steps,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": max_steps // 20,
        "per_device_train_batch_size": 64,
        "num_generations": NUM_SAMPLES,
        "max_completion_length": TASKS[task].max_completion_length,
        "max_grad_norm": MAX_GRAD_NORM,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    config = config_class(directory, **shared | of_variant | settings)
    problems = TASKS[task].load("train", 8_000) if problems is None else problems
    sampler = rollouts_of(TASKS[task])
    trainer = trainer_class(TASKS[task].policy, math_verify_reward, config, problems, rollout_func=sampler)
    trainer.remove_callback(PrinterCallback)
    return trainer


def prepare_worker() -> None:
    """One thread per run, and no progress bars between the printed lines."""
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.disable_progress_bar()


def run(job: Job) -> dict[str, Any]:
    """Train and measure one job."""
    prepare_worker()
    start, cpu = time.perf_counter(), time.process_time()
    result: dict[str, Any] = {"job": job._asdict(), "commit": provenance()["commit"]}
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(job, directory)
        try:
            trainer.train()
        except (ValueError, RuntimeError) as error:  # a learning rate too high: a non-finite number ends the run
            return {**result, "broke_down": f"step {trainer.state.global_step}: {str(error)[:300]}"}
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    rollouts = [entry for entry in steps if "reward" in entry]  # logged by the first step on each rollout batch
    result["curves"] = {
        "reward": [round(entry["reward"], 4) for entry in rollouts],
        "length": [round(entry["completions/mean_length"], 2) for entry in rollouts],
    }
    norms = [entry["grad_norm"] for entry in steps]
    result["training"] = {
        "grad_norm": statistics.fmean(norms),
        "gradient_clipped": statistics.fmean(norm > MAX_GRAD_NORM for norm in norms),
        "ratio_clipped": statistics.fmean(entry.get("clip_ratio/region_mean", 0.0) for entry in steps),
    }
    result["metrics"] = final_metrics(trainer.model, job.split, job.task)
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["cpu_seconds"] = round(time.process_time() - cpu, 1)
    return result


def final_metrics(model: Any, split: str, task: str = "arithmetic") -> dict[str, float]:
    """Every metric of a policy on the held-out problems of a split, all from the same completions."""
    policy = TASKS[task].policy
    base = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    records = sample_records(
        model, AutoTokenizer.from_pretrained(policy), held_out(split, task), num_samples=NUM_SAMPLES,
        max_new_tokens=TASKS[task].max_completion_length, seed=0, base=base, stages=TASKS[task].sampling_stages,
    )  # fmt: skip
    metrics = problem_metrics(records)
    return {name: statistics.fmean(metrics[name].values()) for name in METRICS}


def complete(
    jobs: Iterable[Any], directory: Path, processes: int, run: Callable[[Any], dict[str, Any]] = run
) -> dict[Any, dict[str, Any]]:
    """Results of all jobs: finished runs are read, the others are run, several at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = {job: directory / f"{job.name}.json" for job in dict.fromkeys(jobs)}
    missing = [job for job, path in paths.items() if not path.exists()]
    if missing:
        start = time.perf_counter()
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(run, job): job for job in missing}
            for done, future in enumerate(as_completed(futures), 1):
                job, result = futures[future], future.result()
                part = paths[job].with_suffix(".part")
                part.write_text(json.dumps(result) + "\n")
                part.replace(paths[job])
                left = (time.perf_counter() - start) / done * (len(missing) - done) / 60
                print(f"{done:3d}/{len(missing)}  {job.name:42}{_line(result)}  {left:.0f} min left", flush=True)
    return {job: json.loads(path.read_text()) for job, path in paths.items()}


def _line(result: dict[str, Any]) -> str:
    if "broke_down" in result:
        return f"broke down in {result['broke_down']}"
    metrics = result["metrics"]
    return f"pass@1 {metrics['pass@1']:.3f}  length {metrics['length']:.1f}  {result['seconds']:.0f} s"


def score(result: dict[str, Any]) -> float:
    """The criterion for choosing a learning rate."""
    return 0.0 if "broke_down" in result else result["metrics"]["pass@1"]


def choose_rates(
    directory: Path,
    processes: int,
    rollouts: int,
    variants: Iterable[str] = EXPERIMENTS["arithmetic"].variants,
    run: Callable[[Any], dict[str, Any]] = run,
    task: str = "arithmetic",
) -> dict[str, dict[str, Any]]:
    """Sweep every variant's learning rate; returns the tried rates and the best by the rule in the module docstring."""
    tried: dict[str, list[float]] = {variant: list(FIRST_GRID) for variant in variants}
    while True:
        jobs = [
            Job(variant, rate, seed, "validation", rollouts, task)
            for variant, rates in tried.items()
            for rate in rates
            for seed in SWEEP_SEEDS
        ]
        results = complete(jobs, directory, processes, run)
        sweeps = {}
        for variant, rates in tried.items():
            scores = {
                rate: [score(results[Job(variant, rate, seed, "validation", rollouts, task)]) for seed in SWEEP_SEEDS]
                for rate in sorted(rates)
            }
            best = max(scores, key=lambda rate: (statistics.fmean(scores[rate]), -rate))
            sweeps[variant] = {"best": best, "tried": {f"{rate:g}": each for rate, each in scores.items()}}
        extended = False
        for variant, rates in tried.items():
            best, place = sweeps[variant]["best"], LEARNING_RATES.index(sweeps[variant]["best"])
            neighbours = LEARNING_RATES[max(place - 1, 0) : place + 2]
            new = [rate for rate in neighbours if rate not in rates]
            if best in (min(rates), max(rates)) and new:
                rates += new
                extended = True
        if not extended:
            return sweeps


def paired_interval(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Mean difference, seed by seed, with its interval."""
    return interval([a - b for a, b in zip(values, reference, strict=True)])


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Mean over seeds at each rollout batch."""
    return [round(statistics.fmean(points), 4) for points in zip(*curves, strict=True)]


def summarize(
    sweeps: dict[str, Any], results: dict[Job, dict[str, Any]], rollouts: int, task: str = "arithmetic"
) -> dict[str, Any]:
    """Per variant: learning rate, every metric over seeds, and the differences to OPO, paired by seed."""
    values: dict[str, dict[str, list[float]]] = {}
    variants: dict[str, Any] = {}
    for variant, sweep in sweeps.items():
        jobs = [Job(variant, sweep["best"], seed, "test", rollouts, task) for seed in EXPERIMENTS[task].seeds]
        runs = [results[job] for job in jobs]
        broken = [run_["broke_down"] for run_ in runs if "broke_down" in run_]
        if broken:
            raise RuntimeError(f"{variant} broke down at its best learning rate {sweep['best']:g}: {broken}")
        values[variant] = {
            **{name: [run_["metrics"][name] for run_ in runs] for name in METRICS},
            **{name: [run_["training"][name] for run_ in runs] for name in TRAINING},
            "reward": [statistics.fmean(run_["curves"]["reward"][-20:]) for run_ in runs],
        }
        variants[variant] = {
            "learning_rate": sweep["best"],
            "sweep": sweep["tried"],
            "over_seeds": {name: interval(each) for name, each in values[variant].items()},
            "each_seed": values[variant],
            "curves": {name: mean_curve([run_["curves"][name] for run_ in runs]) for name in ("reward", "length")},
        }
    for variant, found in values.items():
        if variant != REFERENCE:
            variants[variant]["difference_to_opo"] = {
                name: paired_interval(each, values[REFERENCE][name]) for name, each in found.items()
            }
    return variants


def summarize_baselines(jobs: dict[str, list[Job]], results: dict[Job, dict[str, Any]]) -> dict[str, Any]:
    """Per baseline at one rate: every metric over seeds, and the differences to OPO, paired by seed."""
    found: dict[str, Any] = {}
    for variant, of_variant in jobs.items():
        values, reference = (
            {name: [results[job]["metrics"][name] for job in those] for name in METRICS}
            for those in (of_variant, jobs[REFERENCE])
        )
        found[variant] = {"over_seeds": {name: interval(values[name]) for name in METRICS}}
        if variant != REFERENCE:
            found[variant]["difference_to_opo"] = {
                name: paired_interval(values[name], reference[name]) for name in METRICS
            }
    return found


def cpu_hours(directory: Path) -> float:
    """CPU time of all runs in a directory, those of the sweep included and those that broke down left out, in hours."""
    runs = (json.loads(path.read_text()) for path in directory.glob("*.json"))
    return round(sum(run_.get("cpu_seconds", 0.0) for run_ in runs) / 3600, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=EXPERIMENTS, default="arithmetic")
    parser.add_argument("--rollouts", type=int, help="rollout batches per run, instead of the experiment's")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--output_dir", type=Path, help="where finished runs are; default: outputs/opo_vs_grpo[-TASK]")
    args = parser.parse_args()
    keep_freed_memory()
    experiment, name = EXPERIMENTS[args.task], f"opo_vs_grpo{'' if args.task == 'arithmetic' else f'-{args.task}'}"
    rollouts, directory = args.rollouts or experiment.rollouts, args.output_dir or ROOT / "outputs" / name
    sweeps = choose_rates(directory, args.processes, rollouts, experiment.variants, task=args.task)
    print({variant: sweep["best"] for variant, sweep in sweeps.items()}, flush=True)

    def tests(variant: str, rate: float) -> list[Job]:
        return [Job(variant, rate, seed, "test", rollouts, args.task) for seed in experiment.seeds]

    by_variant = [tests(variant, sweeps[variant]["best"]) for variant in experiment.variants]
    results = complete([job for jobs in zip(*by_variant, strict=True) for job in jobs], directory, args.processes)
    variants = summarize(sweeps, results, rollouts, args.task)
    alone = {rate: {variant: tests(variant, rate) for variant in BASELINE_VARIANTS} for rate in experiment.equal_rates}
    every = [job for of_rate in alone.values() for of_variant in of_rate.values() for job in of_variant]
    results |= complete(every, directory, args.processes)
    baselines = {f"{rate:g}": summarize_baselines(of_rate, results) for rate, of_rate in alone.items()}
    report = {
        **provenance(),
        "commit": ", ".join(sorted({result["commit"] for result in results.values()})),  # of the runs
        "cpu_hours": cpu_hours(directory),
        "rule": "highest mean validation pass@1 over the sweep's seeds; the lower rate on a tie",
        "settings": {
            "task": args.task,
            "rollouts": rollouts,
            "completions_per_rollout_batch": 128,
            "sweep_seeds": SWEEP_SEEDS,
            "seeds": experiment.seeds,
            "validation_problems": experiment.held_out,
            "test_problems": experiment.held_out,
            "samples_per_problem": NUM_SAMPLES,
            "max_completion_length": TASKS[args.task].max_completion_length,
            "variants": {variant: VARIANTS[variant][2] for variant in experiment.variants},
        },
        "variants": variants,
        "baselines_at_equal_rates": baselines,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    plot(variants, path.with_suffix(".png"))
    print(*page_tables(report).values(), sep="\n\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
