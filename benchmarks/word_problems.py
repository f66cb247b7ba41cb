r"""
Word problems for a small pre-trained language model: one operation on numbers from 2 to 9, after three worked examples.

    python benchmarks/word_problems.py    # writes outputs/word_problems/train.jsonl and test.jsonl, in a second

    Tom has 6 shells and gets 3 more. How many shells does Tom have?
    Maria had 12 books and lost 5. How many books are left?
    There are 4 boxes with 5 coins each. How many coins are there?

The examples show the form of an answer, `\boxed{}`, with one, five and three sentences before it: how much a completion
explains is left to the model. Every problem belongs to exactly one split, decided by a hash of its text.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from datasets import Dataset

from opo_trl.scripts.arithmetic import draw_distinct

ROOT = Path(__file__).resolve().parents[1]
SMALLEST, LARGEST = 2, 9  # operands
NAMES = ("Maria", "Ben", "Lucy", "Omar", "Nina", "Paul", "Sara", "Leo")
THINGS = ("apples", "books", "coins", "cards", "shells", "stamps", "cookies", "stickers")
LONGEST_COMPLETION = 128  # tokens
EXAMPLES = (
    ("Anna has 6 pencils and gets 3 more. How many pencils does Anna have?", r"6 + 3 = 9. The answer is \boxed{9}."),
    (
        "There are 4 bags with 5 oranges each. How many oranges are there?",
        "Each bag has 5 oranges. There are 4 bags. So we multiply the number of bags by the number of oranges in each "
        r"bag. 4 * 5 = 20. There are 20 oranges. The answer is \boxed{20}.",
    ),
    (
        "Tom had 12 marbles and lost 5. How many marbles are left?",
        r"Tom had 12 marbles. He lost 5 marbles, so we subtract. 12 - 5 = 7. The answer is \boxed{7}.",
    ),
)


def make_problem(rng: random.Random) -> tuple[str, int]:
    """Draw one problem: its text and its answer."""
    name, things, kind = rng.choice(NAMES), rng.choice(THINGS), rng.choice(("gain", "loss", "product"))
    a, b = rng.randint(SMALLEST, LARGEST), rng.randint(SMALLEST, LARGEST)
    if kind == "gain":
        return f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have?", a + b
    if kind == "loss":
        return f"{name} had {a + b} {things} and lost {b}. How many {things} are left?", a
    return f"There are {a} boxes with {b} {things} each. How many {things} are there?", a * b


def make_prompt(problem: str) -> list[dict[str, str]]:
    """The worked examples as turns of a conversation, then the problem."""
    turns = [turn for question, answer in EXAMPLES for turn in (("user", question), ("assistant", answer))]
    return [{"role": role, "content": content} for role, content in (*turns, ("user", problem))]


def load_word_problems(split: str, size: int, seed: int = 0) -> Dataset:
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
        [`~datasets.Dataset`] with the columns `prompt` (messages), `solution` (the answer) and `id`.

    Raises:
        ValueError: If there is no such split.
    """

    def draw(rng: random.Random) -> tuple[str, dict[str, Any]]:
        problem, answer = make_problem(rng)
        return problem, {"prompt": make_prompt(problem), "solution": str(answer), "id": problem}

    return Dataset.from_list(draw_distinct(split, size, f"word-problems-{split}-{seed}", draw))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "word_problems")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, size in (("train", 1000), ("test", 128)):
        load_word_problems(split, size).to_json(args.output_dir / f"{split}.jsonl")
    print(f"written to {args.output_dir}", flush=True)


if __name__ == "__main__":
    main()
