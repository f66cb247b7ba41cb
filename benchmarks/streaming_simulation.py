"""
Simulated step time of exactly on-policy training on 8 to 64 GPUs: colocated, disaggregated, and streamed.

    python benchmarks/streaming_simulation.py          # a table, and a file in benchmarks/results; about a minute
    python benchmarks/streaming_simulation.py --json   # the same, last line one JSON object

Nothing here was run on a GPU: it is arithmetic on published peak numbers and stated efficiencies, to choose a layout
by, not to quote as speed. The modes are:

- "colocated": all GPUs sample, then all of them train. Engine and trainer change places twice a step (`SWITCH`).
- "disaggregated": some GPUs sample while the others wait, then the others train while the first wait.
- "streamed": as disaggregated, but groups are trained in waves while others are sampled, as the trainer cuts them
  (`opo_trl.rollouts.waves`): a wave ends with a micro-batch, and takes at least a quarter of the groups that are left.
  The optimizer steps after the last group, so the gradient is that of the other modes.

For every number of GPUs, the split with the shortest step is taken, for disaggregated and streamed apart.

Sampling. Each GPU holds a copy of the model and decodes its requests together, at most `SLOTS` at a time and as many as
its memory has room for. A decoding step reads the weights and every active request's cache (memory bound), or
multiplies (compute bound), whichever takes longer. Prompts are read at the same rate of multiplication. Groups are
submitted at once and assigned to the GPUs in turn.

Training. 6 FLOPs per parameter and token, 8 with the forward that activation checkpointing repeats, and attention's
own; `MFU` of the peak. Trainers share every wave of finished groups evenly and pay `WAVE` once per wave, for gathering
sharded weights. No padding is counted.

Sources: peak numbers from NVIDIA's H100 SXM data sheet (989 TFLOP/s in dense bf16, 3.35 TB/s); the model's shape from
the published configuration of Qwen2.5-7B; batch, group size and lengths as in the paper's setting (arXiv 2505.23585:
256 prompts x 16 completions), lengths log-normal and cut at 32,768. The efficiencies are assumptions: change them at
the head of the file.
"""

import argparse
import heapq
import json
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from measuring import RESULTS, markdown_table, provenance
from opo_trl.rollouts.waves import WaveSchedule

# NVIDIA H100 SXM, data sheet.
PEAK_FLOPS, BANDWIDTH, MEMORY = 989e12, 3.35e12, 80e9
# Qwen2.5-7B, config.json.
PARAMETERS, LAYERS, HIDDEN, KV_HEADS, HEAD_DIM = 7.6e9, 28, 3_584, 4, 128
CACHE_PER_TOKEN = 2 * 2 * LAYERS * KV_HEADS * HEAD_DIM  # bytes: keys and values in bf16
# Assumptions.
DECODE_BANDWIDTH, DECODE_FLOPS, MFU = 0.7, 0.5, 0.4  # shares of the peak that are reached
MEMORY_SHARE = 0.9  # of a GPU's memory that the engine takes
SLOTS = 256  # vLLM's default number of requests that a GPU decodes together
STEP_OVERHEAD = 2e-3  # s, of scheduling and sampling in each decoding step
SYNC = 2.0  # s, for sending the weights to the engines
SWITCH = 5.0  # s, for giving the GPU's memory to the other side, twice a step when colocated
MICRO_BATCHES = 64  # of a step: 4 groups each
WAVE = 0.5  # s, once per wave of groups that is trained
TRAINER_BYTES = 18  # per parameter, sharded over the trainers: bf16 weights, fp32 gradient, master weights and Adam
TRAINER_MEMORY = 60e9  # of a GPU that these may take, beside activations

PROMPTS, GROUP_SIZE, PROMPT_LENGTH, LONGEST = 256, 16, 256, 32_768
SEEDS = (0, 1, 2)

Sampled = dict[int, dict[int, tuple[np.ndarray, float]]]  # seed -> samplers -> ends of groups, and seconds busy


