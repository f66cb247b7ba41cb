"""Sampling completions from a policy, apart from the pure functions that judge them."""

from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig


class Completion(NamedTuple):
    """One sampled completion: its text without special tokens, and its length in tokens, the end token included."""

    text: str
    num_tokens: int


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
    Sample from the policy itself: its softmax over `temperature`, with no tail cut off.

    The random state of the caller is left as it was.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, padding on the left, with a pad token.
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
    law = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        typical_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_end_tokens(model, tokenizer),
    )
    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for prompt in prompts
        for _ in range(num_samples)
    ]
    # A rendered chat template already holds the special tokens that the tokenizer would add to a plain text.
    add_special_tokens = not prompts or isinstance(prompts[0], str)
    was_training = model.training
    model.eval()
    completions: list[Completion] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in range(0, len(texts), batch_size):
            inputs = tokenizer(
                texts[start : start + batch_size],
                return_tensors="pt",
                padding=True,
                add_special_tokens=add_special_tokens,
            ).to(model.device)
            output = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=law
            )
            completions += [
                _completion(ids, law, tokenizer) for ids in output[:, inputs["input_ids"].size(1) :].tolist()
            ]
    model.train(was_training)
    return [completions[i : i + num_samples] for i in range(0, len(completions), num_samples)]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    declared = model.generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return sorted({*declared, tokenizer.eos_token_id})


def _completion(ids: list[int], law: GenerationConfig, tokenizer: Any) -> Completion:
    ends = [position for position, token in enumerate(ids) if token in law.eos_token_id]
    ids = ids[: ends[0] + 1] if ends else ids
    return Completion(tokenizer.decode(ids, skip_special_tokens=True), len(ids))
