"""Make the tiny policy of the quickstart: a character-level Llama, pre-trained on sums.

    python examples/make_tiny_policy.py

Some of the solutions in the training data are in steps (`17+8=25,25-12=13 \\boxed{13}`). The others are direct guesses,
mostly with a small error (`\\boxed{14}`). So the initial policy samples both forms, and OPO trains it to work in steps.
Takes about 5 minutes on one core and writes the weights (about 430 kB) and the tokenizer to the package's copy, or to
`--output_dir`.
"""

import argparse
import random
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opo_trl.scripts.arithmetic import load_arithmetic
from opo_trl.scripts.policies import EMBEDDED_MODEL, model_path

PAD, EOS, BOX = "<pad>", "<eos>", "\\boxed{"
VOCABULARY = [PAD, EOS, BOX, *"}0123456789+-=?, "]
GUESS_SHARE = 0.55
LARGEST_GUESS_ERROR = 3
BATCH_SIZE = 256
LEARNING_RATE = 3e-3
NUM_PROBLEMS = 20_000


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and one for the start of a box; every other character is read as `?`."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="?"))
    tokenizer.normalizer = normalizers.Replace("\n", "")  # which ends each message of `to_plain_text`
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


def make_model() -> LlamaForCausalLM:
    """A Llama with head dimension 32, the smallest that vLLM supports."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=VOCABULARY.index(PAD),
            eos_token_id=VOCABULARY.index(EOS),
            bos_token_id=None,
        )
    )


def make_batch(problems: Dataset, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> dict[str, torch.Tensor]:
    """Sample left-padded token ids and labels (B, T); only the solution has labels."""
    pairs = []
    for index in rng.choices(range(len(problems)), k=BATCH_SIZE):
        row = problems[index]
        if rng.random() < GUESS_SHARE:
            guess = abs(int(row["answer"]) + rng.randint(-LARGEST_GUESS_ERROR, LARGEST_GUESS_ERROR))
            solution = f"{BOX}{guess}}}"
        else:
            solution = f"{row['steps']} {BOX}{row['answer']}}}"
        pairs.append((row["problem"], solution + EOS))
    batch = tokenizer([problem + solution for problem, solution in pairs], padding=True, return_tensors="pt")
    labels = batch["input_ids"].clone()
    for row_labels, solution_ids in zip(
        labels, tokenizer([solution for _, solution in pairs])["input_ids"], strict=True
    ):
        row_labels[: -len(solution_ids)] = -100
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(model_path(EMBEDDED_MODEL)))
    parser.add_argument("--steps", type=int, default=2_500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer, model = make_tokenizer(), make_model()
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)

    problems = load_arithmetic("warm_start", NUM_PROBLEMS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, args.steps, pct_start=0.05)
    for step in range(1, args.steps + 1):
        loss = model(**make_batch(problems, tokenizer, rng)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5d} of {args.steps}  loss {loss.item():.3f}", flush=True)

    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"written to {args.output_dir}", flush=True)


if __name__ == "__main__":
    main()
