"""The main process's client of a vLLM server, whose failures wait until all ranks can raise them."""

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from trl.generation.vllm_client import VLLMClient

from .watched_session import WatchedSession, health_fault

LEAST_PATIENCE = 60.0  # seconds

T = TypeVar("T")


class ServerClient(VLLMClient):
    """
    TRL's client, made for several ranks.

    TRL calls it on the main process alone, between collectives of all ranks. If it raised there, the other ranks would
    wait in the next collective until its timeout. So it keeps its first failure, does nothing more from then on, and
    returns placeholders; [`~opo_trl.rollouts.server_generation.ServerGeneration`] raises on all ranks.

    Args:
        connection_timeout (`float`, *optional*, defaults to `0.0`):
            Seconds to wait for the server to be up; and, of at least a minute, for a sign of life while it is at work.
        *args, **kwargs:
            As in [`~trl.generation.vllm_client.VLLMClient`].
    """

    def __init__(self, *args: Any, connection_timeout: float = 0.0, **kwargs: Any) -> None:
        self._failure: tuple[str, Exception] | None = None

        def connect() -> None:
            super(ServerClient, self).__init__(*args, connection_timeout=connection_timeout, **kwargs)
            self.session = WatchedSession(self.base_url, max(connection_timeout, LEAST_PATIENCE))

        self._attempt("connecting", connect, None)

    def take_failure(self) -> tuple[str, Exception] | None:
        """Return what failed, and how, since the last call; the client is usable again."""
        failure, self._failure = self._failure, None
        return failure

    def _attempt(self, what: str, call: Callable[[], T], placeholder: T) -> T:
        if self._failure is None:
            try:
                return call()
            except Exception as error:
                self._failure = what, error
        return placeholder

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """
        Wait until the server is up.

        TRL does not stop waiting for a server that answers with an error (1.16; no issue is known): delete this when it
        does.

        Raises:
            ConnectionError: If it is not up after `total_timeout` seconds.
        """
        deadline = time.monotonic() + total_timeout
        while (fault := health_fault(self.base_url)) is not None:
            if time.monotonic() >= deadline:
                raise ConnectionError(
                    f"it is not up after {total_timeout:g} seconds (`vllm_server_timeout`): {fault}. Start it with "
                    "`vllm serve`, and check its address"
                )
            time.sleep(retry_interval)
        super().check_server(total_timeout, retry_interval)

    def init_communicator(self, device: torch.device | str | int = 0) -> None:
        """Prepare the transfer of weights."""
        self._attempt("preparing the transfer of weights", lambda: self._prepare_transfer(device), None)

    def _prepare_transfer(self, device: torch.device | str | int) -> None:
        super().init_communicator(device)

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        """Send weights to the server; whatever happens, the iterator runs to its end."""
        self._attempt("taking new weights", lambda: self._send_weights(metadata, named_params), None)
        # Gathering a parameter is a collective, and an adapter is merged into the model until the end.
        for _ in named_params:
            pass

    def _send_weights(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        super().update_named_params(metadata, named_params)

    def reset_prefix_cache(self) -> None:
        """Let the server forget what it has computed with earlier weights."""
        self._attempt("resetting its prefix cache", super().reset_prefix_cache, None)

    def image_features(self, images: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Let the server process images."""
        prepare = super().image_features
        return self._attempt("processing images", lambda: prepare(images, *args, **kwargs), [None] * len(images))

    def generate(self, prompts: list[Any], *args: Any, n: int = 1, **kwargs: Any) -> dict[str, Any]:
        """
        Generate completions.

        Args:
            prompts, n, *args, **kwargs:
                As in [`~trl.generation.vllm_client.VLLMClient.generate`].

        Returns:
            As there; after a failure, one token for each completion.
        """
        generate = super().generate

        def call() -> dict[str, Any]:
            self._check_policy()
            completions: dict[str, Any] = generate(prompts, *args, n=n, **kwargs)
            self._check_policy()  # a server that was started anew in between answers from other weights
            return completions

        rows = n * len(prompts)
        nothing = {"completion_ids": [[0]] * rows, "logprobs": [[[0.0]]] * rows, "logprob_token_ids": [[[0]]] * rows}
        return self._attempt("generating", call, {"prompt_ids": prompts, **nothing})

    def _check_policy(self) -> None:
        """Raise unless the server holds the weights that it was last sent. To be overridden."""
