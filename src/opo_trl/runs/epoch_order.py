"""The order of the prompts as a function of the seed and the epoch alone, so that a run can be resumed in any epoch."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """
    TRL's sampler, seeded anew in each epoch.

    TRL 1.16 seeds its `RepeatSampler` once: the order of the second epoch is the generator's second draw. A run that is
    resumed in the second epoch starts with a fresh generator, and would see the first epoch's order again. Here epoch
    `e` is drawn from `seed + e`; the first epoch's order is TRL's. No issue is known; delete this when TRL seeds its
    sampler in each epoch.

    An epoch that a callback ends early counts as one, unless the run is resumed: transformers derives the epoch of a
    checkpoint from its step.

    Args:
        sampler (`RepeatSampler`):
            TRL's sampler, with its `generator`, `seed` and `shuffle`.
        steps_done (`Callable`):
            Returns the number of optimizer steps that the run has made when an epoch begins.
        steps_per_epoch (`int`):
            Optimizer steps in an epoch.
    """

    def __init__(self, sampler: Any, steps_done: Callable[[], int], steps_per_epoch: int) -> None:
        self.sampler, self.steps_done, self.steps_per_epoch = sampler, steps_done, steps_per_epoch
        self.epoch, self.begun_at = -1, -1  # number of the epoch, and the step at which it began

    def __iter__(self) -> Iterator[int]:
        step = self.steps_done()
        if step != self.begun_at:  # else the same epoch begins again
            self.epoch, self.begun_at = max(self.epoch + 1, step // self.steps_per_epoch), step
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
