"""GRPOTrainer whose runs can be interrupted anywhere and go on exactly where they stopped. Nothing here is OPO's."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints
from trl import GRPOTrainer

from .checkpoints import MARKER, mark_whole, newest_whole, unmark, what_is_missing
from .epoch_order import EpochOrder
from .hub import BackgroundPushes, PushError, claim_repository
from .preemption import EXIT_CODE, Preemption

logger = logging.getLogger(__name__)


class ResumableTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with promises about what is saved and what a resumed run does.

    1. Each epoch has an order of its own that a resumed run finds again ([`~opo_trl.epoch_order.EpochOrder`]).
    2. A checkpoint counts when it is whole ([`~opo_trl.checkpoints.mark_whole`]), and none is deleted before the next
       one is.
    3. A gradient that is not finite stops the run on all ranks before anything of its step is saved.
    4. An evaluation before training does not keep gradients from being averaged.
    5. After a SIGTERM the run saves at the next step boundary, all ranks alike, and exits with code 75, without
       evaluating or pushing ([`~opo_trl.preemption.Preemption`]).
    6. A Hub that refuses the push is an error before the model is loaded ([`~opo_trl.hub.claim_repository`]). A push
       that fails later is warned about and does not stop training; [`push_to_hub`], [`save_model`] and [`end`] make
       their own attempt and then raise, on all ranks.

    Attributes:
        push_failures (`list[str]`):
            What did not reach the Hub, and why: the same on all ranks after [`train`], [`push_to_hub`] and [`end`].
    """

    model: Any
    model_wrapped: Any
    push_in_progress: Any

    def __init__(self, model: Any, reward_funcs: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        self._hub_repository = claim_repository(args)
        self._pushes = BackgroundPushes()
        self._unpushed: str | None = None  # the newest checkpoint, if it was saved while another one was uploading
        self.push_failures: list[str] = []
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._preemption = Preemption(self._any_rank)
        self.add_callback(self._preemption)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint to go on from. `True` takes the newest whole one in `args.output_dir` and says what it
                passed over.
            *args, **kwargs:
                As in [`~transformers.Trainer.train`].

        Raises:
            ValueError: If there is no whole checkpoint, or the one named lacks a file that its marker lists; or, during
                training, if a gradient is not finite.
            RuntimeError: During training, on all ranks, if a checkpoint cannot be saved; names the last whole one.
            SystemExit: With code 75, after a SIGTERM and the checkpoint that follows it.
        """
        self._forget_evaluation()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_whole_checkpoint()
        elif resume_from_checkpoint:
            self._check_named_checkpoint(Path(resume_from_checkpoint))
        with self._preemption.listening():
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.push_failures and self.accelerator.is_main_process:
            logger.error("%s", PushError(self.push_failures))
        if self._preemption.ends:
            self.accelerator.print(
                f"Asked to stop: step {self.state.global_step} is saved. Go on with resume_from_checkpoint=True."
            )
            raise SystemExit(EXIT_CODE)
        return output

    def _any_rank(self, value: bool) -> bool:
        flag = torch.tensor(int(value), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    def _newest_whole_checkpoint(self) -> str:
        found = newest_whole(Path(self.args.output_dir)) if self.accelerator.is_main_process else None
        checkpoint, passed_over = broadcast_object_list([found])[0]  # one rank looks, all of them go on from there
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        if checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint=True needs a whole checkpoint in {self.args.output_dir!r}, got none"
                f"{f' ({reasons})' if reasons else ''}. Name a checkpoint to go on from one without a marker, or train "
                "from the start without resume_from_checkpoint."
            )
        if reasons and self.accelerator.is_main_process:
            logger.warning("Going on from %s. Passed over what is not whole: %s", checkpoint, reasons)
        return str(checkpoint)

    def _check_named_checkpoint(self, checkpoint: Path) -> None:
        """Refuse a checkpoint that lacks what its marker lists, as after half a download; it may have no marker."""
        has_marker = self.accelerator.is_main_process and (checkpoint / MARKER).exists()
        (missing,) = broadcast_object_list([what_is_missing(checkpoint) if has_marker else None])
        if missing is not None:
            raise ValueError(
                f"resume_from_checkpoint needs a whole checkpoint, got {str(checkpoint)!r}: {missing}. Copy or "
                "download it again, or go on from another one."
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        pushes = self.args.push_to_hub and not self._preemption.ends  # whoever asked to stop waits for no upload
        if pushes and self.args.hub_always_push:
            self._wait_for_pushes()  # else this save would overwrite what the last one is still sending
        directory = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.accelerator.is_main_process:
            unmark(directory)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # nothing is deleted before this is whole
        failure: Exception | None = None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # on one rank, perhaps: all of them must hear of it
            failure = error
        finally:
            self.args.save_total_limit = limit
        if self._any_rank(failure is not None):
            whole, _ = newest_whole(directory.parent)
            raise RuntimeError(
                f"{directory} could not be saved: {failure or 'another rank failed, see its message'}. "
                + (f"{whole} is whole: make room and go on from there." if whole else "There is no other checkpoint.")
            ) from failure
        self._mark_whole(directory)
        self._rotate_checkpoints(directory.parent)
        if pushes:
            self._push(str(directory))

    def _rotate_checkpoints(self, run_directory: Path) -> None:
        """Delete what exceeds `save_total_limit`, but nothing while a checkpoint is on its way to the Hub."""
        if self.args.should_save and not self._pushes.running():
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_directory), self.args.save_total_limit, best, use_mtime=True)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Take the repository that the constructor has claimed, on all ranks."""
        if self._hub_repository is None:  # push_to_hub() of a run that was not going to push
            super().init_hf_repo(token, private)
        else:
            self.hub_model_id, self.push_in_progress = self._hub_repository, None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Leave it to `_save_checkpoint`: here, in the middle of the parent's, the checkpoint is not whole yet."""

    def _push(self, checkpoint_folder: str) -> None:
        """Start to push a whole checkpoint. It fails as a push, never as a save: the checkpoint is on the disk."""
        if not self.accelerator.is_main_process or self.args.hub_strategy == HubStrategy.END:
            return
        self._unpushed = None
        if self._pushes.running():  # the files that it reads must not change; its turn comes at the end of training
            self._unpushed = checkpoint_folder
            return
        try:
            self.create_model_card()  # the parent's may have found the last one on its way
            super()._push_from_checkpoint(checkpoint_folder)
        except Exception as error:
            self._pushes.fail(f"step {self.state.global_step}", error)
            return
        # The strategy every_save has the model alone.
        for part, job in zip(("model", "checkpoint"), self.push_in_progress.jobs, strict=False):
            self._pushes.watch(f"{part} of step {self.state.global_step}", job)

    def _wait_for_pushes(self) -> None:
        """Wait for what the main process uploads: all ranks together, in turns that no collective's timeout cuts."""
        while self._any_rank(self._pushes.running(seconds=10)):
            pass
        self.push_failures = broadcast_object_list([self._pushes.failures])[0]

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        waits_from = time.time()
        if self.args.push_to_hub and self._preemption.ends:
            self._pushes.cancel()
            self._pushes.running()  # says what has failed until now
        elif self.args.push_to_hub:
            self._wait_for_pushes()
            if self._unpushed is not None:
                self._push(self._unpushed)
            self._wait_for_pushes()
            self._rotate_checkpoints(Path(self._get_output_dir(trial=trial)))
        # An upload is no training: the parent's speed metrics count from `start_time`.
        return super()._finalize_training(trial, num_train_samples, start_time + time.time() - waits_from)

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """
        Push as [`~transformers.Trainer.push_to_hub`] does, and wait for it on all ranks alike.

        Args:
            commit_message, blocking, *args, **kwargs:
                As in [`~transformers.Trainer.push_to_hub`].

        Returns:
            As [`~transformers.Trainer.push_to_hub`]; `None` on all ranks but the first.

        Raises:
            PushError: After its own attempt, on all ranks, if that or any earlier push of this trainer has failed.
        """
        self._wait_for_pushes()
        job, failure = None, None
        try:
            job = super().push_to_hub(commit_message, False, *args, **kwargs)
        except Exception as error:  # on one rank, perhaps: all of them must hear of it
            failure = error
            self._pushes.fail(f"{commit_message!r}", error)
        if self._any_rank(failure is not None):
            self.push_failures = self._pushes.failures or [f"{commit_message!r}: another rank failed, see its message"]
            raise PushError(self.push_failures) from failure
        if job is not None:
            self._pushes.watch(f"{commit_message!r}", job)
        if not blocking:
            return job
        self._wait_for_pushes()
        if self.push_failures:
            raise PushError(self.push_failures)
        return None if job is None else job.result()

    def end(self) -> None:
        """
        End as [`~transformers.Trainer.end`] does.

        Raises:
            PushError: After everything is closed, on all ranks, if any push has failed.
        """
        if self.args.push_to_hub:
            self._wait_for_pushes()
        super().end()
        if self.push_failures:
            raise PushError(self.push_failures)

    def _mark_whole(self, checkpoint: Path) -> None:
        self.accelerator.wait_for_everyone()  # all ranks have written their files
        if self.accelerator.is_main_process:
            mark_whole(checkpoint)
        self.accelerator.wait_for_everyone()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)  # over all ranks, so all of them see the same
        if grad_norm is not None and not math.isfinite(grad_norm):
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            # Scaling by a norm that is not finite spreads it over all parameters: then they tell nothing.
            where = f", in {bad}" if 0 < len(bad) < len(gradients) else ""
            raise ValueError(
                f"Gradients must be finite: their norm is {float(grad_norm)} in step {self.state.global_step + 1}"
                f"{where}. Nothing of this step is saved. Go on from the last checkpoint with a lower learning rate, "
                "or with another dtype."
            )
        return grad_norm

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
