"""
Time, memory and padded tokens of planning the micro-batches of an update, against the exact plan.

    python benchmarks/planning.py                    # a table, and a file in benchmarks/results; about 7 minutes
    python benchmarks/planning.py --exact-rows 1024  # the exact plan only up to so many rows: about a minute
    python benchmarks/planning.py --json             # the same, last line one JSON object

One thread plans rows with log-normal completion lengths and evenly distributed prompt lengths, with the trainer's limit
on the largest micro-batch. "Before" is the exact plan, which the package makes up to `EXACT_ROWS` rows. Times are
medians. Peak memory is the resident memory above the level before the plan (VmHWM, reset by clear_refs), in a process
of its own.

The excess in padded tokens over the exact plan depends on the lengths: last come the worst and the median of many draws
from several distributions, with limits on the largest micro-batch from impossible ones to loose ones.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from measuring import RESULTS, markdown_table, provenance
from opo_trl.update import cheapest_cut
from opo_trl.update.cheapest_cut import EXACT_ROWS
from opo_trl.update.microbatches import MEMORY_SHARE, MicroBatch, plan_microbatches

CASES = [(512, 64), (1_024, 64), (2_048, 64), (2_048, 256), (4_096, 256), (8_192, 256), (16_384, 256), (16_384, 1_024)]
DRAWS_ROWS, DRAWS_MICRO_BATCHES, DRAWS_SHARES = 1_024, (16, 64), (0.1, MEMORY_SHARE, 3.0)
TIMED = "any prompts"
LONGEST_PROMPT, LONGEST_COMPLETION = 2_048, 8_192
DISTRIBUTIONS = ("log-normal 0.5", "log-normal 1", "log-normal 1.5", "uniform", "bimodal", "heavy-tailed", "constant",
                 "long prompts", "any prompts", "correlated prompts", "two kinds of prompts")  # fmt: skip


def draw_lengths(distribution: str, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:  # (rows,), (rows,)
    """Lengths of prompts and completions."""
    generator = torch.Generator().manual_seed(seed)
    normal, other = torch.randn(2, rows, generator=generator)
    uniform = torch.rand(rows, generator=generator)
    prompts = torch.full((rows,), 64.0)
    completions = torch.exp(7 + normal)
    if distribution.startswith("log-normal"):
        completions = torch.exp(7 + float(distribution.split()[1]) * normal)
    elif distribution == "uniform":
        completions = LONGEST_COMPLETION * uniform
    elif distribution == "bimodal":
        completions = torch.where(uniform < 0.5, 400 + 60 * normal, 5000 + 800 * other)
    elif distribution == "heavy-tailed":
        completions = 200 * uniform ** (-1 / 0.8)
    elif distribution == "constant":
        completions = torch.full((rows,), 1000.0)
    elif distribution == "long prompts":
        prompts = torch.exp(7 + 0.7 * other)
    elif distribution == "any prompts":
        prompts = LONGEST_PROMPT * uniform
    elif distribution == "correlated prompts":
        prompts = torch.exp(6 + 0.6 * normal)
        completions = torch.exp(7 + 0.6 * normal + 0.5 * other)
    elif distribution == "two kinds of prompts":
        prompts = torch.where(uniform < 0.3, torch.exp(6 + other), 64.0)
        completions = torch.where(uniform < 0.3, 300.0, torch.exp(7 + normal))
    return prompts.clamp(16, LONGEST_PROMPT).long(), completions.clamp(1, LONGEST_COMPLETION).long()


def make_plan(
    lengths: tuple[torch.Tensor, torch.Tensor], micro_batches: int, largest: int, exact: bool
) -> list[MicroBatch]:
    cheapest_cut.EXACT_ROWS = len(lengths[0]) if exact else EXACT_ROWS
    return plan_microbatches(*lengths, micro_batches, largest)


def limit_of(lengths: tuple[torch.Tensor, torch.Tensor], micro_batches: int, share: float) -> int:
    """So large a share of the padded tokens in a micro-batch of TRL's."""
    return int(share * len(lengths[0]) // micro_batches * sum(int(each.max()) for each in lengths))


def padded_tokens(plan: list[MicroBatch]) -> int:
    return sum(micro_batch.padded_tokens for micro_batch in plan)


def measure(rows: int, micro_batches: int, exact: bool, rounds: int) -> dict[str, Any]:
    """Seconds, peak memory and padded tokens of a plan."""
    lengths = draw_lengths(TIMED, rows, seed=0)
    largest = limit_of(lengths, micro_batches, MEMORY_SHARE)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        plan = make_plan(lengths, micro_batches, largest, exact)
        seconds.append(time.perf_counter() - start)
    command = [sys.executable, __file__, "--peak-of", str(rows), str(micro_batches), str(int(exact))]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "peak_bytes": int(output.split()[-1]),
        "padded_tokens": padded_tokens(plan),
        "largest_of_limit": plan[0].padded_tokens / largest,
    }


