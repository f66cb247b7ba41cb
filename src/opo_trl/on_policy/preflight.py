"""What must hold of datasets, tokenizers and models, checked before anything expensive starts."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoProcessor
from trl import GRPOTrainer, is_conversational

from .reward_parameters import check_reward_parameters, columns_of, named_datasets, reward_names
from .unknown_tokens import warn_of_unknown_tokens


def check_arguments(
    model: Any,
    reward_funcs: Any,
    args: Any,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """
    Check the arguments of an [`OPOTrainer`] before its model is loaded.

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *rest, **kwargs:
            As given to the trainer.

    Returns:
        The processing class, loaded where none is given: its faults show before anything expensive, too.

    Raises:
        ValueError: If training would fail late, succeed without a step, or train something else silently.
    """
    given = (
        inspect.signature(GRPOTrainer)
        .bind(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *rest, **kwargs)
        .arguments
    )
    prompts_per_step = args.generation_batch_size // args.num_generations
    from_environment = given.get("environment_factory") is not None
    check_datasets(train_dataset, eval_dataset, prompts_per_step, prompt_optional=from_environment)
    check_prompt_sampling(args, train_dataset)
    check_rollout_correction(args, given.get("rollout_func"))
    check_reward_parameters(reward_funcs, train_dataset, eval_dataset, args, given)
    if not from_environment:  # which may give a reward of its own
        pass_at_k_reward(args.pass_at_k_reward, reward_names(reward_funcs))
    check_continuous_batching(args, model)
    if given.get("tools") or from_environment:
        check_tools_with_vllm(args)
    check_model_directory(model)
    processing_class = load_processor(model, args) if processing_class is None else processing_class
    check_tokenizer(train_dataset, processing_class, renders=given.get("rollout_func") is None)
    if args.process_index == 0:
        warn_of_unknown_tokens(train_dataset, processing_class)
    return processing_class


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
    for name, dataset in named_datasets(train_dataset, eval_dataset):
        rows_needed = prompts_per_step if name == "train_dataset" else 1
        columns = columns_of(dataset)
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


def check_prompt_sampling(args: Any, train_dataset: Any) -> None:
    """
    Refuse to choose prompts of a dataset that cannot be indexed.

    Args:
        args ([`OPOConfig`]):
            The run's configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Dataset handed to the trainer.

    Raises:
        ValueError: If `prompt_sampling` is not `"uniform"` and the dataset has no length or no positions.
    """
    if args.prompt_sampling == "uniform" or isinstance(train_dataset, Dataset):
        return
    if not (hasattr(train_dataset, "__len__") and hasattr(train_dataset, "__getitem__")):
        raise ValueError(
            f"`prompt_sampling={args.prompt_sampling!r}` reads prompts again by position, so `train_dataset` must have "
            f"a length and be indexable, got {type(train_dataset).__name__}. Load it without streaming, or use "
            "`prompt_sampling='uniform'`."
        )


def check_model_directory(model: Any) -> None:
    """
    Refuse the path of a model directory that does not exist: it would be looked up on the Hub, whose message misleads.

    A name of the form `NAMESPACE/NAME` may be one of the Hub, and is left to [`explain_missing_model`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            As handed to the trainer; an object is not looked at.

    Raises:
        ValueError: If `model` can only be a path, and there is nothing there.
    """
    if not isinstance(model, str) or Path(model).exists():
        return
    is_path = model.startswith((".", "~")) or Path(model).is_absolute() or "\\" in model
    if is_path or len(model.split("/")) > 2 or model.endswith("/"):
        expanded = Path(model).expanduser() if model.startswith("~") else None
        there = expanded is not None and expanded.exists()
        raise ValueError(
            f"`model` must be a model directory or a name on the Hub, got {model!r}: there is no such directory. "
            + (f"`~` is not expanded here; write {str(expanded)!r}." if there else "Check the path.")
        )


@contextmanager
def explain_missing_model(model: str) -> Iterator[None]:
    """Add to the error of a model's files that cannot be loaded that there is no directory of that name, either."""
    try:
        yield
    except OSError as error:
        if Path(model).exists():
            raise
        raise OSError(f"{model!r} is not a local directory, and could not be loaded from the Hub: {error}") from error


def load_processor(model: Any, args: Any) -> Any:
    """
    Load what the parent would load after the model, ahead of it: its faults show before anything expensive.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy. A model object's processor is looked for where its config was loaded from.
        args ([`OPOConfig`]):
            The run's configuration.

    Raises:
        ValueError: If a model object does not say where it was loaded from.
    """
    name = model if isinstance(model, str) else model.config.name_or_path
    if not name:
        raise ValueError(
            f"`processing_class` must be given with a model that was not loaded from a name or a directory, got a "
            f"{type(model).__name__} whose config has no `name_or_path`. Pass its tokenizer as `processing_class`."
        )
    with explain_missing_model(name):
        return AutoProcessor.from_pretrained(
            name,
            revision=(args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None,
            truncation_side="left",
            padding_side="left",
            trust_remote_code=args.trust_remote_code,
        )


def check_tokenizer(dataset: Any, processing_class: Any, *, renders: bool = True) -> None:
    """
    Refuse a tokenizer that cannot render or pad the prompts of `dataset`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset whose first prompt is looked at; any other kind is taken to be plain text.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor that holds one.
        renders (`bool`, *optional*, defaults to `True`):
            Whether the trainer renders the prompts. A `rollout_func` gets the messages themselves.

    Raises:
        ValueError: If prompts are messages to be rendered and there is no chat template, or there is neither a pad nor
            an eos token.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} must have a pad or an eos token, got neither. Set "
            "tokenizer.eos_token and pass the tokenizer as `processing_class`."
        )
    holds_messages = isinstance(dataset, Dataset) and "prompt" in dataset.column_names and is_conversational(dataset[0])
    if renders and holds_messages and not processing_class.chat_template:
        raise ValueError(
            f"Prompts are messages, so the tokenizer must have a chat template; {tokenizer.name_or_path!r} has none. "
            "Set tokenizer.chat_template and pass the tokenizer as `processing_class`, or use plain-text prompts "
            "(opo_trl.data.to_plain_text)."
        )


def check_loaded_model(model: nn.Module, args: Any, tp_size: int, cp_size: int, sp_size: int) -> None:
    """Check what is known of a model when it is loaded: that it can be trained, with its dtype and its parallelism."""
    check_trainable(model)
    check_data_parallel(tp_size, cp_size, sp_size)
    check_continuous_batching(args, model)


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


def check_rollout_correction(args: Any, rollout_func: Any) -> None:
    """
    Refuse a correction that has no rollout function to correct, and would be ignored.

    Raises:
        ValueError: If `rollout_importance_sampling_correction` is set without a `rollout_func`.
    """
    if args.rollout_importance_sampling_correction and rollout_func is None:
        raise ValueError(
            "`rollout_importance_sampling_correction=True` corrects with the log-probabilities that a `rollout_func` "
            "returns, got no `rollout_func`. Pass one, or leave the field out: vLLM's own sampling is corrected under "
            "`vllm_importance_sampling_correction`."
        )


def check_tools_with_vllm(args: Any) -> None:
    """
    Refuse tools where several ranks share an engine: completions would be mixed up.

    After a tool's turn, each rank has another number of completions to continue, and TRL 1.16 takes each rank's share
    as if the numbers were equal. A rank that is done also leaves the others waiting (trl#6673).

    Args:
        args ([`OPOConfig`]):
            The run's configuration.

    Raises:
        ValueError: If several ranks use one vLLM server, or one engine under tensor parallelism.
    """
    if not args.use_vllm:
        return
    ranks = args.world_size if args.vllm_mode == "server" else args.vllm_tensor_parallel_size
    if ranks > 1:
        shared = "server" if args.vllm_mode == "server" else "engine under `vllm_tensor_parallel_size`"
        raise ValueError(
            f"Tools and environments need an engine for each process, got {ranks} processes that share one vLLM "
            f"{shared}: TRL would give them each other's completions after a tool's turn (trl#6673). Use "
            "`vllm_mode='colocate'` with `vllm_tensor_parallel_size=1`, or train in one process."
        )


def check_tools_without_vllm(num_processes: int, sharded: bool) -> None:
    """
    Refuse tools where transformers generates with a model whose weights are sharded across ranks: the run would hang.

    A rank keeps generating while one of its completions calls a tool, and generation gathers weights from all ranks. A
    rank whose completions call none has left for the next step's collectives (TRL 1.16; no issue is known).

    Args:
        num_processes (`int`):
            Processes of the run.
        sharded (`bool`):
            Whether the weights are sharded across them, as under FSDP and ZeRO-3.

    Raises:
        ValueError: If there are several processes and the weights are sharded.
    """
    if num_processes > 1 and sharded:
        raise ValueError(
            "Tools and environments without vLLM need the complete weights in each process, got FSDP or ZeRO-3 with "
            f"{num_processes} processes: as soon as one rank calls more tools than another, they deadlock. Use "
            "`use_vllm=True` with `vllm_mode='colocate'` and `vllm_tensor_parallel_size=1`, or train with plain data "
            "parallelism or ZeRO-2."
        )


def check_continuous_batching(args: Any, model: Any) -> None:
    """
    Refuse continuous batching where it would round the policy's weights.

    TRL 1.16 casts the trained model itself to `bf16` or `fp16` at every generation (no issue is known). At a learning
    rate of 1e-6 an update is far below the resolution of bf16: the weights would not move at all.

    Args:
        args ([`OPOConfig`]):
            The run's configuration.
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, or its name before it is loaded.

    Raises:
        ValueError: If a weight would be cast.
    """
    cast_to = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if not args.use_transformers_continuous_batching or cast_to is None:
        return
    if isinstance(model, str):
        given = (args.model_init_kwargs or {}).get("dtype", torch.float32)
        dtypes = {getattr(torch, given, None) if isinstance(given, str) else given} - {None}
    else:
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    rounded = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {cast_to})
    if rounded:
        precision = "bf16" if args.bf16 else "fp16"
        raise ValueError(
            f"`use_transformers_continuous_batching=True` with `{precision}=True` casts the trained weights to "
            f"{precision} at every generation, got weights in {', '.join(rounded)}: small updates would be rounded "
            f"away, and the policy would not change. Set `{precision}=False`, generate with `use_vllm=True` or without "
            f"continuous batching, or load the model in {precision} if its updates may be rounded."
        )


def check_data_parallel(tp_size: int, cp_size: int, sp_size: int) -> None:
    """
    Refuse parallelism in which several ranks must be given the same rows, since rows are assigned to ranks one by one.

    Raises:
        ValueError: If a size of tensor, context or sequence parallelism is above 1.
    """
    sizes = {"tensor": tp_size, "context": cp_size, "sequence": sp_size}
    for kind, size in sizes.items():
        if size > 1:
            raise ValueError(
                f"OPOTrainer assigns each row to one rank, as data parallelism, FSDP and ZeRO need; {kind} "
                f"parallelism, whose ranks share rows, must have size 1, got {size}. Use FSDP or ZeRO-3 to train a "
                "model that does not fit one device; vLLM's own tensor parallelism is not affected."
            )


def pass_at_k_reward(name: str | None, names: Sequence[str]) -> str | None:
    """
    Name of the reward that decides what is correct in evaluation's pass@k, or `None` where there is none.

    Args:
        name (`str`, *optional*):
            Name that the user gives; `None` chooses `math_verify_reward`.
        names (`Sequence[str]`):
            Names of the reward functions, as TRL logs them.

    Raises:
        ValueError: If `name` is given and no reward is called so.
    """
    if name is None:
        return "math_verify_reward" if "math_verify_reward" in names else None
    if name not in names:
        raise ValueError(f"`pass_at_k_reward` must name one of the reward functions {list(names)}, got {name!r}.")
    return name
