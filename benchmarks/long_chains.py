r"""
Long chains: generated problems whose solutions vary in length by a factor of four and more.

A problem is a sum of 8 to 13 numbers in which every operation has a label, such as `17a+4b-2c+5=?`. A solution works
through the labels in order, in one of three styles, and may do so twice:

| style    | a step                                                             | tokens per step |
|----------|--------------------------------------------------------------------|-----------------|
| direct   | `a+4,21`                                                           | 4               |
| stepwise | `a17+4=21,`                                                        | 6               |
| checked  | `a17+4=21(21-4=17),` in 40 to 100 % of the steps, else as stepwise | 6 to 12         |

Solutions contain mistakes, so that a policy trained on them gives right and wrong answers of all lengths. A step is
wrong with the style's probability in `MISTAKES`, and the chain continues from the wrong number. A check finds a
mistake with probability `FOUND` and repeats the step (`a17+4=22(22-4=18)!a17+4=21(21-4=17),`); otherwise the check is
wrong too. A repeated pass starts after `|`, and its result is the answer. The separator of a step is drawn from `,`,
`;` and a space and carries no information: like the choice of words in a text, it makes tokens uncertain all along the
chain. Every number is one token, and so is every operation.

Every problem belongs to exactly one split, decided by a hash of its text.
"""

import random
import re
from typing import Any

from datasets import Dataset

from opo_trl.scripts.arithmetic import draw_distinct

LABELS = "abcdefghijklmnop"
FEWEST_OPERATIONS, MOST_OPERATIONS = 7, 12
LARGEST_OPERAND = 5
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
TOKENS = r"\\boxed\{|[+-]\d|\d+|."
LONGEST_SOLUTION = 400  # tokens, the end token included


def make_problem(
    rng: random.Random, fewest: int = FEWEST_OPERATIONS, most: int = MOST_OPERATIONS, first_label: int = 0
) -> dict[str, Any]:
    """Draw one problem: its text, its operations as signed numbers with their labels, and its answer."""
    start = total = rng.randint(SMALLEST_TOTAL, LARGEST_TOTAL)
    operations = []
    for _ in range(rng.randint(fewest, most)):
        operand = rng.randint(1, LARGEST_OPERAND)
        allowed = [signed for signed in (operand, -operand) if SMALLEST_TOTAL <= total + signed <= LARGEST_TOTAL]
        operations.append(rng.choice(allowed))
        total += operations[-1]
    labelled = list(zip(LABELS[first_label:], operations, strict=False))
    text = str(start) + "".join(f"{label}{signed:+d}" for label, signed in labelled)
    return {"problem": f"{text}=?", "start": start, "operations": labelled, "answer": str(total)}


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
    share = rng.uniform(*CHECKED_SHARE) if style == "checked" else 0.0
    while True:
        steps, totals = _pass(problem, rng, style, rate, share)
        if rng.random() < REPEATED:
            again, others = _pass(problem, rng, style, rate, share)
            steps, totals = f"{steps}|{again}", totals + others
        solution = f"{steps}{BOX}{totals[-1]}}}"
        in_range = min(totals) >= 0 and max(totals) <= LARGEST_NUMBER
        if in_range and count_tokens(solution) <= LONGEST_SOLUTION:
            return solution


def count_tokens(solution: str) -> int:
    """Tokens of a solution, the end token included: one per number, operation, start of the box, other character."""
    return len(re.findall(TOKENS, solution)) + 1


def _pass(
    problem: dict[str, Any], rng: random.Random, style: str, rate: float, checked: float
) -> tuple[str, list[int]]:
    """One pass through the operations: its text, and every number in it."""
    total, text, numbers = problem["start"], "", []
    for label, signed in problem["operations"]:
        result = _result(total + signed, rng, rate)
        separator = rng.choices(list(SEPARATORS), SEPARATORS.values())[0]
        if style == "direct":
            text += f"{label}{signed:+d}{separator}{result}"
        else:
            step, check = f"{label}{total}{signed:+d}=", ""
            if rng.random() < checked:
                if result != total + signed and rng.random() < FOUND:
                    check = f"({result}{-signed:+d}={result - signed})!{step}{total + signed}"
                    numbers.append(result - signed)
                check += f"({total + signed if check else result}{-signed:+d}={total})"
            text += f"{step}{result}{check}{separator}"
            if "!" in check:
                numbers.append(result)
                result = total + signed
        numbers.append(result)
        total = result
    return text, numbers


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

    def draw(rng: random.Random) -> tuple[str, dict[str, Any]]:
        problem = make_problem(rng)
        text, operations = problem["problem"], len(problem["operations"])
        return text, {"prompt": text, "solution": problem["answer"], "operations": operations, "id": text}

    return Dataset.from_list(draw_distinct(split, size, f"long-chains-{split}-{seed}", draw))
