"""Sampling completions from a policy, apart from the pure functions that judge them."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


class Completion(NamedTuple):
    """One sampled completion."""

    text: str  # without special tokens
    token_ids: list[int]  # the end token included
    truncated: bool  # stopped by the length limit


def record_seed(*parts: Any) -> int:
    """Seed that depends on what is sampled and on nothing else, such as (seed, dataset, problem, sample)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def tokenize_prompt(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a plain text, or of messages put through the tokenizer's chat template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    # A rendered chat template already holds the special tokens that the tokenizer would add to a plain text.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class TransformersSampler:
    """
    Samples from the policy itself, `softmax(logits / temperature)` with no tail cut off, by transformers' `generate`.

    Each row draws from a random stream of its own, made of its seed, so that what it samples depends neither on the
    other rows nor on the caller's random state, which stays as it was. What remains is float noise: another padding or
    another number of threads changes logits in their last digits, which turns a token once in a great while. The same
    batch on the same kind of machine gives the same tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature, above 0.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float = 1.0) -> None:
        if temperature <= 0:
            raise ValueError(f"The sampling temperature must be above 0, got {temperature}.")
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self._ends = end_tokens(model.generation_config.eos_token_id, tokenizer)
        # Everything that shapes the distribution stays off; the drawing is `_DrawFromUniforms`.
        self._law = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            # What stands before a prompt and after a completion has no effect; any token will do.
            pad_token_id=next((token for token in (tokenizer.pad_token_id, *self._ends) if token is not None), 0),
            eos_token_id=self._ends or None,
        )

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        """
        Sample one completion for each prompt.

        Args:
            prompts (`Sequence[list[int]]`):
                Token ids of each prompt.
            seeds (`Sequence[int]`):
                Seed of each row's random stream.

        Returns:
            `list[Completion]`: In the order of the prompts.
        """
        device, width, limit = self.model.device, max(map(len, prompts)), self._law.max_new_tokens
        padding = [width - len(prompt) for prompt in prompts]
        pad = self._law.pad_token_id
        input_ids = torch.tensor([[pad] * gap + prompt for gap, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in padding])
        uniforms = torch.stack(
            [torch.rand(limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
        )
        draw = _DrawFromUniforms(uniforms.to(device), width, self.temperature)
        with torch.no_grad(), _only_this_config(self.model, self._law):
            output = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                generation_config=self._law,
                logits_processor=LogitsProcessorList([draw]),
            )
        return [to_completion(ids, self._ends, self.tokenizer) for ids in output[:, width:].tolist()]


def sample_completions(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
) -> list[list[Completion]]:
    """
    Sample several completions for each prompt with a [`TransformersSampler`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`list[str]` or `list[list[dict]]`):
            Plain texts, or messages for the tokenizer's chat template.
        num_samples (`int`, *optional*, defaults to `1`):
            Completions per prompt.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Longest completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature, above 0.
        batch_size (`int`, *optional*, defaults to `256`):
            Completions generated at a time.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.

    Returns:
        `list[list[Completion]]`: For each prompt, its `num_samples` completions.
    """
    sampler = TransformersSampler(model, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature)
    rows = [ids for prompt in prompts for ids in [tokenize_prompt(tokenizer, prompt)] * num_samples]
    seeds = [record_seed(seed, i) for i in range(len(rows))]
    completions: list[Completion] = []
    for start in range(0, len(rows), batch_size):
        completions += sampler.sample(rows[start : start + batch_size], seeds[start : start + batch_size])
    return [completions[i : i + num_samples] for i in range(0, len(completions), num_samples)]


def end_tokens(declared: int | list[int] | None, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: those of the model's generation config and the tokenizer's, if it has one."""
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return sorted({*declared, tokenizer.eos_token_id} - {None})


def to_completion(ids: list[int], ends: list[int], tokenizer: Any) -> Completion:
    """Cut generated ids after their first end token."""
    stop = next((position for position, token in enumerate(ids) if token in ends), None)
    ids = ids if stop is None else ids[: stop + 1]
    return Completion(tokenizer.decode(ids, skip_special_tokens=True), ids, truncated=stop is None)


class _DrawFromUniforms(LogitsProcessor):
    """Draw each row's next token by the inverse of its cumulative distribution, and leave only that one possible."""

    def __init__(self, uniforms: torch.Tensor, prompt_width: int, temperature: float) -> None:
        self.uniforms, self.prompt_width, self.temperature = uniforms, prompt_width, temperature  # (B, max_new_tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # (B, T), (B, V) -> (B, V)
        cumulative = (scores.float() / self.temperature).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        step = input_ids.size(1) - self.prompt_width
        target = self.uniforms[:, step : step + 1] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=scores.size(1) - 1)  # (B, 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


@contextmanager
def _only_this_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills what a generation config leaves open from the model's own, which may cut tails or ban tokens."""
    own, was_training = model.generation_config, model.training
    model.generation_config = config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)
