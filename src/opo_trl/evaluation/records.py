"""What is kept of each sampled completion, and every metric that follows from it."""

import re
from collections.abc import Mapping, Sequence
from math import fsum
from typing import NotRequired, TypedDict

from .bootstrap import Difference, bootstrap_interval, paired_difference
from .diversity import distinct_n, repeated_ngram_rate, self_bleu
from .majority import majority_at_k
from .pass_at_k import pass_at_k

# Metrics with values between 0 and 1, by the beginning of their names.
SHARES = ("pass@", "maj@", "truncated", "no-answer", "rep-", "self-bleu", "distinct-")


class Record(TypedDict):
    """
    One sampled completion, a line of a records file.

    Files that an earlier version wrote have fewer fields: read those that are not required with `get`.

    Args:
        problem (`str`):
            The problem's id.
        sample (`int`):
            Which of the problem's samples, from 0.
        solution (`str`):
            The right answer.
        completion (`str`):
            Text without special tokens.
        token_ids (`list[int]`):
            Tokens of the completion, the end token included.
        truncated (`bool`):
            Whether it was stopped by the length limit.
        answer (`str`, *optional*):
            Final answer that the reward read out of it; `None` if there is none.
        reward (`float`, *optional*):
            1 for correct; `None` where it cannot be scored.
        verdict (`str`, *optional*):
            Why it has this reward: `"right"`, `"wrong"`, `"restated"` (a formula copied from the problem),
            `"no answer"`, `"too long"`, `"too slow"`, `"crashed"`, `"unusable solution"` or `"not graded"`.
        entropy (`float`, *optional*):
            Entropy of the policy, in nats, summed over tokens.
        kl_plain, kl_low_variance (`float`, *optional*):
            Estimates of KL(policy || base), in nats, summed over tokens.
    """

    problem: str
    sample: int
    solution: str
    completion: str
    token_ids: list[int]
    truncated: bool
    answer: str | None
    reward: float | None
    verdict: NotRequired[str]
    entropy: NotRequired[float]
    kl_plain: NotRequired[float]
    kl_low_variance: NotRequired[float]


class Estimate(TypedDict):
    """A mean over problems with its 95 % interval."""

    mean: float
    low: float
    high: float


def is_correct(record: Record) -> bool:
    """Whether the reward is 1. A completion that could not be scored counts as not correct."""
    return record["reward"] == 1


def has_answer(record: Record) -> bool:
    """Whether the completion has a final answer, right or wrong."""
    return bool((record["answer"] or "").strip()) and record.get("verdict") != "no answer"


