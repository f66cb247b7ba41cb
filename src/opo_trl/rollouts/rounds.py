"""The rounds of a step, and all of them together: the rows of this rank, and the groups of all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..algorithm.rollout import Rollout, concatenate


@dataclass(frozen=True)
class Round:
    """
    What one round of a step has sampled under the step's weights.

    Attributes:
        batch (`dict[str, Any]`):
            This rank's rows, as TRL generates and scores them, with their advantages. All ranks have equally many.
        rollout ([`~opo_trl.algorithm.rollout.Rollout`]):
            Rewards, lengths and advantages of all ranks.
        rewards_per_func (`torch.Tensor` of shape `(N, F)`):
            Reward of each function, of all ranks; NaN where it returned none.
    """

    batch: dict[str, Any]
    rollout: Rollout
    rewards_per_func: torch.Tensor


def merge_rounds(rounds: Sequence[Round]) -> Round:
    """
    Join rounds in the order in which they were submitted.

    Rows are padded with zeros to a common width, prompts on the left; counts of the batch are added up.

    Args:
        rounds (`Sequence[Round]`):
            Rounds whose batches hold the same columns, each a tensor with one row per completion or with one number.
    """
    if len(rounds) == 1:
        return rounds[0]
    names = rounds[0].batch
    return Round(
        batch={name: _join([each.batch[name] for each in rounds], name.startswith("prompt")) for name in names},
        rollout=concatenate([each.rollout for each in rounds]),
        rewards_per_func=torch.cat([each.rewards_per_func for each in rounds]),
    )


def _join(parts: Sequence[torch.Tensor], pad_left: bool) -> torch.Tensor:
    if parts[0].ndim == 0:
        return torch.stack(tuple(parts)).sum(dim=0)
    if parts[0].ndim == 1:
        return torch.cat(tuple(parts))
    width = max(part.size(1) for part in parts)
    missing = [width - part.size(1) for part in parts]
    return torch.cat(
        [nn.functional.pad(part, (n, 0) if pad_left else (0, n)) for part, n in zip(parts, missing, strict=True)]
    )
