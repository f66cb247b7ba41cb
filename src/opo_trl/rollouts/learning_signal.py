"""A run in which no completion is informative: its weights do not change, and it would end like a successful one."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

PATIENCE = 5  # consecutive logging periods
BELOW_LIMIT = 0.9  # share of max_completion_length up to which completions end before it, as in the report


class NoSignalWarning(TrainerCallback):
    """
    Warns once, with the likeliest cause, after `PATIENCE` logging periods in a row without an informative completion.

    A shorter run in which no completion was ever informative is warned about at its end.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.warned = False
        self._periods = 0  # consecutive, the last one included
        self._ever_informative = False
        self._last_period: Mapping[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._reset()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        informative = (logs or {}).get("opo/informative_fraction")
        if informative is None:
            return  # an evaluation, or the summary at the end
        self._ever_informative |= informative > 0
        self._periods = 0 if informative > 0 else self._periods + 1
        self._last_period = logs
        if self._periods >= PATIENCE:
            self._warn(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._periods and not self._ever_informative:
            self._warn(args, state)

    def _warn(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.warned:
            return
        self.warned = True
        if state.is_world_process_zero:
            logger.warning(
                "No completion of the last %d logged %s has a non-zero advantage, so there is no gradient. Likeliest "
                "cause: %s",
                self._periods,
                "entries" if self._periods > 1 else "entry",
                likeliest_cause(self._last_period, args),
            )


def likeliest_cause(logs: Mapping[str, Any], args: Any) -> str:
    r"""
    Return why no completion is informative, and how to fix it, from the metrics of one logging period.

    Args:
        logs (`Mapping[str, Any]`):
            Metrics as the trainer logs them. Counts such as `math_verify_reward/no_answer` are those of a step, with
            all of its rounds, as means over ranks.
        args ([`OPOConfig`]):
            The run's configuration.

    Returns:
        `str`: One or two sentences.
    """

    def value(name: str) -> float:
        return logs[name] if logs.get(name) is not None else math.nan

    rows = args.per_device_train_batch_size * args.steps_per_generation  # of one rank, in a step
    if args.max_refill_rounds:  # no group is informative, so this is all that were sampled, refill rounds included
        rows = value("rollouts/groups_dropped") * args.num_generations / args.world_size
    without_answer = [logs[name] for name in logs if name.endswith("/no_answer") and logs[name] is not None]
    if value("opo/unscorable_fraction") == 1:
        return (
            "no reward function returned a number for any completion (all unscorable). Check that the rewards get the "
            "columns that they need, and that solutions can be parsed."
        )
    if value("completions/clipped_ratio") == 1:
        longest, limit = value("completions/max_length"), args.max_completion_length
        if limit is None or (0 < longest <= BELOW_LIMIT * limit and "tools/call_frequency" not in logs):
            return (
                f"every completion stops without an end-of-sequence token, at most {longest:.0f} tokens long, although "
                f"max_completion_length is {limit}. Look for a generation setting, a stop string, or a rollout_func "
                "that leaves the end-of-sequence token out."
            )
        return (
            f"every completion is truncated at max_completion_length={limit}, before its answer. Raise "
            "max_completion_length."
        )
    if without_answer and min(without_answer) >= rows * (1 - 1e-6):  # both are means over steps, rounded
        return (
            r"no completion states an answer in \boxed{...}. Ask for one in the prompt (opo_trl.data.load_math_dataset "
            "adds such an instruction), or start from a model that was trained to give one."
        )
    reward = value("reward")
    if value("reward_std") > 0:
        return (
            f"all completions of a prompt get the same reward, some prompts more than others (mean {reward:.3g}). Use "
            "problems of medium difficulty, or raise num_generations or temperature."
        )
    if reward == 1:
        return "every completion is right (all rewards are 1). Use harder problems."
    if reward == 0:
        return "every completion is wrong (all rewards are 0). Use easier problems or a stronger model."
    return f"the rewards do not differ (all are {reward:.3g}). Use a reward that tells completions apart."
