"""What OPO adds to TRL's completions table, where the trainer computes it."""

from typing import TYPE_CHECKING, Any

import torch

from ..algorithm.rollout import Rollout
from .completion_columns import SOLUTION, TRUNCATED, completion_columns
from .run_settings import RunSettings
from .token_logps import TokenLogps

if TYPE_CHECKING:
    from trl import GRPOTrainer
else:
    GRPOTrainer = object  # a mixin: the trainer comes after it in the bases


class LoggedCompletions(GRPOTrainer):
    """
    Mixin for [`OPOTrainer`]: with `log_completions`, completes the table that TRL writes.

    The subclass gives each rollout to [`_log_rollout`], and the log-probabilities of each micro-batch to
    [`_log_logps`]. It comes before [`~opo_trl.runs.reliable_runs.ReliableRuns`] in the bases.
    """

    args: Any
    model: Any
    train_dataset: Any
    _logs: dict[str, Any]

    def __init__(self, model: Any, reward_funcs: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._token_logps = TokenLogps(self.accelerator, self._tokenizer) if args.log_token_logps else None
        dataset = self.train_dataset
        self.add_callback(
            RunSettings(
                model=self.model.config._name_or_path,
                dataset=getattr(getattr(dataset, "info", None), "dataset_name", None),
                prompts=getattr(dataset, "num_rows", None),
                reward_functions=self.reward_func_names,
            )
        )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards_per_func: torch.Tensor = super()._calculate_rewards(*args, **kwargs)  # (N, F), of all ranks
        if self.log_completions:
            inputs, *_, completion_ids = args
            # Also where no row has one: TRL keeps rows of training and evaluation in one table, and a column that only
            # some of them have would be shorter than the others.
            self._log_completion_extra(SOLUTION, [_as_text(row.get("solution")) for row in inputs])
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}  # as in the parent's completions/clipped_ratio
            self._log_completion_extra(TRUNCATED, [bool(ids) and ids[-1] not in ends for ids in completion_ids])
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._token_logps is not None:
            ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
            self._token_logps.number(batch, rank, ranks, self.model.training, self._logs["extra"])
        return batch

    def _drop_unfinished_step(self) -> None:
        super()._drop_unfinished_step()
        if self._token_logps is not None:
            self._token_logps.clear()

    def _log_rollout(self, rollout: Rollout) -> None:
        """Log the advantages in place of the parent's, which it has just logged, and OPO's further columns."""
        logged, shown = self._logs["advantages"], rollout.completion_advantages.flatten().tolist()
        for _ in range(min(len(logged), len(shown))):
            logged.pop()
        logged.extend(shown)
        if self.log_completions:
            for name, values in completion_columns(rollout, "train" if self.model.training else "eval").items():
                self._logs["extra"][name].extend(values)

    def _log_logps(self, inputs: dict[str, Any], logps: torch.Tensor, mask: torch.Tensor) -> None:
        """Log the log-probabilities of a micro-batch; all ranks call it together."""  # (B, C), (B, C)
        if self._token_logps is not None and self.model.training:
            self._token_logps.add(inputs, logps, mask)
            if self.accelerator.sync_gradients:  # the last micro-batch of the step
                self._token_logps.write(self._logs["extra"])


def _as_text(value: Any) -> str | None:
    """A dataset's value, as text, so that all rows of the table have one type."""
    return None if value is None else str(value)
