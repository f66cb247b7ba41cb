"""From a solution and an answer to a verdict: here if text or exact numbers decide, else in a worker process, once."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from . import worker
from .latex import is_too_deep, normalize
from .quantities import same_number
from .worker_pool import CRASHED, KILLED, UNDONE, WorkerPool

Verdict = Literal[
    "right", "wrong", "restated", "no answer", "too long", "too slow", "crashed", "unusable solution", "not graded"
]  # fmt: skip
REWARDS: dict[str, float | None] = {
    "right": 1.0,
    "wrong": 0.0,
    "restated": 0.0,
    "no answer": 0.0,
    "too long": 0.0,
    "too slow": 0.0,  # None would let an answer that breaks the grader escape the penalty
    "crashed": 0.0,
    "unusable solution": None,
    "not graded": None,
}

LONGEST_ANSWER = 1_000  # characters; legitimate answers are far shorter
DEEPEST_ANSWER = 64  # brackets within brackets
LONGEST_TEXT = 6  # words; a solution of more is prose, which no answer could be compared with
_REMEMBERED = 10_000  # pairs of a solution and an answer

_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


@dataclass
class Judge:
    """
    Verdicts on answers, remembered.

    Args:
        pool ([`WorkerPool`]):
            Where the mathematics runs.
        cpu_limit (`float`):
            Seconds of processor time of a comparison.
        batch_limit (`float`):
            Seconds after which the rest of a batch is left ungraded.
    """

    pool: WorkerPool
    cpu_limit: float
    batch_limit: float
    _verdicts: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    _usable: dict[str, bool] = field(default_factory=dict)

    def verdicts(self, golds: Sequence[str], answers: Sequence[str | None]) -> tuple[list[Verdict], int]:
        """
        Return a verdict on each answer, and how many were found without a worker.

        Args:
            golds (`Sequence[str]`): Solutions as bare LaTeX, empty if there is none.
            answers (`Sequence[str]`): What each completion gives as its answer, `None` if nothing.
        """
        quick = [_quick(gold, answer) for gold, answer in zip(golds, answers, strict=True)]
        pairs = dict.fromkeys(pair for pair in quick if isinstance(pair, tuple))
        known = {pair: verdict for pair in pairs if (verdict := self._verdicts.get(pair))}
        known |= self._compare([pair for pair in pairs if pair not in known])
        found = [known[verdict] if isinstance(verdict, tuple) else verdict for verdict in quick]
        return found, sum(isinstance(verdict, str) for verdict in quick)

    def _compare(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Verdict]:
        deadline = time.monotonic() + self.batch_limit
        # Solutions alone first: a worker that is killed cannot say whose fault it was.
        golds = dict.fromkeys(gold for gold, _ in pairs)
        usable = {gold: known for gold in golds if (known := self._usable.get(gold)) is not None}
        new = [gold for gold in golds if gold not in usable]
        outcomes = self.pool.run([(worker.probe, (gold, self.cpu_limit)) for gold in new], deadline)
        usable |= {
            gold: outcome in ("usable", "different")
            for gold, outcome in zip(new, outcomes, strict=True)
            if outcome != UNDONE
        }
        # What ran into a limit is tried again another time: the machine may have been busy.
        _remember(self._usable, {gold: True for gold, outcome in usable.items() if outcome})

        possible = [pair for pair in pairs if usable.get(pair[0])]
        outcomes = self.pool.run([(worker.compare, (*pair, self.cpu_limit)) for pair in possible], deadline)
        verdicts: dict[tuple[str, str], Verdict] = {
            pair: "unusable solution" if pair[0] in usable else "not graded" for pair in pairs
        }
        verdicts |= {pair: _FROM_OUTCOME[outcome] for pair, outcome in zip(possible, outcomes, strict=True)}
        _remember(
            self._verdicts, {pair: verdict for pair, verdict in verdicts.items() if verdict in ("right", "wrong")}
        )
        return verdicts


_FROM_OUTCOME: dict[str, Verdict] = {
    "equal": "right",
    "different": "wrong",
    "too slow": "too slow",
    "too big": "crashed",
    KILLED: "too slow",
    CRASHED: "crashed",
    UNDONE: "not graded",
}


def _remember(cache: dict[Any, Any], found: dict[Any, Any]) -> None:
    if len(cache) > _REMEMBERED:
        cache.clear()  # unlike dropping the oldest, this is safe on any thread
    cache.update(found)


@lru_cache(maxsize=_REMEMBERED)
def _quick(gold: str, answer: str | None) -> Verdict | tuple[str, str]:
    """The verdict where text or exact numbers decide, else the pair of normal forms to compare."""
    if not gold or len(gold) > LONGEST_ANSWER or is_too_deep(gold, DEEPEST_ANSWER):
        return "unusable solution"
    gold_form = normalize(gold)
    if not gold_form:
        return "unusable solution"
    is_prose = len(_WORD.findall(gold_form)) > LONGEST_TEXT
    if answer is None or not answer.strip():
        return "unusable solution" if is_prose else "no answer"
    if len(answer) > LONGEST_ANSWER or is_too_deep(answer, DEEPEST_ANSWER):
        return "unusable solution" if is_prose else "too long"
    answer_form = normalize(answer)
    if answer_form == gold_form:
        return "right"
    if is_prose:
        return "unusable solution"
    if not answer_form:
        return "no answer"
    decided = same_number(gold_form, answer_form)
    if decided is None:
        return gold_form, answer_form
    return "right" if decided else "wrong"
