"""The reward functions that `--reward_funcs` names: this package's, TRL's, or any function that can be imported."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .. import rewards
from ..on_policy.preflight import pass_at_k_reward

OF_THIS_PACKAGE = ("math_verify_reward", "boxed_format_reward")
OF_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
DEFAULT = [OF_THIS_PACKAGE[0]]
_READ_MESSAGES = OF_TRL[:3]  # they take a completion's text from its messages
_OVERLONG = {"max_completion_len": 1280, "soft_punish_cache": 256}  # the values of `trl grpo`


def load_reward_functions(names: Sequence[str] | None) -> list[Callable[..., Any]]:
    """
    Load the reward functions of a command line.

    Args:
        names (`Sequence[str]`, *optional*):
            Names of this package's or TRL's functions, or `module:function`, or `module.function`; modules are searched
            for in the working directory, too. `None` is `math_verify_reward`.

    Returns:
        `list[Callable]`: In the same order.

    Raises:
        ValueError: If a name is unknown, its module cannot be imported or lacks it, it is not callable or has no
            `__name__`, or two functions would be logged under the same name.
    """
    functions = [_load(name) for name in names or DEFAULT]
    logged = [function.__name__ for function in functions]
    for name in logged:
        if logged.count(name) > 1:
            raise ValueError(
                f"--reward_funcs must name functions that are called differently, since each is logged as "
                f"rewards/NAME/mean, got {name!r} twice. Leave one out, or rename it."
            )
    return functions


def _load(name: str) -> Callable[..., Any]:
    if name in OF_THIS_PACKAGE:
        return getattr(rewards, name)
    if name in OF_TRL:
        found = getattr(importlib.import_module("trl.rewards"), name)
        return found(**_OVERLONG) if name == "get_soft_overlong_punishment" else found
    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module or not attribute:
        raise ValueError(
            f"--reward_funcs: there is no reward {name!r}. Use {', '.join((*OF_THIS_PACKAGE, *OF_TRL))}, or the import "
            "path of your own function, such as my_rewards:brevity."
        )
    return _import(name, module, attribute)


def _import(name: str, module: str, attribute: str) -> Callable[..., Any]:
    """Import a function, from the working directory if it is there, as `trl grpo` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"--reward_funcs {name}: the module {module!r} cannot be imported: {error}. Run the command in the "
            "directory of its file, or install its package."
        ) from error
    try:
        function: Any = getattr(imported, attribute)
    except AttributeError as error:
        defined = [key for key, value in vars(imported).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"--reward_funcs {name}: {imported.__file__} has no {attribute!r}; it has {', '.join(defined) or 'none'}."
        ) from error
    if not callable(function) or not hasattr(function, "__name__") or isinstance(function, type):
        raise ValueError(
            f"--reward_funcs {name} must be a function of the completions that has a `__name__`, got "
            f"{type(function).__name__}. Write `def {attribute}(completions, **kwargs)`."
        )
    return function


def check_weights(functions: Sequence[Callable[..., Any]], weights: Sequence[float] | None) -> None:
    """
    Compare `--reward_weights` with the functions. The trainer does so only after it has loaded the model.

    Raises:
        ValueError: If there is not one weight for each function.
    """
    if weights is not None and len(weights) != len(functions):
        names = ", ".join(function.__name__ for function in functions)
        raise ValueError(
            f"--reward_weights must be one number for each of the {len(functions)} reward function(s) ({names}), got "
            f"{list(weights)}."
        )


def check_prompts(functions: Sequence[Callable[..., Any]], prompt: Any) -> None:
    """
    Refuse TRL's functions that read messages where prompts are plain text: they would fail in the first step.

    Raises:
        ValueError: If a function is one of these and `prompt` is a string.
    """
    for function in functions:
        if isinstance(prompt, str) and function.__module__.startswith("trl.") and function.__name__ in _READ_MESSAGES:
            raise ValueError(
                f"TRL's {function.__name__} reads messages, and the prompts are plain text, since the tokenizer has no "
                "chat template. Use math_verify_reward or a function of your own, or a model with a chat template."
            )


def pass_at_k_name(
    given: str | None, names: Sequence[str] | None, functions: Sequence[Callable[..., Any]]
) -> str | None:
    """
    Name under which the reward of `--pass_at_k_reward` is logged: it may be given as in `--reward_funcs`.

    Returns:
        `str` or `None`: The given function's name; without one `math_verify_reward`, or `None` if that is not used.

    Raises:
        ValueError: If it is none of the reward functions.
    """
    logged = {name: function.__name__ for name, function in zip(names or DEFAULT, functions, strict=True)}
    return pass_at_k_reward(None if given is None else logged.get(given, given), list(logged.values()))