def peak_of(rows: int, micro_batches: int, exact: bool) -> int:
    """Peak memory of one plan above the level before it, in bytes."""
    from update_phase import resident  # imports TRL, which only this process needs

    small = draw_lengths(TIMED, EXACT_ROWS + 1, seed=0)
    make_plan(small, 2, 1, exact=False)  # what a first call loads is not the plan's memory
    lengths = draw_lengths(TIMED, rows, seed=0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    make_plan(lengths, micro_batches, limit_of(lengths, micro_batches, MEMORY_SHARE), exact)
    return resident("VmHWM") - before


def compare(rows: int, micro_batches: int, with_exact: bool, rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {"rows": rows, "micro_batches": micro_batches}
    result["after"] = measure(rows, micro_batches, exact=False, rounds=rounds)
    if with_exact:
        result["before"] = measure(rows, micro_batches, exact=True, rounds=1)
        result["excess"] = result["after"]["padded_tokens"] / result["before"]["padded_tokens"] - 1
    return result


def measure_draws(seeds: int) -> dict[str, Any]:
    """Excess in padded tokens over the exact plan, and the largest micro-batch over its limit, of many draws."""
    draws = []
    for distribution in DISTRIBUTIONS:
        for seed in range(seeds):
            lengths = draw_lengths(distribution, DRAWS_ROWS, seed)
            for micro_batches in DRAWS_MICRO_BATCHES:
                least = make_plan(lengths, micro_batches, 0, exact=True)[0].padded_tokens
                for share in DRAWS_SHARES:
                    largest = limit_of(lengths, micro_batches, share)
                    exact, close = (make_plan(lengths, micro_batches, largest, exact=exact) for exact in (True, False))
                    draws.append({
                        "distribution": distribution,
                        "excess": padded_tokens(close) / padded_tokens(exact) - 1,
                        "largest_of_limit": close[0].padded_tokens / max(largest, least),
                    })  # fmt: skip
        worst = max(draw["excess"] for draw in draws if draw["distribution"] == distribution)
        print(f"{distribution:20} at worst {worst:.3%} more padded tokens than the exact plan", flush=True)
    excesses = [draw["excess"] for draw in draws]
    return {
        "rows": DRAWS_ROWS,
        "number": len(draws),
        "worst_excess": max(excesses),
        "median_excess": statistics.median(excesses),
        "largest_of_limit": max(draw["largest_of_limit"] for draw in draws),
        "worst_excess_of": {
            distribution: max(draw["excess"] for draw in draws if draw["distribution"] == distribution)
            for distribution in DISTRIBUTIONS
        },
    }


def page_table(report: dict[str, Any]) -> str:
    """The table of docs/update.md."""
    heads = ["rows on a rank", "micro-batches", "exact plan", "its memory", "plan", "its memory", "more padded tokens"]
    rows = []
    for result in report["plans"]:
        before, after = result.get("before"), result["after"]
        rows.append([
            f"{result['rows']:,}", f"{result['micro_batches']:,}",
            *([f"{before['seconds']:.2f} s", f"{before['peak_bytes'] / 1e6:.0f} MB"] if before else ["not run"] * 2),
            f"{after['seconds']:.2f} s", f"{after['peak_bytes'] / 1e6:.0f} MB",
            f"{result['excess']:.3%}".replace("%", " %") if before else "not known",
        ])  # fmt: skip
    return markdown_table(heads, rows)


def page_sentence(report: dict[str, Any]) -> str:
    """The sentence of docs/update.md below the table."""
    draws = report["draws"]
    worst, median = (f"{draws[name]:.2%}".replace("%", " %") for name in ("worst_excess", "median_excess"))
    return (
        f"In {draws['number']} draws of {draws['rows']:,} rows from {len(draws['worst_excess_of'])} distributions of "
        f"lengths, the plan has at most {worst} more padded tokens than the exact one, {median} in the median."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact-rows", type=int, default=4_096, help="most rows to make the exact plan for")
    parser.add_argument("--rounds", type=int, default=5, help="timed plans of each case; the exact ones are timed once")
    parser.add_argument("--seeds", type=int, default=3, help="draws from each distribution")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--output", type=Path, default=RESULTS / "planning.json")
    parser.add_argument("--peak-of", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak_of:
        print(peak_of(*args.peak_of))
        return
    report = {**provenance(), "exact_up_to": EXACT_ROWS}
    print(f"{report['hardware']}, one of them used")
    report["plans"] = []
    for rows, micro_batches in CASES:
        result = compare(rows, micro_batches, rows <= args.exact_rows, args.rounds)
        report["plans"].append(result)
        print(page_table({"plans": [result]}).splitlines()[-1], flush=True)
    report["draws"] = measure_draws(args.seeds)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{page_table(report)}\n\n{page_sentence(report)}")
    print(f"written to {args.output}")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
