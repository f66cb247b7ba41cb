"""Completions of zero tokens, which TRL cannot take."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch


class EmptyCompletions:
    """
    Puts a padding token into completions of zero tokens, and masks it afterwards: they have no trainable token.

    A rollout function or an engine may return such completions. TRL 1.16 reads the last token of every completion, and
    raises an IndexError on the rank that has an empty one, while the other ranks wait (no issue is known). Delete this
    when it does not.

    Args:
        pad_token_id (`int`):
            Token that stands in them.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id
        self._rows: list[int] = []  # of the last batch

    def fill(self, completion_ids: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Fill the empty completions of a batch, and keep which they are."""
        self._rows = [row for row, ids in enumerate(completion_ids) if len(ids) == 0]
        return [ids if len(ids) else [self.pad_token_id] for ids in completion_ids]

    def fill_rollouts(self, rollout_func: Callable[[Any, Any], Mapping[str, Any]]) -> Callable[[Any, Any], Any]:
        """Wrap a `rollout_func` to fill what it returns."""

        @wraps(rollout_func)
        def filled(prompts: Any, trainer: Any) -> dict[str, Any]:
            output = rollout_func(prompts, trainer)
            if "completion_ids" not in output:
                return dict(output)  # TRL has a message for this
            output = {**output, "completion_ids": self.fill(output["completion_ids"])}
            if output.get("logprobs") is not None:  # one for each token
                output["logprobs"] = [
                    [0.0] if row in self._rows else logprobs for row, logprobs in enumerate(output["logprobs"])
                ]
            return output

        return filled

    def mask(self, completion_mask: torch.Tensor) -> None:  # (N, C)
        """Mask the last batch's empty completions, in place."""
        completion_mask[self._rows] = 0
