"""SIGTERM as a stop request: the run ends at the next step boundary, on all ranks, with a checkpoint."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Preemption(TrainerCallback):
    """
    Ends a run at the step boundary after a SIGTERM: it saves, and neither evaluates nor pushes.

    A signal reaches the ranks at different moments, and perhaps not all of them. So they ask each other after every
    step, and end together. transformers' own just-in-time checkpoint decides in each process by itself.

    Processes that are forked meanwhile, as by a reward, treat SIGTERM as they would without a trainer.

    Args:
        any_rank (`Callable`):
            Returns whether any rank's argument is true; called by all ranks after each step.
    """

    def __init__(self, any_rank: Callable[[bool], bool]) -> None:
        self.any_rank = any_rank
        self.asked = False  # this process was
        self.ends = False  # all ranks have agreed

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Treat SIGTERM as a stop request, if this is the main thread: others cannot install a handler."""
        self.asked = self.ends = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with _forked_children_without_handler():
            previous = signal.signal(signal.SIGTERM, self._ask)
            try:
                yield
            finally:
                signal.signal(signal.SIGTERM, _restorable(previous))

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.ends = self.any_rank(self.asked)
        if self.ends:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Undo what the strategy `"epoch"` asks for: transformers ends an epoch wherever training stops."""
        if self.ends:
            control.should_save = control.should_evaluate = False
        return control


# A fork inherits the handler. In the child nobody reads the stop request, so `Process.terminate()` would have no effect
# and `Pool.__exit__` would wait forever. The handler is reset right after the fork, but a SIGTERM may come before that,
# and CPython clears the signals that a child receives while it is set up. So SIGTERM is blocked during the fork: it is
# then delivered once the handler is reset.

_in_children: Any = None  # SIGTERM's handler in forked children; None: the one that they inherit
_forking = threading.local()  # `mask`: the signal mask of a thread that is forking


def _restorable(handler: Any) -> Any:
    """A handler that `signal.signal` accepts; None stands for one that was not installed from Python."""
    return signal.SIG_DFL if handler is None else handler


@contextmanager
def _forked_children_without_handler() -> Iterator[None]:
    """Give children forked meanwhile the SIGTERM handler of now; trainers may be nested, and the outermost decides."""
    global _in_children
    if _in_children is not None:
        yield
        return
    _register_fork_hooks()
    _in_children = _restorable(signal.getsignal(signal.SIGTERM))
    try:
        yield
    finally:
        _in_children = None


@cache  # hooks cannot be removed
def _register_fork_hooks() -> None:
    if hasattr(os, "register_at_fork"):  # Windows does not fork
        os.register_at_fork(before=_before_fork, after_in_parent=_unblock, after_in_child=_after_fork_in_child)


def _before_fork() -> None:
    if _in_children is not None:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock() -> None:
    mask = _forking.__dict__.pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    global _in_children
    if _in_children is not None:
        signal.signal(signal.SIGTERM, _in_children)
        _in_children = None  # what the child installs is its own
    _unblock()
