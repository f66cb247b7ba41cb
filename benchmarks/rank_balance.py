"""
What assigning rows to ranks gains, and what it moves: data parallel waits for the slowest rank, and rows are not alike.

    python benchmarks/rank_balance.py            # tables, and a file in benchmarks/results; about a minute
    python benchmarks/rank_balance.py --traffic  # only what is moved and held, and the file; a few seconds

Simulated in padded tokens, for 1, 2 and 8 ranks: rollout batches with log-normal lengths, of which a share of groups
has nothing to learn from, cut by the package's own planner. "own rows" keeps on every rank the rows it sampled;
"assigned" spreads all informative rows over the ranks, as the trainer does. Under DDP ranks meet once a step, so a step
costs the largest total of a rank; under ZeRO-3 and FSDP they meet in every micro-batch, so it costs the sum of the
largest. Speed-ups are against TRL's plan: every row, padded to the longest of the rank's batch.

Next comes what the limit on the largest micro-batch costs: real over padded tokens, at several shares of TRL's. Last
comes what ranks receive and hold when rows are assigned, before and after only those that change rank were moved
(`benchmarks/row_traffic.py`): two ranks run as processes, the others counted.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

import row_traffic
from measuring import RESULTS, provenance
from opo_trl.update.microbatches import MEMORY_SHARE, plan_microbatches
from opo_trl.update.planner import UpdatePlanner

PROMPT_LENGTH, LONGEST, GROUP_SIZE, BATCHES = 32, 512, 8, 40


def draw_lengths(number: int, generator: torch.Generator) -> torch.Tensor:  # (number,)
    """Log-normal completion lengths."""
    return torch.exp(5.0 + 0.7 * torch.randn(number, generator=generator)).clamp(16, LONGEST).long()


def micro_batch_tokens(lengths: torch.Tensor, micro_batches: int, largest: int) -> list[int]:
    """Padded tokens of one rank's micro-batches, the largest first."""
    plan = plan_microbatches(torch.full_like(lengths, PROMPT_LENGTH), lengths, micro_batches, largest)
    return [micro_batch.padded_tokens for micro_batch in plan]


def simulate(ranks: int, rows: int, micro_batches: int, uninformative: float) -> dict[str, float]:
    """Median speed-ups over TRL's plan for a rank's `rows` in `micro_batches`."""
    generator = torch.Generator().manual_seed(0)
    speedups: dict[str, list[float]] = {}
    for _ in range(BATCHES):
        total = ranks * rows
        lengths = draw_lengths(total, generator)
        groups = total // GROUP_SIZE
        chosen = torch.randperm(groups, generator=generator)[: round(uninformative * groups)]
        informative = torch.ones(groups, GROUP_SIZE, dtype=torch.bool)
        informative[chosen] = False
        informative = informative.flatten()
        own = [torch.arange(r * rows, (r + 1) * rows) for r in range(ranks)]
        widths = [PROMPT_LENGTH + int(lengths[rank_rows].max()) for rank_rows in own]
        trl = rows * max(widths)
        largest = int(MEMORY_SHARE * rows // micro_batches * max(widths))
        for name, assigned in (
            ("own rows", [rank_rows[informative[rank_rows]] for rank_rows in own]),
            ("assigned", UpdatePlanner(micro_batches, num_ranks=ranks).assign(lengths + PROMPT_LENGTH, informative)),
        ):
            costs = torch.tensor(
                [micro_batch_tokens(lengths[rank_rows], micro_batches, largest) for rank_rows in assigned]
            )
            speedups.setdefault(f"{name}, DDP", []).append(trl / float(costs.sum(dim=1).max()))
            speedups.setdefault(f"{name}, ZeRO-3", []).append(trl / float(costs.max(dim=0).values.sum()))
    return {name: statistics.median(values) for name, values in speedups.items()}


def token_efficiency(memory_share: float, rows: int = 64, micro_batches: int = 8) -> float:
    """Real over padded tokens on one rank with nothing left out, where the largest micro-batch is so limited."""
    generator = torch.Generator().manual_seed(0)
    real = padded = 0
    for _ in range(BATCHES):
        lengths = draw_lengths(rows, generator)
        largest = int(memory_share * rows // micro_batches * (PROMPT_LENGTH + int(lengths.max())))
        real += int(lengths.sum()) + rows * PROMPT_LENGTH
        padded += sum(micro_batch_tokens(lengths, micro_batches, largest))
    return real / padded


def print_simulated() -> None:
    print(f"{'ranks x rows, micro-batches, uninformative':46}{'DDP: own':>10}{'assigned':>9}{'gain':>7}"
          f"{'ZeRO-3: own':>14}{'assigned':>9}{'gain':>7}")  # fmt: skip
    for rows, micro_batches in ((64, 8), (16, 8), (64, 64)):
        for uninformative in (0.0, 0.5):
            for ranks in (1, 2, 8):
                s = simulate(ranks, rows, micro_batches, uninformative)
                cells = []
                for engine in ("DDP", "ZeRO-3"):
                    own, assigned = s[f"own rows, {engine}"], s[f"assigned, {engine}"]
                    cells.append(f"{own:9.2f}x{assigned:8.2f}x{assigned / own - 1:+7.0%}")
                print(f"{f'{ranks} x {rows}, {micro_batches}, {uninformative}':46}{cells[0]}    {cells[1]}", flush=True)
    for share in (1.0, 0.75, 0.5, 0.4):
        print(f"largest micro-batch at most {share} of TRL's: {token_efficiency(share):.3f} of the tokens are real")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traffic", action="store_true", help="only what is moved and held")
    parser.add_argument("--output", type=Path, default=RESULTS / "rank_balance.json")
    args = parser.parse_args()
    if not args.traffic:
        print_simulated()
    report = {**provenance("accelerate"), **row_traffic.measure()}
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{row_traffic.page_table(report)}\n\n{row_traffic.page_sentence(report)}")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
