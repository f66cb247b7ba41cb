"""
Stability of OPO and GRPO on the tiny policy, by learning rate and by optimizer steps per rollout batch.

    python benchmarks/stability_map.py             # about 100 runs of 45 s on one idle core; resumes where it stopped
    python benchmarks/stability_map.py --report    # write results/stability_map.json and .png from the finished runs

Question: how wide is the band of learning rates that work, how does it change with the number of optimizer steps per
rollout batch (staleness), and what happens to entropy and KL? This text was written before the first run.

| row         | trainer     | baseline | divided by std | optimizer steps per rollout batch of 128 completions   |
|-------------|-------------|----------|----------------|---------------------------------------------------------|
| opo         | OPOTrainer  | b*       | no             | 1; OPOTrainer refuses more                              |
| grpo        | GRPOTrainer | mean     | yes            | 1, 2, 4, 8: mini-batches of 128, 64, 32, 16 completions |
| grpo_no_std | GRPOTrainer | mean     | no             | 1 (control: OPO differs from it in the baseline alone)  |
| grpo_fresh  | GRPOTrainer | mean     | yes            | 4, each on its own fresh rollout batch of 32 (control)  |

- Grid: `RATES` x `SEEDS` for each row. Every run gets 200 rollout batches of 128 completions (grpo_fresh: 800 of 32).
- GRPO: TRL's defaults, which include clipping at epsilon 0.2 and the division by the group's standard deviation. No
  entropy bonus and no KL term: one thing changes along the rows of grpo. (`grpo_off` of opo_vs_grpo.py has the paper's
  entropy coefficient, 0.001.) The advantage is computed once per rollout batch, which is then shuffled and split into
  mini-batches. So with the number of steps the mini-batch shrinks and the number of updates grows; grpo_fresh has the
  same mini-batches and as many updates as grpo at 4 steps, without the staleness.
- Everything else is shared with opo_vs_grpo.py: starting policy, problems, Adam, constant rate after a warm-up of 5 %,
  gradient norm clipped at 1, at most 40 tokens. The seeds are not among that experiment's. `skip_uninformative=False`
  in OPO, so that the logged entropy covers every completion, as GRPO's does; it does not change the gradient.
- Measured at the end of each run: `NUM_TEST` held-out problems, `NUM_SAMPLES` completions each at temperature 1, with
  the same sampling seeds in every run and for the starting policy. Pass@1, pass@8, entropy and KL to the starting
  policy per token, length. Per rollout batch in training: reward, entropy, length, gradient norm, share of clipped
  ratios.
- Collapsed: final pass@1 below half of the starting policy's, or training or sampling raises because a loss, gradient
  or weight is not finite. Such a run counts as pass@1 = 0; its error and curves are recorded. Any other error stops
  the program.
- A rate works in a row if its mean pass@1 over seeds is at least `WORKS` = 90 % of the best cell's mean, best of all
  cells of opo and grpo (one threshold for all rows). The band of a row is its longest run of neighbouring rates that
  work. Its edges are interpolated linearly in pass@1 and in the logarithm of the rate; its width is the ratio of the
  edges, given for the mean curve and for each seed's curve against the same threshold.
- Extension: as long as a row's lowest or highest rate tried works, the next rate on that side is added with all seeds.
- Reported: every cell of every row, each seed's width, the highest rate without a collapsed run. The order of the runs
  is the grid of opo and grpo seed by seed, its extension, then the controls with theirs.

Each finished run is a file in `--output_dir`. CPU seconds are those of the process that trains.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from measuring import RESULTS, provenance
from opo_trl import OPOConfig, OPOTrainer
from opo_vs_grpo import (
    LEARNING_RATES,
    NUM_SAMPLES,
    NUM_TEST,
    POLICY,
    ROOT,
    build_trainer,
    complete,
    final_metrics,
    prepare_worker,
)
from stability_report import page_tables, plot, summarize_cell, summarize_row

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
SEEDS = (11, 12, 13)
ROLLOUTS = 200  # rollout batches of 128 completions
COLLAPSED, WORKS = 0.5, 0.9
CURVES = {
    "reward": "reward",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "grad_norm": "grad_norm",
    "ratio_clipped": "clip_ratio/region_mean",
}


class Row(NamedTuple):
    """One row of the map: an algorithm and its optimizer steps per 128 completions."""

    variant: str
    steps: int


class Job(NamedTuple):
    """One training run, or the measurement of the starting policy."""

    variant: str
    steps: int
    learning_rate: float
    seed: int
    rollouts: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.steps}-{self.learning_rate:g}-{self.seed}-{self.rollouts}"


START = Job("start", 0, 0.0, 0, 0)
MAIN = (Row("opo", 1), *(Row("grpo", steps) for steps in (1, 2, 4, 8)))
CONTROLS = (Row("grpo_no_std", 1), Row("grpo_fresh", 4))

Variant = tuple[type, type, dict[str, Any]]


def variant_of(row: Row) -> Variant:
    """Trainer class, config class and settings of a row."""
    full_batch = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 2}
    mini_batch = {"per_device_train_batch_size": 128 // row.steps, "gradient_accumulation_steps": 1}
    if row.variant == "opo":
        return OPOTrainer, OPOConfig, {**full_batch, "skip_uninformative": False}
    if row.variant == "grpo_fresh":
        return GRPOTrainer, GRPOConfig, {**mini_batch, "steps_per_generation": 1, "epsilon": 0.2}
    batches = full_batch if row.steps == 1 else {**mini_batch, "steps_per_generation": row.steps}
    scale = "none" if row.variant == "grpo_no_std" else "group"
    return GRPOTrainer, GRPOConfig, {**batches, "scale_rewards": scale, "epsilon": 0.2}


def run(job: Job) -> dict[str, Any]:
    """Train and measure one job."""
    prepare_worker()
    start = time.perf_counter(), time.process_time()
    where = {name: value for name, value in provenance().items() if name != "command"}
    result: dict[str, Any] = {"job": job._asdict(), "provenance": where}
    if job == START:
        result["metrics"] = final_metrics(AutoModelForCausalLM.from_pretrained(POLICY), "test")
    else:
        result |= train(job)
    result["seconds"] = round(time.perf_counter() - start[0], 1)
    result["cpu_seconds"] = round(time.process_time() - start[1], 1)
    return result


def train(job: Job) -> dict[str, Any]:
    """Curves of a run, and its final metrics or the error with which it collapsed."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = build_trainer(
            variant_of(Row(job.variant, job.steps)), directory, max_steps=job.rollouts * job.steps, seed=job.seed,
            learning_rate=job.learning_rate,
        )  # fmt: skip
        found: dict[str, Any] = {}
        try:
            trainer.train()
            found["metrics"] = final_metrics(trainer.model, "test")
        except (ValueError, RuntimeError) as error:
            if not numbers_broke_down(error, trainer.model):
                raise
            found["broke_down"] = f"step {trainer.state.global_step}: {type(error).__name__}: {str(error)[:300]}"
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    found["curves"] = {name: batch_means(logged, key, job.steps) for name, key in CURVES.items()}
    return found


