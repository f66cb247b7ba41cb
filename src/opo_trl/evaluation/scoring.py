"""Score completions: log-probabilities and entropies of their tokens under a model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

# Positions, of all rows together, whose logits are held at a time: 1.2 GB for a vocabulary of 150,000 tokens, where one
# row of 32,768 positions would take 20 GB.
_POSITIONS = 2_048


class TokenScores(NamedTuple):
    """Per token of one completion, in nats."""

    logps: list[float]
    entropies: list[float]


@torch.no_grad()
def score_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
) -> list[TokenScores]:
    """
    Log-probability of each completion token, and entropy of the distribution it was drawn from.

    Both are of the distribution `softmax(logits / temperature)`, the one that samples.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        prompts (`Sequence[Sequence[int]]`):
            Token ids of each prompt, at least one each.
        completions (`Sequence[Sequence[int]]`):
            Token ids of each completion.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the distribution.

    Returns:
        `list[TokenScores]`: One per completion.
    """
    was_training = model.training
    model.eval()
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    # Padding goes to the right, where causal attention never looks at it: no mask, and positions as they are.
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)  # (B, T)
    logps, entropies, cache = [], [], DynamicCache(config=model.config)
    chunk = max(_POSITIONS // len(rows), 1)
    for start in range(0, width - 1, chunk):
        end = min(start + chunk, width - 1)
        logits = model(input_ids=input_ids[:, start:end], past_key_values=cache, use_cache=True).logits
        log_law = (logits.float() / temperature).log_softmax(dim=-1)  # (B, chunk, V)
        next_ids = input_ids[:, start + 1 : end + 1].unsqueeze(-1)
        logps.append(log_law.gather(-1, next_ids).squeeze(-1).cpu())
        entropies.append(torch.special.entr(log_law.exp()).sum(dim=-1).cpu())
    model.train(was_training)
    all_logps, all_entropies = torch.cat(logps, dim=1), torch.cat(entropies, dim=1)  # (B, T - 1)
    scores = []
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        span = slice(len(prompt) - 1, len(row) - 1)
        scores.append(TokenScores(all_logps[i, span].tolist(), all_entropies[i, span].tolist()))
    return scores
