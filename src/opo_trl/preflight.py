"""What must hold of datasets, tokenizers and models, checked before anything expensive starts."""

from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoProcessor
from trl import is_conversational


def check_datasets(
    train_dataset: Any, eval_dataset: Any, prompts_per_step: int, *, prompt_optional: bool = False
) -> None:
    """
    Refuse datasets on which training would fail late, or succeed without a single step.

    Args:
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Dataset handed to the trainer. The length of an iterable one is unknown and is not checked.
        eval_dataset (the same, or a `dict` of them, *optional*):
            As handed to the trainer.
        prompts_per_step (`int`):
            Prompts in one rollout batch: with fewer to train on, TRL reports success after 0 steps.
        prompt_optional (`bool`, *optional*, defaults to `False`):
            Whether an environment may supply the prompt.

    Raises:
        ValueError: If `prompt` is missing or there are too few rows.
    """
    datasets = [("train_dataset", train_dataset, prompts_per_step)]
    if isinstance(eval_dataset, dict):
        datasets += [(f"eval_dataset[{name!r}]", dataset, 1) for name, dataset in eval_dataset.items()]
    else:
        datasets.append(("eval_dataset", eval_dataset, 1))
    for name, dataset, rows_needed in datasets:
        columns = dataset.column_names if isinstance(dataset, Dataset | IterableDataset) else None
        if columns is not None and "prompt" not in columns and not prompt_optional:
            raise ValueError(
                f"`{name}` must have a column `prompt`, got the columns {columns}. Rename the problem's column, or "
                "load the dataset with opo_trl.data.load_math_dataset."
            )
        if isinstance(dataset, Dataset) and len(dataset) < rows_needed:
            raise ValueError(
                f"`{name}` must have at least {rows_needed} row(s), the prompts of one rollout batch, got "
                f"{len(dataset)}. Add prompts, lower per_device_train_batch_size or gradient_accumulation_steps, or "
                "raise num_generations."
            )


def load_processor(model: str, args: Any) -> Any:
    """Load what the parent would load after the model, ahead of it: its faults show before anything expensive."""
    return AutoProcessor.from_pretrained(
        model,
        revision=(args.model_init_kwargs or {}).get("revision"),
        truncation_side="left",
        padding_side="left",
        trust_remote_code=args.trust_remote_code,
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


def check_reward_values(name: str, values: Any, num_completions: int) -> list[Any]:
    """
    Refuse what a reward function returned unless it is one number or `None` for each completion.

    Args:
        name (`str`):
            Name of the reward function.
        values (`Any`):
            What it returned; for an async function, the awaited result.
        num_completions (`int`):
            Number of completions that it was called with.

    Returns:
        `list[Any]`: The values, unchanged. Use it instead of `values`, which may be an iterator that is now exhausted.

    Raises:
        ValueError: If `values` is not a sequence of that length, or one of them is neither a number nor `None`.
    """
    rule = f"The reward function {name!r} must return one number or None for each of the {num_completions} completions"
    unordered = isinstance(values, str | bytes | Mapping | Set)
    if unordered or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        hint = " Does it lack a return statement?" if values is None else ""
        raise ValueError(f"{rule}, got {_short(values)}. Return a list of that length.{hint}")
    rewards = list(values)
    if len(rewards) != num_completions:
        raise ValueError(
            f"{rule}, got {len(rewards)} values. Return a list of that length, with None for a completion that cannot "
            "be scored."
        )
    for position, reward in enumerate(rewards):
        if reward is not None and not _is_number(reward):
            raise ValueError(
                f"{rule}, got {_short(reward)} for completion {position}. Convert it with float(), or return None for "
                "a completion that cannot be scored."
            )
    return rewards


def _is_number(value: Any) -> bool:
    """Whether TRL can store the value as one float32."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    if not isinstance(value, Real | Decimal | np.bool_):
        return False
    try:
        float(value)
    except OverflowError:  # an integer of more than 308 digits
        return False
    return True


def _short(value: Any) -> str:
    """A value as a message shows it, with its type."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"
