"""From sampled completions to the records that every measurement reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation import Record, sequence_kl
from ..evaluation.sampling import Completion
from ..evaluation.scoring import TokenScores
from ..rewards import math_verify_reward


def judge(samples: Sequence[tuple[Mapping[str, Any], int]], completions: Sequence[Completion]) -> list[Record]:
    """
    Reward completions, and make a record of each.

    Args:
        samples (`Sequence[tuple[Mapping, int]]`):
            For each completion its problem (`id`, `prompt`, `solution`) and which of the problem's samples it is.
        completions (`Sequence[Completion]`):
            What was sampled.

    Returns:
        `list[Record]`: In the same order.
    """
    noted: dict[str, list[Any]] = {}
    rewards = math_verify_reward(
        [completion.text for completion in completions],
        [problem["solution"] for problem, _ in samples],
        prompts=[problem["prompt"] for problem, _ in samples],  # a formula copied from the problem is no answer
        log_extra=noted.__setitem__,
    )
    return [
        {
            "problem": problem["id"],
            "sample": sample,
            "solution": problem["solution"],
            "completion": completion.text,
            "token_ids": completion.token_ids,
            "truncated": completion.truncated,
            "answer": answer,
            "reward": reward,
            "verdict": verdict,
        }
        for (problem, sample), completion, answer, reward, verdict in zip(
            samples, completions, noted["answer"], rewards, noted["verdict"], strict=True
        )
    ]


def shift(policy: TokenScores, base: TokenScores) -> dict[str, float]:
    """What a record holds of a completion's entropy and of its KL to the base model, summed over tokens."""
    return {
        "entropy": sum(policy.entropies),
        "kl_plain": sequence_kl(policy.logps, base.logps, "plain"),
        "kl_low_variance": sequence_kl(policy.logps, base.logps, "low_variance"),
    }
