"""What must hold of datasets, tokenizers and models, checked before anything expensive starts."""

from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from trl import is_conversational


def by_name(eval_dataset: Any) -> dict[str, Any]:
    """What messages call each evaluation dataset: Trainer takes none, one, or several by name."""
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}


def check_prompts(dataset: Any, name: str, prompt_optional: bool = False, prompts_needed: int = 1) -> None:
    """
    Refuse a dataset on which training would fail late, or succeed without a single step.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset handed to the trainer. The length of an iterable one is unknown and is not checked.
        name (`str`):
            What the message calls it.
        prompt_optional (`bool`, *optional*, defaults to `False`):
            Whether an environment may supply the prompt.
        prompts_needed (`int`, *optional*, defaults to `1`):
            Prompts in one rollout batch: with fewer, TRL reports success after 0 steps.

    Raises:
        ValueError: If `prompt` is missing or there are too few rows.
    """
    columns = dataset.column_names if isinstance(dataset, Dataset | IterableDataset) else None
    if columns is not None and "prompt" not in columns and not prompt_optional:
        raise ValueError(
            f"`{name}` must have a column `prompt`, got the columns {columns}. Rename the problem's column, or load "
            "the dataset with opo_trl.data.load_math_dataset."
        )
    if isinstance(dataset, Dataset) and len(dataset) < prompts_needed:
        raise ValueError(
            f"`{name}` must have at least {prompts_needed} row(s), the prompts of one rollout batch, got "
            f"{len(dataset)}. Add prompts, lower per_device_train_batch_size or gradient_accumulation_steps, or raise "
            "num_generations."
        )


def check_tokenizer(dataset: Any, processing_class: Any) -> None:
    """
    Refuse a tokenizer that cannot render or pad the prompts of `dataset`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset whose first prompt is looked at; any other kind is taken to be plain text.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor that holds one.

    Raises:
        ValueError: If prompts are messages and there is no chat template, or there is neither a pad nor an eos token.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} must have a pad or an eos token, got neither. Set "
            "tokenizer.eos_token and pass the tokenizer as `processing_class`."
        )
    holds_messages = isinstance(dataset, Dataset) and "prompt" in dataset.column_names and is_conversational(dataset[0])
    if holds_messages and not processing_class.chat_template:
        raise ValueError(
            f"Prompts are messages, so the tokenizer must have a chat template; {tokenizer.name_or_path!r} has none. "
            "Set tokenizer.chat_template and pass the tokenizer as `processing_class`, or use plain-text prompts "
            "(opo_trl.data.to_plain_text)."
        )


def check_trainable(model: nn.Module) -> None:
    """
    Refuse a model that training cannot move: rewards and gradient norms would look alive all the same (trl#6700).

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to be trained.

    Raises:
        ValueError: If no parameter of the model is trainable.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"`model` must have a trainable parameter, got a {type(model).__name__} with none: training would change "
            "nothing. Load an adapter with PeftModel.from_pretrained(..., is_trainable=True), or pass the base model "
            "with a `peft_config`."
        )


def pass_at_k_reward(name: str | None, reward_funcs: Any) -> str | None:
    """
    Name of the reward that decides what is correct in evaluation's pass@k, or `None` where there is none.

    Raises:
        ValueError: If `name` is given and no reward is called so.
    """
    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    names = [getattr(function, "__name__", None) for function in functions]
    if name is None:
        return "math_verify_reward" if "math_verify_reward" in names else None
    if name not in names:
        raise ValueError(f"`pass_at_k_reward` must name one of the reward functions {names}, got {name!r}.")
    return name
