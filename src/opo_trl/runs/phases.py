"""How long the phases of an optimizer step take, logged as metrics: on the console and for every tracker."""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import wraps
from time import perf_counter
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

MEASURED = ("generate", "score", "sync_weights")


class StepPhases(TrainerCallback):
    """
    Measures the phases of each optimizer step, from its beginning to its end, and logs them once per step.

    `time/generate`, `time/score` and `time/sync_weights` are measured; `time/update` is the rest of the step's wall
    time, so that the four add up to it. Logging, evaluation and saving come after the end of a step.

    Times are by the clock of this process, and the device is not synchronised for them. Generation and scoring end with
    values that the CPU reads, so their work on the device is done by then. The optimizer's last kernels may still run
    when a step ends: their time is in the next step's `time/generate`.

    Where a server generates while the step is trained, `time/generate` is what was waited for.

    Args:
        metrics (`MutableMapping[str, list[float]]`):
            TRL's lists of the current logging period, by name.
    """

    def __init__(self, metrics: MutableMapping[str, list[float]]) -> None:
        self.metrics = metrics
        self._running: list[str] = []  # the phases that are being measured, each within the one before
        self._start: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._seconds = dict.fromkeys(MEASURED, 0.0)
        self._tokens = {"generated": 0.0, "trained": 0.0}
        self._generating: float | None = None

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the duration of the block to a phase; of a block within another one, to its own phase alone."""
        start = perf_counter()
        self._running.append(phase)
        try:
            yield
        finally:
            self._running.pop()
            elapsed = perf_counter() - start
            self._seconds[phase] += elapsed
            if self._running:
                self._seconds[self._running[-1]] -= elapsed

    def measured(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its duration is added to a phase."""

        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.measure(phase):
                return function(*args, **kwargs)

        return wrapper

    def count(self, kind: str, tokens: float) -> None:
        """Add the `"generated"` or `"trained"` completion tokens of all ranks to the step's."""
        self._tokens[kind] += tokens

    def generate_took(self, seconds: float) -> None:
        """Take the rate of generated tokens over these seconds: the phase is only what was waited for of them."""
        self._generating = seconds

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._reset()  # of an evaluation, or of a step that was interrupted
        self._start = perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._start is not None
        update = perf_counter() - self._start - sum(self._seconds.values())
        for phase, seconds in {**self._seconds, "update": update}.items():
            self.metrics[f"time/{phase}"].append(seconds)
        generating = self._seconds["generate"] if self._generating is None else self._generating
        for kind, seconds in (("generated", generating), ("trained", update)):
            rate = self._tokens[kind] / seconds if seconds > 0 else float("nan")
            self.metrics[f"tokens_per_second/{kind}"].append(rate)
