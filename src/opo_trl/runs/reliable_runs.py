"""What any run of TRL's GRPOTrainer needs and OPO does not define: resuming, checkpoints, failures, the Hub."""

import itertools
import logging
import time
from collections.abc import Mapping, Sized
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerState
from transformers.integrations.integration_utils import WandbCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy, rotate_checkpoints

from .aborted_requests import abort_on_error
from .base_weights import keep_base_weights
from .checkpoints import mark_complete, unmark, warn_of_earlier_run
from .empty_completions import EmptyCompletions
from .epoch_end import EpochEnd
from .epoch_order import EpochOrder
from .evaluated_first import prepare_anew
from .finite_steps import FiniteSteps
from .guarded_functions import FunctionGuard, check_finite_rewards
from .hub import BackgroundPushes, PushError, UnpickledToken, claim_repository
from .model_card import complete_model_card, is_hub_name
from .preemption import EXIT_CODE, Preemption
from .ranks import any_rank
from .renamed_names import ignore_warnings_of_trls_calls
from .reward_values import warn_of_equal_names
from .same_rollouts import keep_rollout_batches, resumable_checkpoint
from .saving import CheckpointNotSaved, agree_on_saved, check_saving, not_saved, on_main_process, overridden
from .streamed_position import streamed_position
from .tested_trl import check_trl
from .tracking import ResumedWandb

if TYPE_CHECKING:
    from trl import GRPOTrainer
else:
    GRPOTrainer = object  # a mixin: the trainer comes after it in the bases

check_trl()
ignore_warnings_of_trls_calls()

logger = logging.getLogger(__name__)