@dataclass(frozen=True)
class Workload:
    """Completion lengths: log-normal, `between` of the variance of their logarithm between prompts."""

    median: float
    sigma: float
    between: float
    informative: float = 1.0  # share of groups that are trained

    def draw(self, seed: int) -> tuple[np.ndarray, np.ndarray]:  # (P, K), (P,)
        generator = np.random.default_rng(seed)
        of_prompt = generator.standard_normal((PROMPTS, 1)) * self.between**0.5
        own = generator.standard_normal((PROMPTS, GROUP_SIZE)) * (1 - self.between) ** 0.5
        lengths = np.exp(np.log(self.median) + self.sigma * (of_prompt + own)).clip(16, LONGEST).astype(int)
        return lengths, generator.random(PROMPTS) < self.informative


WORKLOADS = {
    "short, 1k": Workload(1_000, 0.7, 0.5),
    "long, 4k": Workload(4_000, 0.9, 0.5),
    "long, 4k, lengths vary within prompts": Workload(4_000, 0.9, 0.1),
    "long, 4k, half of the groups informative": Workload(4_000, 0.9, 0.5, 0.5),
    "very long, 8k": Workload(8_000, 0.9, 0.5),
}


def decode_seconds(requests: int, cached: float) -> float:
    """Seconds of one decoding step of a GPU with so many requests and cached tokens."""
    memory = (2 * PARAMETERS + CACHE_PER_TOKEN * cached) / (DECODE_BANDWIDTH * BANDWIDTH)
    compute = 2 * PARAMETERS * requests / (DECODE_FLOPS * PEAK_FLOPS)
    return max(memory, compute) + STEP_OVERHEAD


def sample_on_one(lengths: np.ndarray) -> np.ndarray:  # (N,) -> (N,)
    """
    When each of one GPU's requests ends, in seconds; they start in order, as places become free.

    Between two ends the requests are the same, and the cache grows by one token per request and decoding step.
    """
    room = (MEMORY_SHARE * MEMORY - 2 * PARAMETERS) / CACHE_PER_TOKEN  # tokens
    expected = float(lengths.mean()) + PROMPT_LENGTH  # a request starts if there is room for an average one
    read_prompt = 2 * PARAMETERS * PROMPT_LENGTH / (DECODE_FLOPS * PEAK_FLOPS) / GROUP_SIZE  # a group shares its prompt
    ends = np.zeros(len(lengths))
    active: list[tuple[int, int]] = []  # decoding step at which a request ends, and its number
    now, cached, step, waiting = 0.0, 0.0, 0, 0
    while active or waiting < len(lengths):
        planned = cached
        while waiting < len(lengths) and len(active) < SLOTS and (not active or planned + expected <= room):
            heapq.heappush(active, (step + int(lengths[waiting]), waiting))
            planned, cached, now, waiting = planned + expected, cached + PROMPT_LENGTH, now + read_prompt, waiting + 1
        end, request = heapq.heappop(active)
        requests, steps = len(active) + 1, end - step
        now += steps * decode_seconds(requests, cached + requests * steps / 2)
        cached += requests * steps - float(lengths[request]) - PROMPT_LENGTH
        step, ends[request] = end, now
    return ends


def sample(lengths: np.ndarray, devices: int) -> tuple[np.ndarray, float]:  # (P, K) -> (P,)
    """When each group ends if `devices` GPUs sample, and the seconds that they are busy, in all."""
    ends, busy = np.zeros(len(lengths)), 0.0
    for device in range(devices):
        groups = np.arange(device, len(lengths), devices)
        if len(groups):
            finished = sample_on_one(lengths[groups].flatten())
            ends[groups] = finished.reshape(len(groups), -1).max(axis=1)
            busy += float(finished.max())
    return ends, busy


def train_seconds(lengths: np.ndarray) -> np.ndarray:  # (P, K) -> (P,)
    """GPU seconds of the forward and backward passes of each group."""
    tokens = lengths + PROMPT_LENGTH
    attention = 2 * LAYERS * HIDDEN * tokens.astype(float) ** 2  # of one forward pass, causal
    flops = 8 * PARAMETERS * tokens + 4 * attention
    return flops.sum(axis=1) / (MFU * PEAK_FLOPS)


def train_streamed(ends: np.ndarray, work: np.ndarray, devices: int) -> float:  # (P,), (P,)
    """When the last group is trained, in the waves of the trainer."""
    order, schedule = ends.argsort(), WaveSchedule(len(ends), MICRO_BATCHES)
    ends, work = ends[order], work[order]
    now, taken = 0.0, 0
    while taken < len(ends):
        complete = int(np.searchsorted(ends, now, side="right"))
        size = schedule.wave_size(taken, complete - taken, len(ends) - complete)
        if size:
            now += WAVE + float(work[taken : taken + size].sum()) / devices
            taken += size
        else:
            now = float(ends[complete])
    return now


