"""A real vLLM server on one core of the CPU, and training against it, for test_vllm_server.py and its two ranks."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from opo_trl import OPOTrainer
from opo_trl.rewards import math_verify_reward
from opo_trl.rollouts.watched_session import health_fault
from opo_trl.rollouts.weight_file_client import WORKER_EXTENSION
from opo_trl.scripts.policies import model_path
from opo_trl.scripts.problems import load_problems
from tiny import tiny_config

POLICY = model_path("tiny_policy")
CORES = sorted(os.sched_getaffinity(0))
STARTUP_SECONDS = 600  # three processes import vLLM in turn; a busy machine is not a defect

# docs/vllm.md starts a server with the same options, on a GPU.
OPTIONS = ["--worker-extension-cls", WORKER_EXTENSION, "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
ON_THE_CPU = ["--dtype", "float32", "--enforce-eager"]
VARIABLES = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


class VllmServer:
    """A server in a process group of its own. `with` ends all of the group."""

    def __init__(
        self, log: Path, model: str = POLICY, options: Sequence[str] = (), max_length: int = 128, core: int = CORES[0]
    ) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.url, self.log, self.core = f"http://127.0.0.1:{self.port}", log, str(core)
        self.options = ["--model", model, "--max-model-len", str(max_length), *options]

    def __enter__(self) -> "VllmServer":
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + 30
        while any(self._is_alive(process) for process in psutil.process_iter()):
            assert time.monotonic() < deadline, "processes of the server outlive it"
            time.sleep(0.1)

    def _is_alive(self, process: psutil.Process) -> bool:
        """Whether a process is of the server's group, and not dead and merely not waited for."""
        try:
            return os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    def start(self) -> None:
        """Start it, or start it anew, and wait until it is up."""
        # `vllm serve` asks for the version of a distribution "vllm", which is called vllm-cpu here.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *self.options, *OPTIONS]
        command += [*ON_THE_CPU, "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["taskset", "-c", self.core, *command],
                env={**os.environ, **VARIABLES, "VLLM_CPU_OMP_THREADS_BIND": self.core},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + STARTUP_SECONDS
        try:
            while health_fault(self.url) is not None:
                assert self.process.poll() is None, self.log.read_text()[-5000:]
                assert time.monotonic() < deadline, self.log.read_text()[-5000:]
                time.sleep(1)
        except BaseException:
            self.__exit__()
            raise

    def send(self, number: int) -> None:
        """Send a signal to all of its processes, as far as there are any."""
        send_to_group(self.process.pid, number)


def send_to_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def server_trainer(
    output_dir: Path, url: str, ranks: int = 1, reward: Any = math_verify_reward, **settings: Any
) -> OPOTrainer:
    """OPO on the tiny policy, with weights through a file in `output_dir`."""
    weights = output_dir / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    peft_config = settings.pop("peft_config", None)
    defaults = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": url,
        "vllm_weight_transfer": "file",
        "vllm_weight_dir": str(weights),
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 64 // ranks,
        "num_generations": 8,
        "max_completion_length": 40,
        "max_steps": 4,
    }
    config = tiny_config(output_dir / "run", **{**defaults, **settings})
    problems = load_problems("arithmetic", "train", num_arithmetic=64)
    return OPOTrainer(POLICY, reward, config, problems, peft_config=peft_config)


LORA = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)


class ServedPolicy:
    """
    A reward that looks, between generation and update, at the log-probabilities of fixed tokens.

    Attributes:
        served (`list[Tensor]`), trained (`list[Tensor]`):
            For each step, as the server reports them, and as the policy that is trained gives them. Main process only.
    """

    __name__ = "math_verify_reward"

    def __init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(POLICY)
        texts = ["3 + 4 = 7", "12 * 3 = 36", "The answer is 5."]
        self.sequences = [tokenizer(text)["input_ids"] for text in texts]
        self.served: list[torch.Tensor] = []
        self.trained: list[torch.Tensor] = []
        self.trainer: Any = None

    def __call__(self, **columns: Any) -> list[float | None]:
        if self.trainer.accelerator.is_main_process:
            client = self.trainer.vllm_generation.vllm_client
            answer = client.get_sequence_logprobs(self.sequences, [1] * len(self.sequences), top_logprobs=1)
            self.served.append(torch.tensor([row[0] for rows in answer["actual_logprobs"] for row in rows]))
            self.trained.append(torch.cat([self._of_the_policy(ids) for ids in self.sequences]))
        return math_verify_reward(**columns)

    @torch.no_grad()
    def _of_the_policy(self, ids: list[int]) -> torch.Tensor:
        logits = self.trainer.model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        return logits.log_softmax(dim=-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]

    def check(self, steps: int) -> None:
        """The server's are those of the policy at each step, and each step with a gradient has moved them."""
        assert len(self.served) == steps
        norms = [log["grad_norm"] for log in self.trainer.state.log_history if "grad_norm" in log]
        assert sum(norm > 0 for norm in norms[:-1]) > 0
        for served, trained in zip(self.served, self.trained, strict=True):
            torch.testing.assert_close(served, trained, rtol=0, atol=2e-4)
        for norm, earlier, later in zip(norms, self.trained, self.trained[1:], strict=False):
            if norm > 0:  # else all rewards were equal
                assert (earlier - later).abs().max() > 5e-3, "else the weights of the step before would pass, too"
