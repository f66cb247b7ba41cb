"""How far a policy has moved from another: KL on its own samples."""

from collections.abc import Sequence
from math import exp
from typing import Literal


def sequence_kl(
    policy_logps: Sequence[float],
    base_logps: Sequence[float],
    estimator: Literal["plain", "low_variance"] = "low_variance",
) -> float:
    """
    Estimate of KL(policy || base) from one sample of the policy.

    With `d_t = log policy - log base` of token t, `"plain"` sums `d_t` and `"low_variance"` sums `exp(-d_t) - 1 + d_t`
    (Schulman 2020, "Approximating KL divergence", k1 and k3). Both have the KL of the response as their mean over
    samples of the policy; the second is never negative and scatters less while the two policies are close. Where base
    gives a token much more probability than the policy does, its terms can be very large.

    Args:
        policy_logps (`Sequence[float]`):
            Log-probability of each token under the distribution that sampled it, in nats.
        base_logps (`Sequence[float]`):
            Log-probability of the same tokens under the base model, at the same temperature.
        estimator (`str`, *optional*, defaults to `"low_variance"`):
            `"plain"` or `"low_variance"`.

    Returns:
        `float`: In nats, summed over tokens.

    Raises:
        ValueError: If the lengths differ, or the estimator is unknown.
    """
    if len(policy_logps) != len(base_logps):
        raise ValueError(
            f"KL needs both models' log-probabilities of the same tokens, got {len(policy_logps)} and "
            f"{len(base_logps)} of them."
        )
    differences = [policy - base for policy, base in zip(policy_logps, base_logps, strict=True)]
    if estimator == "plain":
        return sum(differences)
    if estimator == "low_variance":
        return sum(exp(min(-d, 700.0)) - 1 + d for d in differences)  # a double ends at exp(709)
    raise ValueError(f'estimator must be "plain" or "low_variance", got {estimator!r}.')
