"""What OPO adds to TRL's completions table, next to the reward of each function and the advantage."""

from typing import Any

import torch

from ..algorithm.baselines import takes_part
from ..algorithm.rollout import Rollout

# Added by the trainer, too: only it knows the tokens, and the rows of the dataset.
TRUNCATED = "opo/truncated"
SOLUTION = "opo/solution"  # the dataset's column `solution`; None for a row without one


def completion_columns(rollout: Rollout, split: str) -> dict[str, list[Any]]:
    """
    Describe each completion of a rollout batch of all ranks, in its order.

    Args:
        rollout ([`Rollout`]):
            Rewards, lengths, weights, baseline and advantages as they are trained.
        split (`str`):
            `"train"` or `"eval"`: a table that TRL writes after an evaluation has the completions of the evaluation.

    Returns:
        `dict[str, list]`, each of P * K values. The prefix keeps them apart from the names of reward functions:

        - `opo/reward`: weighted sum over the reward functions; None where no function returned a number.
        - `opo/length`: number of trainable tokens.
        - `opo/baseline`: b*, so that the advantage is `opo/reward - opo/baseline`; None where a completion is left
          out of the baseline. With a baseline for each token, the mean over tokens.
        - `opo/group`: position of the group in the rollout batch.
        - `opo/split`: `split`.
    """
    scored = takes_part(rollout.rewards, rollout.completion_weights)  # (P, K)
    groups = torch.arange(len(rollout.rewards)).unsqueeze(1).expand(rollout.rewards.shape)  # (P, K)
    return {
        "opo/reward": _known(rollout.rewards, ~torch.isnan(rollout.rewards)),
        "opo/length": rollout.lengths.flatten().tolist(),
        "opo/baseline": _known(rollout.completion_baselines, scored),
        "opo/group": groups.flatten().tolist(),
        "opo/split": [split] * groups.numel(),
    }


def _known(values: torch.Tensor, known: torch.Tensor) -> list[float | None]:  # (P, K), (P, K)
    pairs = zip(values.flatten().tolist(), known.flatten().tolist(), strict=True)
    return [value if is_known else None for value, is_known in pairs]
