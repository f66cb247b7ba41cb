"""
Compare sampled tokens and their log-probabilities with the policy that should have sampled them. Pure torch.

The log-probabilities alone do not show the temperature of a sampler: it may report those of the policy and sample from
another distribution. So the sampled tokens are tested, too, by the likelihood ratio of alternatives to the policy.
Under the policy the ratio of each alternative q, prod_t q(y_t) / pi(y_t), has mean 1, whatever the number of tokens,
their distributions and when a completion ends. By Markov's inequality a mean of such ratios exceeds 1 / a with a
probability of at most a: the rate of false alarms is bounded exactly, without a normal approximation, which a few
hundred tokens with a low entropy would not justify.

The alternatives are the policy at other temperatures, and a temperature that changes from token to token.
"""

import math
from dataclasses import dataclass, replace

import torch

# The alternatives' temperatures over the configured one. The nearest are 20 % away: rounding moves the draws less.
TEMPERATURES = (0.125, 0.5, 0.8, 1.25, 2.0, 20.0)
FALSE_ALARM = 1e-6  # bound on the probability that draws of the policy are refused
WRONG = 1.0  # nats between the two log-probabilities of a token. bf16: 0.75 at most in 15 steps of the tiny policy
WRONG_SHARE = 0.01  # of the tokens, which a healthy engine stays below


@dataclass(frozen=True)
class SamplerEvidence:
    """
    Sums over sampled tokens, which add up over ranks.

    Attributes:
        tokens (`int`):
            Number of tokens.
        nan (`int`):
            Tokens without a log-probability: the sampler's, or the policy's, is NaN.
        wrong (`int`):
            Tokens whose two log-probabilities are more than `WRONG` nats apart.
        difference (`float`):
            Absolute differences of the two log-probabilities, in nats, without the NaN.
        surprise, entropy (`float`):
            `-log pi` of the tokens, and its expectation under the policy, in nats.
        log_ratios (`tuple[float, ...]`):
            Log-likelihood ratio of each alternative to the policy: one for each of `TEMPERATURES`, and last a
            temperature that changes from token to token.
    """

    tokens: int
    nan: int
    wrong: int
    difference: float
    surprise: float
    entropy: float
    log_ratios: tuple[float, ...]

    def __add__(self, other: "SamplerEvidence") -> "SamplerEvidence":
        return SamplerEvidence(
            self.tokens + other.tokens,
            self.nan + other.nan,
            self.wrong + other.wrong,
            self.difference + other.difference,
            self.surprise + other.surprise,
            self.entropy + other.entropy,
            tuple(mine + theirs for mine, theirs in zip(self.log_ratios, other.log_ratios, strict=True)),
        )

    @property
    def log_likelihood_ratio(self) -> float:
        """Log of the mean over the alternatives of their likelihood ratios."""
        return float(torch.tensor(self.log_ratios, dtype=torch.float64).logsumexp(0)) - math.log(len(self.log_ratios))

    def problems(self, tolerance: float, temperature: float) -> list[str]:
        """
        Describe where the sampler and the policy differ by more than the limits.

        Args:
            tolerance (`float`):
                Largest mean absolute difference of the two log-probabilities, in nats.
            temperature (`float`):
                The configured one, for the message.

        Returns:
            `list[str]`: With the numbers; empty if the tokens may well be the policy's.
        """
        problems, known = [], self.tokens - self.nan
        if self.nan > WRONG_SHARE * self.tokens:
            problems.append(
                f"{self.nan / self.tokens:.1%} of its log-probabilities are NaN (accepted: {WRONG_SHARE:.0%})"
            )
        if known and self.difference > tolerance * known:
            problems.append(
                f"its log-probabilities differ from the policy's by {self.difference / known:.3g} nats in the mean "
                f"(accepted: {tolerance:g})"
            )
        if self.wrong > WRONG_SHARE * self.tokens:
            problems.append(
                f"{self.wrong / self.tokens:.1%} of its log-probabilities are more than {WRONG:g} nat off (accepted: "
                f"{WRONG_SHARE:.0%})"
            )
        if self.log_likelihood_ratio > -math.log(FALSE_ALARM):
            best = max(range(len(self.log_ratios)), key=self.log_ratios.__getitem__)
            drawn = f"{TEMPERATURES[best] * temperature:.2g}" if best < len(TEMPERATURES) else "one that varies"
            problems.append(
                f"its draws fit a temperature of {drawn} better than the configured {temperature:g}: their -log pi is "
                f"{self.surprise / known:.3g} nats in the mean, and the policy's entropy {self.entropy / known:.3g} "
                f"(probability under the policy: below {FALSE_ALARM:g})"
            )
        return problems


def compare_sampler(logits: torch.Tensor, tokens: torch.Tensor, reported: torch.Tensor) -> SamplerEvidence:
    """
    Compare sampled tokens with the policy that should have sampled them.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`):
            The policy's logits over the configured temperature, for each token.
        tokens (`torch.Tensor` of shape `(N,)`):
            Sampled tokens, with none chosen for what it is.
        reported (`torch.Tensor` of shape `(N,)`):
            Log-probabilities that the sampler reported, in nats; NaN where it did not.

    Returns:
        [`SamplerEvidence`].
    """
    policy = logits.float().log_softmax(dim=-1)  # (N, V)
    chosen = policy.gather(1, tokens.unsqueeze(1)).squeeze(1)  # (N,)
    evidence = compare_log_probabilities(chosen, torch.special.entr(policy.exp()).sum(dim=-1), reported)
    known = ~(reported.isnan() | chosen.isnan())  # (N,)
    policy, chosen = policy[known], chosen[known]
    alternatives = [
        chosen / factor - (policy / factor).logsumexp(dim=-1)  # the log-probability at that temperature
        for factor in TEMPERATURES
    ]
    each = torch.stack([chosen, *alternatives])  # (1 + A, n)
    varying = each.logsumexp(dim=0) - math.log(len(each))
    log_ratios = torch.stack([*alternatives, varying]) - chosen  # (A + 1, n)
    return replace(evidence, log_ratios=tuple(log_ratios.double().sum(dim=1).tolist()))


def compare_log_probabilities(
    logps: torch.Tensor, entropies: torch.Tensor, reported: torch.Tensor
) -> SamplerEvidence:  # (N,) each
    """Compare log-probabilities alone, where the policy's logits are not available: the draws are not tested."""
    known = ~(reported.isnan() | logps.isnan())  # (N,)
    differences = (logps - reported)[known].abs()
    return SamplerEvidence(
        tokens=len(logps),
        nan=len(logps) - len(differences),
        wrong=int((differences > WRONG).sum()),
        difference=float(differences.double().sum()),
        surprise=-float(logps[known].double().sum()),
        entropy=float(entropies[known].double().sum()),
        log_ratios=(0.0,) * (len(TEMPERATURES) + 1),
    )
