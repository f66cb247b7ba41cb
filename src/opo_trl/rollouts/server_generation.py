"""Generation by a vLLM server that several ranks share: what fails on the main process is raised on all of them."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from trl import GRPOTrainer
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from .server_client import Group, ServerClient
from .weight_file import unusable_directory
from .weight_file_client import WeightFileClient

RESUME = (
    " The optimizer has not taken this step. Once the server is up, resume from the last checkpoint "
    "(`resume_from_checkpoint='auto'`)."
)


class ServerError(RuntimeError):
    """A request to a vLLM server has failed. All ranks raise it, with the same message."""


class ServerGeneration(VLLMGeneration):
    """TRL's generation in server mode, whose main process communicates with the server through a [`ServerClient`]."""

    vllm_client: ServerClient  # on the main process alone

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._wave: list[Group] | None = None  # what the next `generate` returns
        super().__init__(*args, **kwargs)
        self._raise_on_all_ranks()

    def sync_weights(self) -> None:
        """
        Send the weights to the server.

        Raises:
            ServerError: On all ranks.
        """
        super().sync_weights()
        self._raise_on_all_ranks(RESUME)

    def generate(self, prompts: list[list[int]], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """
        Generate as [`~trl.generation.vllm_generation.VLLMGeneration.generate`] does, or return a wave that is complete.

        Raises:
            ServerError: On all ranks.
        """
        if self._wave is not None:
            wave, self._wave = self._wave, None
            return self._rows_of_rank(wave, prompts)
        output: tuple[Any, ...] = super().generate(prompts, *args, **kwargs)
        self._raise_on_all_ranks(RESUME)
        return output

    def _place_features(self, features: dict[str, Any] | None, prompt_ids: list[int]) -> dict[str, Any] | None:
        """Place image features in a prompt, on the main process alone: what fails there is raised on all ranks."""
        place = super()._place_features
        return self.vllm_client.attempt("placing image features", lambda: place(features, prompt_ids), None)

    # ---- A streamed step

    def submit(self, prompts: list[list[int]], num_generations: int) -> None:
        """
        Request the completions of a streamed step, or further ones, without waiting for them.

        The parent's `generate` gathers the prompts and passes the sampling settings to its client, which does not wait.

        Args:
            prompts (`list[list[int]]`):
                Tokens of each row of this rank: each prompt once for each of its completions, a group perhaps split
                across ranks.
            num_generations (`int`):
                Completions of each prompt.

        Raises:
            ServerError: On all ranks.
        """
        with self.vllm_client.without_waiting() if self.accelerator.is_main_process else nullcontext():
            self.generate(prompts, None, num_generations)

    def next_wave(self, wave_size: Callable[[int, int], int]) -> list[int]:
        """
        Wait for the next complete groups of the streamed step. The next [`generate`] returns their completions.

        Args:
            wave_size (`Callable`):
                As in [`~opo_trl.rollouts.server_client.ServerClient.take_groups`]; the main process's counts.

        Returns:
            `list[int]`: Numbers of their prompts, counted from 0 in the order of submission; the same list on all
            ranks.

        Raises:
            ServerError: On all ranks.
        """
        is_main = self.accelerator.is_main_process
        groups = self.vllm_client.take_groups(wave_size) if is_main else None
        self._raise_on_all_ranks(RESUME)
        wave: list[Group] = broadcast_object_list([groups])[0]
        self._wave = wave
        return [group.number for group in wave]

    def end_stream(self) -> float:
        """End the streamed step, and return the seconds from its first request until its last answer, on all ranks."""
        seconds = [0.0]
        self._wave = None
        if self.accelerator.is_main_process:
            seconds = [self.vllm_client.generation_seconds]
            self.vllm_client.end_stream()
        return float(broadcast_object_list(seconds)[0])

    def drop_stream(self) -> None:
        """Cancel a streamed step that has failed, on this rank alone, since the others may not call it."""
        self._wave = None
        if self.accelerator.is_main_process:
            self.vllm_client.end_stream()

    def _rows_of_rank(self, wave: Sequence[Group], prompts: list[list[int]]) -> tuple[Any, ...]:
        """A wave in the form of the parent's `generate`: the rows of this rank, of which all ranks have as many."""
        ids = [ids for group in wave for ids in group.completion_ids]
        logprobs = [values for group in wave for values in group.logprobs]
        first = self.accelerator.process_index * len(prompts)
        rows = slice(first, first + len(prompts))
        return prompts, ids[rows], logprobs[rows], None

    def _raise_on_all_ranks(self, advice: str = "") -> None:
        error: Exception | None = None
        message, is_setting = None, False
        if self.accelerator.is_main_process:
            failure = self.vllm_client.take_failure()
            if failure is not None:
                what, error = failure
                is_setting = type(error) is ValueError
                message = f"The vLLM server at {self.vllm_client.base_url} failed while {what}: {describe(error)}."
        message, is_setting = broadcast_object_list([message, is_setting])
        if message is None:
            return
        if is_setting:
            raise ValueError(message) from error
        raise ServerError(message + advice) from error


def describe(error: Exception) -> str:
    """Return an error's message, without the full stop; with its type unless the message alone is enough."""
    text = str(error).rstrip(".")
    return text if type(error) in (ValueError, RuntimeError, ConnectionError) else f"{type(error).__name__}: {text}"


def check_weight_directory(args: Any) -> None:
    """
    Refuse, before a model is loaded, a directory into which the main process cannot write weights.

    Args:
        args ([`OPOConfig`]):
            The run's configuration.

    Raises:
        ValueError: On all ranks, if it cannot.
    """
    if args.vllm_weight_transfer != "file":
        return
    fault = unusable_directory(Path(args.vllm_weight_dir)) if args.process_index == 0 else None
    [fault] = broadcast_object_list([fault])
    if fault is not None:
        raise ValueError(
            "`vllm_weight_dir` must be an existing directory that the main process can write to, got "
            f"{args.vllm_weight_dir!r}: {fault}. Create it where both the trainer and the server can access it."
        )


@contextmanager
def server_generation(args: Any) -> Iterator[None]:
    """
    Make TRL build its server-mode generation from the classes of this package, since TRL's constructor names its own.

    Args:
        args ([`OPOConfig`]):
            The run's configuration; in another mode than "server", nothing changes.
    """
    if not (args.use_vllm and args.vllm_mode == "server"):
        yield
        return
    client: Any = ServerClient
    if args.vllm_weight_transfer == "file":
        client = functools.partial(WeightFileClient, directory=Path(args.vllm_weight_dir))
    trainer_module: Any = sys.modules[GRPOTrainer.__module__]
    theirs = vllm_generation.VLLMClient, trainer_module.VLLMGeneration
    vllm_generation.VLLMClient, trainer_module.VLLMGeneration = client, ServerGeneration
    try:
        yield
    finally:
        vllm_generation.VLLMClient, trainer_module.VLLMGeneration = theirs
