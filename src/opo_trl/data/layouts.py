"""Where published datasets keep a problem, its answer and its id."""

import json
from collections.abc import Sequence
from typing import Any

from ..rewards.text import last_boxed

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."

# Columns of the problem and of the answer, in order of preference: MATH has both a worked `solution` and a bare
# `answer`, and the reward wants the answer.
PROMPT_COLUMNS = ("problem", "question", "prompt", "Problem", "Question")
SOLUTION_COLUMNS = ("answer", "Answer", "solution", "Solution")
ID_COLUMNS = ("unique_id", "id", "ID", "uuid", "problem_id", "idx")
OTHER_COLUMNS = ("Body", "reward_model", "question_type")

# Columns that divide problems into categories: MATH, MATH-500, SVAMP, NuminaMath, OpenR1-Math, Big-Math.
CATEGORY_COLUMNS = ("subject", "type", "Type", "problem_type", "level", "source")

# What NuminaMath and OpenR1-Math write where there is no answer to compare with.
_NO_ANSWER = {"", "proof", "notfound"}

# DAPO-Math-17k asks for its own answer format around each problem, which would contradict any other instruction.
_DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer:"
)
_DAPO_SUFFIX = 'Remember to put your answer on its own line after "Answer:".'


def is_svamp(columns: Sequence[str]) -> bool:
    """A problem in two parts: `Body` and `Question`."""
    return {"Body", "Question", "Answer"} <= set(columns)


def is_verl(columns: Sequence[str]) -> bool:
    """A prompt of messages with the answer in `reward_model.ground_truth`: DAPO-Math-17k, Skywork-OR1-RL-Data."""
    return {"prompt", "reward_model"} <= set(columns)


def svamp_problem(row: dict[str, Any]) -> str:
    """Body and question as one text."""
    body = row["Body"].strip()
    return f"{body if body.endswith(('.', '?', '!')) else body + '.'} {row['Question'].strip()}"


def verl_problem(row: dict[str, Any]) -> str:
    """The last user message, without DAPO's own instruction around it."""
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else [m["content"] for m in prompt if m["role"] == "user"][-1]
    if text.startswith(_DAPO_PREFIX):
        text = text.partition("\n")[2].strip().removesuffix(_DAPO_SUFFIX)
    return text.strip()


def verl_answer(row: dict[str, Any]) -> str | None:
    """The ground truth; Skywork's is a JSON list, and one with several entries has no single answer."""
    truth = (row["reward_model"] or {}).get("ground_truth")
    if isinstance(truth, str) and truth.startswith('["') and truth.endswith('"]'):
        answers = json.loads(truth)
        return answers[0] if len(answers) == 1 else None
    return truth


def final_answer(solution: Any) -> str:
    """
    Bare final answer in a solution: what follows the last `####` as in GSM8K, or the last box, or all of the text.

    Returns an empty string where there is none: a missing value, or a word such as "proof" that stands for none.
    """
    if solution is None or solution != solution:  # NaN is a number's missing value
        return ""
    text = str(solution).rsplit("####", 1)[-1].strip()
    boxed = last_boxed(text)
    text = text if boxed is None else boxed.strip()
    return "" if text.lower() in _NO_ANSWER else text


def are_worked(solutions: Sequence[Any]) -> bool:
    """Whether most solutions hold a box: then one without is a proof, say, and its text is not an answer."""
    return 2 * sum("\\boxed" in str(solution) for solution in solutions) > len(solutions)
