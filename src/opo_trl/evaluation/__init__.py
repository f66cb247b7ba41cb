"""Measuring a policy: pure functions over plain records, and sampling apart."""

from .bootstrap import Difference, bootstrap_interval, paired_difference
from .diversity import distinct_n, repeated_ngram_rate, self_bleu
from .majority import majority_at_k
from .pass_at_k import mean_pass_at_k, pass_at_k
from .policy_shift import sequence_kl
from .records import (
    Record,
    average,
    by_category,
    has_answer,
    pass_rates,
    problem_metrics,
    summarize,
    summarize_differences,
)

__all__ = [
    "Difference",
    "Record",
    "average",
    "bootstrap_interval",
    "by_category",
    "distinct_n",
    "has_answer",
    "majority_at_k",
    "mean_pass_at_k",
    "paired_difference",
    "pass_at_k",
    "pass_rates",
    "problem_metrics",
    "repeated_ngram_rate",
    "self_bleu",
    "sequence_kl",
    "summarize",
    "summarize_differences",
]
