"""Errors before the first training step or generated token: the user's, as a rule, so their message is enough."""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object, get_int_from_env
from transformers import TrainerCallback

DEBUG = "OPO_DEBUG"
_RANK_VARIABLES = ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"]  # as accelerate reads them
_SECONDS_FOR_MAIN = 5.0
_REPORTED = (ValueError, OSError, ImportError)

Result = TypeVar("Result")


class ErrorOnARank(ValueError):
    """What failed on one or more ranks, raised on all of them."""


class SetupPhase(TrainerCallback):
    """
    The part of a script before the first training step or generated token.

    As a context manager, it replaces the traceback of a `ValueError`, an `OSError` or an `ImportError` (of a package
    that a chosen feature needs) in that part by the message, and exits with status 1. Later errors, and all of them if
    the environment variable `OPO_DEBUG` is set, keep theirs. As a callback of a trainer, it ends where training begins.

    Every rank exits. The main process prints the message; another one prints its own only if the main process has not
    ended the job within a few seconds, as where one machine lacks a file.

    Attributes:
        over (`bool`):
            Whether this part has ended.
    """

    def __init__(self) -> None:
        self.over = False

    def end(self) -> None:
        """Let later errors keep their traceback."""
        self.over = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end()

    def __enter__(self) -> "SetupPhase":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        keeps_traceback = self.over or os.environ.get(DEBUG, "0") not in ("", "0")
        if keeps_traceback or not isinstance(error, _REPORTED):
            return
        rank = get_int_from_env(_RANK_VARIABLES, 0)
        if rank == 0 or not isinstance(error, ErrorOnARank):
            if rank:
                time.sleep(_SECONDS_FOR_MAIN)  # a launcher ends this process once the main one has exited
            where = f" on rank {rank}" if rank else ""
            print(f"error{where}: {error}\nSet {DEBUG}=1 for the traceback.", file=sys.stderr, flush=True)
        sys.exit(1)


def on_all_ranks(state: PartialState, function: Callable[[], Result]) -> Result:
    """
    Call a function that does not communicate on every rank; if it fails on one, raise the same error on all.

    Args:
        state ([`~accelerate.PartialState`]):
            State of this process.
        function (`Callable[[], Result]`):
            What may raise a `ValueError`, an `OSError` or an `ImportError`.

    Returns:
        `Result`: What the function returned on this rank.

    Raises:
        ErrorOnARank: With the message of the first rank that failed. With one process, the error itself is raised.
    """
    if state.num_processes == 1:
        return function()
    failure: Exception | None = None
    result: Any = None
    try:
        result = function()
    except _REPORTED as error:
        failure = error
    messages = gather_object([None if failure is None else str(failure)])
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed:
        where = "" if len(failed) == len(messages) else f" (on rank {', '.join(map(str, failed))})"
        raise ErrorOnARank(f"{messages[failed[0]]}{where}") from failure
    return result
