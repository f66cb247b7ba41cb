"""
What a worker process runs: one comparison at a time, within limits that hold even if nobody is left to kill it.

Text in, a word out: sympy objects never leave the process, since printing or pickling one may evaluate it. Must import
neither torch nor transformers nor trl, or each worker would take seconds to start and hundreds of megabytes.
"""

import resource
import signal
from collections.abc import Callable
from types import FrameType
from typing import Literal

Outcome = Literal["equal", "different", "usable", "too slow", "too big"]


# One comparison of each kind, since sympy loads and tabulates much at first use.
_WARM_UP = [
    (r"\sin^2x+\cos^2x", "1"),
    ("(x+y)^2", "x^2+2xy+y^2"),
    (r"\frac{1}{\sqrt{x}}", r"\frac{\sqrt{x}}{x}"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
    ("y=2x+3", "2x-y+3=0"),
    (r"\mathbb{R}\setminus\{3\}", r"(-\infty,3)\cup(3,\infty)"),
    (r"\begin{pmatrix}1\\x\end{pmatrix}", r"\begin{pmatrix}\frac{2}{2}\\x\end{pmatrix}"),
]


class _TooSlow(BaseException):
    """Not an `Exception`: sympy and math-verify catch those and continue."""


def start(memory_limit: int) -> None:
    """
    Prepare a new worker; what it imports does not count against the first task.

    Args:
        memory_limit (`int`): Bytes of address space.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for Python code that no longer runs
    signal.signal(signal.SIGPROF, _raise_too_slow)
    _, highest = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit, highest))
    from . import grading

    for pair in _WARM_UP:
        grading.equal(*pair)


def compare(gold: str, answer: str, cpu_limit: float) -> Outcome:
    """
    Compare two normal forms.

    Args:
        gold, answer (`str`): Normal forms of the solution and of the answer.
        cpu_limit (`float`): Seconds of processor time.

    Returns:
        `str`: `"equal"`, `"different"`, or why that cannot be told: `"too slow"`, `"too big"`.
    """
    from .grading import equal

    return _limited(lambda: "equal" if equal(gold, answer) else "different", cpu_limit)


def probe(gold: str, cpu_limit: float) -> Outcome:
    """Say whether a solution can be compared within the limits: `"usable"`, `"too slow"` or `"too big"`."""
    from .grading import probe as evaluate

    def usable() -> Outcome:
        evaluate(gold)
        return "usable"

    return _limited(usable, cpu_limit)


def _limited(task: Callable[[], Outcome], cpu_limit: float) -> Outcome:
    """Run a task under a timer, which interrupts Python code, and a limit, by which the system kills any code."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, highest = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime + cpu_limit) + 2, highest))
    try:
        signal.setitimer(signal.ITIMER_PROF, cpu_limit)
        try:
            return task()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except _TooSlow:
        return "too slow"
    except (MemoryError, RecursionError, OverflowError):
        return "too big"
    except Exception:  # what sympy raises for nonsense: no proof that the two are equal
        return "different"


def _raise_too_slow(signum: int, frame: FrameType | None) -> None:
    raise _TooSlow
