"""Weights for a vLLM server through a file, and a check of each generation that it is of the latest version."""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .server_client import ServerClient
from .weight_file import write_weights

WORKER_EXTENSION = "opo_trl.rollouts.weight_file_worker.WeightFileWorker"
CACHE_TIMEOUT = 60.0  # seconds in which requests that nobody waits for any more must end


class WeightFileClient(ServerClient):
    """
    Client that sends weights through a directory that the main process and all of the server's workers can access.

    TRL's own transfer needs CUDA and NCCL on both sides. Each update has a version of its own, which no other update of
    any run has; a worker that fails to load it holds no version. The server's workers are asked for theirs before and
    after each generation, so that completions of other weights than the latest are never trained on: not if the server
    was restarted, an update failed, or another run has sent its own.

    Args:
        directory (`Path`):
            Existing directory. It holds a file while an update lasts, and nothing after.
        *args, **kwargs:
            As in [`ServerClient`].
    """

    def __init__(self, *args: Any, directory: Path, **kwargs: Any) -> None:
        self.directory = directory.absolute()
        self.version: str | None = None  # of the weights that the server was last sent
        self._run, self._updates = uuid.uuid4().hex, 0
        super().__init__(*args, **kwargs)

    def _prepare_transfer(self, device: torch.device | str | int) -> None:
        """Make sure that the server has the extension, that all workers answer, and that they see the directory."""
        parallel = self.get_server_info()["parallel_config"]
        extension = parallel["worker_extension_cls"]
        if extension != WORKER_EXTENSION:
            raise ValueError(
                f"`vllm_weight_transfer='file'` needs a server with the worker extension {WORKER_EXTENSION}, got "
                f"{extension or 'none'!r}. Restart it with `--worker-extension-cls {WORKER_EXTENSION}`"
            )
        if parallel["data_parallel_size"] != 1:  # vLLM 0.31: DPLBAsyncMPClient.call_utility_async
            raise ValueError(
                "`vllm_weight_transfer='file'` needs a server with one engine, since vLLM reports the answer of the "
                f"first one alone, got `--data-parallel-size {parallel['data_parallel_size']}`. Leave it out; "
                "`--tensor-parallel-size` is not affected"
            )
        probe = self.directory / f"{self._run}.probe"
        try:
            probe.write_text(self._run)
            seen = self._ask_workers("opo_read_probe", str(probe))
        finally:
            probe.unlink(missing_ok=True)
        if any(answer != {"probe": self._run} for answer in seen):
            raise ValueError(
                "`vllm_weight_dir` must be a directory that the server sees under the same path, got "
                f"{str(self.directory)!r}, in which its workers do not find a file that was written there. Name a "
                "directory on a file system that both machines mount"
            )

    def _send_weights(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        self.version = f"{self._run}-{self._updates:06d}"
        self._updates += 1
        path = write_weights(self.directory, self.version, named_params)
        try:
            answers = self._ask_workers("opo_load_weights", str(path), self.version)
        finally:
            path.unlink(missing_ok=True)
        for answer in answers:
            if "error" in answer:
                raise RuntimeError(f"a worker has not loaded them: {answer['error']}")
        self._check_versions(answers)

    def reset_prefix_cache(self) -> None:
        """
        Reset the prefix cache, which was computed with earlier weights, once no request uses it.

        vLLM refuses while requests run, such as those of a trainer that was killed, and TRL does not look at the
        answer (1.16; no issue is known): delete this when it does.
        """
        self.attempt("resetting its prefix cache", self._reset_prefix_cache, None)

    def _reset_prefix_cache(self) -> None:
        deadline = time.monotonic() + CACHE_TIMEOUT
        while not self._call("/reset_prefix_cache").get("success", True):
            if time.monotonic() >= deadline:
                raise RuntimeError(
                    f"requests that keep the cache in use did not end in {CACHE_TIMEOUT:g} seconds; another run may "
                    "generate with this server"
                )
            time.sleep(0.5)

    def _check_policy(self) -> None:
        self._check_versions(self._ask_workers("opo_held_version"))

    def _check_versions(self, answers: list[dict[str, str | None]]) -> None:
        held = {answer["version"] for answer in answers}
        if held != {self.version}:
            found = ", ".join(sorted(map(str, held)))
            raise RuntimeError(
                f"the policy is version {self.version}, and its workers hold {found}: the server was restarted, "
                "another run has sent it weights, or an update failed"
            )

    def _ask_workers(self, method: str, *args: str) -> list[dict[str, str | None]]:
        """Call a method of the extension in each worker."""
        answers: list[dict[str, str | None]] = self._call("/collective_rpc", method=method, args=list(args))["results"]
        return answers

    def _call(self, path: str, **body: Any) -> dict[str, Any]:
        response = self.session.post(f"{self.base_url}{path}", json=body)
        if response.status_code != 200:
            raise RuntimeError(f"{path} answers {response.status_code}: {response.text}")
        return response.json() if response.content else {}
