"""Where a trainer's phases begin and end."""

from typing import TYPE_CHECKING, Any

import torch

from .phases import StepPhases

if TYPE_CHECKING:
    from trl import GRPOTrainer
else:
    GRPOTrainer = object  # a mixin: the trainer comes after it in the bases


class MeasuredPhases(GRPOTrainer):
    """
    Mixin for [`~trl.GRPOTrainer`] and its subclasses: logs how long the phases of a step take.

    See [`~opo_trl.runs.phases.StepPhases`]. Which completion tokens a step trains is for the subclass to count.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._phases = StepPhases(self._metrics["train"])
        self.add_callback(self._phases)
        if self.use_vllm:
            synchronise = self.vllm_generation.sync_weights
            self.vllm_generation.sync_weights = self._phases.measured("sync_weights", synchronise)

    def _generate(self, prompts: list[Any]) -> Any:
        mode = "train" if self.model.training else "eval"
        with self._phases.measure("generate"):
            output = super()._generate(prompts)
        mean_length = self._metrics[mode]["completions/mean_length"][-1]  # over the completions of all ranks
        self._phases.count("generated", mean_length * len(prompts) * self.accelerator.num_processes)
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._phases.measure("score"):
            rewards_per_func: torch.Tensor = super()._calculate_rewards(*args, **kwargs)  # (N, F), of all ranks
        return rewards_per_func
