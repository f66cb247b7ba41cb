"""A reward that is not mathematics: as many different characters as possible, as in TRL's quickstart.

    python examples/own_reward.py [MODEL]    # a minute on a CPU

With the tiny policy, the reward (different characters per completion) goes from about 14 to about 18.
"""

import sys

from datasets import Dataset

from opo_trl import OPOConfig, OPOTrainer
from opo_trl.scripts.arithmetic import load_arithmetic
from opo_trl.scripts.policies import model_path

model = sys.argv[1] if len(sys.argv) > 1 else model_path("tiny_policy")  # any causal language model
prompts = Dataset.from_dict({"prompt": load_arithmetic("train", 2_000)["problem"]})


def different_characters(completions, **kwargs):
    """Any number will do: OPO divides by no standard deviation, and a larger reward is a larger gradient."""
    return [float(len(set(completion))) for completion in completions]


config = OPOConfig(
    output_dir="outputs/own_reward",
    max_steps=40,
    learning_rate=3e-4,  # for 100,000 parameters; about 1e-6 for a larger model
    num_generations=8,  # completions per prompt, the group of a baseline
    per_device_train_batch_size=64,  # completions per step: 8 prompts
    max_completion_length=32,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    use_cpu=True,  # on a GPU, remove this line and the next two
    bf16=False,
    gradient_checkpointing=False,
)
trainer = OPOTrainer(model=model, reward_funcs=different_characters, args=config, train_dataset=prompts)
trainer.train()
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print(f"reward: {rewards[0]:.2f} in the first steps, {rewards[-1]:.2f} in the last")
