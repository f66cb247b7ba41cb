"""
What assigning rows to ranks moves between them and holds in memory, for `benchmarks/rank_balance.py`.

"Before" is what 0.1.0.dev0 did first: every padded row of every rank was gathered to every rank, while TRL's
shuffled copy of the batch was alive as well. "After" is `UpdatePlanner.plan_step`. Rows have log-normal completion
lengths and the sampler's log-probabilities, as with vLLM; half of the groups are uninformative.

Bytes are those that a rank receives from the others, and so that all others together send to it. They follow from the
lengths and the assignment alone, so any number of ranks is counted in one process. Two ranks are also run for real, as
two processes with gloo, which must receive exactly as many bytes, and whose peak memory is measured (VmHWM).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed

from measuring import markdown_table
from opo_trl.update.planner import UpdatePlanner
from opo_trl.update.row_exchange import RowExchange

CASES = [(2, 64), (2, 256), (8, 64), (8, 512), (64, 64), (64, 256)]  # ranks, rows that each samples
REAL = (2, 256)
MICRO_BATCHES, GROUP_SIZE, SEED = 16, 8, 0
LONGEST_PROMPT, LONGEST_COMPLETION = 512, 8_192


def draw_lengths(total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # (total,) each
    """Lengths of prompts and completions, and which rows are informative."""
    generator = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(32, LONGEST_PROMPT + 1, (total // GROUP_SIZE,), generator=generator)
    completions = torch.exp(7 + torch.randn(total, generator=generator)).clamp(16, LONGEST_COMPLETION).long()
    informative = torch.randperm(total // GROUP_SIZE, generator=generator) % 2 == 0
    return prompts.repeat_interleave(GROUP_SIZE), completions, informative.repeat_interleave(GROUP_SIZE)


def padded_bytes(prompt_width: int, completion_width: int) -> int:
    """A padded row: ids and masks of 8 bytes, log-probabilities of 4, and its advantage."""
    return 16 * (prompt_width + completion_width) + 4 * completion_width + 4


def packed_bytes(prompts: torch.Tensor, completions: torch.Tensor) -> int:
    """Rows without padding: ids of 4 bytes, log-probabilities of 4, and their advantages."""
    return int(4 * (prompts + completions).sum() + 4 * completions.sum() + 4 * len(prompts))


def count(ranks: int, rows: int) -> dict[str, Any]:
    """Bytes that each rank receives and holds, before and after, counted from the lengths."""
    prompts, completions, informative = draw_lengths(ranks * rows)
    widths = int(prompts.max()), int(completions.max())
    planner = UpdatePlanner(MICRO_BATCHES, num_ranks=ranks)
    rank_rows = planner.assign(prompts + completions, informative)
    lengths_bytes = (ranks - 1) * (rows + 1) * 12  # what every rank tells of its rows
    widths_bytes = (ranks - 1) * 5 * 16  # before: the shapes of five matrices, to pad them alike
    received, held, before_held = [], [], []
    for rank in range(ranks):
        exchange = RowExchange(rank, rank_rows, prompts, completions)
        moved, own = torch.cat(exchange.received), exchange.order
        received.append(lengths_bytes + packed_bytes(prompts[moved], completions[moved]))
        plan = planner.plan(prompts[own], completions[own], rows, sum(widths))
        micro_batches = sum(
            len(part.rows) * padded_bytes(part.prompt_width, part.completion_width)
            for part in plan if part.informative
        )  # fmt: skip
        packed = packed_bytes(prompts[own], completions[own])
        batch = rows * padded_bytes(
            int(prompts[rank * rows : (rank + 1) * rows].max()), int(completions[rank * rows : (rank + 1) * rows].max())
        )
        held.append(packed + max(batch, micro_batches))
        before_held.append(2 * batch + ranks * rows * padded_bytes(*widths) + micro_batches)
    return {
        "ranks": ranks,
        "rows": rows,
        "informative_rows_kept": 1 - sum(
            int((each // rows != rank).sum()) for rank, each in enumerate(rank_rows)
        ) / int(informative.sum()),
        "before": {
            "received_bytes": widths_bytes + (ranks - 1) * rows * padded_bytes(*widths),
            "held_bytes": max(before_held),
        },
        "after": {"received_bytes": max(received), "held_bytes": max(held)},
    }  # fmt: skip


# One of two processes.


def make_batch(rank: int, ranks: int, rows: int) -> dict[str, torch.Tensor]:
    """A rank's part of the rollout batch, padded to its own longest row."""
    prompts, completions, informative = (
        each[rank * rows : (rank + 1) * rows].unsqueeze(1) for each in draw_lengths(ranks * rows)
    )
    width, longest = int(prompts.max()), int(completions.max())
    batch = {
        "prompt_mask": (torch.arange(width) >= width - prompts).long(),
        "completion_mask": (torch.arange(longest) < completions).long(),
        "sampling_per_token_logps": -torch.ones(rows, longest),
        "advantages": informative.squeeze(1).float(),
    }
    batch["prompt_ids"] = 7 * batch["prompt_mask"]
    batch["completion_ids"] = 7 * batch["completion_mask"]
    return batch


