"""A stand-in for TRL's vLLM engine that draws from a network, rightly or wrongly."""

import itertools

import torch
from torch.nn.utils.rnn import pad_sequence

from tiny import tiny_model


class PolicyEngine:
    """
    Draws completions from a copy of the tiny policy, with a generator of its own.

    What a test may set: the `network`, the temperature that it `draws_at` over the configured one, whether it reports
    the log-probabilities at the configured temperature all the same (`raw`), and every how many tokens it reports NaN.
    """

    draws_at = 1.0
    raw = False
    nan_every = 0

    def __init__(self, temperature=1.0, max_completion_length=16, **settings):
        self.temperature, self.length = temperature, max_completion_length
        self.network = tiny_model()
        self.generator = torch.Generator().manual_seed(0)
        self.synced = 0

    def sync_weights(self):
        self.synced += 1

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler=None):
        rows = [torch.tensor(prompt) for prompt in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        cache, drawn, logprobs = None, [], []
        for _ in range(self.length):
            output = self.network(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            logits, cache = output.logits[:, -1] / self.temperature, output.past_key_values
            ids = torch.multinomial((logits / self.draws_at).softmax(dim=-1), 1, generator=self.generator)  # (B, 1)
            logps = (logits if self.raw else logits / self.draws_at).log_softmax(dim=-1)
            drawn.append(ids)
            logprobs.append(logps.gather(1, ids))
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        completions = [ids[: ids.index(1) + 1 if 1 in ids else None] for ids in torch.cat(drawn, dim=1).tolist()]
        logprobs = torch.cat(logprobs, dim=1).tolist()
        reported = itertools.count(1)
        return (
            prompts,
            completions,
            [
                [
                    [None if self.nan_every and next(reported) % self.nan_every == 0 else logp]
                    for logp in row[: len(ids)]
                ]
                for row, ids in zip(logprobs, completions, strict=True)  # TRL gives None for NaN
            ],
            None,
        )
