"""What stands out in a run, by stated rules. Every number in a finding can be looked up in the report."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from statistics import median
from typing import Any, NamedTuple

from .groups import NO_ANSWER, Completion, Group, Messages
from .metrics import Series, first_quarter, last_part, last_quarter

# From this share on, a finding explains what can follow from it.
EXPLAINS = 0.9
# Completions end before `max_completion_length` if the longest have at most this share of it. A logged maximum is a
# mean over steps, a little below the limit where not every step reaches it.
BELOW_LIMIT = 0.9
# What a rule needs, other than a metric.
VERDICTS = "verdicts of math_verify_reward in its completions"
REWARDS = "rewards in its completions"
SERIES = 8  # logged values from which on first and last quarter are compared


class Finding(NamedTuple):
    """
    One thing that stands out.

    Attributes:
        title (`str`):
            What it is.
        text (`str`):
            The numbers.
        advice (`str`, *optional*):
            What to do. A finding that follows from another one has none.
        filter (`str`, *optional*):
            Filter that shows the completions in question.
        explains (`bool`, *optional*, defaults to `True`):
            Whether it is frequent enough to explain the findings that can follow from it.
        examples (`list[tuple[str, str]]`, *optional*):
            Some completions of a group, with what each text is.
        consequences (`list[Finding]`, *optional*):
            Findings that probably follow from this one.
    """

    title: str
    text: str
    advice: str = ""
    filter: str | None = None
    explains: bool = True
    examples: "Sequence[tuple[str, str]]" = ()
    consequences: "Sequence[Finding]" = ()


class Rule(NamedTuple):
    """
    When something stands out.

    Attributes:
        text (`str`):
            The condition, in words.
        find (`Callable`):
            Decides it.
        needs (`tuple[str, ...]`):
            Metrics, or what else a run has: it needs one of them for the rule to be evaluated.
        causes (`tuple[Callable, ...]`, *optional*):
            `find` of the rules whose finding explains this one.
        least (`int`, *optional*, defaults to `1`):
            How many values of it the run must have.
    """

    text: str
    find: "Callable[[Evidence], Finding | None]"
    needs: tuple[str, ...]
    causes: "tuple[Callable[[Evidence], Finding | None], ...]" = ()
    least: int = 1

    @property
    def missing(self) -> str:
        """What a run lacks where the rule is not evaluated, in words."""
        return " or ".join(self.needs) + (f", logged {self.least} times or more" if self.least > 1 else "")


@dataclass(frozen=True)
class Evidence:
    """
    What the rules look at.

    Attributes:
        metrics (`Mapping[str, Series]`):
            Every metric of the run.
        groups (`Sequence[Group]`):
            Groups of the report, of training and evaluation.
        limit (`int`, *optional*):
            `max_completion_length` of the run; None where it is not known.
    """

    metrics: Mapping[str, Series]
    groups: Sequence[Group]
    limit: int | None = None

    @property
    def trained(self) -> list[Group]:
        """Groups of training steps; those of an evaluation have other sizes and are not trained on."""
        return [group for group in self.groups if group.split != "eval"]

    @property
    def completions(self) -> list[Completion]:
        return list(chain.from_iterable(group.completions for group in self.trained))

    @property
    def verdicts(self) -> list[str]:
        """What `math_verify_reward` has logged for each completion."""
        found = (completion.verdict for completion in self.completions)
        return [verdict for verdict in found if verdict is not None]

    def has(self, rule: Rule) -> bool:
        """Whether the run has what a rule needs."""
        return any(self._count(need) >= rule.least for need in rule.needs)

    def _count(self, need: str) -> int:
        """How many values of what a rule needs the run has."""
        if need == VERDICTS:
            return len(self.verdicts)
        if need == REWARDS:
            return sum(len(group.scores()) for group in self.trained)
        return len(self.metrics[need].values) if need in self.metrics else 0

    def recent(self, name: str) -> float | None:
        """Mean over the last quarter of the logged steps; None for a metric that the run does not have."""
        return last_quarter(self.metrics[name].values) if name in self.metrics else None

    def longest(self) -> float | None:
        """
        Length of the longest completion in the last quarter of the logged steps.

        None for a run without that metric, or with tools: their output counts towards the limit and not in the metric.
        """
        if "completions/max_length" not in self.metrics or "tools/call_frequency" in self.metrics:
            return None
        return max(last_part(self.metrics["completions/max_length"].values))

    def change(self, name: str) -> tuple[float, float] | None:
        """Means over the first and the last quarter of the logged steps, of a metric with `SERIES` values or more."""
        values = self.metrics[name].values if name in self.metrics else []
        return (first_quarter(values), last_quarter(values)) if len(values) >= SERIES else None


def find(evidence: Evidence) -> list[Finding]:
    """
    Apply every rule, in the order of `RULES`.

    Args:
        evidence ([`Evidence`]):
            What the run has logged.

    Returns:
        `list[Finding]`: Those that follow from another one are in its `consequences`.
    """
    found = {rule.find: finding for rule in RULES if (finding := rule.find(evidence)) is not None}
    caused: dict[Any, list[Finding]] = {}
    for rule in RULES:
        if rule.find in found:
            cause = next((cause for cause in rule.causes if cause in found and found[cause].explains), rule.find)
            caused.setdefault(cause, []).append(found[rule.find])
    return [
        found[cause]._replace(
            consequences=[each._replace(advice="", examples=()) for each in same if each is not found[cause]]
        )
        for cause, same in caused.items()
    ]


def evaluate(evidence: Evidence) -> list[tuple[str, str]]:
    """Return the text of each rule, and whether it has found something."""

    def result(rule: Rule) -> str:
        if rule.find(evidence) is not None:
            return "found"
        return "not found" if evidence.has(rule) else f"not evaluated: the run has no {rule.missing}"

    return [(rule.text, result(rule)) for rule in RULES]


def _truncated(evidence: Evidence) -> Finding | None:
    share = evidence.recent("completions/clipped_ratio")
    if share is None or share < 0.5:
        return None
    longest = evidence.longest()
    text = (
        f"In the last quarter of the logged steps {_percent(share)} of the completions stop without an end-of-sequence "
        "token, so most never state an answer."
    )
    if longest is None or evidence.limit is None or longest > BELOW_LIMIT * evidence.limit:
        advice = (
            "Raise `max_completion_length`, or check that the model's end-of-sequence token is the one that the "
            "tokenizer names."
        )
    else:
        text += f" `max_completion_length` is {evidence.limit}, but the longest have {longest:.0f} tokens."
        advice = (
            "Find what stops them before the limit: a generation setting, a stop string, or a `rollout_func` that "
            "leaves the end-of-sequence token out."
        )
    return Finding(
        "All completions are truncated" if share == 1 else f"{_percent(share)} of the completions are truncated",
        text,
        advice,
        "truncated",
        share >= EXPLAINS,
    )


def _constant_reward(evidence: Evidence) -> Finding | None:
    rewards = evidence.metrics.get("reward", Series([], [])).values
    spread = evidence.metrics.get("reward_std", Series([], [])).values
    if not rewards or max(rewards) - min(rewards) > 1e-6 or not spread or max(spread) > 1e-6:
        return None
    functions = [name.removeprefix("rewards/").removesuffix("/mean") for name in evidence.metrics if _is_reward(name)]
    named = " and ".join(f"`{name}`" for name in functions) or "the reward function"
    return Finding(
        f"The reward is always {rewards[0]:g}",
        f"Every completion of all {len(rewards)} logged steps has the reward {rewards[0]:g} from {named}, so every "
        "advantage is 0 and the policy does not change.",
        f"Call {named} on a right and on a wrong completion by hand.",
        "all_equal",
        examples=_different_completions(evidence.trained),
    )


def _no_answer(evidence: Evidence) -> Finding | None:
    verdicts = evidence.verdicts
    share = verdicts.count(NO_ANSWER) / len(verdicts) if verdicts else 0
    if share < 0.5:
        return None
    return Finding(
        "No completion has a boxed answer"
        if share == 1
        else f"{_percent(share)} of the completions have no boxed answer",
        f"`math_verify_reward` finds no answer, such as `\\boxed{{42}}`, in {_percent(share)} of the {len(verdicts)} "
        "training completions in this report.",
        "Ask for a box in the prompt (`--instruction`), add `boxed_format_reward`, or start from a model that answers "
        "in this format.",
        "no_answer",
        share >= EXPLAINS,
        _without_answer(evidence.trained),
    )


def _none_positive(evidence: Evidence) -> Finding | None:
    groups = [group for group in evidence.trained if group.scores()]
    share = sum(group.none_positive() for group in groups) / len(groups) if groups else 0
    if share < 0.5:
        return None
    return Finding(
        f"No reward above 0 in {'any group' if share == 1 else f'{_percent(share)} of the groups'}",
        f"In {sum(group.none_positive() for group in groups)} of the {len(groups)} training groups in this report no "
        "completion has a reward above 0.",
        "Check the reward function on a right completion. If the function is correct, train on easier problems.",
        "none_positive",
        share >= EXPLAINS,
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
        f"In the last quarter of the logged steps {_percent(1 - informative)} of the completions have the advantage 0, "
        "because the rewards within their group are equal.",
        "The problems are too easy or too hard for the policy, or the reward does not tell completions apart.",
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
        "Every reward function returned None for them, and they are not trained on.",
        "Find out why the reward function cannot score them.",
        "unscorable",
        share >= EXPLAINS,
    )


def _reward_falls(evidence: Evidence) -> Finding | None:
    change = evidence.change("reward")
    if change is None or change[0] <= change[1] or change[0] - change[1] < 0.1 * max(map(abs, change)):
        return None
    return Finding(
        "The reward falls",
        f"From {change[0]:.3g} in the first quarter of the logged steps to {change[1]:.3g} in the last.",
        "Lower the learning rate, and compare with `entropy` and `grad_norm`.",
    )


def _length_changes(evidence: Evidence) -> Finding | None:
    change = evidence.change("completions/mean_length")
    if change is None or min(change) <= 0 or 0.5 < change[1] / change[0] < 2:
        return None
    return Finding(
        f"Completions get {'longer' if change[1] > change[0] else 'shorter'}",
        f"From {change[0]:.1f} tokens in the first quarter of the logged steps to {change[1]:.1f} in the last.",
        "Read completions of early and late steps below, and compare their lengths with their rewards.",
    )


def _entropy_collapses(evidence: Evidence) -> Finding | None:
    change = evidence.change("entropy")
    if change is None or change[0] <= 0 or change[1] > 0.1 * change[0]:
        return None
    return Finding(
        "The entropy collapses",
        f"From {change[0]:.3g} nats per token in the first quarter of the logged steps to {change[1]:.3g} in the last: "
        "the completions of a group become copies of each other.",
        "Lower the learning rate, or stop earlier.",
    )


def _gradient_jumps(evidence: Evidence) -> Finding | None:
    steps, norms = evidence.metrics.get("grad_norm", Series([], []))
    if len(norms) < SERIES or not 0 < 10 * median(norms) < max(norms):
        return None
    worst = norms.index(max(norms))
    return Finding(
        "The gradient norm jumps",
        f"The largest is {norms[worst]:.3g}, at step {steps[worst]}; the median is {median(norms):.3g}.",
        "Check `max_grad_norm` and the learning rate.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share in (0, 1) or 0.005 <= share < 0.995 else f"{100 * share:.1f} %"


def _is_reward(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")


def _different_completions(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Two completions of a group with equal rewards: if possible, with another last number, which is the answer."""
    candidates = [
        (_last_number(one) != _last_number(two), group, one, two)
        for group in groups
        for one, two in pairwise(group.completions)
        if one.messages != two.messages and one.reward is not None and two.reward is not None
    ]
    if not candidates:
        return []
    _, group, one, two = max(candidates, key=lambda candidate: candidate[0])
    return _examples(group, [(f"reward {each.reward:g}", each) for each in (one, two)])


