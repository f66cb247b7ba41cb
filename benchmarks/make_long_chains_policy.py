"""
Make the policy of the long chains: a Llama of a million parameters, trained on worked solutions.

    python benchmarks/make_long_chains_policy.py

Every batch has new problems of the split `warm_start`. The first ones have few operations (`PHASES`): a small model
learns to find the operation of a label much faster in a short sequence. A run that was interrupted resumes from its
last checkpoint in `--work_dir`; problems depend on the seed and the step alone. Writes the weights in float16 (2 MB), a
configuration that loads them in float32, and the tokenizer to `benchmarks/long_chains_policy`.
"""

import argparse
import random
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from long_chains import (
    BOX,
    LABELS,
    LARGEST_NUMBER,
    LARGEST_OPERAND,
    TOKENS,
    make_problem,
    write_solution,
)
from opo_trl.scripts.arithmetic import split_of

ROOT = Path(__file__).resolve().parents[1]
POLICY = ROOT / "benchmarks" / "long_chains_policy"
PAD, EOS = "<pad>", "<eos>"
OPERATIONS = [f"{signed:+d}" for signed in range(-LARGEST_OPERAND, LARGEST_OPERAND + 1) if signed]
VOCABULARY = [PAD, EOS, BOX, *map(str, range(LARGEST_NUMBER + 1)), *OPERATIONS, *f"}}=?,; ()!|{LABELS}"]
POOL = 50  # batches that are drawn together and sorted by length, so that little of a batch is padding
LEARNING_RATE = 2e-3
WARM_UP, DECAY = 50, 0.25  # steps of linear warm-up; share of the steps in which the rate falls to 0
SAVE_STEPS = 100


class Phase(NamedTuple):
    """A part of the training: the operations of its problems and the solutions in a batch."""

    first_step: int
    fewest: int
    most: int
    batch_size: int


# The last one has more operations than the problems of the task.
PHASES = (Phase(0, 1, 3, 16), Phase(600, 2, 8, 8), Phase(1_200, 7, 16, 8))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per number, operation and other character, and one for the start of a box."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKENS), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


def make_model() -> LlamaForCausalLM:
    """
    A Llama with head dimension 32, the smallest that vLLM supports.

    It has fewer than 2^20 parameters, so that `gradient_variance.py` keeps its gradients exactly.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=5,
            num_attention_heads=4,
            head_dim=32,
            max_position_embeddings=512,
            initializer_range=0.06,
            tie_word_embeddings=True,
            pad_token_id=VOCABULARY.index(PAD),
            eos_token_id=VOCABULARY.index(EOS),
            bos_token_id=None,
        )
    )


def make_pool(seed: int, step: int) -> list[list[tuple[list[int], list[int]]]]:
    """The next `POOL` batches of (prompt ids, solution ids), each of similar lengths, in random order."""
    phase = max(phase for phase in PHASES if phase.first_step <= step)
    rng = random.Random(f"{seed}-{step}")
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    pairs = []
    while len(pairs) < POOL * phase.batch_size:
        first_label = rng.randint(0, len(LABELS) - phase.most)
        problem = make_problem(rng, phase.fewest, phase.most, first_label)
        if split_of(problem["problem"]) != "warm_start":
            continue
        texts = problem["problem"], write_solution(problem, rng)
        prompt, solution = ([ids[token] for token in re.findall(TOKENS, text)] for text in texts)
        pairs.append((prompt, [*solution, ids[EOS]]))
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    batches = [pairs[start : start + phase.batch_size] for start in range(0, len(pairs), phase.batch_size)]
    rng.shuffle(batches)
    return batches


def collate(pairs: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Right-padded token ids and labels (B, T); only solutions have labels. Causal attention needs no mask then."""
    width = max(len(prompt) + len(solution) for prompt, solution in pairs)
    input_ids = torch.full((len(pairs), width), VOCABULARY.index(PAD))
    labels = torch.full_like(input_ids, -100)
    for row, (prompt, solution) in enumerate(pairs):
        end = len(prompt) + len(solution)
        input_ids[row, :end] = torch.tensor(prompt + solution)
        labels[row, len(prompt) : end] = torch.tensor(solution)
    return {"input_ids": input_ids, "labels": labels}


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, constant, then a linear decay to 0."""
    return min((step + 1) / WARM_UP, 1.0, (steps - step) / (DECAY * steps))


def train(model: Any, steps: int, seed: int, work_dir: Path) -> None:
    """Train to `steps` optimizer steps, from the checkpoint in `work_dir` if there is one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    path, step, pool = work_dir / "checkpoint.pt", 0, []
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    losses, start, cpu = [], time.perf_counter(), time.process_time()
    while step < steps:
        if not pool or step % POOL == 0:
            pool = make_pool(seed, step - step % POOL)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, steps)
        loss = model(**collate(pool[step % POOL])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % SAVE_STEPS == 0 or step == steps:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, f"{path}.part")
            Path(f"{path}.part").replace(path)
            seconds = f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of CPU time"
            print(f"step {step:5d} of {steps}  loss {sum(losses) / len(losses):.4f}  {seconds}", flush=True)
            losses = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=POLICY)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs" / "long_chains_policy")
    parser.add_argument("--steps", type=int, default=2_200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer, model = make_tokenizer(), make_model()
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    train(model, args.steps, args.seed, args.work_dir)
    model.half().save_pretrained(args.output_dir)
    model.config.dtype = torch.float32
    model.config.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"written to {args.output_dir}", flush=True)


if __name__ == "__main__":
    main()
