"""The metrics of a step that samples in several rounds: over all completions sampled, not a mean over rounds."""

import math
from collections.abc import Mapping, MutableMapping, Sequence

import torch

# Already over all rounds: TRL keeps one number for the run.
_CUMULATIVE = "num_tokens"

# Ends of the names of what `math_verify_reward` counts, whatever name the reward has. The counts of a step are the sum
# of those of its rounds or waves: a mean would shrink with their number, and could not be compared with the completions
# of the step. Other numbers that a reward function logs may be anything, and are pooled as means.
_COUNTS = ("/restated", "/timeouts", "/crashes", "/no_answer", "/unusable_solutions", "/not_graded")


class RoundMetrics:
    """
    Replaces what TRL logs for each round in its lists by one number for the step.

    TRL appends one number to every list each time it generates and scores. Left there, the mean over a logging period
    would give a round of two prompts the weight of a round of two hundred.

    Args:
        metrics (`MutableMapping[str, list[float]]`):
            TRL's lists of the current logging period, by name.
    """

    def __init__(self, metrics: MutableMapping[str, list[float]]) -> None:
        self.metrics = metrics
        self._start = {name: len(values) for name, values in metrics.items()}  # what earlier steps have logged
        self._rounds: list[dict[str, float]] = []
        self._sizes: list[int] = []

    def take(self, completions: int) -> None:
        """Take what the last round has appended, with the number of its completions on all ranks."""
        taken = {}
        for name, values in self.metrics.items():
            start = self._start.get(name, 0)
            if name != _CUMULATIVE and len(values) > start:
                taken[name] = sum(values[start:]) / (len(values) - start)
                del values[start:]
        self._rounds.append(taken)
        self._sizes.append(completions)

    def put(self, exact: Mapping[str, float]) -> None:
        """Append each metric of the step: the number in `exact` where it is known, else the rounds' numbers pooled."""
        for name, value in (pool_rounds(self._rounds, self._sizes) | dict(exact)).items():
            self.metrics[name].append(value)


def pool_rounds(rounds: Sequence[Mapping[str, float]], sizes: Sequence[int]) -> dict[str, float]:
    r"""
    Join the metrics of several rounds, as if all of their completions had been sampled in one.

    Args:
        rounds (`Sequence[Mapping[str, float]]`):
            Metrics of each round, as TRL names them. NaN is a number that is undefined in that round.
        sizes (`Sequence[int]`):
            Completions of each round.

    Returns:
        `dict[str, float]`: Minima and maxima over the rounds, sums of what `math_verify_reward` counts, and means
        weighted by what each number is a mean over: the completions; those that ended by themselves; the tool calls.
        NaN where it is undefined in every round.
    """
    pooled = {}
    for name in dict.fromkeys(name for metrics in rounds for name in metrics):
        known = [
            (metrics[name], _weight(name, metrics, size))
            for metrics, size in zip(rounds, sizes, strict=True)
            if not math.isnan(metrics.get(name, math.nan))
        ]
        # Nothing is counted where, say, no completion ended by itself: TRL's number for that is the same in each round.
        counted = [(value, weight) for value, weight in known if weight > 0] or [(value, 1.0) for value, _ in known]
        if not counted:
            pooled[name] = math.nan
        elif name.startswith("completions/min_"):
            pooled[name] = min(value for value, _ in counted)
        elif name.startswith("completions/max_"):
            pooled[name] = max(value for value, _ in counted)
        elif name.endswith(_COUNTS):
            pooled[name] = sum(value for value, _ in counted)
        else:
            pooled[name] = sum(value * weight for value, weight in counted) / sum(weight for _, weight in counted)
    return pooled


def _weight(name: str, metrics: Mapping[str, float], size: int) -> float:
    """How much a round's number counts in the step's."""
    if name.endswith("_terminated_length"):
        return size * (1 - metrics["completions/clipped_ratio"])
    if name == "tools/failure_frequency":
        return size * metrics["tools/call_frequency"]
    return float(size)


def reward_metrics(
    rewards_per_func: torch.Tensor, rewards: torch.Tensor, names: Sequence[str]
) -> dict[str, float]:  # (N, F), (P, K)
    """
    Means and standard deviations of the rewards as TRL logs them, over the completions that were scored.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, F)`):
            Reward of each function, NaN where it returned none.
        rewards (`torch.Tensor` of shape `(P, K)`):
            Weighted sum of them, NaN where no function returned a number.
        names (`Sequence[str]`):
            Name of each function.
    """
    metrics = {}
    for name, values in zip(names, rewards_per_func.unbind(dim=1), strict=True):
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = _mean_and_std(values)
    metrics["reward"], metrics["reward_std"] = _mean_and_std(rewards)
    return metrics


def _mean_and_std(values: torch.Tensor) -> tuple[float, float]:
    known = values[~torch.isnan(values)]
    std = known.std().item() if len(known) > 1 else math.nan
    return (known.mean().item() if len(known) else math.nan), std
