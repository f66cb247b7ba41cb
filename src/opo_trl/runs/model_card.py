"""The configuration and the last metrics of a run, put into the model card that TRL writes."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import SchedulerType, TrainerState
from transformers.training_args import OptimizerNames

# What TRL 1.16 writes where it has nothing to say, and where our sections go.
NO_BASE_MODEL = "[None](https://huggingface.co/None)"
NO_REPOSITORY = 'model="None"'
CHAT_QUESTION = '[{"role": "user", "content": question}]'
VERSIONS = "### Framework versions\n\n"

# Metric in the trainer's log -> what the card calls it.
_TRAINING_METRICS = {
    "reward": "mean training reward",
    "completions/mean_length": "mean completion length (tokens)",
    "entropy": "mean entropy per token (nats)",
}


def is_hub_name(name: str) -> bool:
    """Whether a model's or dataset's name is one of the Hub: not a local path, and not empty."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def complete_model_card(
    path: Path,
    args: Any,
    state: TrainerState,
    *,
    method: str,
    settings: Mapping[str, Any],
    base_model: str,
    reward_names: Sequence[str],
    has_chat_template: bool = True,
    num_problems: int | None = None,
    dataset_name: str | None = None,
) -> None:
    """
    Complete TRL's model card with the method, the configuration and the last metrics.

    Args:
        path (`Path`):
            The card as TRL has just written it.
        args ([`OPOConfig`]):
            The run's configuration.
        state ([`~transformers.TrainerState`]):
            How far the run is, and its log.
        method (`str`):
            Section on the method; empty for none.
        settings (`Mapping[str, Any]`):
            Settings of the method, name to value.
        base_model (`str`):
            Name or path of the model that training started from; may be empty.
        reward_names (`Sequence[str]`):
            Names of the reward functions.
        has_chat_template (`bool`, *optional*, defaults to `True`):
            Whether the tokenizer has a chat template; without one, the card's example passes text, not messages.
        num_problems (`int`, *optional*):
            Number of training problems.
        dataset_name (`str`, *optional*):
            Where they come from: a name on the Hub, a file, or anything else.
    """
    card = ModelCard(path.read_text(encoding="utf-8"))
    card.data.pop("licence", None)  # TRL's placeholder: the licence is for whoever publishes the model to say
    card.data["tags"] = sorted({*card.data.get("tags", []), "reinforcement-learning"})

    body = card.text.replace(NO_REPOSITORY, f'model="{path.absolute().parent.name}"')
    if not has_chat_template:
        body = body.replace(CHAT_QUESTION, "question")
    if not is_hub_name(base_model):
        card.data.pop("base_model", None)
        local = f"the local model `{Path(base_model).name}`" if base_model else "a model without a published name"
        for link in (NO_BASE_MODEL, f"[{base_model}](https://huggingface.co/{base_model})"):
            body = body.replace(link, local)
    configuration = {**configuration_of(args, state), **settings}
    configuration["rewards"] = ", ".join(f"`{name}`" for name in reward_names)
    if num_problems is not None:
        configuration["training problems"] = num_problems
    if dataset_name is not None:
        configuration["dataset"] = f"`{dataset_name if is_hub_name(dataset_name) else Path(dataset_name).name}`"
    before, heading, after = body.partition(VERSIONS)
    sections = [
        method,
        _table("### Configuration", ("setting", "value"), configuration),
        _table("### Results", ("metric", "value"), last_metrics(state.log_history)),
    ]
    card.text = f"{before}{chr(10).join(sections)}\n{heading or VERSIONS}- OPO-TRL: {version('opo-trl')}\n{after}"
    card.save(path)


def configuration_of(args: Any, state: TrainerState) -> dict[str, Any]:
    """
    Pick the settings that say what was trained.

    Args:
        args ([`OPOConfig`]):
            The run's configuration.
        state ([`~transformers.TrainerState`]):
            How far the run is.

    Returns:
        `dict[str, Any]`: Name to value.
    """
    groups = args.generation_batch_size // args.num_generations
    return {
        "steps": f"{state.global_step} of {state.max_steps}",
        "completions per step": f"{args.generation_batch_size}, {args.num_generations} for each of {groups} prompts",
        "longest completion": f"{args.max_completion_length} tokens",
        "temperature": args.temperature,
        "learning rate": f"{args.learning_rate:g}, {SchedulerType(args.lr_scheduler_type).value}",
        "optimizer": OptimizerNames(args.optim).value,
        "gradient clipping": args.max_grad_norm or "none",
        "loss normaliser": f"`{args.loss_type}`",
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "processes": args.world_size,
        "seed": args.seed,
    }


def last_metrics(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """
    Pick the last training and evaluation metrics of a run, each with the step that it was measured at.

    Args:
        history (`Sequence`):
            The trainer's log, one mapping per entry.

    Returns:
        `dict[str, str]`: Name to value; empty before anything is logged.
    """
    metrics: dict[str, str] = {}
    nothing: Mapping[str, Any] = {}
    training = next((entry for entry in reversed(history) if "reward" in entry), nothing)
    for name, title in _TRAINING_METRICS.items():
        if training.get(name) is not None:  # no reward where no completion could be scored
            metrics[f"{title}, step {training['step']}"] = f"{training[name]:.4g}"
    evaluation = next((entry for entry in reversed(history) if any(_is_result(name) for name in entry)), nothing)
    for name, value in evaluation.items():
        if _is_result(name) and value is not None:
            title = name.removeprefix("eval_").replace("_", " ")
            metrics[f"held-out {title}, step {evaluation['step']}"] = f"{value:.4g}"
    return metrics


def _is_result(name: str) -> bool:
    """Rewards and pass@k of an evaluation, also those of one among several evaluation sets."""
    return name.startswith("eval_") and (name.endswith("_reward") or "_pass@" in name)


def _table(heading: str, columns: tuple[str, str], rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([heading, "", f"| {columns[0]} | {columns[1]} |", "|---|---|", *lines, ""])
