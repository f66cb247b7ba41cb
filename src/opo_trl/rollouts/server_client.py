"""The main process's client of a vLLM server, whose failures are kept until all ranks can raise them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from trl.generation.vllm_client import VLLMClient, parse_logprobs

from .watched_session import WatchedSession, health_fault

if TYPE_CHECKING:
    from .completion_stream import CompletionStream

LEAST_PATIENCE = 60.0  # seconds

T = TypeVar("T")


class Group(NamedTuple):
    """The completions of one prompt of a streamed step, as TRL's client returns those of several."""

    number: int  # of the prompt in the step
    completion_ids: list[list[int]]
    logprobs: list[list[list[float | None]]]


class ServerClient(VLLMClient):
    """
    TRL's client, made for several ranks.

    TRL calls it on the main process alone, between collectives of all ranks. If it raised there, the other ranks would
    wait in the next collective until its timeout. So it keeps its first failure, does nothing more from then on, and
    returns placeholders; [`~opo_trl.rollouts.server_generation.ServerGeneration`] raises on all ranks.

    Args:
        connection_timeout (`float`, *optional*, defaults to `0.0`):
            Seconds to wait for the server to be up and, at least 60, for `/health` to answer during a request.
        *args, **kwargs:
            As in [`~trl.generation.vllm_client.VLLMClient`].
    """

    def __init__(self, *args: Any, connection_timeout: float = 0.0, **kwargs: Any) -> None:
        self._failure: tuple[str, Exception] | None = None
        self._stream: CompletionStream | None = None
        self._waits = True  # whether `generate` waits for the completions

        def connect() -> None:
            super(ServerClient, self).__init__(*args, connection_timeout=connection_timeout, **kwargs)
            self.session = WatchedSession(self.base_url, max(connection_timeout, LEAST_PATIENCE))

        self.attempt("connecting", connect, None)

    def take_failure(self) -> tuple[str, Exception] | None:
        """Return what failed, and how, since the last call; the client is usable again."""
        failure, self._failure = self._failure, None
        return failure

    def attempt(self, what: str, call: Callable[[], T], placeholder: T) -> T:
        """Call unless something has failed. After a failure, which [`take_failure`] returns, return the placeholder."""
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
        self.attempt("preparing the transfer of weights", lambda: self._prepare_transfer(device), None)

    def _prepare_transfer(self, device: torch.device | str | int) -> None:
        super().init_communicator(device)

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        """Send weights to the server; whatever happens, the iterator runs to its end."""
        self.attempt("taking new weights", lambda: self._send_weights(metadata, named_params), None)
        # Gathering a parameter is a collective, and an adapter is merged into the model until the end.
        for _ in named_params:
            pass

    def _send_weights(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        super().update_named_params(metadata, named_params)

    def reset_prefix_cache(self) -> None:
        """Reset the prefix cache, which was computed with earlier weights."""
        self.attempt("resetting its prefix cache", super().reset_prefix_cache, None)

    def image_features(self, images: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Let the server process images."""
        prepare = super().image_features
        return self.attempt("processing images", lambda: prepare(images, *args, **kwargs), [None] * len(images))

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

        def submit() -> dict[str, Any]:
            self._submit(prompts, n, **kwargs)
            return {"prompt_ids": prompts, **nothing}

        def call() -> dict[str, Any]:
            self._check_policy()
            completions: dict[str, Any] = generate(prompts, *args, n=n, **kwargs)
            self._check_policy()  # a server that was started anew in between answers from other weights
            return completions

        # A server fills what a request leaves out from its model's generation config; TRL sends the other settings.
        given = {name: value for name, value in (kwargs.get("generation_kwargs") or {}).items() if value is not None}
        kwargs["generation_kwargs"] = {"presence_penalty": 0.0, "frequency_penalty": 0.0, **given}
        rows = n * len(prompts)
        nothing = {"completion_ids": [[0]] * rows, "logprobs": [[[0.0]]] * rows, "logprob_token_ids": [[[0]]] * rows}
        return self.attempt("generating", call if self._waits else submit, {"prompt_ids": prompts, **nothing})

    # ---- A streamed step

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Context in which [`generate`] asks for completions, and returns placeholders without waiting for them."""
        self._waits = False
        try:
            yield
        finally:
            self._waits = True

    def _submit(
        self,
        prompts: Sequence[list[int]],
        n: int,
        *,
        features: Any = None,
        structured_outputs_regex: str | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> None:
        """Send a request for each prompt, without a seed: vLLM samples each row with a seed separately: slower."""
        if features is not None or structured_outputs_regex is not None:
            raise ValueError("a streamed step takes prompts of text, and no regular expression")
        if self._stream is None:
            from .completion_stream import CompletionStream  # imports httpx, which nothing else needs

            self._check_policy()
            self._stream = CompletionStream(self.base_url, self.session.patience, self._group)
        for prompt in prompts:
            tokens = {"return_token_ids": True, "return_tokens_as_token_ids": True}
            body = {"model": self.model, "prompt": [prompt], **tokens, "n": n, **sampling, **(generation_kwargs or {})}
            self._stream.submit(body)

    @staticmethod
    def _group(number: int, answer: dict[str, Any]) -> Group:
        choices = sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
        logprobs, _ = parse_logprobs([choice["logprobs"] for choice in choices])
        return Group(number, [choice["token_ids"] for choice in choices], logprobs or [])

    def take_groups(self, wave_size: Callable[[int, int], int]) -> list[Group]:
        """
        Wait until groups of the streamed step are complete, and take those that were completed first.

        Args:
            wave_size (`Callable`):
                Maps the number of complete groups and that of the others to how many complete ones to take;
                0 to wait for more.

        Returns:
            `list[Group]`: Empty after a failure.
        """
        return self.attempt("generating", lambda: self._take_groups(wave_size), [])

    def _take_groups(self, wave_size: Callable[[int, int], int]) -> list[Group]:
        assert self._stream is not None
        self._stream.receive()
        while not (count := wave_size(self._stream.complete, self._stream.generating)):
            self._stream.wait()
            self._stream.receive()
        groups = self._stream.take(count)
        if not self._stream.complete and not self._stream.generating:
            self._check_policy()  # a server that was started anew in between answers from other weights
        return groups

    @property
    def generation_seconds(self) -> float:
        """Seconds from the first request of the streamed step until the last answer so far."""
        return 0.0 if self._stream is None else self._stream.seconds

    def end_stream(self) -> None:
        """End the streamed step, and cancel what the server still generates for it."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _check_policy(self) -> None:
        """Raise unless the server holds the weights that it was last sent. To be overridden."""
