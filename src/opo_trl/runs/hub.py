"""Pushing to the Hub: asked before anything expensive starts, and what failed in the background is not forgotten."""

import logging
from concurrent import futures
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import TrainingArguments

logger = logging.getLogger(__name__)


class PushError(RuntimeError):
    """Something of a run did not reach the Hub. All of it is in `output_dir`."""

    def __init__(self, failures: list[str]) -> None:
        listed = "".join(f"\n- {failure}" for failure in failures)
        super().__init__(
            f"{len(failures)} push(es) to the Hub failed, and every file is in output_dir, from where "
            f"`hf upload REPO OUTPUT_DIR . --exclude 'checkpoint-*'` sends it:{listed}"
        )


def claim_repository(args: TrainingArguments) -> str | None:
    """
    Create the repository that a run pushes to, if it is not there yet, and make sure that the token may write to it.

    The main process asks, and all of them return, or raise, the same.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Its `push_to_hub`, `hub_model_id`, `hub_token` and `hub_private_repo` count.

    Returns:
        `str` or `None`: Name of the repository with its namespace; `None` if the run does not push, and then the Hub is
        not asked.

    Raises:
        ValueError: If the Hub refuses, or does not answer, or if the repository is public and should be private.
    """
    if not args.push_to_hub:
        return None
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    repository: str | None = None
    refusal: str | None = None
    cause: Exception | None = None
    if args.process_index == 0:
        api = HfApi()
        try:
            url = api.create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True)
            repository = url.repo_id
            # Creating a repository that exists succeeds with any token that may see it.
            api.auth_check(repository, token=args.hub_token, write=True)
            if args.hub_private_repo and not api.model_info(repository, token=args.hub_token).private:
                refusal = "hub_private_repo=True, but it exists and is public"
        except Exception as error:  # of whatever kind: the other ranks must hear of it
            cause, refusal = error, describe_error(error)
    repository, refusal = broadcast_object_list([repository, refusal])
    if refusal is not None:
        raise ValueError(
            f"push_to_hub=True needs a repository that may be written to, got {name!r}: {refusal}. Log in with "
            "`hf auth login` or set HF_TOKEN, with a token that has write permission; set hub_model_id to a "
            "repository of your own, as NAMESPACE/NAME; or leave push_to_hub out."
        ) from cause
    return repository


class UnpickledToken(str):
    """An access token that works like the string it is, and is pickled as `None`."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __copy__(self) -> "UnpickledToken":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "UnpickledToken":
        return self


class BackgroundPushes:
    """
    What the main process uploads to the Hub during training, and what became of it. Empty in the other processes.

    transformers waits for the threads that upload, but never asks whether they have failed.

    Attributes:
        failures (`list[str]`):
            What did not arrive, and why.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []
        self._running: list[tuple[str, futures.Future[Any]]] = []

    def watch(self, what: str, push: futures.Future[Any]) -> None:
        """Track a running upload."""
        self._running.append((what, push))

    def fail(self, what: str, error: BaseException) -> None:
        """Record a failed push and log it."""
        self.failures.append(f"{what}: {describe_error(error)}")
        logger.warning(
            "A push to the Hub failed, %s. Training continues; the files are in output_dir.", self.failures[-1]
        )

    def running(self, seconds: float = 0.0) -> bool:
        """Wait for the pushes that have started, so many seconds at most; return whether any of them still runs."""
        done, _ = futures.wait([push for _, push in self._running], timeout=seconds)
        for what, push in self._running:
            if push in done and not push.cancelled():
                error = push.exception()
                if error is not None:
                    self.fail(what, error)
        self._running = [(what, push) for what, push in self._running if push not in done]
        return bool(self._running)

    def cancel(self) -> None:
        """Give up what has not started yet."""
        for _, push in self._running:
            push.cancel()


def describe_error(error: BaseException) -> str:
    """Say an error and what it was raised from in one line: an upload's own message does not name the Hub's answer."""
    causes = []
    link: BaseException | None = error
    while link is not None:
        causes.append(f"{type(link).__name__}: {' '.join(str(link).split())}")
        link = link.__cause__
    return ", from ".join(causes)