def numbers_broke_down(error: Exception, model: Any) -> bool:
    """Whether an error is caused by a non-finite number: only then is it a result and not a bug."""
    tensors = [each for p in model.parameters() for each in (p.data, p.grad) if each is not None]
    named = any(word in str(error) for word in ("finite", "`nan`"))
    return named or not all(bool(each.isfinite().all()) for each in tensors)


def batch_means(logged: Sequence[Mapping[str, float]], key: str, steps: int) -> list[float | None]:
    """Mean of a logged value over the optimizer steps on each 128 completions; `None` where it is not finite."""
    means: list[float | None] = []
    for start in range(0, len(logged), steps):
        values = [entry[key] for entry in logged[start : start + steps] if key in entry]
        mean = statistics.fmean(values) if values else math.nan
        means.append(round(mean, 5) if math.isfinite(mean) else None)
    return means


def jobs_of(rows: Iterable[Row], rates: Iterable[float], seeds: Iterable[int], rollouts: int) -> list[Job]:
    """The jobs of the given rows and rates, ordered by seed."""
    return [Job(*row, rate, seed, rollouts) for seed in seeds for row in rows for rate in rates]


def pass_at_1(result: Mapping[str, Any]) -> float:
    """Final pass@1; a run that broke down counts as 0."""
    return 0.0 if "broke_down" in result else float(result["metrics"]["pass@1"])


Results = dict[Job, dict[str, Any]]
Scores = dict[Row, dict[float, list[float]]]  # pass@1 of each seed, by row and by rate in ascending order


def scores_of(tried: Mapping[Row, Sequence[float]], results: Results, rollouts: int) -> Scores:
    """Final pass@1 of every run of the given rows and rates."""
    return {
        row: {rate: [pass_at_1(results[Job(*row, rate, seed, rollouts)]) for seed in SEEDS] for rate in sorted(rates)}
        for row, rates in tried.items()
    }


