"""OPO on your own problems with your own reward: `python examples/minimal.py [MODEL]`, a minute on a CPU."""

import random
import re
import sys

from datasets import Dataset

from opo_trl import OPOConfig, OPOTrainer
from opo_trl.scripts.policies import model_path

model = sys.argv[1] if len(sys.argv) > 1 else model_path("tiny_policy")  # any causal language model
# The tiny policy has tokens for digits, + - = ? , space, \boxed{ and }: it reads any other character as `?`.
rng = random.Random(0)
sums = [(rng.randint(1, 49), rng.randint(1, 49), rng.randint(1, 49)) for _ in range(2_000)]
problems = Dataset.from_list([{"prompt": f"{a}+{b}+{c}=?", "answer": a + b + c} for a, b, c in sums])


def last_number_is_right(completions, answer, **kwargs):
    """1 if the last number of a completion is the answer; columns of the dataset are passed as arguments."""
    numbers = [re.findall(r"\d+", completion) for completion in completions]
    return [float(found[-1:] == [str(right)]) for found, right in zip(numbers, answer, strict=True)]


config = OPOConfig(
    output_dir="outputs/minimal",
    max_steps=60,
    learning_rate=1e-4,  # for 100,000 parameters; about 1e-6 for a larger model
    num_generations=8,  # completions per problem, the group of a baseline
    per_device_train_batch_size=128,  # completions per step: 16 problems
    max_completion_length=32,
    logging_steps=10,
    use_cpu=True,  # on a GPU, remove this line and the next two
    bf16=False,
    gradient_checkpointing=False,
)
trainer = OPOTrainer(model=model, reward_funcs=last_number_is_right, args=config, train_dataset=problems)
trainer.train()
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print(f"reward: {rewards[0]:.2f} in the first steps, {rewards[-1]:.2f} in the last")