def fewest_trainers() -> int:
    return int(np.ceil(PARAMETERS * TRAINER_BYTES / TRAINER_MEMORY))


def step(workload: Workload, devices: int, seed: int, ends_of: dict[int, tuple[np.ndarray, float]]) -> dict[str, Any]:
    """Seconds of a step in each mode, at each split; `ends_of` keeps what so many samplers need."""
    lengths, informative = workload.draw(seed)
    work = np.where(informative, train_seconds(lengths), 0.0)
    found: dict[str, Any] = {"disaggregated": {}, "streamed": {}}
    for samplers in range(1, devices + 1):
        trainers = devices - samplers
        if 0 < trainers < fewest_trainers():
            continue
        if samplers not in ends_of:
            ends_of[samplers] = sample(lengths, samplers)
        ends, busy = ends_of[samplers]
        if not trainers:
            update = WAVE + float(work.sum()) / devices
            found["colocated"] = {"seconds": float(ends.max()) + update + SYNC + 2 * SWITCH}
            continue
        update = float(work.sum()) / trainers
        for mode, last in (
            ("disaggregated", float(ends.max()) + WAVE + update),
            ("streamed", train_streamed(ends, work, trainers)),
        ):
            seconds = max(last, float(ends.max())) + SYNC
            found[mode][samplers] = {
                "seconds": seconds,
                "samplers_idle": 1 - busy / samplers / seconds,
                "trainers_idle": 1 - update / seconds,
            }
    return found


def simulate(workload: Workload, devices: int, sampled: Sampled) -> dict[str, Any]:
    """Medians over seeds, at the split that is best for each mode."""
    steps = [step(workload, devices, seed, sampled[seed]) for seed in SEEDS]
    report: dict[str, Any] = {"colocated": {"seconds": statistics.median(one["colocated"]["seconds"] for one in steps)}}
    for mode in ("disaggregated", "streamed"):
        medians = {
            samplers: {
                name: statistics.median(one[mode][samplers][name] for one in steps) for name in steps[0][mode][samplers]
            }
            for samplers in steps[0][mode]
        }
        best = min(medians, key=lambda samplers: medians[samplers]["seconds"])
        report[mode] = {"samplers": best, "trainers": devices - best, **medians[best]}
    synchronous = min(report["colocated"]["seconds"], report["disaggregated"]["seconds"])
    report["gain"] = synchronous / report["streamed"]["seconds"]
    return report


def page_table(report: dict[str, Any]) -> str:
    rows = []
    for name, each in report["workloads"].items():
        for devices, found in each.items():
            split, streamed = found["disaggregated"], found["streamed"]
            rows.append([
                name, devices, f"{found['colocated']['seconds']:.0f} s",
                f"{split['seconds']:.0f} s ({split['samplers']} + {split['trainers']})",
                f"{streamed['seconds']:.0f} s ({streamed['samplers']} + {streamed['trainers']})",
                f"{streamed['samplers_idle']:.0%}, {streamed['trainers_idle']:.0%}".replace("%", " %"),
                f"{found['gain']:.2f}x",
            ])  # fmt: skip
    headings = ["completions", "GPUs", "colocated", "disaggregated (sample + train)", "streamed (sample + train)",
                "idle: samplers, trainers", "streamed against the better synchronous"]  # fmt: skip
    return markdown_table(headings, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 16, 32, 64], help="numbers of GPUs")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python benchmarks/streaming_simulation.py",
        **provenance(),
        "simulated": True,
        "workloads": {},
    }
    for name, workload in WORKLOADS.items():
        report["workloads"][name] = {}
        sampled: Sampled = {seed: {} for seed in SEEDS}
        for devices in args.devices:
            found = report["workloads"][name][str(devices)] = simulate(workload, devices, sampled)
            print(
                f"{name:45} {devices:3} GPUs  streamed {found['streamed']['seconds']:6.0f} s  {found['gain']:.2f}x",
                flush=True,
            )
    report["settings"] = {name: asdict(workload) for name, workload in WORKLOADS.items()}
    print(page_table(report))
    path = RESULTS / "streaming_simulation.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {path}")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
