"""The groups that a step trains on: which prompts, in how many rounds, and from which server."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..algorithm.baselines import takes_part
from ..algorithm.rollout import Rollout
from .chosen_prompts import ChosenPrompts
from .learning_signal import NoSignalWarning
from .refilling import Refilling, check_refilling
from .rounds import Round
from .server_generation import check_weight_directory, server_generation

if TYPE_CHECKING:
    from trl import GRPOTrainer
else:
    GRPOTrainer = object  # a mixin: the trainer comes after it in the bases


class StepRollouts(GRPOTrainer):
    """
    Mixin for [`OPOTrainer`]: chooses the prompts of each step, and samples more of them under the same weights.

    See [`~opo_trl.rollouts.chosen_prompts.ChosenPrompts`] and [`~opo_trl.rollouts.refilling.Refilling`]; without their
    settings, a step trains on what the data loader delivers. Errors of a vLLM server are raised on all ranks. It comes
    before [`~opo_trl.runs.reliable_runs.ReliableRuns`] in the bases.
    """

    args: Any
    model: Any
    _obstacle: Callable[[dict[str, Any]], str | None]  # of `PlannedUpdates`: rounds are merged row by row

    def __init__(
        self, model: Any, reward_funcs: Any, args: Any, train_dataset: Any = None, *rest: Any, **kwargs: Any
    ) -> None:
        check_refilling(args, train_dataset)
        check_weight_directory(args)
        with server_generation(args):
            super().__init__(model, reward_funcs, args, train_dataset, *rest, **kwargs)
        self.add_callback(NoSignalWarning)
        self._refilling: Refilling | None = None
        if args.max_refill_rounds:
            self._refilling = Refilling(
                self.accelerator,
                max_rounds=args.max_refill_rounds,
                seed=args.seed,
                reward_names=self.reward_func_names,
                obstacle=lambda batch: self._obstacle(batch),
                metrics=self._metrics["train"],
            )
        self._chosen: ChosenPrompts | None = None
        if args.prompt_sampling == "informative":
            prompts_per_step = args.generation_batch_size // args.num_generations
            self._chosen = ChosenPrompts(
                self.accelerator,
                self.train_dataset,
                prompts_per_step,
                self.num_generations,
                args.seed,
                spare=prompts_per_step * args.max_refill_rounds,
            )

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.model.training and self._chosen is not None and self._step % self.args.steps_per_generation == 0:
            generation_batch, metrics = self._chosen.draw_rows(self.state.global_step, len(generation_batch))
            self._log_in_training(metrics)
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        return inputs

    def _sample_step(self, rows: list[dict[str, Any]], sample: Callable[[list[dict[str, Any]]], Round]) -> Round:
        """Sample this rank's rows of a step, and in training those of refill rounds."""
        if not self.model.training:
            return sample(rows)
        if self._refilling is None:
            sampled = sample(rows)
        else:
            order = None if self._chosen is None else self._chosen.refill_order()
            sampled = self._refilling.sample_step(rows, self.train_dataset, self.state.global_step, sample, order)
        self._observe(sampled.rollout)
        return sampled

    def _observe(self, rollout: Rollout) -> None:
        """Update the counts that prompts are chosen by with the rewards of a step."""
        if self._chosen is not None:
            scored = takes_part(rollout.rewards, rollout.lengths)
            self._log_in_training(self._chosen.observe(rollout.rewards, scored))

    def _log_in_training(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    # The state of the chosen prompts is part of a checkpoint.

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        checkpoint: str | None = super()._find_checkpoint(resume_from_checkpoint)
        if self._chosen is not None:
            self._chosen.resume(checkpoint)
        return checkpoint

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._chosen is not None and self.args.should_save:
            self._chosen.save(output_dir)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        if self._chosen is not None and dataset is not None:
            self._chosen.dataset = dataset  # with the columns that the data loader keeps
        return super()._get_train_sampler(dataset)
