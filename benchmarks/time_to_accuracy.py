"""
Time to a held-out accuracy: TRL's GRPOTrainer against OPOTrainer, refilling and choosing prompts.

    python benchmarks/time_to_accuracy.py             # about 80 runs, one a core; resumes where it stopped
    python benchmarks/time_to_accuracy.py --report    # write results/time_to_accuracy.json and .png

Question: how many seconds, generated tokens and optimizer steps does it take to the same held-out pass@1 on the uniform
distribution of problems, where about half of the groups are uninformative? This text was written before any run was
measured; the difficulties of the problems were set by the rewards of the starting policy and of one short run alone.

| variant    | trainer     | what differs                                                                          |
|------------|-------------|---------------------------------------------------------------------------------------|
| grpo       | GRPOTrainer | the best GRPO of docs/opo_vs_grpo.md: 2 steps per rollout batch, clip 0.2, divided by |
|            |             | the standard deviation, entropy bonus 0.001                                           |
| grpo_fresh | GRPOTrainer | exactly on-policy: 1 step per batch, not divided by the standard deviation            |
| opo        | OPOTrainer  | as it is                                                                              |
| opo_refill | OPOTrainer  | max_refill_rounds=2                                                                   |
| opo_choose | OPOTrainer  | prompt_sampling="informative"                                                         |
| opo_both   | OPOTrainer  | both                                                                                  |

- Problems: `NUM_PROBLEMS` sums of three numbers to train on, of the difficulties in `LEVELS`. Validation and test
  problems are `NUM_HELD_OUT` each of the same difficulties in the same shares; no problem is in two sets. The training
  set is small, so that every problem comes several times, as it does in training for a few epochs.
- Everything else is shared with opo_vs_grpo.py: starting policy, rollout batches of 16 problems with 8 completions,
  Adam, constant rate after a warm-up of 5 %, gradient norm clipped at 1. Every run gets `ROLLOUTS` rollout batches.
- Learning rates: swept for each variant by the rule of opo_vs_grpo.py, with its grid and sweep seeds: the highest mean
  pass@1 on validation problems at the end of training, the lower rate on a tie, one more rate while the best is at an
  edge. A run that breaks down counts as 0.
- Then every variant is trained at its rate with the seeds `SEEDS`. Runs are started seed by seed, all variants of a
  seed one after another, so that what changes on the machine affects all variants alike. One thread a run.
- The clock: wall-clock seconds from the start of training, with the clock stopped while the policy is measured; CPU
  seconds of the process beside it. Tokens: all completion tokens sampled in training, refills included, counted where
  completions are scored. Steps: optimizer steps. Loading the model and the problems is not counted.
- Measured before training and after every `EVERY` rollout batches: pass@1 on the test problems, `NUM_SAMPLES`
  completions each at temperature 1, with the same sampling seeds in every run.
- The accuracy curve of a run is the centred mean of `SMOOTHING` measurements. It reaches a target where it first
  crosses it, interpolated linearly on each axis.
- The target is the starting accuracy plus `SHARE` = 90 % of what the better of the two GRPO variants gains by the end
  of training (mean over seeds of the last point of the curve). `OTHER_SHARES` are reported beside it.
- A GRPO run that does not reach the target counts with what it took until its end, which favours GRPO. An OPO variant
  with a run that does not reach it gets no ratio, and the number of runs that did is given.
- Ratios are GRPO's over the variant's, paired by seed; means are geometric, intervals Student's t over seeds in the
  logarithm. The headline is against the GRPO variant that is faster on that axis. Aimed at: 2.5 times fewer seconds
  and 2 times fewer tokens, for opo_both.
- Reported besides: the share of groups with equal rewards over training, the final pass@1 of every variant, every seed.

Each finished run is a file in `--output_dir`. Variants whose options this version of OPOTrainer does not have are left
out, and the report names them.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

import opo_vs_grpo
from measuring import RESULTS, provenance, sample_records
from opo_trl import OPOConfig, OPOTrainer
from opo_trl.evaluation import problem_metrics
from opo_trl.scripts.arithmetic import make_problem, split_of
from opo_vs_grpo import (
    MAX_COMPLETION_LENGTH,
    ON_POLICY,
    POLICY,
    ROOT,
    SWEEP_SEEDS,
    Job,
    build_trainer,
    choose_rates,
    complete,
    prepare_worker,
)
from stability_map import numbers_broke_down
from time_report import final_table, page_tables, plot, summarize

SEEDS = (21, 22, 23, 24, 25, 26)
ROLLOUTS, EVERY = 200, 10  # rollout batches of 128 completions: of a run, between two measurements
NUM_PROBLEMS, NUM_HELD_OUT, NUM_SAMPLES = 512, 256, 4
SMOOTHING, SHARE, OTHER_SHARES = 3, 0.9, (0.5, 0.75)
LEVELS = {9: 0.125, 49: 0.3125, 99: 0.25, 299: 0.3125}  # largest operand -> share of the problems

VARIANTS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "grpo": opo_vs_grpo.VARIANTS["grpo_off"],
    "grpo_fresh": opo_vs_grpo.VARIANTS["grpo_no_std"],
    "opo": (OPOTrainer, OPOConfig, ON_POLICY),
    "opo_refill": (OPOTrainer, OPOConfig, {**ON_POLICY, "max_refill_rounds": 2}),
    "opo_choose": (OPOTrainer, OPOConfig, {**ON_POLICY, "prompt_sampling": "informative"}),
    "opo_both": (OPOTrainer, OPOConfig, {**ON_POLICY, "max_refill_rounds": 2, "prompt_sampling": "informative"}),
}


def available_variants() -> list[str]:
    """The variants whose options there are."""
    return [
        variant
        for variant, (_, config, settings) in VARIANTS.items()
        if settings.keys() <= {f.name for f in fields(config)}
    ]


def mixed_problems(split: str, size: int) -> Dataset:
    """Problems of all difficulties of one split, level by level: columns `prompt`, `solution` and `id`."""
    rng = random.Random(f"mixed-{split}")
    rows: dict[str, dict[str, str]] = {}
    for place, largest in enumerate(LEVELS, 1):
        wanted = round(size * sum(list(LEVELS.values())[:place]))
        while len(rows) < wanted:
            problem = make_problem(rng, largest)
            text = problem["problem"]
            if split_of(text) == split:
                rows.setdefault(text, {"prompt": text, "solution": problem["answer"], "id": text})
    return Dataset.from_list(list(rows.values()))


def held_out(split: str) -> Dataset:
    """Validation and test problems: every other problem, so that both have all difficulties in the same shares."""
    problems = mixed_problems("test", 2 * NUM_HELD_OUT)
    return problems.select(range(["validation", "test"].index(split), len(problems), 2))


def pass_at_1(model: Any, split: str) -> float:
    """Held-out accuracy, with the same sampling seeds whoever asks; leaves the caller's random state as it was."""
    records = sample_records(
        model, AutoTokenizer.from_pretrained(POLICY), held_out(split), num_samples=NUM_SAMPLES,
        max_new_tokens=MAX_COMPLETION_LENGTH, seed=0,
    )  # fmt: skip
    return statistics.fmean(problem_metrics(records)["pass@1"].values())


