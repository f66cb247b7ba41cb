"""That the columns of a dataset and the parameters of the reward functions fit together."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn

_PASSED_BY_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_NOT_PASSED = ("prompt", "completion", "completion_ids")
_USED_COLUMNS = ("prompt", "image", "images")  # what remove_unused_columns=True keeps


def check_reward_parameters(
    reward_funcs: Any, train_dataset: Any, eval_dataset: Any, args: Any, trainer_kwargs: Mapping[str, Any]
) -> None:
    """
    Refuse a reward function that the dataset's columns cannot be passed to, before anything is generated for it.

    Reward models and names of reward models are not looked at, nor are functions whose signature is not known. Nothing
    is checked with a `rollout_func` or an `environment_factory`, which add arguments of their own.

    Args:
        reward_funcs (`Callable`, `str`, [`~torch.nn.Module`] or a `list` of them, *optional*):
            As handed to the trainer.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Dataset handed to the trainer. A streamed one whose columns are unknown is not checked.
        eval_dataset (the same, or a `dict` of them, *optional*):
            As handed to the trainer.
        args ([`~trl.GRPOConfig`]):
            Its `remove_unused_columns` decides which columns are left.
        trainer_kwargs (`Mapping[str, Any]`):
            The other keyword arguments of the trainer.

    Raises:
        ValueError: If a function needs an argument that it will not get, or does not accept one that it will.
    """
    if any(trainer_kwargs.get(name) is not None for name in ("rollout_func", "environment_factory")):
        return
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        parameters = _parameters(function)
        if parameters is None:
            continue
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            columns = columns_of(dataset)
            if columns is not None:
                kept = [column for column in columns if not args.remove_unused_columns or column in _USED_COLUMNS]
                _check_names(name, kept)
                removed = [column for column in columns if column not in kept]
                _check_arguments(_function_name(function), parameters, name, kept, removed)


def column_parameters(reward_funcs: Sequence[Any]) -> dict[str, bool]:
    """Names of the parameters that only a column of the dataset can be passed to, and whether a function needs it."""
    found: dict[str, bool] = {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for function in reward_funcs:
        for each in _parameters(function) or []:
            if each.kind in by_name and each.name not in _PASSED_BY_TRL:
                found[each.name] = found.get(each.name, False) or each.default is inspect.Parameter.empty
    return found


def reward_names(reward_funcs: Any) -> list[str]:
    """Names under which TRL logs reward functions, reward models and the names of reward models."""
    functions = reward_funcs if isinstance(reward_funcs, list) else [] if reward_funcs is None else [reward_funcs]
    return [_logged_name(function) for function in functions]


def _check_names(dataset: str, columns: list[str]) -> None:
    """Refuse columns that TRL would pass under the name of an argument of its own, or replace by it."""
    taken = [column for column in columns if column in _PASSED_BY_TRL and column not in _NOT_PASSED]
    if taken:
        raise ValueError(
            f"A column must not have the name of an argument that TRL itself passes to reward functions: `{dataset}` "
            f"has {taken}. Rename or remove {'it' if len(taken) == 1 else 'them'}."
        )


def _check_arguments(
    function: str, parameters: list[inspect.Parameter], dataset: str, columns: list[str], removed: list[str]
) -> None:
    """Compare a reward function's parameters with what TRL calls it with: every argument by its name."""
    passed = [*_PASSED_BY_TRL, *(column for column in columns if column not in _NOT_PASSED)]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [each for each in parameters if each.default is inspect.Parameter.empty and each.kind not in variadic]
    missing = [each.name for each in required if each.name not in passed]
    if missing:
        left = f", of which `remove_unused_columns=True` leaves {columns}" if removed else ""
        fix = (
            "Set `remove_unused_columns=False`."
            if set(missing) <= set(removed)
            else "Rename the column or the parameter, or give the parameter a default."
        )
        raise ValueError(
            "The parameters of a reward function must be columns of the dataset or arguments that TRL passes: "
            f"{function!r} requires {missing}, `{dataset}` has the columns {columns + removed}{left}, and TRL passes "
            f"{list(_PASSED_BY_TRL)} and every column but `prompt`, `completion` and `completion_ids`. {fix}"
        )
    positional = [each.name for each in required if each.kind is inspect.Parameter.POSITIONAL_ONLY]
    if positional:
        raise ValueError(
            f"TRL passes every argument of a reward function by name: {function!r} takes {positional} by position "
            "only. Remove the `/` from its parameters."
        )
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        taken = {each.name for each in parameters if each.kind in by_name}
        refused = [argument for argument in passed if argument not in taken]
        if refused:
            raise ValueError(
                f"A reward function must accept every argument that TRL passes: {function!r} does not take {refused}. "
                "Add **kwargs to its parameters."
            )


def _parameters(function: Any) -> list[inspect.Parameter] | None:
    """Parameters of a reward function; `None` where TRL calls it otherwise, or they cannot be known."""
    if function is None or isinstance(function, str | nn.Module):
        return None
    try:
        # A decorator may add arguments to those that it is called with, so the function below it does not count.
        return list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):  # no signature, as of some functions in C
        return None


def _logged_name(function: Any) -> str:
    if isinstance(function, str | nn.Module):
        model: Any = function
        name: str = model if isinstance(model, str) else model.config.name_or_path
        return name.split("/")[-1]
    return _function_name(function)


def _function_name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def named_datasets(train_dataset: Any, eval_dataset: Any) -> list[tuple[str, Any]]:
    """All datasets, with the names that messages call them by."""
    if isinstance(eval_dataset, dict):
        evaluated = [(f"eval_dataset[{name!r}]", dataset) for name, dataset in eval_dataset.items()]
    else:
        evaluated = [("eval_dataset", eval_dataset)]
    return [("train_dataset", train_dataset), *evaluated]


def columns_of(dataset: Any) -> list[str] | None:
    """Columns of a dataset; `None` where there is none, or a streamed one that does not know them."""
    return dataset.column_names if isinstance(dataset, Dataset | IterableDataset) else None
