"""The rewards of each prompt so far, as a Beta posterior, and from it the chance of an informative group.

Pure torch, on the CPU.
"""

from typing import Any

import torch

from ..algorithm.baselines import reward_range

PRIOR_HALF_LIFE = 20  # steps: the population is seen in every step, so its prior can follow the policy closely
START_CORRELATION = 1 / 3  # of two outcomes of one prompt under Beta(1, 1)
LEAST_COUNT = 1e-3  # completions: smaller counts are dropped, before they become denormal numbers


def informative_chance(
    successes: torch.Tensor, failures: torch.Tensor, group_size: int
) -> torch.Tensor:  # (N,), (N,) -> (N,)
    r"""
    Chance that K completions with rewards 0 or 1 do not all get the same one, where the pass rate p is Beta(a, b).

    `1 - E[p^K] - E[(1 - p)^K]`, with `E[p^K] = Gamma(a + K) Gamma(a + b) / (Gamma(a) Gamma(a + b + K))`.

    Args:
        successes, failures (`torch.Tensor` of shape `(N,)`):
            a and b, above 0.
        group_size (`int`):
            Completions per prompt, K.

    Returns:
        `torch.Tensor` of shape `(N,)`, between 0 and 1.
    """
    total = successes + failures
    shared = torch.lgamma(total) - torch.lgamma(total + group_size)
    equal = torch.exp(torch.lgamma(successes + group_size) - torch.lgamma(successes) + shared)
    equal += torch.exp(torch.lgamma(failures + group_size) - torch.lgamma(failures) + shared)
    return (1 - equal).clamp(min=0, max=1)


class PromptOutcomes:
    """
    Successes and failures of each prompt, with exponential forgetting, and a Beta prior fitted to all prompts.

    Where all rewards so far were 0 or 1, an outcome is a completion, and a success is the reward 1: K completions tell
    more about a prompt than one bit. From the first other reward on, an outcome is a group, and a success is a group
    whose rewards differ; the counts so far are converted.

    The prior is the Beta distribution of the prompts' success rates that has the observed mean and the observed
    correlation between two completions of one prompt: moments of the beta-binomial distribution. Observations are
    weighted by the inverse of the probability with which their prompt was drawn, so the prior describes all prompts
    and not mainly those that are drawn most. With general rewards, a group is a single outcome and has no correlation:
    that of Beta(1, 1) is used.

    Args:
        num_prompts (`int`):
            Prompts in the training set, N.
        group_size (`int`):
            Completions per prompt, K.
        half_life (`float`):
            Steps after which an observation counts half.
    """

    def __init__(self, num_prompts: int, group_size: int, half_life: float) -> None:
        self.group_size, self.half_life = group_size, half_life
        self.counts = torch.zeros(2, num_prompts)  # (2, N): successes, failures
        self.binary = True  # all rewards so far were 0 or 1
        self.totals = self._one_uniform_group()  # (4,): successes, outcomes, pairs that differ, pairs

    def _one_uniform_group(self) -> torch.Tensor:
        """What a group of a prompt whose success rate is Beta(1, 1) has on average: the prior before there is data."""
        pairs = self.group_size * (self.group_size - 1)
        differing = pairs * (1 - START_CORRELATION) / 2
        return torch.tensor([self.group_size / 2, self.group_size, differing, pairs], dtype=torch.float64)

    def prior(self) -> tuple[float, float]:
        """The prior's two parameters."""
        successes, outcomes, differing, pairs = self.totals.tolist()
        mean = min(max(successes / outcomes, 1e-3), 1 - 1e-3)
        correlation = 1 - differing / pairs / (2 * mean * (1 - mean)) if self.binary else START_CORRELATION
        strength = 1 / min(max(correlation, 0.02), 0.98) - 1
        return mean * strength, (1 - mean) * strength

    def chances(self) -> torch.Tensor:  # (N,)
        """Predicted chance of each prompt that its next group is informative: that its rewards are not all equal."""
        successes, failures = (count + start for count, start in zip(self.counts, self.prior(), strict=True))
        if self.binary:
            return informative_chance(successes, failures, self.group_size)
        return successes / (successes + failures)

    def forget(self) -> None:
        """Discount all observations so far by one step."""
        self.counts *= 0.5 ** (1 / self.half_life)
        torch.nn.functional.threshold(self.counts, LEAST_COUNT, 0.0, inplace=True)
        self.totals *= 0.5 ** (1 / PRIOR_HALF_LIFE)

    def add(
        self, prompts: torch.Tensor, rewards: torch.Tensor, scored: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:  # (P,), (P, K), (P, K), (P,) -> (P,), bool
        """
        Add the rewards of some prompts' groups.

        Args:
            prompts (`torch.Tensor` of shape `(P,)`):
                Positions in the training set.
            rewards (`torch.Tensor` of shape `(P, K)`):
                Rewards of their completions.
            scored (`torch.Tensor` of shape `(P, K)`):
                Which completions take part: those that were scored and have a trainable token. A group with fewer than
                two is uninformative whatever the rewards, and counts as K failures.
            weights (`torch.Tensor` of shape `(P,)`):
                Weight of each group in the prior.

        Returns:
            `torch.Tensor` of shape `(P,)`: which groups are informative.
        """
        lowest, highest = reward_range(rewards, scored)  # (P, 1)
        informative = (lowest < highest).squeeze(1)
        if self.binary and not bool(((rewards == 0) | (rewards == 1) | ~scored).all()):
            self._count_groups()
        if self.binary:
            compared = scored.sum(dim=1) > 1
            outcomes = torch.where(compared, scored.sum(dim=1), self.group_size).double()
            successes = torch.where(compared, ((rewards == 1) & scored).sum(dim=1), 0).double()
        else:
            outcomes, successes = torch.ones(len(prompts), dtype=torch.float64), informative.double()
        failures = outcomes - successes
        self.counts[:, prompts] += torch.stack([successes, failures]).float()
        found = torch.stack([successes, outcomes, 2 * successes * failures, outcomes * (outcomes - 1)])  # (4, P)
        self.totals += (found * weights.double()).sum(dim=1)
        return informative

    def _count_groups(self) -> None:
        """Convert the counts to counts of groups: K completions are one, informative as often as predicted."""
        chances, groups = self.chances(), self.counts.sum(dim=0) / self.group_size
        self.binary = False
        self.counts = torch.stack([groups * chances, groups * (1 - chances)])
        self.totals = torch.tensor([0.5, 1.0, 0.0, 0.0], dtype=torch.float64)
        self.totals[:2] += torch.stack([self.counts[0].sum(), self.counts.sum()]).double()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the chances depend on."""
        return {"counts": self.counts, "totals": self.totals, "binary": self.binary}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Load a state.

        Raises:
            ValueError: If it is that of another number of prompts.
        """
        if state["counts"].shape != self.counts.shape:
            raise ValueError(
                f"`prompt_sampling='informative'` must resume with the training set that it has counted, which has "
                f"{state['counts'].size(1)} prompts, got {self.counts.size(1)}. Resume with that training set, or "
                "start a new run from the checkpoint's model."
            )
        self.counts, self.totals, self.binary = state["counts"], state["totals"], state["binary"]
