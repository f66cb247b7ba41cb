"""GRPOTrainer whose runs can be interrupted anywhere and go on exactly where they stopped. Nothing here is OPO's."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from transformers.integrations.integration_utils import WandbCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOTrainer

from .checkpoints import checkpoint_to_resume, latest_complete, mark_complete, unmark
from .epoch_order import EpochOrder
from .preemption import EXIT_CODE, Preemption
from .tested_trl import check_trl
from .tracking import ContinuedWandb

check_trl()


class CheckpointNotSaved(RuntimeError):
    """A checkpoint could not be saved, and all ranks that can hear of it have."""


@contextmanager
def overridden(args: TrainingArguments, **fields: Any) -> Iterator[None]:
    """Set fields of the training arguments, and set them back at the end."""
    given = {name: getattr(args, name) for name in fields}
    for name, value in fields.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in given.items():
            setattr(args, name, value)


class ResumableTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with promises about what is saved and what a resumed run does.

    1. Each epoch has an order of its own that a resumed run finds again ([`~opo_trl.runs.epoch_order.EpochOrder`]).
    2. A checkpoint counts when it is complete ([`~opo_trl.runs.checkpoints.mark_complete`]), and none is deleted before
       the next one is.
    3. A loss or a gradient that is not finite stops the run on all ranks before anything of its step is saved.
    4. An evaluation before training does not keep gradients from being averaged.
    5. After a SIGTERM the run saves at the next step boundary, all ranks alike, and exits with code 75, without
       evaluating or pushing ([`~opo_trl.runs.preemption.Preemption`]).
    6. A resumed run goes on in its checkpoint's Weights & Biases run ([`~opo_trl.runs.tracking.ContinuedWandb`]).
    """

    model: Any
    model_wrapped: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss_of_step = torch.zeros(())  # of this rank, so far
        self._fields_of_user: dict[str, Any] = {}  # of `args`, as the user set them, while a save overrides them
        self._preemption = Preemption(self._any_rank)
        self.add_callback(self._preemption)
        self._wandb: ContinuedWandb | None = None
        theirs = [callback for callback in self.callback_handler.callbacks if type(callback) is WandbCallback]
        if theirs:
            self._wandb = ContinuedWandb(self._describe)
            self.remove_callback(theirs[0])
            self.add_callback(self._wandb)

    def _describe(self) -> Mapping[str, Any]:
        """What a tracked run's config says besides the training arguments."""
        return {}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint to resume from. `True` takes the latest complete one in `args.output_dir` and logs which it
                skipped; `"auto"` does so, too, and starts from scratch if there is none, so that a job scheduler can
                repeat one command.
            *args, **kwargs:
                As in [`~transformers.Trainer.train`].

        Raises:
            ValueError: If there is no complete checkpoint, or the one named does not exist or lacks a file that its
                marker lists; or, during training, if a loss or a gradient is not finite.
            RuntimeError: During training, on all ranks, if a checkpoint cannot be saved; names the last complete one.
            SystemExit: With code 75, after a SIGTERM and the checkpoint that follows it.
        """
        self._forget_evaluation()
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        if self._wandb is not None and checkpoint is not None:
            self._wandb.go_on_from(Path(checkpoint))
        self._loss_of_step = torch.zeros(())
        with self._preemption.listening():
            output = super().train(checkpoint, *args, **kwargs)
        if self._preemption.ends:
            self.accelerator.print(
                f"Stopped by SIGTERM: step {self.state.global_step} is saved. Resume with "
                "resume_from_checkpoint='auto'."
            )
            raise SystemExit(EXIT_CODE)
        return output

    def _any_rank(self, value: bool) -> bool:
        flag = torch.tensor(int(value), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint to resume from: the main process looks, and all of them return, or raise, the same."""
        checkpoint: str | None = None
        refusal: str | None = None
        cause: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                found = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
                checkpoint = None if found is None else str(found)
            except (ValueError, OSError) as error:
                cause, refusal = error, str(error)
        checkpoint, refusal = broadcast_object_list([checkpoint, refusal])
        if refusal is not None:
            raise ValueError(refusal) from cause
        return checkpoint

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._on_main_process(unmark, directory)
        failure: BaseException | None = None
        try:
            if self._wandb is not None and self.accelerator.is_main_process:
                self._wandb.keep_run(directory)
            # The parent ends by deleting older checkpoints: that waits until this one is complete.
            self._fields_of_user = {"save_total_limit": self.args.save_total_limit}
            with overridden(self.args, save_total_limit=None):
                super()._save_checkpoint(model, trial)
        except CheckpointNotSaved:
            raise
        except (Exception, CheckpointException) as error:  # the second, of torch, is no Exception
            failure = error
        finally:
            self._fields_of_user = {}
        if failure is not None and self._saves_in_collectives():
            # The others wait for this rank inside of the save: to wait for them would be a deadlock. This rank ends,
            # so their collectives break or their launcher ends them.
            raise self._not_saved(directory, failure) from failure
        self._agree_on_saved(directory, failure)
        self._on_main_process(mark_complete, directory)
        self._rotate_checkpoints(directory.parent)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with overridden(self.args, **self._fields_of_user):  # the parent pickles `self.args` into training_args.bin
            super()._save(*args, **kwargs)

    def _rotate_checkpoints(self, run_directory: Path) -> None:
        """Delete what exceeds `save_total_limit`."""
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_directory), self.args.save_total_limit, best, use_mtime=True)

    def _saves_in_collectives(self) -> bool:
        """Whether ranks wait for each other inside of a save: sharded weights do, and the look for the best one."""
        by_transformers = getattr(self.model, "is_distributed_loading_by_transformers", False)  # loaded sharded
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or by_transformers or bool(self.state.best_global_step)

    def _on_main_process(self, change: Callable[[Path], None], checkpoint: Path) -> None:
        failure = None
        if self.accelerator.is_main_process:
            try:
                change(checkpoint)
            except OSError as error:
                failure = error
        self._agree_on_saved(checkpoint, failure)

    def _agree_on_saved(self, checkpoint: Path, failure: BaseException | None) -> None:
        """Wait for all ranks, and raise on all of them if one has failed."""
        if self._any_rank(failure is not None):
            raise self._not_saved(checkpoint, failure) from failure

    def _not_saved(self, checkpoint: Path, failure: BaseException | None) -> CheckpointNotSaved:
        whole, _ = latest_complete(checkpoint.parent)
        return CheckpointNotSaved(
            f"{checkpoint} could not be saved: {failure or 'another rank failed, see its message'}. "
            + (f"{whole} is whole: make room and go on from there." if whole else "There is no other checkpoint.")
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take a micro-batch's gradient as [`~trl.GRPOTrainer`] does, and keep what its loss adds to the step's."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._loss_of_step = self._loss_of_step + loss.float()  # a sum with a number that is not finite is not, either
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        losses = self.accelerator.gather(self._loss_of_step.reshape(1).to(self.accelerator.device))  # (ranks,)
        self._loss_of_step = torch.zeros(())
        bad_ranks = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad_ranks:
            raise self._not_finite(
                f"The loss must be finite: it is {losses[bad_ranks[0]].item()}", f"on rank {bad_ranks}"
            )
        grad_norm = super()._get_grad_norm(model, grad_norm)  # over all ranks, so all of them see the same
        # Under fp16 a gradient too large for the loss scale is not bad: the step is left out and the scale lowered.
        # DeepSpeed stops by itself when its scale can fall no further. It has called a norm that is not finite -1.
        if grad_norm is None or 0 <= grad_norm < math.inf or self._scales_loss():
            return grad_norm
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        # Scaling by a norm that is not finite spreads it over all parameters: then they tell nothing.
        where = f"in {bad}" if 0 < len(bad) < len(gradients) else ""
        raise self._not_finite(f"Gradients must be finite: their norm is {float(grad_norm)}", where)

    def _scales_loss(self) -> bool:
        """Whether a loss scale is there that can still be lowered."""
        if self.accelerator.mixed_precision != "fp16":
            return False
        return self.accelerator.scaler is None or self.accelerator.scaler.get_scale() >= 1

    def _not_finite(self, what: str, where: str) -> ValueError:
        return ValueError(
            f"{what} in step {self.state.global_step + 1}{where and f', {where}'}. Nothing of this step is saved. "
            "Go on from the last checkpoint with a lower learning rate, or with another dtype."
        )

    def _forget_evaluation(self) -> None:
        """
        Undo what an evaluation before training has prepared.

        accelerate takes a model that it prepared for evaluation for one that is ready to train. Under plain data
        parallel no gradient would then be averaged: each rank would train a policy of its own, without a word.
        """
        if self.is_deepspeed_enabled and self.deepspeed is not None and self.optimizer is None:
            raise ValueError(
                "Under DeepSpeed a trainer that has evaluated before training cannot train any more: its engine has no "
                "optimizer. Set eval_on_start=True instead of calling evaluate() first."
            )
        if self.accelerator.num_processes == 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return
        if any(isinstance(module, DistributedDataParallel) for module in self.model_wrapped.modules()):
            return  # prepared by an earlier call of train()
        self.accelerator.free_memory()
        self.model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        self.model._is_accelerate_prepared = False
        self.model_wrapped = self.model

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochOrder:
        sampler = super()._get_train_sampler(dataset)
        # One rollout batch is one step, and a last incomplete one is left out.
        steps_per_epoch = max(1, sampler.num_samples // sampler.batch_size)
        return EpochOrder(sampler, lambda: self.state.global_step, steps_per_epoch)
