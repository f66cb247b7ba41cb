"""GRPOTrainer that loses nothing on its way to the Hub. Nothing here is OPO's."""

import logging
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from .hub import BackgroundPushes, PushError, UnpickledToken, claim_repository
from .resumable import ResumableTrainer, overridden

logger = logging.getLogger(__name__)


class PushingTrainer(ResumableTrainer):
    """
    [`ResumableTrainer`] with promises about what reaches the Hub.

    1. A Hub that refuses the push is an error before the model is loaded ([`~opo_trl.runs.hub.claim_repository`]).
    2. Checkpoints are pushed when they are whole, the last one always, and none is deleted on its way.
    3. The access token is in no file that is saved or pushed.
    4. A push that fails is warned about and does not stop training; [`push_to_hub`], [`save_model`] and [`end`] make
       their own attempt and then raise, on all ranks.

    Attributes:
        push_failures (`list[str]`):
            What did not reach the Hub, and why: the same on all ranks after [`train`], [`push_to_hub`] and [`end`].
    """

    push_in_progress: Any

    def __init__(self, model: Any, reward_funcs: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        self._hub_repository = claim_repository(args)
        self._pushes = BackgroundPushes()
        self._unpushed: str | None = None  # the newest checkpoint, if it was saved while another one was uploading
        self.push_failures: list[str] = []
        super().__init__(model, reward_funcs, args, *rest, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Take the repository that the constructor has claimed, on all ranks."""
        if self._hub_repository is None:  # push_to_hub() of a run that was not going to push
            super().init_hf_repo(*args, **kwargs)
        else:
            self.hub_model_id, self.push_in_progress = self._hub_repository, None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        pushes = self.args.push_to_hub and not self._preemption.ends  # whoever asked to stop waits for no upload
        if pushes and self.args.hub_always_push:
            self._wait_for_pushes()  # else this save would overwrite what the last one is still sending
        super()._save_checkpoint(model, trial)
        if pushes:
            directory = self._get_output_dir(trial=trial)
            self._push(str(Path(directory, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")))

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with self._token_not_pickled():
            super()._save(*args, **kwargs)

    def _token_not_pickled(self) -> AbstractContextManager[None]:
        """
        Keep the access token out of `training_args.bin`: the parent pickles `self.args`, and the file is pushed.

        Only there: a copy of the arguments, or a pickle for another process, keeps the token.
        """
        token = self.args.hub_token
        return overridden(self.args, hub_token=None if token is None else UnpickledToken(token))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Leave it to `_save_checkpoint`: here, in the middle of the parent's, the checkpoint is not whole yet."""

    def _rotate_checkpoints(self, run_directory: Path) -> None:
        if not self._pushes.running():  # nothing is deleted while a checkpoint is on its way to the Hub
            super()._rotate_checkpoints(run_directory)

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
            with self._token_not_pickled():
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
        if self.push_failures and self.accelerator.is_main_process:
            logger.error("%s", PushError(self.push_failures))
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
        Finish the trackers and leave the process group, as [`~transformers.Trainer.end`] of newer releases does.

        Raises:
            PushError: After everything is closed, on all ranks, if any push has failed.
        """
        if self.args.push_to_hub:
            self._wait_for_pushes()
        self.accelerator.end_training()
        if self.push_failures:
            raise PushError(self.push_failures)