def _without_answer(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Up to three completions without an answer: of the group that has the most different ones."""

    def different(group: Group) -> list[Completion]:
        return list({_text_of(each.messages): each for each in group.completions if each.verdict == NO_ANSWER}.values())

    group = max(groups, key=lambda group: len(different(group)))
    return _examples(group, [("no answer", each) for each in different(group)[:3]])


def _examples(group: Group, completions: Sequence[tuple[str, Completion]]) -> list[tuple[str, str]]:
    """The prompt of a group, its solution if it has one, and completions with what each is."""
    solution = [] if group.solution is None else [("solution", _end(group.solution))]
    texts = [(what, _end(_text_of(each.messages))) for what, each in completions]
    return [("prompt", _end(_text_of(group.prompt))), *solution, *texts]


def _last_number(completion: Completion) -> str:
    return (re.findall(r"\d+(?:\.\d+)?", _text_of(completion.messages)) or [""])[-1]


def _text_of(messages: Messages) -> str:
    return "\n".join(text for _, text in messages)


def _end(text: str) -> str:
    """The end of a text, where a question and an answer stand."""
    return text if len(text) <= 300 else f"… {text[-300:]}"


# Causes before what follows from them.
RULES: Sequence[Rule] = (
    Rule(
        "half of the completions or more are truncated in the last quarter of the logged steps",
        _truncated,
        ("completions/clipped_ratio",),
    ),
    Rule(
        "math_verify_reward finds no boxed answer in half of the training completions in this report or more",
        _no_answer,
        (VERDICTS,),
        (_truncated,),
    ),
    Rule(
        "the reward is the same number for all completions of all logged steps",
        _constant_reward,
        ("reward_std",),
        (_truncated, _no_answer),
    ),
    Rule(
        "no completion has a reward above 0 in half of the training groups in this report or more",
        _none_positive,
        (REWARDS,),
        (_truncated, _no_answer, _constant_reward),
    ),
    Rule("10 % of the completions or more are unscorable", _unscorable, ("opo/unscorable_fraction", REWARDS)),
    Rule(
        "90 % of the completions or more have the advantage 0 in the last quarter of the logged steps",
        _no_signal,
        ("opo/informative_fraction", "frac_reward_zero_std"),
        (_truncated, _no_answer, _constant_reward, _none_positive, _unscorable),
    ),
    Rule(
        "the reward of the last quarter is 10 % or more below that of the first (from 8 logged steps on)",
        _reward_falls,
        ("reward",),
        least=SERIES,
    ),
    Rule(
        "the mean length doubles or halves between the first and the last quarter",
        _length_changes,
        ("completions/mean_length",),
        least=SERIES,
    ),
    Rule(
        "the entropy of the last quarter is at most a tenth of that of the first",
        _entropy_collapses,
        ("entropy",),
        least=SERIES,
    ),
    Rule("the largest gradient norm is more than 10 times the median", _gradient_jumps, ("grad_norm",), least=SERIES),
)
