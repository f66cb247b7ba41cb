"""
What dealing rows across ranks gains: data parallel waits for the slowest rank, and rows are not alike.

    python benchmarks/rank_balance.py

Simulated in padded tokens, for 1, 2 and 8 ranks: rollout batches with log-normal lengths, of which a share of groups
has nothing to learn from, cut by the package's own planner. "own rows" keeps on every rank the rows it sampled; "dealt"
spreads all rows that learn over the ranks, as the trainer does. Under DDP ranks meet once a step, so a step costs the
largest total of a rank; under ZeRO-3 and FSDP they meet in every micro-batch, so it costs the sum of the largest.
Speed-ups are against TRL's plan: every row, padded to the longest of the rank's batch.

Last comes what the limit on the largest micro-batch costs: real over padded tokens, at several shares of TRL's.
"""

import statistics

import torch

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
        silent = torch.randperm(groups, generator=generator)[: round(uninformative * groups)]
        learns = torch.ones(groups, GROUP_SIZE, dtype=torch.bool)
        learns[silent] = False
        learns = learns.flatten()
        own = [torch.arange(r * rows, (r + 1) * rows) for r in range(ranks)]
        widths = [PROMPT_LENGTH + int(lengths[hand].max()) for hand in own]
        trl = rows * max(widths)
        largest = int(MEMORY_SHARE * rows // micro_batches * max(widths))
        for name, hands in (
            ("own rows", [hand[learns[hand]] for hand in own]),
            ("dealt", UpdatePlanner(micro_batches, num_ranks=ranks).assign(lengths + PROMPT_LENGTH, learns)),
        ):
            costs = torch.tensor([micro_batch_tokens(lengths[hand], micro_batches, largest) for hand in hands])
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


def main() -> None:
    print(f"{'ranks x rows, micro-batches, uninformative':46}{'DDP: own':>10}{'dealt':>8}{'gain':>7}"
          f"{'ZeRO-3: own':>14}{'dealt':>8}{'gain':>7}")  # fmt: skip
    for rows, micro_batches in ((64, 8), (16, 8), (64, 64)):
        for uninformative in (0.0, 0.5):
            for ranks in (1, 2, 8):
                s = simulate(ranks, rows, micro_batches, uninformative)
                cells = []
                for engine in ("DDP", "ZeRO-3"):
                    own, dealt = s[f"own rows, {engine}"], s[f"dealt, {engine}"]
                    cells.append(f"{own:9.2f}x{dealt:7.2f}x{dealt / own - 1:+7.0%}")
                print(f"{f'{ranks} x {rows}, {micro_batches}, {uninformative}':46}{cells[0]}    {cells[1]}", flush=True)
    for share in (1.0, 0.75, 0.5, 0.4):
        print(f"largest micro-batch at most {share} of TRL's: {token_efficiency(share):.3f} of the tokens are real")


if __name__ == "__main__":
    main()
