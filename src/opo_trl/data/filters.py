"""Which problems to leave out: those of an evaluation set, and uninformative ones."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from .layouts import INSTRUCTION

logger = logging.getLogger(__name__)

_SIGNS = str.maketrans({"−": "-", "–": "-", "·": "*", "×": "*", "÷": "/"})


def drop_overlapping(
    dataset: Dataset, held_out: Dataset, *, ngram_size: int = 13, instruction: str | None = INSTRUCTION
) -> Dataset:
    """
    Drop every problem that shares a run of `ngram_size` words with a problem of an evaluation set.

    Words are letters and digits, upper or lower case alike. A shorter problem is dropped where all of it, the signs of
    its operations included, equals a short problem of the other set. 13 words are what Brown et al. 2020 (arXiv
    2005.14165, appendix C) call an overlap.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems with a `prompt` of messages or text, as [`load_math_dataset`] gives.
        held_out ([`~datasets.Dataset`]):
            Problems of the evaluation set, likewise.
        ngram_size (`int`, *optional*, defaults to `13`):
            Number of words in a row.
        instruction (`str`, *optional*):
            Line that was added to every problem, which is no part of what is compared.

    Returns:
        [`~datasets.Dataset`]: The problems kept, their number logged.

    Raises:
        ValueError: If `ngram_size` is below 1, or no problem is left.
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size must be at least 1 word, got {ngram_size}.")
    known = {ngram for prompt in held_out["prompt"] for ngram in _ngrams(prompt, ngram_size, instruction)}
    kept = [
        i for i, prompt in enumerate(dataset["prompt"]) if known.isdisjoint(_ngrams(prompt, ngram_size, instruction))
    ]
    return _keep(dataset, kept, f"share {ngram_size} words in a row with the evaluation set")


def drop_by_pass_rate(
    dataset: Dataset, pass_rates: Mapping[str, float], *, lowest: float = 0.0, highest: float = 1.0
) -> Dataset:
    """
    Keep the problems that a model solves sometimes: `lowest < pass rate < highest`.

    A group of completions that are all right or all wrong has no gradient; the paper drops such problems beforehand.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems with an `id`, as [`load_math_dataset`] gives.
        pass_rates (`Mapping[str, float]`):
            Measured share of correct samples by problem id, as [`~opo_trl.evaluation.pass_rates`] gives.
        lowest (`float`, *optional*, defaults to `0.0`):
            Problems must pass more often than this.
        highest (`float`, *optional*, defaults to `1.0`):
            Problems must pass less often than this.

    Returns:
        [`~datasets.Dataset`]: The problems kept; those outside the bounds and those never measured are dropped, their
        numbers logged.

    Raises:
        ValueError: If the bounds leave nothing between them, no problem was measured, or none is left.
    """
    if not 0 <= lowest < highest <= 1:
        raise ValueError(f"Pass rates to keep must obey 0 <= lowest < highest <= 1, got {lowest} and {highest}.")
    measured = [i for i, problem in enumerate(dataset["id"]) if problem in pass_rates]
    if not measured:
        raise ValueError(
            f"The pass rates must be of this dataset's problems: of {len(pass_rates)} ids, such as "
            f"{list(pass_rates)[:3]}, none is among its {len(dataset)}, such as {dataset['id'][:3]}. Measure this "
            "dataset and split."
        )
    dataset = _keep(dataset, measured, "have no measured pass rate")
    kept = [i for i, problem in enumerate(dataset["id"]) if lowest < pass_rates[problem] < highest]
    return _keep(dataset, kept, f"have a pass rate outside ({lowest:g}, {highest:g})")


def _keep(dataset: Dataset, kept: list[int], reason: str) -> Dataset:
    dropped = len(dataset) - len(kept)
    if not kept:
        raise ValueError(f"A filter must leave problems to train on, but all {dropped} {reason}.")
    if dropped:
        logger.warning("Dropped %d of %d problems: they %s.", dropped, len(dataset), reason)
    return dataset.select(kept)


def _ngrams(prompt: Any, size: int, instruction: str | None) -> set[tuple[str, ...]]:
    if not isinstance(prompt, str):
        prompt = "\n".join(message["content"] for message in prompt if message["role"] == "user")
    text = prompt.strip().removesuffix(instruction or "").casefold()
    words = re.findall(r"[^\W_]+", text)
    if len(words) < size:  # 17+8-12 and 17-8+12 have the same words
        text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])|--+", " ", text.translate(_SIGNS))  # well-known, and dashes
        signed = re.findall(r"[^\W_]+|[-+*/^=<>|]", text)
        return {tuple(signed[:-1] if signed[-1:] == ["="] else signed)}  # "17-8=?" asks for what "17-8" does
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
