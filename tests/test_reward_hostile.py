"""Nothing that a policy writes, or that a dataset holds, hangs, crashes, fills or controls the training process."""

import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hostile import HOSTILE, INJECTIONS
from opo_trl.rewards import get_math_verify_reward, math_verify_reward

LIMIT = 3.0  # seconds for one input, the killing of its process included


def survive(names):
    """Score each input alone, then a normal one; return what went wrong, by name."""
    math_verify_reward(["\\boxed{\\sqrt{4}}"], ["2"])  # starts the workers
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = {}
    for number, name in enumerate(names):
        completion, solution = HOSTILE[name]
        start = time.monotonic()
        rewards = math_verify_reward([completion], [solution])
        seconds = time.monotonic() - start
        if len(rewards) != 1 or rewards[0] not in (0.0, 1.0, None):
            problems[name] = f"returned {rewards}"
        if seconds > LIMIT:
            problems[name] = f"took {seconds:.1f} s"
        fresh = number + 2  # a pair that no cache has seen
        if math_verify_reward([f"\\boxed{{\\frac{{{2 * fresh}x}}{{2}}}}"] * 2, [f"{fresh}x", f"{fresh}x+1"]) != [
            1.0,
            0.0,
        ]:
            problems[name] = "the next verdicts were wrong"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    if grown > 200:
        problems["memory"] = f"grew by {grown:.0f} MB"
    return problems


def in_a_thread(function, *args):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.slow
def test_all_hostile_inputs():
    assert len(HOSTILE) >= 60
    assert survive(list(HOSTILE)) == {}


@pytest.mark.slow
def test_all_hostile_inputs_off_the_main_thread():
    math_verify_reward.__globals__["_judge"].cache_clear()  # nothing is remembered from the main thread
    assert in_a_thread(survive, list(HOSTILE)) == {}


@pytest.mark.slow
def test_a_flood_ends_with_the_batch():
    """A batch full of towers takes as long as its limit, not two seconds for each; the rest is ungraded, not wrong."""
    reward = get_math_verify_reward(workers=1, batch_limit=5.0, name="flood")
    reward(completions=["\\boxed{\\sqrt{4}}"], solution=["2"])
    verdicts = {}
    start = time.monotonic()
    rewards = reward(
        completions=["\\boxed{7}", *(f"\\boxed{{9^{{9^{{9^{{{n}}}}}}}}}" for n in range(9, 29))],
        solution=["7"] * 21,
        log_extra=verdicts.__setitem__,
    )
    assert time.monotonic() - start < 10.0
    assert rewards[:2] == [1.0, 0.0]
    assert verdicts["flood/verdict"][-1] == "not graded"
    assert rewards[-1] is None
    assert reward(completions=["\\boxed{\\sqrt{9}}"], solution=["3"]) == [1.0], "the next batch is graded again"


# Grades in this process what a worker would grade, with everything that an attack would need under audit.
AUDITED = """
import sys, json, re
from opo_trl.rewards import judge, grading
answers = json.loads(sys.stdin.read())
def grade(answer):
    for solution in ("13", "2x+\\\\sqrt{3}", "\\\\text{yes}", answer + "+0"):
        pair = judge._quick(solution, answer)
        if not isinstance(pair, str):
            try:
                grading.equal(*pair)
            except Exception:
                pass
for answer in ("x", "\\\\sqrt{2}", "(1,2)", "x=2", "f(x)", "[1,2)\\\\cup(3,4)", "\\\\frac{x}{2}", "1+i", "a*b", "2^x"):
    grade(answer)  # whatever is imported on first use
# sympy makes a number of a string of digits by evaluating a call, and generates code for polynomials of n variables.
HARMLESS = re.compile(
    r"from sympy import \\*|(?:Integer|Float) ?\\('?[0-9.]+'? ?\\)|"
    r"def monomial_[a-z]+\\([ABk, ]+\\):\\n(?:[ABabrk0-9()=+*<>:;, \\n-]|if|else|return|None)*"
)
def watch(event, args):
    if event == "compile" and HARMLESS.fullmatch(args[0].decode() if isinstance(args[0], bytes) else str(args[0])):
        return
    if event == "exec" and args[0].co_filename == "<string>":
        return  # its source was compiled before
    if event.startswith(FORBIDDEN):
        seen.append((event, str(args)[:300]))
seen = []
FORBIDDEN = ("exec", "compile", "open", "import", "os.", "subprocess", "socket", "shutil", "ctypes", "pty", "urllib")
sys.addaudithook(watch)
for answer in answers:
    before = len(seen)
    grade(answer)
    for event in seen[before:]:
        print(answer, "->", event)
assert not seen, seen[:5]
open("/dev/null")
eval("1+1")
assert len(seen) == 2, "the hook sees what it should"
"""


def test_answers_are_never_run(tmp_path):
    target = tmp_path / "touched"
    answers = [injection.replace("{path}", str(target)) for injection in INJECTIONS]
    run = subprocess.run(
        [sys.executable, "-c", AUDITED], input=json.dumps(answers), capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    rewards = math_verify_reward([f"\\boxed{{{answer}}}" for answer in answers], ["13"] * len(answers))
    assert set(rewards) <= {0.0}
    assert not target.exists()
    assert not Path("touched").exists()
