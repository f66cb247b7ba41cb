"""The self-test of a vLLM engine: the first completions that a run trains on must be the policy's."""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .sampler_evidence import SamplerEvidence, compare_log_probabilities, compare_sampler

logger = logging.getLogger(__name__)

ROWS, ROWS_AT_ONCE, TOKENS = 128, 16, 32  # completions of each rank, those in one forward, and first tokens of each

_FIXES = {
    "colocate": (
        "Check that vLLM is a release that TRL supports, and that `sync_weights` reaches every layer of the engine (on "
        "a CPU, import `opo_trl.rollouts.weight_file_worker` before the trainer is built: vLLM then packs no weights)"
    ),
    "server": (
        "Check that the server serves this model and revision, that it was started with `--logprobs-mode "
        "processed_logprobs` and the trainer's `--dtype`, that new weights reach every layer (on a CPU, packed ones "
        "cannot be replaced), and, where it uses speculative decoding, that it draws correctly without it"
    ),
}


def check_tolerance(tolerance: float | None) -> None:
    """
    Refuse a tolerance under which the self-test accepts nothing or everything.

    Raises:
        ValueError: If it is neither `None` nor a finite number above 0.
    """
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(
            f"`vllm_logp_tolerance` must be a finite number above 0, or None to skip the self-test, got {tolerance!r}. "
            "Leave `vllm_logp_tolerance` out."
        )


class SelfTest:
    """
    Refuses an engine that is not the policy, by the first completions that a run would train on.

    It draws nothing of its own: the random states of trainer and engine are those of a run without it, and the prompts,
    requests and settings that it judges are those of the run. All ranks call it together.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Its processes agree.
        temperature (`float`):
            Configured temperature.
        pad_token_id (`int`):
            Of the tokenizer.
        tolerance (`float`, *optional*):
            Largest mean absolute difference of the log-probabilities that is accepted, in nats; `None`: no test.
        mode (`str`):
            `"colocate"` or `"server"`, for the message.
        score (`Callable`):
            The update's own forward: maps tokens `(B, T)`, their mask `(B, T)` and the number C of the last tokens that
            count to log-probabilities and entropies `(B, C)`. Takes the place of the logits under ZeRO-3, where the
            draws are not judged.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        temperature: float,
        pad_token_id: int,
        tolerance: float | None,
        mode: str,
        score: Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.accelerator = accelerator
        self.temperature = temperature
        self.pad_token_id = pad_token_id
        self.tolerance = tolerance
        self.mode = mode
        self.score = score
        self._due = False

    def start(self) -> None:
        """Test the next completions: a run starts, from scratch or from a checkpoint."""
        self._due = self.tolerance is not None

    def check(
        self,
        model: nn.Module,
        prompts: Sequence[list[int]],
        images: Any,
        completions: Sequence[list[int]],
        logprobs: Sequence[list[float | None]],
    ) -> None:
        """
        Compare completions of all ranks with the policy, once in a run.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Policy.
            prompts, completions (`list[list[int]]`):
                Tokens of each row of this rank. All ranks have the same number of rows.
            images (`list`, *optional*):
                Images of each row. Prompts with images are not tested.
            logprobs (`list[list[float | None]]`):
                Log-probability that the engine reported for each token, in nats; `None` for NaN.

        Raises:
            ValueError: On all ranks alike, with the numbers and how to fix it.
        """
        if not self._due:
            return
        self._due = False
        if any(gather_object([images is not None])):
            if self.accelerator.is_main_process:
                logger.warning("The self-test of the vLLM engine is skipped: it takes no prompts with images.")
            return
        # One completion of many prompts rather than many of one. Every rank runs the same number of forwards.
        rows = range(0, len(prompts), max(1, len(prompts) // ROWS))[:ROWS]
        parts = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            parts.append(
                self._compare(
                    model,
                    [prompts[row] for row in some],
                    [completions[row] for row in some],
                    [logprobs[row] for row in some],
                )
            )
        first, *others = gather_object(parts)  # the same on all ranks
        self._judge(sum(others, first))

    def _judge(self, evidence: SamplerEvidence) -> None:
        assert self.tolerance is not None
        if not evidence.tokens:
            self._due = True
            return
        problems = evidence.problems(self.tolerance, self.temperature)
        if problems:
            raise ValueError(
                f"The vLLM engine must sample from the policy. In its first {evidence.tokens} tokens, "
                f"{'; '.join(problems)}. {_FIXES[self.mode]}. If the difference is rounding that you accept, as of a "
                f"quantized engine, raise `vllm_logp_tolerance`, {self.tolerance:g} now."
            )
        if self.accelerator.is_main_process:
            logger.info("Self-test of the vLLM engine passed: %s.", evidence)

    def _compare(
        self,
        model: nn.Module,
        prompts: list[list[int]],
        completions: list[list[int]],
        logprobs: list[list[float | None]],
    ) -> SamplerEvidence:
        """Compare the first tokens of some rows, in one forward of the policy."""
        # An empty completion has a filler token, without a log-probability.
        sizes = [min(len(ids), len(logps), TOKENS) for ids, logps in zip(completions, logprobs, strict=True)]
        completions = [ids[:size] for ids, size in zip(completions, sizes, strict=True)]
        reported = [
            [math.nan if logp is None else logp for logp in logps[:size]]
            for logps, size in zip(logprobs, sizes, strict=True)
        ]
        prompt_ids, prompt_mask = self._pad(prompts, "left")  # (B, P), as the update pads them
        completion_ids, mask = self._pad(completions, "right")  # (B, C)
        sampled = torch.tensor([logp for row in reported for logp in row], device=mask.device)  # (N,)
        input_ids, attended = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, mask], 1)
        if is_deepspeed_zero3_enabled():
            # It expects the modules of a forward in the order of the last one: the update's leaves out the LM head's.
            with torch.no_grad():
                logps, entropies = self.score(input_ids, attended.long(), completion_ids.size(1))  # (B, C)
            return compare_log_probabilities(logps[mask], entropies[mask], sampled)
        logits = self._logits(model, input_ids, attended, completion_ids.size(1))  # (B, C, V)
        return compare_sampler(logits[mask] / self.temperature, completion_ids[mask], sampled)

    def _pad(self, rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad rows of tokens on one side: tokens `(B, T)`, and a mask `(B, T)` that is true for tokens."""
        tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
        padded = pad_sequence(tokens, batch_first=True, padding_value=self.pad_token_id, padding_side=side)
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True, padding_side=side).bool()
        if not padded.size(1):  # no row has a token, and a forward takes one
            padded, mask = padded.new_full((len(rows), 1), self.pad_token_id), mask.new_zeros(len(rows), 1)
        return padded.to(self.accelerator.device), mask.to(self.accelerator.device)

    def _logits(
        self, model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, length: int
    ) -> torch.Tensor:  # (B, T), (B, T) -> (B, C, V)
        """Logits that predict the last `length` tokens; those before them are not computed where a model can do so."""
        forward = self.accelerator.unwrap_model(model)
        forward = forward.get_base_model().forward if hasattr(forward, "get_base_model") else forward.forward
        few = {"logits_to_keep": length + 1} if "logits_to_keep" in inspect.signature(forward).parameters else {}
        with torch.no_grad(), self.accelerator.autocast():
            output = model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False, **few)
        logits: torch.Tensor = output.logits[:, -length - 1 : -1]
        return logits
