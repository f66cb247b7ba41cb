"""What the metrics of a run are, in one sentence each, as docs/metrics.md has them."""

import re
from collections.abc import Iterable

MEANINGS = {
    "reward": (
        "mean reward of the rollout batch: the weighted sum of the reward functions, over completions that were scored"
    ),
    "grad_norm": "norm of the gradient before clipping",
    "entropy": (
        "mean entropy of the policy's next-token distribution, at the sampling temperature, over the trained tokens"
    ),
    "loss": "0 by construction",
    "learning_rate": "learning rate of the optimizer, at the time of logging",
    "num_tokens": "prompt and completion tokens since the start, every completion counted with its prompt",
    "step_time": "generation, scoring, forwards and backwards of one optimizer step; the optimizer itself is not in it",
    "time/generate": "tokenising prompts, sampling completions, calling tools; all rounds of a refilled step",
    "time/score": "the reward functions, and gathering their rewards",
    "time/sync_weights": "sending the weights to vLLM; 0 without it",
    "time/update": "the rest of the step: advantages, planning, forwards, backwards, gradient norm, optimizer",
    "tokens_per_second/generated": "completion tokens that the policy sampled on all ranks, over time/generate",
    "tokens_per_second/trained": (
        "trainable tokens of the completions with a non-zero advantage on all ranks, over time/update"
    ),
    "opo/baseline": "mean of b* over groups",
    "opo/baseline_minus_mean": "mean over groups of b* minus the plain mean reward",
    "opo/length_reward_correlation": "correlation of length and reward within groups",
    "opo/informative_fraction": "share of completions with a non-zero advantage",
    "opo/unscorable_fraction": "share of completions that no reward function scored (None or NaN)",
    "opo/variance_proxy": (
        "1 - sum w (r - b*)^2 / sum w (r - mean)^2, w the baseline's weights: the predicted relative "
        "variance reduction by b*"
    ),
    "opo/padding_fraction": (
        "share of padding among the tokens of all forward passes of the step, over all ranks; training only"
    ),
    "rewards/NAME/mean": "mean of one reward function, before its weight",
    "rewards/NAME/std": "standard deviation of one reward function over the rollout batch",
    "reward_std": "standard deviation of the total reward over the rollout batch",
    "frac_reward_zero_std": "share of completions in groups whose rewards are all equal",
    "completions/mean_length": "mean length of a completion, with the end token, without tool output",
    "completions/min_length": "length of the shortest completion",
    "completions/max_length": "length of the longest completion",
    "completions/clipped_ratio": (
        "share of completions that end without an end token, as those do that reach max_completion_length"
    ),
    "completions/mean_terminated_length": "mean length of the completions that ended with an end token; 0 if none did",
    "completions/min_terminated_length": "length of the shortest completion that ended with an end token",
    "completions/max_terminated_length": "length of the longest completion that ended with an end token",
    "math_verify_reward/fast_path_share": "share of verdicts without a worker process",
    "math_verify_reward/restated": "number of completions that repeat a formula of the problem",
    "math_verify_reward/timeouts": "number of comparisons that reached the time limit",
    "math_verify_reward/crashes": "number of completions that killed their worker or ran out of memory",
    "math_verify_reward/no_answer": "number of completions without a closed, non-empty box",
    "math_verify_reward/unusable_solutions": (
        "number of completions whose solution is empty, prose, or too slow to compare"
    ),
    "math_verify_reward/not_graded": (
        "number of completions that were not graded because a batch took too long or no worker could start"
    ),
}


def meanings(metrics: Iterable[str]) -> dict[str, str]:
    """The meaning of each metric that has one here; a held-out metric is what the same of training is."""
    general = {
        name: re.sub(r"^rewards/.+/(mean|std)$", r"rewards/NAME/\1", name.removeprefix("eval_")) for name in metrics
    }
    return {name: MEANINGS[known] for name, known in general.items() if known in MEANINGS}
