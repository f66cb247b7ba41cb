"""What stands out in a run, by stated rules. Every number in a finding can be looked up in the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import NamedTuple

from .groups import Completion, Group
from .metrics import Series, first_quarter, last_quarter


class Finding(NamedTuple):
    """
    One thing that stands out.

    Attributes:
        title (`str`):
            What it is.
        text (`str`):
            The numbers, and what to do.
        filter (`str`, *optional*):
            Filter that shows the completions in question.
    """

    title: str
    text: str
    filter: str | None = None


class Rule(NamedTuple):
    """When something stands out, in words, and the function that decides it."""

    text: str
    find: "Callable[[Evidence], Finding | None]"


@dataclass(frozen=True)
class Evidence:
    """
    What the rules look at.

    Attributes:
        metrics (`Mapping[str, Series]`):
            Every metric of the run.
        groups (`Sequence[Group]`):
            Groups of the report, of training and evaluation.
    """

    metrics: Mapping[str, Series]
    groups: Sequence[Group]

    @property
    def trained(self) -> list[Group]:
        """Groups of training steps; those of an evaluation have other sizes and are not trained on."""
        return [group for group in self.groups if group.split != "eval"]

    @property
    def completions(self) -> list[Completion]:
        return list(chain.from_iterable(group.completions for group in self.trained))

    def recent(self, name: str) -> float | None:
        """Mean over the last quarter of the logged steps; None for a metric that the run does not have."""
        return last_quarter(self.metrics[name].values) if name in self.metrics else None

    def change(self, name: str) -> tuple[float, float] | None:
        """Means over the first and the last quarter of the logged steps, of a metric that was logged eight times."""
        values = self.metrics[name].values if name in self.metrics else []
        return (first_quarter(values), last_quarter(values)) if len(values) >= 8 else None


def find(evidence: Evidence) -> list[Finding]:
    """Apply every rule, in the order of `RULES`."""
    found = [rule.find(evidence) for rule in RULES]
    return [finding for finding in found if finding is not None]


def _truncated(evidence: Evidence) -> Finding | None:
    share = evidence.recent("completions/clipped_ratio")
    if share is None or share < 0.5:
        return None
    return Finding(
        "All completions are truncated" if share == 1 else f"{_percent(share)} of the completions are truncated",
        f"In the last quarter of the logged steps {_percent(share)} of the completions reach `max_completion_length` "
        "without an end-of-sequence token, so most never state an answer. Raise `max_completion_length`, or check that "
        "the model's end-of-sequence token is the one that the tokenizer names.",
        "truncated",
    )


def _constant_reward(evidence: Evidence) -> Finding | None:
    rewards = evidence.metrics.get("reward", Series([], [])).values
    spread = evidence.metrics.get("reward_std", Series([], [])).values
    if not rewards or max(rewards) - min(rewards) > 1e-6 or not spread or max(spread) > 1e-6:
        return None
    return Finding(
        f"The reward is always {rewards[0]:g}",
        f"Every completion of all {len(rewards)} logged steps has the reward {rewards[0]:g}, so every advantage is 0 "
        "and the policy does not change. Call the reward function on a right and on a wrong completion by hand.",
        "all_equal",
    )


def _no_answer(evidence: Evidence) -> Finding | None:
    verdicts = [
        value
        for completion in evidence.completions
        for name, value in completion.extra.items()
        if name.endswith("verdict") and value is not None
    ]
    share = verdicts.count("no answer") / len(verdicts) if verdicts else 0
    if share < 0.5:
        return None
    return Finding(
        "No completion has an answer" if share == 1 else f"{_percent(share)} of the completions have no answer",
        f"`math_verify_reward` finds no answer, such as `\\boxed{{42}}`, in {_percent(share)} of the {len(verdicts)} "
        "training completions in this report. Ask for a box in the prompt (`--instruction`), add "
        "`boxed_format_reward`, or start from a model that answers in this format.",
    )


def _all_wrong(evidence: Evidence) -> Finding | None:
    groups = [group for group in evidence.trained if group.scores()]
    share = sum(group.all_wrong() for group in groups) / len(groups) if groups else 0
    if share < 0.5:
        return None
    return Finding(
        f"No reward above 0 in {'any group' if share == 1 else f'{_percent(share)} of the groups'}",
        f"In {sum(group.all_wrong() for group in groups)} of the {len(groups)} training groups in this report no "
        "completion has a reward above 0. Train on easier problems, or check the reward function.",
        "all_wrong",
    )


def _no_signal(evidence: Evidence) -> Finding | None:
    informative = evidence.recent("opo/informative_fraction")
    if informative is None:  # a plain GRPOTrainer
        equal = evidence.recent("frac_reward_zero_std")
        informative = None if equal is None else 1 - equal
    if informative is None or informative > 0.1:
        return None
    return Finding(
        "No learning signal" if informative == 0 else "Little learning signal",
        f"In the last quarter of the logged steps {_percent(informative)} of the completions have an advantage other "
        "than 0: the rewards within a group are equal. The problems are too easy or too hard for the policy, or the "
        "reward does not tell completions apart.",
        "all_equal",
    )


def _unscorable(evidence: Evidence) -> Finding | None:
    share = evidence.recent("opo/unscorable_fraction")
    if share is None:
        completions = evidence.completions
        share = sum(each.unscorable for each in completions) / len(completions) if completions else 0
    if share < 0.1:
        return None
    return Finding(
        f"{_percent(share)} of the completions are unscorable",
        "Every reward function returned None for them, and they are not trained on. Find out why the reward function "
        "cannot score them.",
        "unscorable",
    )


def _reward_falls(evidence: Evidence) -> Finding | None:
    change = evidence.change("reward")
    if change is None or change[0] <= change[1] or change[0] - change[1] < 0.1 * max(map(abs, change)):
        return None
    return Finding(
        "The reward falls",
        f"From {change[0]:.3g} in the first quarter of the logged steps to {change[1]:.3g} in the last. Lower the "
        "learning rate, and compare with `entropy` and `grad_norm`.",
    )


def _length_changes(evidence: Evidence) -> Finding | None:
    change = evidence.change("completions/mean_length")
    if change is None or min(change) <= 0 or 0.5 < change[1] / change[0] < 2:
        return None
    return Finding(
        f"Completions get {'longer' if change[1] > change[0] else 'shorter'}",
        f"From {change[0]:.1f} tokens in the first quarter of the logged steps to {change[1]:.1f} in the last. Read "
        "completions of early and late steps below, and compare with the reward.",
    )


def _entropy_collapses(evidence: Evidence) -> Finding | None:
    change = evidence.change("entropy")
    if change is None or change[0] <= 0 or change[1] > 0.1 * change[0]:
        return None
    return Finding(
        "The entropy collapses",
        f"From {change[0]:.3g} nats per token in the first quarter of the logged steps to {change[1]:.3g} in the last: "
        "the completions of a group become copies of each other. Lower the learning rate, or stop earlier.",
    )


def _gradient_jumps(evidence: Evidence) -> Finding | None:
    steps, norms = evidence.metrics.get("grad_norm", Series([], []))
    if len(norms) < 8 or not 0 < 10 * median(norms) < max(norms):
        return None
    worst = norms.index(max(norms))
    return Finding(
        "The gradient norm jumps",
        f"{norms[worst]:.3g} at step {steps[worst]}, and {median(norms):.3g} in the median. Check `max_grad_norm` and "
        "the learning rate.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share in (0, 1) or 0.005 <= share < 0.995 else f"{100 * share:.1f} %"


# Causes before what follows from them.
RULES: Sequence[Rule] = (
    Rule("half of the completions or more are truncated in the last quarter of the logged steps", _truncated),
    Rule("math_verify_reward finds no answer in half of the training completions in this report or more", _no_answer),
    Rule("the reward is the same number for all completions of all logged steps", _constant_reward),
    Rule("no completion has a reward above 0 in half of the training groups in this report or more", _all_wrong),
    Rule("at most 10 % of the completions have an advantage other than 0 in the last quarter", _no_signal),
    Rule("10 % of the completions or more are unscorable", _unscorable),
    Rule(
        "the reward of the last quarter is 10 % or more below that of the first (from 8 logged steps on)", _reward_falls
    ),
    Rule("the mean length doubles or halves between the first and the last quarter", _length_changes),
    Rule("the entropy of the last quarter is at most a tenth of that of the first", _entropy_collapses),
    Rule("the largest gradient norm is more than 10 times the median", _gradient_jumps),
)