def gather_all_rows(
    planner: UpdatePlanner, batch: dict[str, torch.Tensor], accelerator: Accelerator
) -> list[dict[str, torch.Tensor]]:
    """How the package moved rows before."""
    rows = {}
    for name, tensor in batch.items():
        if tensor.ndim == 2:
            tensor = accelerator.pad_across_processes(tensor, dim=1, pad_first=name.startswith("prompt"))
        rows[name] = accelerator.gather(tensor)
    prompts, completions = (rows[f"{side}_mask"].sum(dim=1) for side in ("prompt", "completion"))
    own = planner.assign(prompts + completions, rows["advantages"] != 0)[accelerator.process_index]
    width = rows["prompt_ids"].size(1) + rows["completion_ids"].size(1)
    plan = planner.plan(prompts[own], completions[own], len(batch["advantages"]), width)
    return [
        {
            name: (
                tensor if tensor.ndim == 1
                else tensor[:, -part.prompt_width :] if name.startswith("prompt")
                else tensor[:, : part.completion_width]
            )[own[part.rows]]
            for name, tensor in rows.items()
        }
        for part in plan if part.informative
    ]  # fmt: skip


class ReceivedBytes:
    """Counts what this process receives from others in the collectives that move rows."""

    def __init__(self) -> None:
        self.total = 0
        self._all_gather, self._all_to_all = distributed.all_gather, distributed.all_to_all_single
        distributed.all_gather, distributed.all_to_all_single = self.all_gather, self.all_to_all_single

    def all_gather(self, outputs: list[torch.Tensor], tensor: torch.Tensor, **options: Any) -> Any:
        self.total += sum(output.nbytes for output in outputs) - tensor.nbytes
        return self._all_gather(outputs, tensor, **options)

    def all_to_all_single(self, output: torch.Tensor, *args: Any) -> Any:
        self.total += output.nbytes
        return self._all_to_all(output, *args)


def run_rank(method: str, result: Path) -> None:
    """Move the rows of one rollout batch, and write what this process has received and held."""
    from update_phase import resident  # imports TRL

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    rank, ranks, rows = accelerator.process_index, *REAL
    accelerator.gather(torch.zeros(1))  # connects
    planner = UpdatePlanner(MICRO_BATCHES, num_ranks=ranks)
    small = make_batch(rank, ranks, 8)
    warm_up = {name: tensor[:, -8:] if tensor.ndim == 2 else tensor for name, tensor in small.items()}
    planner.plan_step(warm_up, accelerator).micro_batches()
    before = resident("VmRSS")
    batch: Any = make_batch(rank, ranks, rows)
    if method == "before":  # TRL's shuffled copy is alive
        parents: Any = {name: tensor[torch.randperm(rows)] for name, tensor in batch.items()}
    received = ReceivedBytes()
    Path("/proc/self/clear_refs").write_text("5")
    if method == "before":
        micro_batches = gather_all_rows(planner, batch, accelerator)
        del parents
    else:
        step = planner.plan_step(batch, accelerator)
        del batch
        micro_batches = step.micro_batches()
    held = resident("VmHWM") - before
    assert micro_batches
    result.with_suffix(f".{rank}").write_text(json.dumps({"received_bytes": received.total, "held_bytes": held}))


def run_for_real() -> dict[str, Any]:
    """Both methods, each in two processes of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(REAL[0])]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # else freed tensors stay resident
    }
    found = {}
    for method in ("before", "after"):
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result"
            subprocess.run([*launcher, __file__, method, str(result)], env=environment, check=True)
            ranks = [json.loads(result.with_suffix(f".{rank}").read_text()) for rank in range(REAL[0])]
        found[method] = {name: max(each[name] for each in ranks) for name in ranks[0]}
    return {"ranks": REAL[0], "rows": REAL[1], **found}


def measure() -> dict[str, Any]:
    """Every case counted, and two ranks run."""
    report = {"counted": [count(ranks, rows) for ranks, rows in CASES], "two_processes": run_for_real()}
    (same,) = [case for case in report["counted"] if (case["ranks"], case["rows"]) == REAL]
    for method in ("before", "after"):
        run, counted = (found[method]["received_bytes"] for found in (report["two_processes"], same))
        if run != counted:
            raise AssertionError(f"{method}: two processes received {run} bytes, {counted} were counted.")
    return report


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def page_table(report: dict[str, Any]) -> str:
    """The table of docs/update.md."""
    heads = ["ranks x rows", "moved before", "moved after", "held before", "held after", "rows that stay"]
    return markdown_table(heads, [
        [
            f"{case['ranks']} x {case['rows']}",
            *(megabytes(case[when]["received_bytes"]) for when in ("before", "after")),
            *(megabytes(case[when]["held_bytes"]) for when in ("before", "after")),
            f"{case['informative_rows_kept']:.0%}".replace("%", " %"),
        ]
        for case in report["counted"]
    ])  # fmt: skip


def page_sentence(report: dict[str, Any]) -> str:
    """The sentence of docs/update.md below the table."""
    run = report["two_processes"]
    before, after = (megabytes(run[when]["held_bytes"]) for when in ("before", "after"))
    return (
        f"Two processes with gloo and {run['rows']} rows each received exactly the bytes that are counted here, and "
        f"their resident memory rose by at most {before} before and {after} after."
    )


if __name__ == "__main__":
    run_rank(sys.argv[1], Path(sys.argv[2]))