def threshold_of(scores: Scores) -> float:
    """The mean pass@1 from which a rate works: 90 % of the best cell of OPO and GRPO."""
    return WORKS * max(statistics.fmean(each) for row in MAIN for each in scores[row].values())


def rates_to_add(scores: Scores, threshold: float) -> dict[Row, list[float]]:
    """The next rates of rows whose lowest or highest rate tried works."""
    wanted = {}
    for row, of_row in scores.items():
        low, high = min(of_row), max(of_row)
        new = [
            LEARNING_RATES[place]
            for rate, place in ((low, LEARNING_RATES.index(low) - 1), (high, LEARNING_RATES.index(high) + 1))
            if statistics.fmean(of_row[rate]) >= threshold and 0 <= place < len(LEARNING_RATES)
        ]
        if new:
            wanted[row] = new
    return wanted


def complete_map(rollouts: int, finish: Callable[[list[Job]], Results]) -> tuple[Scores, Results]:
    """Finish every run of the map, in the order given in the module docstring."""
    results = finish([START])
    tried: dict[Row, list[float]] = {}
    for rows in (MAIN, CONTROLS):
        added = {row: list(RATES) for row in rows}
        results |= finish(jobs_of(rows, RATES, SEEDS, rollouts))
        while added:
            for row, rates in added.items():
                tried[row] = [*tried.get(row, []), *rates]
            scores = scores_of(tried, results, rollouts)
            added = rates_to_add(scores, threshold_of(scores))
            more = [job for row, rates in added.items() for job in jobs_of([row], rates, SEEDS, rollouts)]
            results |= finish(more)
    return scores, results


def read(jobs: Iterable[Job], directory: Path) -> Results:
    """Results of jobs that must all be finished."""
    paths = {job: directory / f"{job.name}.json" for job in jobs}
    missing = [path.stem for path in paths.values() if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"--report needs every run, and {len(missing)} of {len(paths)} are not in {directory}, the first of them "
            f"{missing[0]}. Run the same command without --report to finish them."
        )
    return {job: json.loads(path.read_text()) for job, path in paths.items()}


def summarize(scores: Scores, results: Results, rollouts: int) -> dict[str, Any]:
    """The result file: provenance of the runs, the rules, the starting policy, and every row with its cells."""
    start, threshold = results[START]["metrics"], threshold_of(scores)
    origins = [result["provenance"] for result in results.values()]
    rows = {}
    for row, of_row in scores.items():
        cells = {
            rate: summarize_cell(
                [results[Job(*row, rate, seed, rollouts)] for seed in SEEDS], each, COLLAPSED * start["pass@1"]
            )
            for rate, each in of_row.items()
        }
        rows[f"{row.variant}-{row.steps}"] = summarize_row(cells, threshold)
    return {
        **provenance(),
        **{
            name: ", ".join(sorted({json.dumps(origin[name]).strip('"') for origin in origins}))
            for name in ("commit", "hardware")  # of the runs
        },
        "versions": one_of([origin["versions"] for origin in origins], "versions"),
        "runs": len(results) - 1,
        "cpu_hours": round(sum(result["cpu_seconds"] for result in results.values()) / 3600, 2),
        "settings": {
            "learning_rates": RATES,
            "seeds": SEEDS,
            "rollouts": rollouts,
            "completions_per_rollout_batch": 128,
            "test_problems": NUM_TEST,
            "samples_per_problem": NUM_SAMPLES,
            "collapsed_below": COLLAPSED * start["pass@1"],
            "works_at_share_of_best": WORKS,
            "rows": {f"{row.variant}-{row.steps}": variant_of(row)[2] for row in scores},
        },
        "start": start,
        "threshold": threshold,
        "rows": rows,
    }


def one_of(values: Sequence[Any], name: str) -> Any:
    """The value that all runs share."""
    if any(value != values[0] for value in values):
        raise ValueError(
            f"All runs must have the same {name}, got {values[0]} and others. Run them in one environment."
        )
    return values[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=ROLLOUTS, help="rollout batches of 128 completions per run")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "stability_map", help="finished runs")
    parser.add_argument("--report", action="store_true", help="write the results of the finished runs, run nothing")
    args = parser.parse_args()
    if args.report:
        report = summarize(
            *complete_map(args.rollouts, lambda jobs: read(jobs, args.output_dir)), rollouts=args.rollouts
        )
        path = RESULTS / "stability_map.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        plot(report, path.with_suffix(".png"))
        print(*page_tables(report).values(), sep="\n\n")
        print(f"written to {path}")
    else:
        complete_map(args.rollouts, lambda jobs: complete(jobs, args.output_dir, args.processes, run))


if __name__ == "__main__":
    main()
