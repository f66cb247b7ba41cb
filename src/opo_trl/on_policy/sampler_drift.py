"""A sampler that moves away from the policy in the course of a run."""

import logging
import math
from collections import deque
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

METRIC = "sampling/sampling_logp_difference/mean"
FIRST, LAST = 5, 3  # logging periods that give the reference, and consecutive ones above the limit that warn
GROWTH = 5  # times the reference. Rounding to bf16 alone stays within a factor of 3.4 (docs/engines.md)
FLOOR = 1e-3  # nats: an importance weight of 1.001 biases nothing, and float32's noise of 5e-7 may well grow


class SamplerDriftWarning(TrainerCallback):
    """
    Warns once if the sampler's log-probabilities move away from the policy's in the course of a run.

    Watches the mean of their absolute difference per token. The limit is `GROWTH` times the smallest of the first
    `FIRST` logging periods, and at least `FLOOR`; where there is a tolerance of the self-test, at most that. A resumed
    run continues with the periods that its checkpoint has logged.

    Args:
        tolerance (`float`, *optional*):
            `vllm_logp_tolerance`, in nats.
    """

    def __init__(self, tolerance: float | None) -> None:
        self.tolerance = math.inf if tolerance is None else tolerance
        self._reset()

    def _reset(self) -> None:
        self.warned = False
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=LAST)

    @property
    def limit(self) -> float:
        """Value in nats above which a period counts."""
        return min(self.tolerance, max(FLOOR, GROWTH * min(self._first)))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._reset()
        for logs in state.log_history:
            self._add(logs)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not self._add(logs or {}) or self.warned or len(self._last) < LAST or min(self._last) <= self.limit:
            return
        self.warned = True
        if state.is_world_process_zero:
            logger.warning(
                "The sampler moves away from the policy: in the last %d logging periods their log-probabilities "
                "differed by %.3g nats per token or more in the mean, where the run's first periods had %.3g (limit: "
                "%.3g, `%s`). Likeliest cause: new weights do not reach every layer of the engine. Restart from the "
                "last checkpoint, which repeats the engine's self-test; if it passes, compare the engine's dtype with "
                "the trainer's.",
                LAST,
                min(self._last),
                min(self._first),
                self.limit,
                METRIC,
            )

    def _add(self, logs: Any) -> bool:
        """Take a logging period into account, unless it has no such number."""
        value = logs.get(METRIC)
        if value is None:
            return False  # an evaluation, the summary at the end, or a period without an informative completion
        if len(self._first) < FIRST:
            self._first.append(value)
        self._last.append(value)
        return True
