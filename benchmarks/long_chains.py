r"""
Long chains: generated problems whose solutions vary in length by a factor of four and more.

A problem is a sum of 9 to 17 numbers in which every operation has a label, such as `17a+8b-2c+5=?`. A solution works
through the labels in order, in one of three styles, and may do so twice:

| style    | a step                                                             | tokens per step |
|----------|--------------------------------------------------------------------|-----------------|
| direct   | `a25,`                                                             | 3               |
| stepwise | `a17+8=25,`                                                        | 7               |
| checked  | `a17+8=25(25-8=17),` in 40 to 100 % of the steps, else as stepwise | 7 to 14         |

Solutions contain mistakes, so that a policy trained on them gives right and wrong answers of all lengths. A step is
wrong with the style's probability in `MISTAKES`, and the chain continues from the wrong number. A check finds a
mistake with probability `FOUND` and repeats the step (`a17+8=26(26-8=18)!a17+8=25(25-8=17),`); otherwise the check is
wrong too. A repeated pass starts after `|`, without checks, and its result is the answer. The separator after a step is
drawn from `,`, `;` and a space and carries no information: like the choice of words in a text, it makes tokens
uncertain all along the chain. Every number is one token.

Every problem belongs to exactly one split, decided by a hash of its text.
"""

import random
import re
from typing import Any

from datasets import Dataset

from opo_trl.scripts.arithmetic import SPLIT_SHARES, split_of

LABELS = "abcdefghijklmnop"
FEWEST_OPERATIONS, MOST_OPERATIONS = 8, len(LABELS)
LARGEST_OPERAND = 9
SMALLEST_TOTAL, LARGEST_TOTAL = 5, 24  # of the right chain
LARGEST_NUMBER = 29  # of a chain with mistakes; its smallest is 0

BOX = "\\boxed{"
STYLES = {"direct": 0.3, "stepwise": 0.35, "checked": 0.35}  # shares of the solutions
MISTAKES = {"direct": 0.045, "stepwise": 0.04, "checked": 0.08}  # share of wrong steps
FOUND = 0.6
REPEATED = 0.25
CHECKED_SHARE = (0.4, 1.0)
SEPARATORS = {",": 0.6, ";": 0.25, " ": 0.15}
ERRORS = (-2, -1, 1, 2)
TOKENS = r"\\boxed\{|\d+|."
LONGEST_SOLUTION = 400  # tokens, the end token included


def make_problem(rng: random.Random) -> dict[str, Any]:
    """Draw one problem: its text, its operations as signed numbers, and its answer."""
    start = total = rng.randint(SMALLEST_TOTAL, LARGEST_TOTAL)
    operations = []
    for _ in range(rng.randint(FEWEST_OPERATIONS, MOST_OPERATIONS)):
        operand = rng.randint(1, LARGEST_OPERAND)
        allowed = [signed for signed in (operand, -operand) if SMALLEST_TOTAL <= total + signed <= LARGEST_TOTAL]
        operations.append(rng.choice(allowed))
        total += operations[-1]
    text = str(start) + "".join(f"{label}{signed:+d}" for label, signed in zip(LABELS, operations, strict=False))
    return {"problem": f"{text}=?", "start": start, "operations": operations, "answer": str(total)}


def write_solution(
    problem: dict[str, Any], rng: random.Random, style: str | None = None, *, mistakes: bool = True
) -> str:
    """
    Write one solution of a problem.

    Args:
        problem (`dict`):
            Row of [`make_problem`].
        rng (`random.Random`):
            Source of every random choice.
        style (`str`, *optional*):
            `"direct"`, `"stepwise"` or `"checked"`; drawn if not given.
        mistakes (`bool`, *optional*, defaults to `True`):
            Whether steps may be wrong. If not, the answer is right.

    Returns:
        `str`: A solution of at most `LONGEST_SOLUTION` tokens, with its answer in `\\boxed{}`.
    """
    style = style or rng.choices(list(STYLES), STYLES.values())[0]
    rate = MISTAKES[style] if mistakes else 0.0
    while True:
        share = rng.uniform(*CHECKED_SHARE) if style == "checked" else 0.0
        steps, answer = _pass(problem, rng, style, rate, share)
        if rng.random() < REPEATED:
            again, answer = _pass(problem, rng, style, rate, 0.0)
            steps += "|" + again
        solution = f"{steps}{BOX}{answer}}}"
        if in_range(solution):
            return solution


def count_tokens(solution: str) -> int:
    """Tokens of a solution, the end token included: one per number, one per other character, one for the box."""
    return len(re.findall(TOKENS, solution)) + 1


def in_range(solution: str) -> bool:
    """Whether a solution has no number below 0 or above `LARGEST_NUMBER`, and at most `LONGEST_SOLUTION` tokens."""
    largest = max(int(number) for number in re.findall(r"\d+", solution))
    negative = re.search(r"(?<!\d)-", solution)
    return largest <= LARGEST_NUMBER and not negative and count_tokens(solution) <= LONGEST_SOLUTION


def _pass(problem: dict[str, Any], rng: random.Random, style: str, rate: float, checked: float) -> tuple[str, int]:
    """One pass through the operations: its text, and the number it ends with."""
    total, text = problem["start"], ""
    for label, signed in zip(LABELS, problem["operations"], strict=False):
        result = _result(total + signed, rng, rate)
        if style == "direct":
            text += f"{label}{result}"
        else:
            step = f"{label}{total}{signed:+d}="
            text += f"{step}{result}"
            if rng.random() < checked:
                found = result != total + signed and rng.random() < FOUND
                if found:
                    text += f"({result}{-signed:+d}={result - signed})!"
                    result = total + signed
                    text += f"{step}{result}"
                text += f"({result}{-signed:+d}={total})"
        text += rng.choices(list(SEPARATORS), SEPARATORS.values())[0]
        total = result
    return text, total


def _result(right: int, rng: random.Random, rate: float) -> int:
    """The result of a step, wrong with probability `rate`."""
    return right + rng.choice(ERRORS) if rng.random() < rate else right


def load_long_chains(split: str, size: int, seed: int = 0) -> Dataset:
    """
    Generate `size` distinct problems of one split.

    Args:
        split (`str`):
            `"warm_start"`, `"train"` or `"test"`.
        size (`int`):
            Number of problems.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw. The split of a problem does not depend on it.

    Returns:
        [`~datasets.Dataset`] with the columns `prompt`, `solution` (the answer), `operations` (their number) and `id`.

    Raises:
        ValueError: If there is no such split.
    """
    if split not in SPLIT_SHARES:
        raise ValueError(f"split must be one of {sorted(SPLIT_SHARES)}, got {split!r}.")
    rng = random.Random(f"long-chains-{split}-{seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < size:
        problem = make_problem(rng)
        text = problem["problem"]
        if split_of(text) == split:
            rows[text] = {"prompt": text, "solution": problem["answer"], "operations": len(problem["operations"])}
    return Dataset.from_list([{**row, "id": text} for text, row in rows.items()])
