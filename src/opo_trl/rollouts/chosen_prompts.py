"""The rows of a rollout batch for the prompts that were drawn, on all ranks, and their state in checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, send_to_device

from .prompt_sampling import Draw, PromptSampling

STATE = "prompt_sampling.pt"


class ChosenPrompts:
    """
    Replaces the prompts that the data loader delivers by those that [`PromptSampling`] draws.

    A data loader fetches ahead: accelerate's one batch, worker processes more. What it delivers was decided before the
    last step's rewards were known, so rows are read here, by their position in the dataset.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer.
        dataset (`Sized`):
            Training set, which can be indexed.
        prompts_per_step, group_size, seed, spare (`int`):
            As in [`PromptSampling`].
    """

    def __init__(
        self, accelerator: Accelerator, dataset: Any, prompts_per_step: int, group_size: int, seed: int, spare: int = 0
    ) -> None:
        self.accelerator, self.dataset, self.group_size = accelerator, dataset, group_size
        self._arguments = (len(dataset), prompts_per_step, group_size, seed, spare)
        self.sampling = PromptSampling(*self._arguments)
        self._drawn: Draw | None = None  # from the draw to the rewards of the step

    def draw_rows(self, step: int, num_rows: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """
        Draw a step's prompts, and return this rank's rows: each prompt once for each of its completions.

        Args:
            step (`int`):
                Optimizer steps made so far.
            num_rows (`int`):
                Rows of this rank.

        Returns:
            `tuple[list[dict], dict[str, float]]`: Rows as the data loader delivers them, and metrics of the draw.
        """
        self._drawn, metrics = self.sampling.draw(step)
        # Every rank draws the same, unless processors round differently: a group must not be split, so rank 0 decides.
        drawn = broadcast(torch.cat([self._drawn.prompts, self._drawn.spare]).to(self.accelerator.device)).cpu()
        prompts, spare = drawn[: len(self._drawn.prompts)], drawn[len(self._drawn.prompts) :]
        self._drawn = self._drawn._replace(prompts=prompts, spare=spare)
        first = self.accelerator.process_index * num_rows
        groups = torch.arange(first, first + num_rows) // self.group_size
        rows = read_rows(self.dataset, prompts[groups.clamp(max=len(prompts) - 1)].tolist())
        return send_to_device(rows, self.accelerator.device), metrics

    def refill_order(self) -> list[int]:
        """Positions of the prompts that follow those of the step in its draw, for refill rounds."""
        assert self._drawn is not None
        spare: list[int] = self._drawn.spare.tolist()
        return spare

    def observe(self, rewards: torch.Tensor, scored: torch.Tensor) -> dict[str, float]:
        """Update the state with the rewards (P, K) of all ranks; those of refill rounds, which follow, are ignored."""
        assert self._drawn is not None
        drawn, self._drawn = self._drawn, None
        count = len(drawn.prompts)
        return self.sampling.observe(drawn, rewards[:count], scored[:count])

    def save(self, checkpoint: str) -> None:
        """Write the state into a checkpoint."""
        torch.save(self.sampling.state_dict(), Path(checkpoint, STATE))

    def resume(self, checkpoint: str | None) -> None:
        """
        Load the state of a checkpoint, or start without any.

        Raises:
            ValueError: On all ranks, if the checkpoint has no such state, or that of another training set.
        """
        self.sampling, self._drawn = PromptSampling(*self._arguments), None
        if checkpoint is None:
            return
        refusal: str | None = None
        try:
            self.sampling.load_state_dict(torch.load(Path(checkpoint, STATE), weights_only=True))
        except FileNotFoundError:
            refusal = (
                f"`prompt_sampling='informative'` must resume from a checkpoint with {STATE}, got {checkpoint!r}, "
                "which was saved with 'uniform', or lacks the file. Use `prompt_sampling='uniform'`, or start a new "
                "run from the checkpoint's model."
            )
        except ValueError as error:
            refusal = str(error)
        refusals = [each for each in gather_object([refusal]) if each is not None]
        if refusals:
            raise ValueError(refusals[0])


def read_rows(dataset: Any, positions: Sequence[int]) -> list[dict[str, Any]]:
    """Read rows as torch's data loader does; each is an object of its own, since TRL adds columns to some."""
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(list(positions)))
    return [dict(dataset[position]) for position in positions]
