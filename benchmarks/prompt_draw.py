"""
CPU time and memory of choosing prompts, by the number of prompts.

    python benchmarks/prompt_draw.py    # a table, and results/prompt_draw.json; under a minute

A step draws 512 prompts and learns from 8 completions of each, on one thread; every prompt has been seen, which is the
slowest case. Times are the process's own CPU time, medians of `--rounds` steps.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from measuring import RESULTS, markdown_table, provenance
from opo_trl.rollouts.prompt_sampling import PromptSampling

SIZES = (1_000, 10_000, 100_000, 1_000_000)
PROMPTS_PER_STEP, GROUP_SIZE = 512, 8


def measure(num_prompts: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of a step's draw and of learning from its rewards, and the bytes that a checkpoint keeps."""
    generator = torch.Generator().manual_seed(0)
    sampling = PromptSampling(num_prompts, PROMPTS_PER_STEP, GROUP_SIZE, seed=0)
    sampling.outcomes.counts = 8 * torch.rand(2, num_prompts, generator=generator)
    scored = torch.ones(PROMPTS_PER_STEP, GROUP_SIZE, dtype=torch.bool)
    seconds = []
    for step in range(rounds + 1):
        rewards = torch.rand(PROMPTS_PER_STEP, GROUP_SIZE, generator=generator).round()
        start = time.process_time()
        draw, _ = sampling.draw(step)
        sampling.observe(draw, rewards, scored)
        seconds.append(time.process_time() - start)
    state = sampling.state_dict().values()
    return {
        "prompts": num_prompts,
        "cpu_seconds": statistics.median(seconds[1:]),
        "state_bytes": sum(value.nbytes for value in state if isinstance(value, torch.Tensor)),
    }


def page_table(report: dict[str, Any]) -> str:
    """The table of docs/choosing_prompts.md."""
    rows = [
        [f"{size['prompts']:,}", f"{1000 * size['cpu_seconds']:.1f} ms", f"{size['state_bytes'] / 1e6:.2f} MB"]
        for size in report["sizes"]
    ]
    return markdown_table(["prompts", "CPU time of a step", "in a checkpoint"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {**provenance(), "sizes": [measure(size, args.rounds) for size in SIZES]}
    (RESULTS / "prompt_draw.json").write_text(json.dumps(report, indent=1) + "\n")
    print(page_table(report))


if __name__ == "__main__":
    main()
