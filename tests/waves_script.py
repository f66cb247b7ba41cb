"""The script played by a stand-in for a vLLM server, its groups finished in batches that a test chooses."""

import math
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from opo_trl import OPOTrainer
from test_update import sampler_logprobs
from tiny import SCRIPT, scripted_trainer, tiny_model, tiny_tokenizer, update_of
from vllm_stand_in import Died, VllmStandIn, vllm_stand_in


def score(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float | None]:
    scores = {(prompt, text): value for prompt, rows in SCRIPT.items() for text, value in rows}
    return [scores[prompt, text] for prompt, text in zip(prompts, completions, strict=True)]


# Batches of prompts that finish together.
ONE_BY_ONE = [[prompt] for prompt in reversed(SCRIPT)]
UNEVEN = [["fifteen"], ["three", "six", "one"], ["seven!", "twenty two"]]  # the first has no informative group

# Streamed steps on several ranks: settings of the trainer.
STREAMED: dict[str, dict[str, Any]] = {
    "streamed": {},
    "streamed, dr_grpo": {"loss_type": "dr_grpo"},
    "streamed, clipped": {"max_grad_norm": 0.5},
    "streamed, split groups": {
        "num_generations": 3,
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 6,
    },
}
# What ends the first attempt on all ranks with one message; a second one trains.
INTERRUPTED = {
    "streamed, reward fails": "The reward function 'fails_in_a_wave' failed on rank 1: OverflowError: rank 1 only",
    "streamed, server dies": "failed while generating: the connection broke (",
    "streamed, server refuses": "failed while generating: /v1/completions answers 500: ",
    "streamed, server restarts": "failed while generating: the policy is version ",
}


class ScriptedServer:
    """
    Makes a stand-in answer with the script's completions.

    Attributes:
        requests (`list[str]`):
            Prompts, in the order in which they came.
    """

    def __init__(self, server: VllmStandIn) -> None:
        self.requests: list[str] = []
        self.finished = {prompt: threading.Event() for prompt in SCRIPT}
        self.faults: dict[str, Callable[[], None]] = {}  # by prompt: called once before its streamed answer
        self._answer, self._tokenizer = server.answer, tiny_tokenizer()
        server.answer = self.answer

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path != "/v1/completions":
            return self._answer(path, body)
        self._answer(path, body)  # keeps what it was sampled from
        choices = []
        for prompt in body["prompt"]:
            text = self._tokenizer.decode(prompt)
            self.requests.append(text)
            if len(body["prompt"]) == 1:  # of a streamed step, or a round of one prompt
                assert self.finished[text].wait(60)
                self.faults.pop(text, lambda: None)()
            choices += [self._choice(prompt, completion) for completion, _ in SCRIPT[text][: body["n"]]]
        return {"choices": [{"index": i, **choice} for i, choice in enumerate(choices)]}

    def finish_all(self) -> None:
        for event in self.finished.values():
            event.set()

    def _choice(self, prompt: list[int], text: str) -> dict[str, Any]:
        ids = [*self._tokenizer(text)["input_ids"], self._tokenizer.eos_token_id]
        tokens = [f"token_id:{token}" for token in ids]
        values = [math.nan if value is None else value for value in sampler_logprobs(ids)]
        logprobs = {"tokens": tokens, "token_logprobs": values}
        logprobs["top_logprobs"] = [{token: value} for token, value in zip(tokens, values, strict=True)]
        return {"prompt_token_ids": prompt, "token_ids": ids, "logprobs": logprobs}


def finish_in_batches(trainer: OPOTrainer, script: ScriptedServer, batches: list[list[str]]) -> list[list[int]]:
    """Whenever the trainer waits, let the next batch of prompts finish; returns the waves that the trainer takes."""
    engine = trainer.vllm_generation
    next_wave, left, waves = engine.next_wave, list(batches), []

    def finish_a_batch(wave_size: Any) -> list[int]:
        if trainer.accelerator.is_main_process:
            stream = engine.vllm_client._stream

            def size(complete: int, generating: int) -> int:
                while not (count := wave_size(stream.complete, stream.generating)):
                    if left:
                        batch = left.pop(0)
                        for prompt in batch:
                            script.finished[prompt].set()
                        for _ in batch:
                            stream.wait()
                    else:
                        stream.wait()
                return count

            waves.append(next_wave(size))
        else:
            waves.append(next_wave(wave_size))
        return waves[-1]

    engine.next_wave = finish_a_batch
    return waves


def server_settings(url: str, weights: Any) -> dict[str, Any]:
    return {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": url,
        "vllm_server_timeout": 0.0,
        "vllm_weight_transfer": "file",
        "vllm_weight_dir": str(weights),
        "vllm_logp_tolerance": None,  # it plays a script
    }


def streaming_trainer(output_dir: Any, server: VllmStandIn, **settings: Any) -> OPOTrainer:
    """Six prompts a step, in six micro-batches unless said otherwise; `per_device_train_batch_size` is of all ranks."""
    weights = output_dir / "weights"
    weights.mkdir(exist_ok=True, parents=True)
    defaults = {
        "stream_rollouts": True,
        "reward_funcs": score,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 6,
    }
    settings = {**defaults, **server_settings(server.url, weights), **settings}
    settings["per_device_train_batch_size"] //= int(os.environ.get("WORLD_SIZE", "1"))
    return scripted_trainer(output_dir / "run", **{"rollout": None, **settings})


def fail_in_a_wave(case: str, trainer: OPOTrainer, server: VllmStandIn, script: ScriptedServer) -> None:
    """Have the last wave of the first attempt fail, with gradients of those before it accumulated."""

    def die() -> None:
        raise Died

    def refuse() -> None:
        raise RuntimeError("no more memory")

    faults = {"server dies": die, "server refuses": refuse, "server restarts": server.restart}
    fault = case.removeprefix("streamed, ")
    if fault in faults:
        script.faults["seven!"] = faults[fault]
        return
    rewards = trainer.reward_funcs[0]
    is_last_rank = trainer.accelerator.process_index == trainer.accelerator.num_processes - 1

    def fails_in_a_wave(prompts: list[str], **kwargs: Any) -> Any:
        # The two groups of the last wave may come in either order, and a rank may have the rows of one of them.
        if is_last_rank and {"seven!", "twenty two"} & {*prompts}:
            trainer.reward_funcs[0] = rewards
            raise OverflowError(f"rank {trainer.accelerator.process_index} only")
        return rewards(prompts=prompts, **kwargs)

    trainer.reward_funcs[0] = trainer._guard.reward(fails_in_a_wave, "fails_in_a_wave")


def plain_update(output_dir: Any, **settings: Any) -> dict[str, torch.Tensor]:
    """The update of a step that is not streamed, of one process."""
    with vllm_stand_in() as server:
        ScriptedServer(server)
        return update_of(streaming_trainer(output_dir, server, stream_rollouts=False, **settings))


def streamed_update(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """How far weights are from those that every trainer here starts with."""
    return {name: weights[name] - start.detach() for name, start in tiny_model().named_parameters()}
