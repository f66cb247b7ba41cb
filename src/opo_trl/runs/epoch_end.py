"""The end of an epoch, on time or not."""

from collections.abc import Callable

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochEnd(TrainerCallback):
    """
    Calls a function at the end of every epoch, also of one that a callback has ended in the middle of a step.

    Args:
        act (`Callable`):
            What to call, with whether training ends, too.
    """

    def __init__(self, act: Callable[[bool], None]) -> None:
        self.act = act

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.act(control.should_training_stop)
