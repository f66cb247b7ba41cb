"""Tools in several turns: the policy stops at every `=`, and a calculator writes the result for it.

    python examples/calculator.py    # a minute on a CPU

`rollout_func` samples turn by turn, and `env_mask` marks what the calculator wrote: it is attended to, but neither
trained nor counted in a completion's length. The calculator makes work in steps right, so the policy learns to call it:
the reward goes from about 0.6 to about 0.9, and calls per completion from about 1 to about 2.
"""

import re

import torch

from opo_trl import OPOConfig, OPOTrainer
from opo_trl.rewards import math_verify_reward
from opo_trl.scripts.policies import model_path
from opo_trl.scripts.problems import load_problems


def calculate(text):
    """Result of the sum that a text ends with, as text; nothing if it ends with none."""
    found = re.search(r"(\d+)([+-])(\d+)=$", text)
    return str(int(found[1]) + int(found[2] + found[3])) if found else ""


@torch.no_grad()
def rollout(prompts, trainer, turns=3):
    tokenizer, ends = trainer.processing_class, trainer.processing_class.convert_tokens_to_ids(["=", "<eos>"])
    prompt_ids = tokenizer(prompts)["input_ids"]
    completions, masks, calls = [[] for _ in prompts], [[] for _ in prompts], [0] * len(prompts)
    waiting = range(len(prompts))  # rows whose turn it is
    for turn in range(turns):
        batch = tokenizer.pad([{"input_ids": prompt_ids[i] + completions[i]} for i in waiting], return_tensors="pt")
        settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": trainer.temperature}  # the policy's own
        sampled = trainer.model.generate(**batch, **settings, max_new_tokens=16, eos_token_id=ends)
        called = []
        for i, row in zip(waiting, sampled[:, batch["input_ids"].size(1) :].tolist(), strict=True):
            ids = row[: next((n + 1 for n, token in enumerate(row) if token in ends), len(row))]  # without padding
            result = calculate(tokenizer.decode(completions[i] + ids)) if turn + 1 < turns else ""
            written = tokenizer(result)["input_ids"] if result else []
            completions[i] += ids + written
            masks[i] += [1] * len(ids) + [0] * len(written)
            calls[i] += bool(result)
            called += [i] * bool(result)
        if not (waiting := called):
            break
    logprobs = [[0.0] * len(ids) for ids in completions]  # TRL asks for them; OPO does not use them
    columns = {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logprobs, "env_mask": masks}
    return {**columns, "calls": calls}  # a column of our own, for the reward


def reward(completions, solution, calls, log_metric, **kwargs):
    log_metric("calculator/calls", sum(calls) / len(calls))
    return math_verify_reward(completions, solution)


settings = {"max_steps": 40, "logging_steps": 5, "save_strategy": "no", "report_to": "none"}
settings |= {"num_generations": 8, "per_device_train_batch_size": 64, "learning_rate": 3e-4}
settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}  # on a GPU, remove this line
problems = load_problems("arithmetic", "train", num_arithmetic=2_000)
config = OPOConfig(output_dir="outputs/calculator", **settings)
trainer = OPOTrainer(model_path("tiny_policy"), reward, config, problems, rollout_func=rollout)
trainer.train()
logged = [entry for entry in trainer.state.log_history if "reward" in entry]
for name in ("reward", "calculator/calls"):
    print(f"{name}: {logged[0][name]:.2f} in the first steps, {logged[-1][name]:.2f} in the last")