class ReliableRuns(GRPOTrainer):
    """
    Mixin for [`~trl.GRPOTrainer`] and its subclasses: runs resume exactly, and fail on all ranks alike.

    1. Each epoch has an order of its own that a resumed run finds again ([`~opo_trl.runs.epoch_order.EpochOrder`]), and
       so has each pass over a streamed dataset. A checkpoint that a run cannot continue is refused
       ([`~opo_trl.runs.same_rollouts.resumable_checkpoint`]).
    2. A checkpoint counts when it is complete ([`~opo_trl.runs.checkpoints.mark_complete`]), and none is deleted before
       the next one is.
    3. After a SIGTERM the run saves at the next step boundary, on all ranks, and exits with code 75, without evaluating
       or pushing ([`~opo_trl.runs.preemption.Preemption`]). An interrupted step leaves nothing to the next `train()`.
    4. A loss or a gradient that is not finite, a reward that is infinite, and a reward function, a rollout function or
       an environment that raises on one rank stop the run on all ranks, with the same message, before anything of the
       step is saved. A completion of zero tokens does not.
    5. An evaluation before training does not keep gradients from being averaged.
    6. A Hub that refuses the push is an error before the model is loaded. Complete checkpoints are pushed, the last one
       always, and none is deleted while it is uploaded. A rejected push is warned about and does not stop training;
       [`push_to_hub`], [`save_model`] and [`end`] make their own attempt and then raise, on all ranks. The access token
       is in no file that is saved or pushed.
    7. A resumed run continues its checkpoint's Weights & Biases run ([`~opo_trl.runs.tracking.ResumedWandb`]), and the
       model card has the run's configuration and last metrics.

    Example:

    ```python
    >>> from trl import GRPOTrainer
    >>> from opo_trl.runs.reliable_runs import ReliableRuns

    >>> class MyTrainer(ReliableRuns, GRPOTrainer):
    ...     pass
    ```

    Attributes:
        push_failures (`list[str]`):
            What did not reach the Hub, and why: the same on all ranks after [`train`], [`push_to_hub`] and [`end`].
    """

    model: Any
    model_wrapped: Any
    push_in_progress: Any
    reward_funcs: list[Any]
    rollout_func: Any
    environment_factories: dict[str | None, Any] | None
    log_completions: bool
    _logs: dict[str, Any]
    _step: int
    _tr_loss: torch.Tensor

    # ---- Construction

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        if args is not None:
            check_saving(args)
        self._hub_repository = None if args is None else claim_repository(args)
        self._pushed_by_hand = False
        self._pushes = BackgroundPushes()
        self._unpushed: str | None = None  # the latest checkpoint, if it was saved while another one was uploading
        self.push_failures: list[str] = []
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._finite_steps = FiniteSteps(self.accelerator)
        self._fields_of_user: dict[str, Any] = {}  # of `args`, as the user set them, while a save overrides them
        self._preemption = Preemption(lambda value: any_rank(self.accelerator, value))
        self.add_callback(self._preemption)
        self.add_callback(EpochEnd(self._end_epoch))
        self._wandb: ResumedWandb | None = None
        theirs = [callback for callback in self.callback_handler.callbacks if type(callback) is WandbCallback]
        if theirs:
            self._wandb = ResumedWandb(self._describe)
            self.remove_callback(theirs[0])
            self.add_callback(self._wandb)
        if self.use_vllm and self.args.vllm_mode == "colocate":
            self.vllm_generation.generate = abort_on_error(self.vllm_generation)
        if self.use_vllm and hasattr(self.model, "merge_adapter"):
            self.vllm_generation.sync_weights = keep_base_weights(self.model, self.vllm_generation.sync_weights)
        if self.accelerator.is_main_process:
            warn_of_equal_names(self.reward_func_names)
        self._guard, self._empty = FunctionGuard(), EmptyCompletions(self._tokenizer.pad_token_id)
        self.reward_funcs = [
            self._guard.reward(function, name)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        if self.rollout_func is not None:
            self.rollout_func = self._empty.fill_rollouts(self._guard.rollout(self.rollout_func))
        if self.environment_factories is not None:
            self.environment_factories = {
                name: self._guard.environment(factory) for name, factory in self.environment_factories.items()
            }
            for environment in itertools.chain(*self._environment_pool.values()):  # those that TRL has looked at
                self._guard.reset_of(environment)

    def _describe(self) -> Mapping[str, Any]:
        """Return what a tracked run's config has besides the training arguments. To be overridden."""
        return {}

    def _describe_method(self) -> tuple[str, Mapping[str, Any]]:
        """Return what the model card has on the method: a section, and settings. To be overridden."""
        return "", {}

    # ---- Starting and ending

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
                marker lists, or was saved without the optimizer's state or with rollout batches of another size; or,
                during training, if a loss or a gradient is not finite.
            RuntimeError: During training, on all ranks, if a checkpoint cannot be saved; names the last complete one.
            SystemExit: With code 75, after a SIGTERM and the checkpoint that follows it.
        """
        prepare_anew(self)
        self._drop_unfinished_step()
        self._finite_steps.take()
        self._send_weights_again()  # an earlier run may have left the number of the step that this one starts at
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        if self._wandb is not None and checkpoint is not None:
            self._wandb.resume_from(Path(checkpoint))
        with self._preemption.listening():
            output = super().train(checkpoint, *args, **kwargs)
        if self._preemption.ends:
            resume = (
                "`save_only_model=True` saved the weights alone, from which a run cannot be resumed."
                if self.args.save_only_model
                else "Resume with `trainer.train(resume_from_checkpoint='auto')`, or on the command line with "
                "--resume_from_checkpoint auto."
            )
            self.accelerator.print(f"Stopped by SIGTERM: step {self.state.global_step} is saved. {resume}")
            raise SystemExit(EXIT_CODE)
        return output

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Find the checkpoint to resume from: the main process looks, and all of them return, or raise, the same."""
        checkpoint: str | None = None
        refusal: str | None = None
        cause: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                found = resumable_checkpoint(self.args, resume_from_checkpoint)
                checkpoint = None if found is None else str(found)
                if found is None and self.args.save_strategy != SaveStrategy.NO:
                    warn_of_earlier_run(Path(self.args.output_dir))
            except (ValueError, OSError) as error:
                cause, refusal = error, str(error)
        checkpoint, refusal = broadcast_object_list([checkpoint, refusal])
        if refusal is not None:
            raise ValueError(refusal) from cause
        return checkpoint

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochOrder:
        sampler = super()._get_train_sampler(dataset)
        rollout_batches = sampler.num_samples // sampler.batch_size  # a last incomplete one is left out
        steps = rollout_batches * sampler.repeat_count // self.args.gradient_accumulation_steps
        return EpochOrder(sampler, lambda: self.state.global_step, max(1, steps))

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        # transformers 5.23 checks `max_steps` after a step, and so trains one more step each time that a finished run
        # is resumed in the middle of an epoch. No issue is known; delete this when it checks before.
        if checkpoint is not None and (step := self.state.global_step) >= max_steps:
            self.accelerator.print(f"The run is finished: {checkpoint} is of step {step} of {max_steps}.")
            return num_train_epochs, 0
        if checkpoint is None or self.args.ignore_data_skip or not isinstance(self.train_dataset, IterableDataset):
            return position
        passes, steps = streamed_position(TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))))
        return passes, steps * self.args.gradient_accumulation_steps

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """
        Log as the parent does, with a table of completions only if some were sampled.

        Where a finished run is resumed, TRL 1.16 would write an empty table over that of the last step. No issue is
        known; delete this when it does not.
        """
        shown = self.log_completions
        self.log_completions = shown and len(self._logs["prompt"]) > 0
        try:
            super().log(logs, *args, **kwargs)
        finally:
            self.log_completions = shown

    def _end_epoch(self, stops: bool) -> None:
        self._drop_unfinished_step()

    def _drop_unfinished_step(self) -> None:
        """
        Drop what an exception, an interrupt or an epoch that a callback has ended left of a rollout batch.

        Its rest would otherwise be trained in the next step, after an optimizer step in its middle: TRL 1.16 keeps its
        buffer and its position over the end of an epoch and of `train()`. No issue is known; delete this when it drops
        both.
        """
        in_step = self._step % self.args.gradient_accumulation_steps
        if in_step and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                "Under DeepSpeed and FSDP a step must not end before its last micro-batch, since they keep its "
                f"gradients: it ended after {in_step} of {self.args.gradient_accumulation_steps}. Build a new trainer, "
                "and let callbacks stop an epoch in `on_step_end`, not in `on_substep_end`."
            )
        if in_step:
            self.model.zero_grad()
            loss = self._finite_steps.take()
            if loss.isfinite():
                self._tr_loss -= loss.to(self._tr_loss)  # else it would be logged with the next step's
        self._step -= self._step % (self.args.steps_per_generation * self.num_iterations)
        self._buffered_inputs = None
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        waits_from = time.time()
        if self.args.push_to_hub and self._preemption.ends:
            self._pushes.cancel()
            self._pushes.running()  # logs what has failed until now
        elif self.args.push_to_hub:
            self._wait_for_pushes()
            if self._unpushed is not None:
                self._push(self._unpushed)
            self._wait_for_pushes()
            self._rotate_checkpoints(Path(self._get_output_dir(trial=trial)))
        if self.push_failures and self.accelerator.is_main_process:
            logger.error("%s", PushError(self.push_failures))
        # With `save_total_limit=1` and a better checkpoint, the parent would delete what the stop has just saved.
        unfinished = {"save_total_limit": None, "load_best_model_at_end": False} if self._preemption.ends else {}
        with overridden(self.args, **unfinished):
            # An upload is no training: the parent's speed metrics count from `start_time`.
            return super()._finalize_training(trial, num_train_samples, start_time + time.time() - waits_from)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the next class does; a vLLM engine is synchronized again after averaged weights are evaluated."""
        output = super().evaluation_loop(*args, **kwargs)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # in accelerate's wrapper
        if hasattr(optimizer, "eval"):  # a schedule-free one: the engine has averaged weights, under the same number
            self._send_weights_again()
        return output

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._send_weights_again()  # the engine has those of the last step, under the same number

    def _send_weights_again(self) -> None:
        """Have TRL send the weights to vLLM before the next generation, although the number of the step is the same."""
        if self.use_vllm:
            self._last_loaded_step = -1

    def end(self) -> None:
        """
        Finish the trackers and leave the process group, as [`~transformers.Trainer.end`] of newer releases does.

        Raises:
            PushError: After everything is closed, on all ranks, if any push has failed.
        """
        if self.args.push_to_hub or self._pushed_by_hand:
            self._wait_for_pushes()
        self.accelerator.end_training()
        if self.push_failures:
            raise PushError(self.push_failures)

    # ---- Rollouts and steps

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards_per_func: torch.Tensor = super()._calculate_rewards(*args, **kwargs)  # (N, F), NaN for None
        self._guard.raise_on_all_ranks(self.accelerator)
        check_finite_rewards(rewards_per_func, self.reward_func_names)
        return rewards_per_func

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if self.environment_factories is not None:  # TRL has just reset the environments, each rank its own
            self._guard.raise_on_all_ranks(self.accelerator)
        return super()._generate(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        completion_ids, *rest = super()._generate_single_turn(*args, **kwargs)
        # With tools, a later turn may well be empty: its completion is not.
        return completion_ids if self.tools else self._empty.fill(completion_ids), *rest

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        tool_mask, completions, completion_ids, *rest = super()._tool_call_loop(*args, **kwargs)
        return tool_mask, completions, self._empty.fill(completion_ids), *rest

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self._empty.mask(output["completion_mask"])
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take a micro-batch's gradient as [`~trl.GRPOTrainer`] does, and add its loss to the step's."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._finite_steps.add(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        step = self.state.global_step + 1
        self._finite_steps.check_loss(step)
        grad_norm = super()._get_grad_norm(model, grad_norm)  # over all ranks, so all of them see the same
        self._finite_steps.check_gradients(model, grad_norm, step)
        return grad_norm

    # ---- Saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        pushes = self.args.push_to_hub and not self._preemption.ends  # a stop request waits for no upload
        if pushes and self.args.hub_always_push:
            self._wait_for_pushes()  # else this save would overwrite what the last one is still sending
        directory = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        on_main_process(self.accelerator, unmark, directory)
        failure: BaseException | None = None
        try:
            if self._wandb is not None and self.accelerator.is_main_process:
                self._wandb.keep_run(directory)
            # The parent ends by deleting older checkpoints: that waits until this one is complete. Delete the override
            # when transformers (5.23, no issue is known) writes a marker of its own before it deletes.
            self._fields_of_user = {"save_total_limit": self.args.save_total_limit}
            with overridden(self.args, save_total_limit=None):
                super()._save_checkpoint(model, trial)
            if self.accelerator.is_main_process:
                keep_rollout_batches(directory, self.args)
        except CheckpointNotSaved:
            raise
        except (Exception, CheckpointException) as error:  # the second, of torch, is no Exception
            failure = error
        finally:
            self._fields_of_user = {}
        if failure is not None and self._saves_in_collectives():
            # The others wait for this rank inside of the save: to wait for them would be a deadlock. This rank ends,
            # so their collectives break or their launcher ends them.
            raise not_saved(directory, failure) from failure
        agree_on_saved(self.accelerator, directory, failure)
        on_main_process(self.accelerator, mark_complete, directory)
        self._rotate_checkpoints(directory.parent)
        if pushes:
            self._push(str(directory))

    def _saves_in_collectives(self) -> bool:
        """Whether ranks wait for each other inside of a save: for sharded weights, and while finding the best one."""
        by_transformers = getattr(self.model, "is_distributed_loading_by_transformers", False)  # loaded sharded
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or by_transformers or bool(self.state.best_global_step)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        # The parent pickles `self.args` into training_args.bin, with the token (5.23, no issue is known).
        with overridden(self.args, **self._fields_of_user), self._token_not_pickled():
            super()._save(*args, **kwargs)

    def _token_not_pickled(self) -> AbstractContextManager[None]:
        """
        Keep the access token out of `training_args.bin`, which is pushed.

        Only there: a copy of the arguments, or a pickle for another process, keeps the token. Delete this when
        transformers leaves it out itself.
        """
        token = self.args.hub_token
        return overridden(self.args, hub_token=None if token is None else UnpickledToken(token))

    def _rotate_checkpoints(self, run_directory: Path) -> None:
        """Delete what exceeds `save_total_limit`, unless a checkpoint is being uploaded."""
        if self.args.should_save and not self._pushes.running():
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_directory), self.args.save_total_limit, best, use_mtime=True)

    # ---- The Hub

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Take the repository that the constructor has claimed, on all ranks."""
        if self._hub_repository is None:  # push_to_hub() of a run that was not going to push
            super().init_hf_repo(*args, **kwargs)
        else:
            self.hub_model_id, self.push_in_progress = self._hub_repository, None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """No-op: `_save_checkpoint` pushes once the checkpoint is complete."""

    def _push(self, checkpoint_folder: str) -> None:
        """Start to push a complete checkpoint. It fails as a push, never as a save: the checkpoint is on the disk."""
        if not self.accelerator.is_main_process or self.args.hub_strategy == HubStrategy.END:
            return
        self._unpushed = None
        if self._pushes.running():  # the files that it reads must not change: this one is pushed when training ends
            self._unpushed = checkpoint_folder
            return
        try:
            self.create_model_card()  # the parent's may have found the last one being uploaded
            with self._token_not_pickled():
                super()._push_from_checkpoint(checkpoint_folder)
        except Exception as error:
            self._pushes.fail(f"step {self.state.global_step}", error)
            return
        # The strategy every_save has the model alone.
        for part, job in zip(("model", "checkpoint"), self.push_in_progress.jobs, strict=False):
            self._pushes.watch(f"{part} of step {self.state.global_step}", job)

    def _wait_for_pushes(self) -> None:
        """Wait for the main process's uploads: all ranks together, in turns shorter than any collective's timeout."""
        while any_rank(self.accelerator, self._pushes.running(seconds=10)):
            pass
        self.push_failures = broadcast_object_list([self._pushes.failures])[0]

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
        self._pushed_by_hand = True
        self._wait_for_pushes()
        job, failure = None, None
        try:
            job = super().push_to_hub(commit_message, False, *args, **kwargs)
        except Exception as error:  # on one rank, perhaps: all of them must raise
            failure = error
            self._pushes.fail(f"{commit_message!r}", error)
        if any_rank(self.accelerator, failure is not None):
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

    def create_model_card(self, model_name: Any = None, dataset_name: str | None = None, tags: Any = None) -> None:
        """Write the model card as TRL does, and complete it; a dataset that is not on the Hub is not linked."""
        if not self.is_world_process_zero() or self._pushes.running():
            return  # a card that is being uploaded stays that of its step
        model_name = model_name or Path(self.hub_model_id or self.args.output_dir).absolute().name
        linked = dataset_name if dataset_name is not None and is_hub_name(dataset_name) else None
        super().create_model_card(model_name, linked, tags)
        method, settings = self._describe_method()
        complete_model_card(
            Path(self.args.output_dir, "README.md"),
            self.args,
            self.state,
            method=method,
            settings=settings,
            base_model=self.model.config.name_or_path,
            reward_names=self.reward_func_names,
            has_chat_template=getattr(self.processing_class, "chat_template", None) is not None,
            num_problems=len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None,
            dataset_name=dataset_name,
        )
