"""Functions of the user whose failure on one rank is raised on all ranks. Nothing here is OPO's."""

import asyncio
import functools
import inspect
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from .ranks import any_rank
from .reward_values import check_reward_values

# An interrupt is no failure of the function.
_NOT_FAILURES = (KeyboardInterrupt, SystemExit, GeneratorExit)


class RewardError(RuntimeError):
    """A reward or rollout function or an environment raised on some rank. All ranks raise it, with the same message."""


class FunctionGuard:
    """
    Keeps the exceptions of user functions until all ranks can raise them together.

    TRL calls a reward function between two collectives. If it raises on one rank, the other ranks wait in the next
    collective until its timeout, half an hour with NCCL, and the message that matters is far up in another rank's log.
    So a guarded function returns placeholder rewards instead of raising, and [`raise_on_all_ranks`] follows at the next
    point that all ranks reach. No issue is known; delete this when TRL raises the exception on all ranks.
    """

    def __init__(self) -> None:
        self._failures: list[tuple[str, BaseException]] = []  # of this rank: what failed, and its exception

    def reward(self, function: Any, name: str) -> Any:
        """
        Wrap a reward function, synchronous or asynchronous.

        Args:
            function (`Callable` or `nn.Module`):
                As in [`~trl.GRPOTrainer`]; a reward model is returned as it is.
            name (`str`):
                Name of the function in messages.

        Returns:
            `Callable`: The function that never raises an `Exception`.
        """
        if isinstance(function, nn.Module):
            return function

        if _is_async(function):

            @functools.wraps(function)
            async def guarded_async(*args: Any, **kwargs: Any) -> list[Any]:
                try:
                    return check_reward_values(name, await function(*args, **kwargs), len(kwargs["completions"]))
                except BaseException as error:
                    self._keep(f"The reward function {name!r}", error)
                    return [0.0] * len(kwargs["completions"])

            return guarded_async

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> list[Any]:
            try:
                return check_reward_values(name, function(*args, **kwargs), len(kwargs["completions"]))
            except BaseException as error:
                self._keep(f"The reward function {name!r}", error)
                return [0.0] * len(kwargs["completions"])

        return guarded

    def rollout(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a `rollout_func`, which all ranks call at the same point: they agree right after it."""

        @functools.wraps(function)
        def guarded(prompts: Any, trainer: Any) -> Any:
            output = None
            try:
                output = function(prompts, trainer)
            except BaseException as error:
                self._keep("The rollout function", error)
            self.raise_on_all_ranks(trainer.accelerator)
            return output

        return guarded

    def environment(self, factory: Callable[[], Any]) -> Callable[[], Any]:
        """
        Wrap an `environment_factory`, and `reset` of what it makes: all ranks agree after resetting theirs.

        TRL reads an environment's methods from its class, and calls `reset` on the instance.
        """

        def guarded() -> Any:
            try:
                return self.reset_of(factory())
            except BaseException as error:
                self._keep("The environment factory", error)
                return _NoEnvironment()

        return guarded

    def reset_of(self, environment: Any) -> Any:
        """Wrap `reset` of an environment, in place, and return the environment."""
        reset, name = environment.reset, type(environment).__name__

        @functools.wraps(reset)
        def guarded(**kwargs: Any) -> Any:
            try:
                return reset(**kwargs)
            except BaseException as error:
                self._keep(f"`reset` of the environment {name!r}", error)
                return None

        with suppress(AttributeError):  # an environment with `__slots__` is left as it is
            environment.reset = guarded
        return environment

    def raise_on_all_ranks(self, accelerator: Accelerator) -> None:
        """
        Raise what any rank has kept since the last call. To be called by all ranks at the same point.

        Args:
            accelerator ([`~accelerate.Accelerator`]):
                Its processes agree.

        Raises:
            RewardError: On all ranks with the same message, which holds every rank's first failure and its traceback.
        """
        failures, self._failures = self._failures, []
        if not any_rank(accelerator, bool(failures)):
            return
        messages: list[str] = gather_object(
            [
                f"{what} failed on rank {accelerator.process_index}: {type(error).__name__}: {error}\n"
                + "".join(traceback.format_exception(error)).rstrip()
                for what, error in failures[:1]
            ]
        )
        raise RewardError("\n\n".join(messages)) from (failures[0][1] if failures else None)

    def _keep(self, what: str, error: BaseException) -> None:
        if isinstance(error, _NOT_FAILURES) or _is_cancelled_from_outside(error):
            raise error
        self._failures.append((what, error))


class _NoEnvironment:
    """Stands in until the ranks agree that an environment could not be made."""

    def reset(self, **kwargs: Any) -> None:
        return None


def check_finite_rewards(rewards_per_func: torch.Tensor, names: Sequence[str]) -> None:  # (N, F)
    """
    Refuse infinite rewards. All ranks see the same gathered rewards, so all of them raise together.

    Raises:
        ValueError: With the function, the reward and the row.
    """
    infinite = torch.isinf(rewards_per_func).nonzero().tolist()
    if infinite:
        row, function = infinite[0]
        raise ValueError(
            f"Rewards must be finite: '{names[function]}' returned {rewards_per_func[row, function].item()} for row "
            f"{row} of the rollout batch ({len(infinite)} infinite rewards in all). Return None for a completion that "
            "cannot be scored."
        )


def _is_cancelled_from_outside(error: BaseException) -> bool:
    """Whether the task itself is being cancelled, as when a loop ends: a function may cancel what it waits for, too."""
    if not isinstance(error, asyncio.CancelledError):
        return False
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return False
    return task is not None and task.cancelling() > 0


def _is_async(function: Any) -> bool:
    """Whether calling it returns a coroutine; a `partial` and a callable object are looked into."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
