"""
A stand-in for a vLLM server's HTTP interface, for TRL's real client: what training in server mode asks for.

It samples at random, keeps the weights that it is sent, runs the package's own worker extension, and can be told to
fail.
"""

import contextlib
import importlib
import json
import random
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from opo_trl.rollouts.weight_file_client import WORKER_EXTENSION
from tiny import VOCABULARY

EOS = 1


class Died(Exception):
    """Raised by a fault: the server is gone from here on."""


def stand_in_modules(on_cpu: bool = True) -> dict[str, ModuleType]:
    """Modules of vLLM that the worker extension imports, with what it takes from them."""
    names = {
        "vllm": {},
        "vllm.config": {"set_current_vllm_config": contextlib.nullcontext},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: on_cpu)},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.utils": {"dispatch_cpu_unquantized_gemm": lambda layer, remove_weight: None},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.reload": {
            "initialize_layerwise_reload": lambda model: None,
            "finalize_layerwise_reload": lambda model, config: None,
        },
    }
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        vars(module).update(names[name])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


def import_worker(modules: dict[str, ModuleType]) -> ModuleType:
    """Import the package's worker extension with these modules in place of vLLM's."""
    with mock.patch.dict(sys.modules, modules):
        sys.modules.pop("opo_trl.rollouts.weight_file_worker", None)
        module = importlib.import_module("opo_trl.rollouts.weight_file_worker")
        sys.modules.pop("opo_trl.rollouts.weight_file_worker")
    return module


class ServedModel:
    """A model as vLLM loads it: it takes weights, and says which."""

    def __init__(self) -> None:
        self.weights: dict[str, Any] = {}
        self.needs: set[str] = set()  # names of parameters

    def named_parameters(self) -> list[tuple[str, None]]:
        return [(name, None) for name in self.needs]

    def load_weights(self, weights: Any) -> set[str]:
        self.weights = dict(weights)
        return set(self.weights)


def stand_in_worker(model: ServedModel) -> Any:
    """The package's worker extension on a worker that has nothing else."""
    worker = import_worker(stand_in_modules()).WeightFileWorker()
    worker.vllm_config, worker.model_config = None, SimpleNamespace(quantization=None)
    worker.model_runner = SimpleNamespace(get_model=lambda: model, reset_lora_state=lambda: None)
    return worker


class VllmStandIn:
    """
    Attributes:
        faults (`dict[str, Callable[[], None]]`):
            Called before a path is answered: may sleep, change the stand-in, or raise; what it raises is status 500.
        after (`dict[str, Callable[[], None]]`):
            Called when the answer to a path is known and not sent yet.
        served (`list[tuple[str, dict[str, Tensor]]]`):
            Version and weights from which each batch of completions was sampled.
    """

    def __init__(self) -> None:
        self.faults: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[], None]] = {}
        self.served: list[tuple[str, dict[str, Any]]] = []
        self.asked: list[str] = []
        self.extension, self.engines = WORKER_EXTENSION, 1
        self.restart()
        self._random = random.Random(0)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def restart(self) -> None:
        """Forget the weights, as a new process does."""
        self.model = ServedModel()
        self.worker = stand_in_worker(self.model)

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "stand-in"}]}
        if path == "/server_info":
            parallel = {"worker_extension_cls": self.extension, "data_parallel_size": self.engines}
            model = {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32"}
            return {"vllm_config": {"parallel_config": parallel, "model_config": model}}
        if path == "/collective_rpc":
            return {"results": [getattr(self.worker, body["method"])(*body["args"])]}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/v1/completions":
            self.served.append((self.worker.opo_version, self.model.weights))
            return {"choices": [self._choice(prompt) for prompt in body["prompt"] for _ in range(body["n"])]}
        assert path == "/health"
        return {}

    def _choice(self, prompt: list[int]) -> dict[str, Any]:
        length = self._random.randint(1, 12)
        ids = [*(self._random.randint(3, len(VOCABULARY) - 1) for _ in range(length)), EOS]
        tokens = [f"token_id:{token}" for token in ids]
        logprobs = {"tokens": tokens, "token_logprobs": [-4.0] * len(ids)}
        logprobs["top_logprobs"] = [{token: -4.0} for token in tokens]
        return {"prompt_token_ids": prompt, "token_ids": ids, "logprobs": logprobs}

    def _handler(stand_in) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
                stand_in.asked.append(path)
                try:
                    stand_in.faults.get(path, lambda: None)()
                    status, answer = 200, stand_in.answer(path, body)
                    stand_in.after.get(path, lambda: None)()
                except Died:
                    stand_in.stop()
                    return  # the connection closes without an answer
                except Exception as error:
                    status, answer = 500, {"error": str(error)}
                payload = json.dumps(answer).encode()
                with contextlib.suppress(ConnectionError):  # the client may have given up
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(payload)))
                    self.end_headers()
                    self.wfile.write(payload)

            do_POST = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


@contextlib.contextmanager
def vllm_stand_in() -> Iterator[VllmStandIn]:
    """Run a stand-in, with TRL made to believe that vLLM is installed."""
    stand_in = VllmStandIn()
    available = {"is_vllm_available": lambda min_version=None: True}
    with (
        mock.patch.multiple("trl.generation.vllm_client", **available),
        mock.patch.multiple("trl.generation.vllm_generation", **available),
    ):
        try:
            yield stand_in
        finally:
            stand_in.stop()
