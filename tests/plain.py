"""TRL's own trainer and configuration with reliable runs, and nothing of OPO's."""

from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from opo_trl.runs.reliable_runs import ReliableRuns
from test_resume import PROMPTS, STEPS, letters_reward
from tiny import GROUP_SIZE, tiny_model, tiny_tokenizer


class PlainTrainer(ReliableRuns, GRPOTrainer):
    """The one line of the how-to page."""


def plain_trainer(output_dir: Any, model: Any = None, num_steps: int = STEPS, **settings: Any) -> PlainTrainer:
    """Eight completions of two prompts a step, sampled for real, as `sampling_trainer` has them."""
    callbacks = settings.pop("callbacks", None)
    defaults: dict[str, Any] = {
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": GROUP_SIZE,
        "max_completion_length": 12, "max_steps": num_steps, "learning_rate": 1e-2, "max_grad_norm": 0.5,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    return PlainTrainer(
        tiny_model() if model is None else model,
        letters_reward,
        GRPOConfig(str(output_dir), **{**defaults, **settings}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )
