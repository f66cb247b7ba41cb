"""How varied samples are: repetition within one, likeness among several."""

from collections.abc import Sequence
from typing import Any


def check_self_bleu() -> None:
    """
    Check that Self-BLEU can be computed, before anything expensive starts.

    Raises:
        ImportError: If sacrebleu is not installed.
    """
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Self-BLEU needs the package sacrebleu, which is not installed. Install it, or the extra "
            "`evaluate`: pip install sacrebleu."
        ) from error


def repeated_ngram_rate(tokens: Sequence[Any], n: int = 5) -> float:
    """
    Rep-n: share of a response's n-grams that repeat an earlier one (seq-rep-n, Welleck et al. 2020, arXiv 1908.04319).

    Args:
        tokens (`Sequence`):
            Token ids or words of one response.
        n (`int`, *optional*, defaults to `5`):
            Length of the n-grams.

    Returns:
        `float`: `1 - distinct / all`, from 0 to 1. Lower is more varied. A response without any n-gram has 0.

    Raises:
        ValueError: If `n` is below 1.
    """
    return 1.0 - distinct_n([tokens], n)


def distinct_n(responses: Sequence[Sequence[Any]], n: int = 2) -> float:
    """
    Distinct-n: share of distinct n-grams among those of all responses (Li et al. 2016, arXiv 1510.03055).

    Args:
        responses (`Sequence[Sequence]`):
            Token ids or words of each response.
        n (`int`, *optional*, defaults to `2`):
            Length of the n-grams.

    Returns:
        `float`: `distinct / all`, from 0 to 1. Higher is more varied. Responses without any n-gram have 1.

    Raises:
        ValueError: If `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"An n-gram has at least one token, got n={n}.")
    ngrams = [tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def self_bleu(texts: Sequence[str]) -> float:
    """
    Self-BLEU: mean BLEU of each text against the others as its references (Zhu et al. 2018, arXiv 1802.01886).

    BLEU is sacrebleu's for sentences: up to 4-grams, "13a" words, exponential smoothing, effective order. Two texts
    that contains no word have 0.

    Args:
        texts (`Sequence[str]`):
            Responses to one problem.

    Returns:
        `float`: From 0 to 1; the paper prints it times 100. Lower is more varied.

    Raises:
        ValueError: If there are fewer than two texts.
        ImportError: If sacrebleu, which the extra `evaluate` brings, is not installed.
    """
    check_self_bleu()
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.helpers import extract_all_word_ngrams

    if len(texts) < 2:
        raise ValueError(f"Self-BLEU compares a text with others and needs at least two, got {len(texts)}.")
    tokenize = BLEU().tokenizer
    counts, lengths = zip(*(extract_all_word_ngrams(tokenize(text.rstrip()), 1, 4) for text in texts), strict=True)
    # sacrebleu's own loop counts the n-grams of every reference anew for every hypothesis. The largest count among the
    # other texts takes the two largest among all of them.
    largest: dict[tuple[str, ...], list[int]] = {}
    for count in counts:
        for ngram, number in count.items():
            largest[ngram] = sorted([*largest.get(ngram, [0, 0]), number])[1:]
    scores = []
    for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        matches, totals = [0] * 4, [0] * 4
        for ngram, number in count.items():
            second, first = largest[ngram]
            matches[len(ngram) - 1] += min(number, second if number == first else first)
            totals[len(ngram) - 1] += number
        others = [*lengths[:i], *lengths[i + 1 :]]
        closest = min(others, key=lambda other: (abs(other - length), other))
        score = BLEU.compute_bleu(matches, totals, length, closest, smooth_method="exp", effective_order=True).score
        scores.append(score)
    return min(sum(scores) / len(scores) / 100, 1.0)  # sacrebleu's logarithms make 100.00000000000004 of equal texts
