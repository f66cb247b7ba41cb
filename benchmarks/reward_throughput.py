"""
Time and verdicts of math rewards on the same completions: ours, TRL's, and math-verify as in its README.

    python benchmarks/reward_throughput.py            # prints a table and writes a file to benchmarks/results
    python benchmarks/reward_throughput.py --json     # the same, with one JSON object as the last line

A batch is 256 problems with 8 completions each, with a page of reasoning before every answer. Half of the problems are
from GSM8K's test file and half from MATH's, if a folder `shared/data` is next to the checkout; otherwise problems of
the same kinds are generated. Half of the answers are the solution as in the file, one in ten is the solution in another
notation, one in twenty is missing, and the rest are solutions of other problems of the same file. So each verdict is
known, and every reward is compared with it.

Solutions are given as they are in the files, and boxed as well: math-verify reads LaTeX only in a box or between dollar
signs.

In each round all rewards run on the same new batch, one after another; times are medians. Ours is measured with its
worker processes started and its cache empty. The broken batch has 300 comparisons that include six tasks that no signal
handler can interrupt, an allocation of 8 GB, a SIGSEGV and a SIGKILL.
"""

import argparse
import json
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the tasks that break their process

from math_verify import parse, verify
from trl.rewards import accuracy_reward

from measuring import RESULTS, provenance
from opo_trl.rewards import math_verify_reward
from opo_trl.rewards.math_verify import _judge
from opo_trl.rewards.worker_pool import CRASHED, KILLED, WorkerPool, default_workers
from pool_tasks import mixed_batch

DATA = ROOT.parent / "shared" / "data"
NUM_PROBLEMS, GROUP_SIZE = 256, 8
REASONING = "We set up an equation, simplify both sides and check that $2x + 3 = 7$ has the solution $x = 2$. " * 15


