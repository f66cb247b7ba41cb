"""HTTP requests to a server that may take long, and end with an error once the server is gone."""

import threading
import time
from concurrent.futures import Future
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

POLL_SECONDS = 5.0  # between two looks at a server that is at work
HEALTH_TIMEOUT = 10.0  # for the answer to one of them


def health_fault(base_url: str) -> str | None:
    """Return why a server does not answer `/health` with 200, or `None` if it does."""
    try:
        status = requests.get(f"{base_url}/health", timeout=HEALTH_TIMEOUT).status_code
    except requests.RequestException as error:
        return f"{type(error).__name__}: {error}"
    return None if status == 200 else f"/health answers {status}"


class WatchedSession(requests.Session):
    """
    Session of requests to one server that have no time limit while its `/health` answers.

    A batch of completions may take an hour, so a request has no timeout; but a server that is frozen, or whose machine
    is gone, would never answer. A request whose connection breaks is not retried: a server that was restarted in
    between would generate with the weights that it starts with. A connection that cannot be made is retried for a
    minute, and so is a request that a proxy answers with 502 or 503.

    Args:
        base_url (`str`):
            Address of the server.
        patience (`float`):
            Seconds without an answer to `/health` after which a request is given up.
    """

    def __init__(self, base_url: str, patience: float) -> None:
        super().__init__()
        self._base_url, self.patience = base_url, patience
        retries = Retry(
            total=5,
            read=0,
            status_forcelist=[502, 503],
            allowed_methods=None,  # POST, too
            backoff_factor=2,  # 0, 4, 8, 16 and 32 seconds
            raise_on_status=False,  # the answer says more
        )
        for scheme in ("http://", "https://"):
            self.mount(scheme, HTTPAdapter(max_retries=retries, pool_maxsize=64))  # what TRL sends at a time
        # uvicorn closes a connection that is idle for 5 seconds: one that is kept could break just as it is used again.
        self.headers["Connection"] = "close"

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        """
        Send a request as [`requests.Session.request`] does.

        Raises:
            ConnectionError: If the connection breaks, or `/health` has not answered for `patience` seconds.
        """
        answer: Future[requests.Response] = Future()

        def send() -> None:
            try:
                answer.set_result(super(WatchedSession, self).request(*args, **kwargs))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=send, daemon=True).start()  # a daemon: it may never end
        healthy = time.monotonic()
        while True:
            try:
                return answer.result(timeout=POLL_SECONDS)
            except TimeoutError:
                if answer.done():  # in between, or with a TimeoutError of its own
                    return answer.result()
            fault = health_fault(self._base_url)
            if fault is None:
                healthy = time.monotonic()
            elif time.monotonic() - healthy > self.patience:
                raise ConnectionError(
                    f"{self._base_url} has not answered for {self.patience:g} seconds while it was at work ({fault})"
                )
