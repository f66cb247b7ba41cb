"""
Runs that are spoilt on purpose, and a healthy one: what the report must make visible at first sight.

    python tests/spoilt_runs.py FOLDER    # trains each for a few steps, and writes its report
"""

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from opo_trl.report import write_report
from opo_trl.rewards import math_verify_reward
from tiny import scripted_trainer

# Completions of one prompt: lengths and answers vary; "12" is right.
ANSWERS = ["boxed: \\boxed{12}", "\\boxed{12}", "it is \\boxed{7}", "\\boxed{30} or so"]
PROSE = ["it is twelve", "12", "the result is 12", "no idea"]
TITLES = {
    "truncated": "All completions are truncated",
    "no boxes": "No completion has a boxed answer",
    "always 1": "The reward is always 1",
}


def always_one(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def spoilt_run(kind: str, folder: Path, steps: int = 2, **overrides: Any) -> Path:
    """Train a tiny policy on scripted completions: one of `TITLES`, or `"healthy"`."""
    texts = PROSE if kind == "no boxes" else ANSWERS

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        ids = [tokenizer(texts[i % 4])["input_ids"] for i in range(len(prompts))]
        ids = [row[:6] if kind == "truncated" else [*row, tokenizer.eos_token_id] for row in ids]
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": ids,
            "logprobs": [[0.0] * len(row) for row in ids],
        }

    trainer = scripted_trainer(
        folder,
        rollout=rollout,
        reward_funcs=always_one if kind == "always 1" else math_verify_reward,
        train_dataset=Dataset.from_list([{"prompt": f"{n}+{12 - n}=?", "solution": "12"} for n in range(12)]),
        max_steps=steps,
        learning_rate=1e-3,
        log_completions=True,
        num_completions_to_print=0,
        **overrides,
    )
    trainer.train()
    trainer.save_state()
    return folder


if __name__ == "__main__":
    for each in [*TITLES, "healthy"]:
        print(write_report(spoilt_run(each, Path(sys.argv[1]) / each.replace(" ", "_"), 8, log_token_logps=True)))
