"""Shared by the benchmarks: provenance, Markdown tables, intervals, and sampling and scoring of completions."""

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from opo_trl.evaluation import Record
from opo_trl.evaluation.sampling import TransformersSampler, record_seed, tokenize_prompt
from opo_trl.evaluation.scoring import score_completions
from opo_trl.scripts.judging import judge, shift
from staged_sampling import StagedSampler

RESULTS = Path(__file__).parent / "results"


def provenance(*packages: str) -> dict[str, Any]:
    """Command, commit, hardware and versions, for the head of a result file."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=RESULTS, capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no", "--", "../../src", "../../examples", ".."],
        cwd=RESULTS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit.stdout.strip() + (" with changes" if changed.stdout.strip() else ""),
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("opo-trl", "trl", "transformers", "torch", *packages)},
    }


def keep_freed_memory() -> None:
    """
    Let the processes that are started from now on keep the memory that they free (glibc's malloc).

    By default, glibc returns large blocks to the system, and every step of a long generation on the CPU then waits for
    new pages: half of the time of the long chains.
    """
    for name, value in (("MMAP_THRESHOLD_", 4 * 2**30), ("TRIM_THRESHOLD_", 8 * 2**30), ("TOP_PAD_", 2**26)):
        os.environ.setdefault(f"MALLOC_{name}", str(value))


def hardware() -> str:
    """Name of the GPU, or name of the processor and its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} threads"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, as on the pages of docs."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds with its 95 % interval by Student's t."""
    from scipy.stats import t as student_t  # of the extra `dev`, which the other benchmarks do not need

    mean = statistics.fmean(values)
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def crossing(places: Sequence[float], accuracies: Sequence[float], target: float) -> float | None:
    """Where an accuracy first reaches the target, interpolated linearly; `None` if it never does."""
    for at, (place, accuracy) in enumerate(zip(places, accuracies, strict=True)):
        if accuracy >= target:
            if at == 0:
                return place
            share = (target - accuracies[at - 1]) / (accuracy - accuracies[at - 1])
            return places[at - 1] + share * (place - places[at - 1])
    return None


def sampling_seed(seed: int, problem: Any, sample: int) -> int:
    """Seed of one completion in [`sample_records`]."""
    return record_seed(seed, problem["id"], sample)


def sample_records(
    model: Any,
    tokenizer: Any,
    problems: Dataset,
    *,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    base: Any = None,
    batch_size: int = 256,
    stages: Sequence[int] = (),
) -> list[Record]:
    """
    Sample completions of a policy at temperature 1 and score them.

    Args:
        model, tokenizer:
            The policy.
        problems ([`~datasets.Dataset`]):
            Columns `prompt`, `solution` and `id`.
        num_samples (`int`):
            Completions per problem.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        seed (`int`):
            Seed of the sampling.
        base ([`~transformers.PreTrainedModel`], *optional*):
            Starting policy; with it, records contain entropy and KL.
        batch_size (`int`, *optional*, defaults to `256`):
            Completions generated at a time.
        stages (`Sequence[int]`, *optional*):
            Lengths after which completions that have ended are set aside, as in [`StagedSampler`]; ascending, and below
            `max_new_tokens`.

    Returns:
        `list[Record]`: In the order of the problems.
    """
    sampler = (
        StagedSampler(model, tokenizer, (*stages, max_new_tokens))
        if stages
        else TransformersSampler(model, tokenizer, max_new_tokens=max_new_tokens)
    )
    rows = [(row, sample) for row in problems for sample in range(num_samples)]
    records: list[Record] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompts = [tokenize_prompt(tokenizer, row["prompt"]) for row, _ in batch]
        completions = sampler.sample(prompts, [sampling_seed(seed, row, sample) for row, sample in batch])
        records += judge(batch, completions)
        if base is not None:
            token_ids = [completion.token_ids for completion in completions]
            scored = (score_completions(scorer, prompts, token_ids) for scorer in (model, base))
            for record, own, other in zip(records[start:], *scored, strict=True):
                record.update(shift(own, other))
    return records