def real_solutions(name: str, draw: random.Random) -> list[str]:
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    return draw.sample([row["answer"].rsplit("####", 1)[-1].strip() for row in rows], NUM_PROBLEMS // 2)


def generated_solutions(draw: random.Random) -> list[str]:
    """Three in four are numbers; the rest are fractions, radicals, expressions, points and intervals."""
    forms = [r"\frac{%d}{%d}", r"%d\sqrt{%d}", "%dx^2+%d", "(%d,%d)", "[%d,%d)", r"\frac{%d\pi}{%d}"]
    numbers = [str(draw.randrange(2_000)) for _ in range(NUM_PROBLEMS * 3 // 4)]
    return numbers + [
        draw.choice(forms) % (draw.randrange(2, 40), draw.randrange(41, 90)) for _ in range(NUM_PROBLEMS // 4)
    ]


def other_notation(answer: str, draw: random.Random) -> str:
    """The same answer in another notation that models use."""
    if re.fullmatch(r"-?\d+", answer):
        return draw.choice([f"{answer}.0", f"x = {answer}", f"{answer}.", f"{answer}\\text{{ units}}"])
    return draw.choice(
        [answer.replace(r"\frac", r"\dfrac"), f"x = {answer}", f"\\displaystyle {answer}", f" {answer} "]
    )


def make_batch(seed: int) -> tuple[list[str], list[str], list[float]]:
    """Completions, solutions, and the correct rewards."""
    draw = random.Random(seed)
    if DATA.is_dir():
        files = [real_solutions("gsm8k_test", draw), real_solutions("math_test", draw)]
    else:
        files = [generated_solutions(draw)]
    completions, solutions, labels = [], [], []
    for golds in files:
        for gold in golds:
            others = [other for other in draw.sample(golds, 12) if plain(other) != plain(gold)][:3]
            for _ in range(GROUP_SIZE):
                dice = draw.random()
                answer = gold if dice < 0.5 else other_notation(gold, draw) if dice < 0.6 else draw.choice(others)
                boxed = f"The answer is $\\boxed{{{answer}}}$." if dice < 0.95 else "So it follows."
                completions.append(f"<think>\n{REASONING}\n</think>\n{REASONING}\n{boxed}")
                solutions.append(gold)
                labels.append(float(dice < 0.6))
    return completions, solutions, labels


def plain(answer: str) -> str:
    """Crude on purpose: pairs that differ only in units, signs or spaces are not used as different answers."""
    return re.sub(r"\\text\{[^{}]*\}|\\mbox\{[^{}]*\}|\^\\circ|\\[dt]?frac|[^\w]|\.0*$", "", answer)


def ours(completions: list[str], solutions: list[str]) -> list[float | None]:
    return math_verify_reward(completions, solutions)


def trl(completions: list[str], solutions: list[str]) -> list[float | None]:
    return accuracy_reward([[{"role": "assistant", "content": text}] for text in completions], solutions)


def plain_math_verify(completions: list[str], solutions: list[str]) -> list[float | None]:
    return [float(verify(parse(gold), parse(text))) for text, gold in zip(completions, solutions, strict=True)]


def boxed(solutions: list[str]) -> list[str]:
    return [f"\\boxed{{{solution}}}" for solution in solutions]


REWARDS = {
    "math_verify_reward": ours,
    "TRL accuracy_reward": trl,
    "TRL accuracy_reward, boxed solutions": lambda completions, solutions: trl(completions, boxed(solutions)),
    "verify(parse, parse)": plain_math_verify,
    "verify(parse, parse), boxed solutions": lambda completions, solutions: plain_math_verify(
        completions, boxed(solutions)
    ),
}


def clear_cache() -> None:
    """Clear the cached verdicts, but keep the workers."""
    judge = _judge(*math_verify_reward.__globals__["_default"].limits)
    judge._verdicts.clear()
    judge._usable.clear()


def compare(rounds: int) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in REWARDS}
    mistakes: dict[str, Counter[str]] = {name: Counter() for name in REWARDS}
    for round_number in range(rounds):
        completions, solutions, labels = make_batch(round_number)
        for name, reward in REWARDS.items():
            clear_cache()
            start = time.perf_counter()
            verdicts = reward(completions, solutions)
            seconds[name].append(time.perf_counter() - start)
            for verdict, label in zip(verdicts, labels, strict=True):
                if verdict != label:
                    kind = "unscored" if verdict is None else "false positives" if verdict else "false negatives"
                    mistakes[name][kind] += 1
    total = rounds * NUM_PROBLEMS * GROUP_SIZE
    return [
        {
            "reward": name,
            "seconds": statistics.median(seconds[name]),
            "range": [min(seconds[name]), max(seconds[name])],
            **{kind: mistakes[name][kind] / total for kind in ("false positives", "false negatives", "unscored")},
        }
        for name in REWARDS
    ]


def copied_formulas() -> dict[str, float]:
    """Share of MATH's first 1,500 test problems for which a formula of the problem, boxed unchanged, gets a reward."""
    rows = [json.loads(line) for line in (DATA / "math_test.jsonl").read_text().splitlines()[:1_500]]
    pairs = [
        (row, formula)
        for row in rows
        for formula in re.findall(r"\$([^$]{1,80})\$", row["problem"])
        if formula.replace(" ", "") != row["answer"].replace(" ", "")
    ]
    completions = [f"\\boxed{{{formula}}}" for _, formula in pairs]
    solutions = [row["answer"] for row, _ in pairs]
    rewards = {
        "math_verify_reward": math_verify_reward(completions, solutions, prompts=[row["problem"] for row, _ in pairs]),
        "the same without prompts": math_verify_reward(completions, solutions),
        "TRL accuracy_reward": trl(completions, boxed(solutions)),
    }
    return {
        name: len({id(row) for (row, _), reward in zip(pairs, paid, strict=True) if reward}) / len(rows)
        for name, paid in rewards.items()
    }


def broken_batch() -> dict[str, Any]:
    pool = WorkerPool(default_workers(), time_limit=2.0, memory_limit=1024)
    pool.run(mixed_batch(20)[0][:1], time.monotonic() + 60)  # starts the workers
    tasks, expected = mixed_batch(300)
    start = time.perf_counter()
    outcomes = pool.run(tasks, time.monotonic() + 120)
    seconds = time.perf_counter() - start
    pool.stop()
    return {
        "seconds": seconds,
        "items": len(tasks),
        "killed": outcomes.count(KILLED),
        "crashed": outcomes.count(CRASHED),
        "other outcomes right": outcomes == expected,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="batches for each reward")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--output", type=Path, default=RESULTS / "reward_throughput.json", help="JSON file")
    args = parser.parse_args()

    math_verify_reward([r"\boxed{\sqrt{4}}"], ["2"])  # starts the workers
    results = compare(args.rounds)
    print("| reward | 2,048 completions | false positives | false negatives | unscored |\n|---|---|---|---|---|")
    for row in results:
        shares = [f"{row[kind]:.1%}" for kind in ("false positives", "false negatives", "unscored")]
        low, high = row["range"]
        print(f"| {row['reward']} | **{row['seconds']:.2f} s** ({low:.2f} to {high:.2f}) | {' | '.join(shares)} |")
    broken = broken_batch()
    print(f"\nBroken batch: {broken}")
    copied = copied_formulas() if DATA.is_dir() else {}
    print(f"\nReward for a copied formula of the problem, solutions boxed: {copied}")
    report = {
        **provenance("math-verify", "sympy", "pebble", "loky"),
        "solutions": "GSM8K and MATH" if DATA.is_dir() else "generated",
        "rewards": results,
        "broken batch": broken,
        "problems rewarded for a copied formula": copied,
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
