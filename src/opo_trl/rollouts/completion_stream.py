"""Requests to a vLLM server, one for each prompt, whose answers are taken in the order in which they arrive."""

import asyncio
import contextlib
import functools
import queue
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from . import watched_session

CONCURRENCY = 256  # requests at a time, each of several completions; the server schedules what it can hold
CONNECT_TIMEOUT = 60.0  # seconds
RETRY_SECONDS = (0.0, 2.0, 4.0, 8.0, 16.0)  # before a request is sent again that no server has taken


@functools.cache
def ssl_context() -> ssl.SSLContext:
    """Return the context that all streams share: making one reads all certificates, for a tenth of a second."""
    return httpx.create_ssl_context()


class CompletionStream:
    """
    Sends requests from its own thread, while the caller trains, and keeps their answers until they are taken.

    A request has no time limit while the server's `/health` answers. One that cannot be sent, or is answered by 502 or
    503, as by a proxy, is retried for half a minute. One whose connection breaks is not retried: a server that was
    restarted in between would generate with the weights that it starts with.

    Args:
        base_url (`str`):
            Address of the server.
        patience (`float`):
            Seconds without an answer to `/health` after which the server is given up.
        parse (`Callable`):
            Maps a request's number and the JSON of its answer to what [`take`] returns; called in the thread.
    """

    def __init__(self, base_url: str, patience: float, parse: Callable[[int, dict[str, Any]], Any]) -> None:
        self._base_url, self._patience, self._parse = base_url, patience, parse
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._complete: list[Any] = []
        self._submitted = self._generating = 0
        self._first, self._last = 0.0, 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=0),
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT),
            verify=ssl_context(),
        )
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def generating(self) -> int:
        """Number of requests that are not answered yet."""
        return self._generating

    @property
    def complete(self) -> int:
        """Number of answers that [`take`] can return."""
        return len(self._complete)

    @property
    def seconds(self) -> float:
        """Seconds from the first request until the last answer so far."""
        return self._last - self._first

    def submit(self, body: dict[str, Any]) -> None:
        """Send a request to `/v1/completions`. The requests are numbered from 0."""
        self._first = self._first or time.perf_counter()
        self._loop.call_soon_threadsafe(self._start, self._submitted, body)
        self._submitted += 1
        self._generating += 1

    def receive(self) -> None:
        """
        Collect the answers that have arrived.

        Raises:
            RuntimeError: If the server has answered a request with an error.
            Exception: Any other error with which a request has failed.
        """
        with contextlib.suppress(queue.Empty):
            while True:
                self._take_in(self._arrived.get_nowait())

    def wait(self) -> None:
        """
        Wait for another answer, for as long as the server answers `/health`.

        Raises:
            ConnectionError: If `/health` has not answered for `patience` seconds.
            Exception: As [`receive`].
        """
        healthy = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                return self._take_in(self._arrived.get(timeout=watched_session.POLL_SECONDS))
            fault = watched_session.health_fault(self._base_url)
            if fault is None:
                healthy = time.monotonic()
            elif time.monotonic() - healthy > self._patience:
                raise ConnectionError(
                    f"{self._base_url} has not answered for {self._patience:g} seconds while it was at work ({fault})"
                )

    def take(self, count: int) -> list[Any]:
        """Take the `count` answers that arrived first."""
        taken, self._complete = self._complete[:count], self._complete[count:]
        return taken

    def close(self) -> None:
        """Close the connections of requests that are not answered, so that the server stops generating for them."""
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._loop.is_running():
            self._loop.close()

    def _take_in(self, answer: Any) -> None:
        if isinstance(answer, Exception):
            raise answer
        self._generating -= 1
        self._complete.append(answer)

    def _start(self, number: int, body: dict[str, Any]) -> None:
        task = self._loop.create_task(self._ask(number, body))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, number: int, body: dict[str, Any]) -> None:
        try:
            answer = self._parse(number, await self._post(body))
        except Exception as error:
            answer = error
        self._last = time.perf_counter()
        self._arrived.put(answer)

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        for seconds in (*RETRY_SECONDS, None):
            try:
                response = await self._client.post(f"{self._base_url}/v1/completions", json=body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if seconds is None:
                    raise ConnectionError(f"no connection to {self._base_url}: {error}") from error
            except httpx.TransportError as error:
                raise ConnectionError(f"the connection broke ({type(error).__name__}: {error})") from error
            else:
                if response.status_code == 200:
                    answer: dict[str, Any] = response.json()
                    return answer
                if response.status_code not in (502, 503) or seconds is None:
                    raise RuntimeError(f"/v1/completions answers {response.status_code}: {response.text}")
            await asyncio.sleep(seconds)
        raise AssertionError("unreachable")

    async def _cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()
