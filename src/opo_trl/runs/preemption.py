"""Being asked to stop: at the next step boundary, on all ranks, with a checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Preemption(TrainerCallback):
    """
    Ends a run at the step boundary after a SIGTERM: it saves, and neither evaluates nor pushes.

    A signal reaches the ranks at different moments, and perhaps not all of them. So they ask each other after every
    step, and end together. transformers' own just-in-time checkpoint decides in each process by itself.

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
        """Take SIGTERM for a wish, where a process may: on its main thread."""
        self.asked = self.ends = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

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
