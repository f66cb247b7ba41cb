"""That a rollout function returns the log-probabilities that the loss corrects its sampler with."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from accelerate.utils import gather_object


def with_log_probabilities(rollout_func: Callable[[Any, Any], Mapping[str, Any]]) -> Callable[[Any, Any], Any]:
    """
    Wrap a `rollout_func` to refuse what it returns unless each token has a log-probability.

    TRL asks for the key `logprobs` alone. Without values nothing would be corrected, and it pads missing ones with 0,
    the log-probability of a certain token.

    Args:
        rollout_func (`Callable`):
            As in [`~trl.GRPOTrainer`].

    Returns:
        `Callable`: The same, which raises a `ValueError` on all ranks alike.
    """

    @wraps(rollout_func)
    def checked(prompts: Any, trainer: Any) -> Any:
        output = rollout_func(prompts, trainer)
        problems = gather_object([_problem(output)])
        found = [f"on rank {rank}, {problem}" for rank, problem in enumerate(problems) if problem is not None]
        if found:
            raise ValueError(
                "With `rollout_importance_sampling_correction=True`, a `rollout_func` must return in `logprobs` the "
                f"log-probability of each token of `completion_ids` under its sampler; {'; '.join(found)}. Return "
                "them, or leave `rollout_importance_sampling_correction` out."
            )
        return output

    return checked


def _problem(output: Mapping[str, Any]) -> str | None:
    """What is wrong with a rank's log-probabilities; `None` if nothing is, or a key is missing, which TRL reports."""
    if "completion_ids" not in output or "logprobs" not in output:
        return None
    if output["logprobs"] is None:
        return "it is None"
    tokens, logprobs = [len(ids) for ids in output["completion_ids"]], [len(row or ()) for row in output["logprobs"]]
    if len(tokens) != len(logprobs):
        return f"{len(tokens)} completions have {len(logprobs)} rows of them"
    wrong = [row for row, (one, other) in enumerate(zip(tokens, logprobs, strict=True)) if one != other]
    return f"completion {wrong[0]} has {tokens[wrong[0]]} tokens and {logprobs[wrong[0]]} of them" if wrong else None
