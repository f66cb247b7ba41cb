"""Reward for a right final answer, decided by math-verify."""

import logging
import threading
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from .text import final_text, last_boxed

LONGEST_ANSWER = 1_000  # characters; legitimate answers are far shorter, and parsing time grows without bound
_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
_TIME_LIMIT = 2  # whole seconds: math-verify keeps its time with signal.alarm

logger = logging.getLogger(__name__)


def math_verify_reward(
    completions: list[Any],
    solution: list[Any],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    Reward 1.0 for a completion whose boxed final answer equals the solution, 0.0 for any other.

    The answer is what the last closed `\boxed{...}` after the thinking holds. The solution is boxed too before it is
    parsed: math-verify reads LaTeX only inside a box or dollar signs, and would take a bare `2\sqrt{3}` for `2`.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions as text, messages, or messages with a list of parts.
        solution (`list`):
            The right final answer of each completion's problem, a string or a number, boxed or bare. Dataset columns
            reach a reward function as keyword arguments of this name.
        log_extra (`Callable`, *optional*):
            Adds a column to the completions table; passed by TRL's trainers.
        **kwargs:
            Ignored; a TRL trainer passes more than this function needs.

    Returns:
        `list[float | None]`: `None` where the solution is missing or cannot be parsed, so that the completion counts
        as unscorable instead of wrong.
    """
    answers = [last_boxed(final_text(completion)) for completion in completions]
    if log_extra is not None:
        log_extra("answer", answers)
    return [_grade(_gold_text(gold), answer) for answer, gold in zip(answers, solution, strict=True)]


def _gold_text(gold: Any) -> str:
    """Bare LaTeX of a gold answer: without GSM8K's `####`, an outer box, or dollar signs around it."""
    text = "" if gold is None else str(gold).rsplit("####", 1)[-1].strip()
    boxed = last_boxed(text)
    return (text if boxed is None else boxed).strip().strip("$").strip()


def _grade(gold: str, answer: str | None) -> float | None:
    if not gold:
        return None
    if answer is None or len(answer) > LONGEST_ANSWER:
        return 0.0
    answer = answer.strip()
    if gold == answer:
        return 1.0
    gold_number, answer_number = _plain_number(gold), _plain_number(answer)
    if gold_number is not None and answer_number is not None:
        return float(gold_number == answer_number)
    parsed_gold = _parse_gold(gold)
    if not parsed_gold:
        return None
    try:
        parsed_answer = parse(rf"\boxed{{{answer}}}", _LATEX, extraction_mode="first_match", parsing_timeout=_limit())
        return float(verify(list(parsed_gold), parsed_answer, timeout_seconds=_limit()))
    except (Exception, TimeoutException) as error:  # an answer that breaks the parser is wrong, not unscorable
        logger.warning("Counted as wrong, since math-verify failed with %r: %.100s", error, answer)
        return 0.0


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    try:
        return tuple(parse(rf"\boxed{{{gold}}}", _LATEX, extraction_mode="first_match", parsing_timeout=_limit()))
    except (Exception, TimeoutException) as error:
        logger.warning("Unscorable, since math-verify could not parse the solution (%r): %.100s", error, gold)
        return ()


def _plain_number(text: str) -> Fraction | None:
    """Exact value of an integer or a decimal such as `-1,234.50`, or `None`."""
    digits = text.replace(",", "").removeprefix("-")
    if not digits.isascii() or not digits.replace(".", "", 1).isdigit():
        return None
    return Fraction(text.replace(",", ""))


def _limit() -> int | None:
    """math-verify's alarms work on the main thread only; elsewhere they must be off."""
    return _TIME_LIMIT if threading.current_thread() is threading.main_thread() else None