class Clock(TrainerCallback):
    """
    Measures the policy during training, and what training has taken until then, without the measurements.

    Args:
        measure (`Callable`):
            Returns the accuracy of the model.
        every (`int`):
            Optimizer steps between two measurements.
        clocks (`tuple`, *optional*):
            Wall-clock and CPU seconds.
    """

    def __init__(
        self,
        measure: Callable[[Any], float],
        every: int,
        clocks: tuple[Callable[[], float], ...] = (time.perf_counter, time.process_time),
    ) -> None:
        self.measure, self.every, self.clocks = measure, every, clocks
        self.curve: list[dict[str, float]] = []
        self.tokens = 0
        self._spent, self._started = [0.0] * len(clocks), [0.0] * len(clocks)

    def count_tokens(self, trainer: Any) -> None:
        """Count completion tokens where they are scored: TRL and OPO do so for every completion that they sample."""
        score = trainer._calculate_rewards

        def scored(inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
            self.tokens += sum(len(ids) for ids in completion_ids_list) if trainer.model.training else 0
            return score(inputs, prompts, completions, completion_ids_list)

        trainer._calculate_rewards = scored

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._spent = [
                spent + clock() - started
                for spent, clock, started in zip(self._spent, self.clocks, self._started, strict=True)
            ]
            self._measure(state, kwargs["model"])

    def _measure(self, state: Any, model: Any) -> None:
        model.eval()
        accuracy = self.measure(model)
        model.train()
        seconds, cpu_seconds = self._spent
        self.curve.append({
            "steps": state.global_step, "tokens": self.tokens, "seconds": seconds, "cpu_seconds": cpu_seconds,
            "pass@1": accuracy,
        })  # fmt: skip
        self._started = [clock() for clock in self.clocks]


def run(job: Job) -> dict[str, Any]:
    """Train and measure one job: at the end alone on validation problems, all along on test problems."""
    prepare_worker()
    start = time.perf_counter()
    settings = VARIANTS[job.variant][2]
    steps_per_batch = settings.get("steps_per_generation", 2) // settings["gradient_accumulation_steps"]
    steps = job.rollouts * steps_per_batch
    result: dict[str, Any] = {"job": job._asdict(), "provenance": provenance()}
    clock = Clock(lambda model: pass_at_1(model, job.split), EVERY * steps_per_batch)
    with tempfile.TemporaryDirectory() as directory:
        trainer = build_trainer(
            VARIANTS[job.variant], directory, max_steps=steps, problems=mixed_problems("train", NUM_PROBLEMS),
            seed=job.seed, learning_rate=job.learning_rate,
        )  # fmt: skip
        clock.count_tokens(trainer)
        if job.split == "test":
            trainer.add_callback(clock)
        try:
            trainer.train()
            result["metrics"] = {"pass@1": pass_at_1(trainer.model, job.split), "length": mean_length(trainer)}
        except (ValueError, RuntimeError) as error:
            if not numbers_broke_down(error, trainer.model):
                raise
            result["broke_down"] = f"step {trainer.state.global_step}: {type(error).__name__}: {str(error)[:300]}"
    logged = [entry for entry in trainer.state.log_history if "frac_reward_zero_std" in entry]
    result["curve"] = clock.curve
    result["uninformative"] = [round(entry["frac_reward_zero_std"], 4) for entry in logged]
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def mean_length(trainer: Any) -> float:
    """Mean length of the completions of the last rollout batch."""
    return next(
        entry["completions/mean_length"]
        for entry in reversed(trainer.state.log_history)
        if "completions/mean_length" in entry
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=ROLLOUTS, help="rollout batches per run")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "time_to_accuracy", help="finished runs")
    parser.add_argument("--report", action="store_true", help="write the results of the finished runs")
    args = parser.parse_args()
    variants = available_variants()
    print(
        f"variants: {', '.join(variants)}; not available: {', '.join(VARIANTS.keys() - set(variants)) or 'none'}",
        flush=True,
    )
    sweeps = choose_rates(args.output_dir, args.processes, args.rollouts, variants, run)
    print({variant: sweep["best"] for variant, sweep in sweeps.items()}, flush=True)
    jobs = [
        Job(variant, sweeps[variant]["best"], seed, "test", args.rollouts) for seed in SEEDS for variant in variants
    ]
    results = complete(jobs, args.output_dir, args.processes, run)
    if not args.report:
        return
    runs = {variant: [results[job] for job in jobs if job.variant == variant] for variant in variants}
    report = {
        **provenance(),
        **{
            name: ", ".join(sorted({result["provenance"][name] for result in results.values()}))
            for name in ("commit", "hardware")  # of the runs
        },
        "settings": {
            "rollouts": args.rollouts, "every": EVERY, "seeds": SEEDS, "sweep_seeds": SWEEP_SEEDS, "levels": LEVELS,
            "problems": NUM_PROBLEMS, "held_out": NUM_HELD_OUT, "samples_per_problem": NUM_SAMPLES,
            "smoothing": SMOOTHING, "shares": [SHARE, *OTHER_SHARES],
            "not_available": sorted(VARIANTS.keys() - set(variants)),
            "variants": {variant: VARIANTS[variant][2] for variant in variants},
        },
        "sweeps": sweeps,
        **summarize(runs, [SHARE, *OTHER_SHARES], SMOOTHING),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "time_to_accuracy.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, path.with_suffix(".png"))
    print(final_table(report), *page_tables(report).values(), sep="\n\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
