"""A step that trains its finished groups while a vLLM server generates the others."""

import copy
import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
import trl

from ..algorithm.loss import loss_normalizer
from ..algorithm.rollout import Rollout
from .chosen_prompts import ChosenPrompts
from .refilling import Refilling
from .rounds import Round
from .streaming import Streaming, TrainerParts, check_streaming, refuse_obstacle
from .waves import WaveSchedule

if TYPE_CHECKING:
    from trl import GRPOTrainer
else:
    GRPOTrainer = object  # a mixin: the trainer comes after it in the bases


class StreamedSteps(GRPOTrainer):
    """
    Mixin for [`OPOTrainer`]: with `stream_rollouts`, micro-batches come from [`~opo_trl.rollouts.streaming.Streaming`].

    It comes after [`~opo_trl.rollouts.step_rollouts.StepRollouts`], which chooses the prompts, and before
    [`~opo_trl.update.planned_updates.PlannedUpdates`], which plans each wave and scales the gradients.
    """

    args: Any
    model: Any
    _last_loaded_step: int  # of the parent: the step whose weights the server has
    _chosen: ChosenPrompts | None
    _refilling: Refilling | None

    def __init__(self, model: Any, reward_funcs: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        given = inspect.signature(trl.GRPOTrainer).bind(model, reward_funcs, args, *rest, **kwargs).arguments
        check_streaming(args, given)
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        if args.stream_rollouts:
            refuse_obstacle(self._obstacle({}))
        self._streaming: Streaming | None = None

    def _make_streaming(self) -> Streaming:
        world_size = self.accelerator.num_processes
        return Streaming(
            self.accelerator,
            self.vllm_generation,
            WaveSchedule(
                prompts=self.args.generation_batch_size // self.num_generations,
                micro_batches=self.args.steps_per_generation,
                multiple=world_size // math.gcd(world_size, self.num_generations),
            ),
            TrainerParts(
                tokenize=lambda rows: self._tokenize_prompts(copy.deepcopy([row["prompt"] for row in rows]))[0],
                sample=self._sample_round,
                obstacle=self._obstacle,
                plan=self._plan_wave,
                finish=self._finish_streamed_step,
                waiting=lambda: self._phases.measure("generate"),
            ),
            group_size=self.num_generations,
            seed=self.args.seed,
            reward_names=self.reward_func_names,
            skip_uninformative=self.args.skip_uninformative,
            metrics=self._metrics["train"],
            refilling=self._refilling,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the next class does; no request to the server stays open after a step that fails."""
        self._streaming = self._make_streaming() if self.args.stream_rollouts else None
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._streaming is not None:
                self._streaming.drop()

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self._streaming is None or not self.model.training:
            inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
            return inputs
        if self._step % self.args.steps_per_generation == 0:
            self._start_streamed_step(self._streaming, generation_batch)
        return self._streaming.next_micro_batch()

    def _start_streamed_step(self, streaming: Streaming, rows: list[dict[str, Any]]) -> None:
        self._check_rows(rows)
        if self.state.global_step != self._last_loaded_step:  # as the parent does before it generates
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        order = None
        if self._chosen is not None and self._refilling is not None:
            order = self._chosen.refill_order()
        with self._phases.measure("generate"):
            streaming.start(rows, self.state.global_step, self._first_normalizer(), self.train_dataset, order)

    def _first_normalizer(self) -> torch.Tensor:
        """What the losses of a streamed step are divided by while the lengths of its groups are not known."""
        rows = torch.empty(self.args.generation_batch_size, device=self.accelerator.device)
        return loss_normalizer("dr_grpo", rows, self.max_completion_length, self.accelerator.num_processes)

    def _finish_streamed_step(self, step: Round, seconds: float) -> None:
        rollout: Rollout = step.rollout
        self._observe(rollout)
        self._log_step(rollout)
        self._phases.generate_took(seconds)
        # The gradient is divided by the first normaliser, and is to be by the one of all groups.
        self._scale_step((self._first_normalizer() / self._loss_normalizer(rollout)).item())