def by_problem(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group records by problem, problems in the order in which they first appear, samples in theirs."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["problem"], []).append(record)
    return {problem: sorted(group, key=lambda record: record["sample"]) for problem, group in groups.items()}


def pass_rates(records: Sequence[Record]) -> dict[str, float]:
    """Share of correct samples of each problem: its measured pass rate."""
    return {problem: sum(map(is_correct, group)) / len(group) for problem, group in by_problem(records).items()}


def problem_metrics(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """
    Every metric of every problem.

    Args:
        records (`Sequence[Record]`):
            Completions of one model on one dataset, the same number for each problem.

    Returns:
        `dict[str, dict[str, float]]`: metric -> problem id -> value. `pass@k` for k = 1, 2, 4, ... up to the number of
        samples, `maj@k` for all samples, `rep-5` and `distinct-2` over token ids, `self-bleu` (both from two samples
        on), `length` in tokens, `truncated` and `no-answer` (shares of samples), and, where records hold them,
        `entropy`, `kl_plain` and `kl_low_variance` in nats per token.

    Raises:
        ValueError: If there is no record, or problems have different numbers of samples.
    """
    groups = by_problem(records)
    sizes = {len(group) for group in groups.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"Every problem needs the same number of samples, at least one, got {sorted(sizes)} for {len(groups)} "
            "problems. Let the run that writes the records come to its end."
        )
    metrics: dict[str, dict[str, float]] = {}
    for problem, group in groups.items():
        for name, value in _metrics_of(group).items():
            metrics.setdefault(name, {})[problem] = value
    return metrics


def summarize(metrics: dict[str, dict[str, float]]) -> dict[str, Estimate]:
    """Mean over problems of each metric, with its interval."""
    summary: dict[str, Estimate] = {}
    for name, values in metrics.items():
        low, high = bootstrap_interval(list(values.values()), bounds=_bounds(name))
        summary[name] = {"mean": fsum(values.values()) / len(values), "low": low, "high": high}
    return summary


def summarize_differences(
    metrics: dict[str, dict[str, float]], reference: dict[str, dict[str, float]]
) -> dict[str, Difference]:
    """
    Mean difference of each metric to that of another model on the same problems, with its interval.

    Args:
        metrics (`dict[str, dict[str, float]]`):
            metric -> problem id -> value, as of [`problem_metrics`].
        reference (`dict[str, dict[str, float]]`):
            The other model's.

    Returns:
        `dict[str, Difference]`: One for each metric.
    """
    return {
        name: paired_difference(
            list(values.values()), [reference[name][problem] for problem in values], bounds=_bounds(name)
        )
        for name, values in metrics.items()
    }


def by_category(
    metrics: dict[str, dict[str, float]], categories: Mapping[str, str]
) -> dict[str, dict[str, dict[str, float]]]:
    """
    Divide problems by their category, such as their level.

    Args:
        metrics (`dict[str, dict[str, float]]`):
            metric -> problem id -> value, as of [`problem_metrics`].
        categories (`Mapping[str, str]`):
            Category of each problem id.

    Returns:
        `dict[str, dict[str, dict[str, float]]]`: category -> metrics of its problems, sorted by category.
    """
    return {
        category: {
            name: {problem: value for problem, value in values.items() if categories[problem] == category}
            for name, values in metrics.items()
        }
        for category in sorted(set(categories.values()), key=_natural_order)
    }


def average(metrics: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """
    Average each problem's metrics over several checkpoints, as the paper does over the last five.

    Raises:
        ValueError: If the checkpoints were not measured on the same problems by the same metrics.
    """
    first = metrics[0]
    for other in metrics[1:]:
        if other.keys() != first.keys() or any(other[name].keys() != first[name].keys() for name in first):
            raise ValueError(
                "Checkpoints are averaged problem by problem, so all of them must have the same metrics of the same "
                f"problems; got {sorted(first)} of {len(first['length'])} problems and {sorted(other)} of "
                f"{len(other['length'])}."
            )
    return {
        name: {problem: fsum(one[name][problem] for one in metrics) / len(metrics) for problem in values}
        for name, values in first.items()
    }


def _metrics_of(group: list[Record]) -> dict[str, float]:
    n, correct = len(group), [is_correct(record) for record in group]
    responses = [record["token_ids"] for record in group]
    tokens = sum(map(len, responses))
    metrics = {f"pass@{k}": pass_at_k(n, sum(correct), k) for k in powers_of_two(n)}
    if n > 1:
        answers = [record["answer"] if has_answer(record) else None for record in group]  # an empty box has no vote
        metrics[f"maj@{n}"] = majority_at_k(answers, correct, n)
    metrics["length"] = tokens / n
    metrics["truncated"] = sum(record["truncated"] for record in group) / n
    metrics["no-answer"] = sum(not has_answer(record) for record in group) / n
    metrics["rep-5"] = sum(map(repeated_ngram_rate, responses)) / n
    if n > 1:
        metrics["self-bleu"] = self_bleu([record["completion"] for record in group])
        metrics["distinct-2"] = distinct_n(responses, 2)
    for name in ("entropy", "kl_plain", "kl_low_variance"):
        if all(name in record for record in group):
            metrics[name] = fsum(record[name] for record in group) / tokens
    return metrics


def _bounds(metric: str) -> tuple[float, float] | None:
    return (0.0, 1.0) if metric.startswith(SHARES) else None


def _natural_order(category: str) -> list[tuple[int, str]]:
    """Level 2 before level 10: numbers in a name are compared as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", category)]


def powers_of_two(largest: int) -> list[int]:
    """Return 1, 2, 4, ... up to `largest`."""
    return [2**i for i in range(largest.bit_length())]
