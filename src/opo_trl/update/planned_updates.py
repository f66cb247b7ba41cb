"""The micro-batches of a step, planned where TRL would cut its own."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_compiled_module
from torch import nn

from .extra_forward import score_batch, score_planned_rows
from .gradient_scale import scale_gradients
from .planner import UpdatePlanner
from .regrouping import ObstacleAgreement, regrouping_obstacle
from .rollout_batch import FORWARD_ARGUMENTS, count_tokens
from .step_plan import StepPlan
from .step_statistics import StepStatistics

if TYPE_CHECKING:
    from trl import GRPOTrainer
else:
    GRPOTrainer = object  # a mixin: the trainer comes after it in the bases


class PlannedUpdates(GRPOTrainer):
    """
    Mixin for [`OPOTrainer`]: trains each rollout batch in the micro-batches of an [`UpdatePlanner`].

    The subclass gives the rollout batch, with its advantages, to [`_plan_update`]. Where rows may not be regrouped,
    TRL's micro-batches are kept. It comes before [`~opo_trl.runs.reliable_runs.ReliableRuns`] in the bases.
    """

    args: Any
    model: Any
    _buffered_inputs: Any

    def __init__(self, model: Any, reward_funcs: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._planner = UpdatePlanner(
            micro_batches=args.steps_per_generation,
            num_ranks=self.accelerator.num_processes,
            skip_uninformative=args.skip_uninformative,
            pad_to_multiple_of=self.pad_to_multiple_of,
            rows_per_rank=args.per_device_train_batch_size * args.steps_per_generation,
        )
        self._agreement = ObstacleAgreement(self.accelerator)
        self._statistics = StepStatistics()
        # TRL calls what follows from one method of its own, which passes no values between the calls.
        self._rollout_batch: dict[str, Any] | None = None  # from the advantages to the micro-batches
        self._early_plan: StepPlan | None = None  # from the weights to the micro-batches
        self._gradient_factor = 1.0  # of the step
        self._step_loss: Any = 0.0  # of the micro-batches of the step so far

    def _plan_update(self, batch: dict[str, Any]) -> None:
        """Plan the next micro-batches from this rank's part of a rollout batch."""
        self._rollout_batch = batch

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        self._rollout_batch = self._early_plan = None
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        batch, self._rollout_batch = self._rollout_batch, None
        earlier, self._early_plan = self._early_plan, None
        if not self.model.training:
            return inputs
        if batch is not None:  # the first micro-batch of a step
            if self._agreement.agree(self._obstacle(batch), batch) is None:
                del inputs
                self._buffered_inputs = None  # frees TRL's copy before rows move, and the batch before they are padded
                step = self._planner.plan_step(batch, self.accelerator, earlier)
                del batch, earlier
                self._buffered_inputs = step.micro_batches()
            attended, padded = count_tokens(self._buffered_inputs)
            self._statistics.add_ratio("opo/padding_fraction", padded - attended, padded)
        position = self._step % self.args.steps_per_generation
        micro_batch, self._buffered_inputs[position] = self._buffered_inputs[position], None  # each runs once
        return micro_batch

    def _plan_wave(self, batch: dict[str, Any], micro_batches: int) -> list[dict[str, torch.Tensor]]:
        """Plan a part of a step's rows, in as many micro-batches on all ranks; other parts are planned apart."""
        self._early_plan = None
        rows = self.args.per_device_train_batch_size * micro_batches
        planner = replace(self._planner, micro_batches=micro_batches, rows_per_rank=rows)
        planned = planner.plan_step(batch, self.accelerator).micro_batches()
        attended, padded = count_tokens(planned)
        self._statistics.add_ratio("opo/padding_fraction", padded - attended, padded)
        return planned

    def _scale_step(self, factor: float) -> None:
        """Multiply the gradient of this step, and its loss, by a factor that was not known at its beginning."""
        self._gradient_factor = factor

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute a micro-batch's gradient as the next class does; after the last one, scale the step's gradient."""
        loss: torch.Tensor = super().training_step(model, *args, **kwargs)
        self._step_loss = self._step_loss + loss
        if self.accelerator.sync_gradients:
            factor, total = self._gradient_factor, self._step_loss
            self._gradient_factor, self._step_loss = 1.0, 0.0
            if factor != 1.0:
                scale_gradients(model.parameters(), factor)
                loss = loss + (factor - 1.0) * total  # the sum of what is returned for the step's micro-batches
        return loss

    def _drop_unfinished_step(self) -> None:
        super()._drop_unfinished_step()
        self._gradient_factor, self._step_loss = 1.0, 0.0
        self._rollout_batch = self._early_plan = None
        self._statistics = StepStatistics()

    def _obstacle(self, batch: dict[str, Any]) -> str | None:
        """Return why the rows of a batch may not be regrouped; `None` if they may."""
        return regrouping_obstacle(
            batch,
            compiled=self.args.torch_compile or is_compiled_module(self.model),
            device_type=self.accelerator.device.type,
            router_loss=self.aux_loss_enabled,
        )

    def _token_scores(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any, Any]:
        """Run a micro-batch: log-probabilities (B, C), and entropies (B, C) and the router's loss where asked for."""
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),  # (B, T)
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),  # (B, T)
            logits_to_keep=inputs["completion_ids"].size(1),
            **{name: inputs[name] for name in FORWARD_ARGUMENTS if name in inputs},
            **options,
        )

    def _score_rows(self, batch: dict[str, Any], chosen: torch.Tensor) -> torch.Tensor:  # (N,) -> (N, C)
        """Log-probabilities of the chosen rows of this rank, computed in the micro-batches that will train them."""
        score = lambda part, batch_size: self._token_scores(self.model, part, batch_size=batch_size)[0]  # noqa: E731
        planner, obstacle = UpdatePlanner(micro_batches=1), self._obstacle(batch)
        if self.model.training:
            rows, per_micro_batch = len(batch["completion_ids"]), self.args.per_device_train_batch_size
            fewest = min(self._planner.micro_batches, -(-rows // per_micro_batch))  # a wave is a part of a step
            planner, obstacle = replace(self._planner, micro_batches=fewest), self._agreement.agree(obstacle, batch)
        if obstacle is not None:
            return score_batch(batch, planner.micro_batches, score)
        step = planner.plan_before_advantages(batch, chosen, self.accelerator)
        self._early_plan = step if self.model.training else None
        return score_planned_rows(step, batch["completion_ids"].size(1), score)
