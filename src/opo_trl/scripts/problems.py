"""The problems that a command line names: any math dataset, or the generated arithmetic of the quickstart."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from ..data import load_math_dataset, to_plain_text
from .arithmetic import load_arithmetic

EMBEDDED_DATASET = "arithmetic"


def load_problems(
    name: str,
    split: str,
    *,
    config: str | None = None,
    prompt_column: str | None = None,
    solution_column: str | None = None,
    instruction: str | None = None,
    system_prompt: str | None = None,
    num_arithmetic: int = 512,
    keep_columns: Sequence[str] = (),
    require_columns: bool = True,
    require_solution: bool = True,
) -> Dataset:
    """Load a dataset's problems: columns `prompt`, `solution` and `id`, and those to keep that it has."""
    if name == EMBEDDED_DATASET:
        rows = load_arithmetic(split, num_arithmetic).remove_columns("steps")
        rows = rows.rename_columns({"problem": "prompt", "answer": "solution"})
        return rows.add_column("id", rows["prompt"][:])
    return load_math_dataset(
        name,
        split,
        config=config,
        prompt_column=prompt_column,
        solution_column=solution_column,
        instruction=instruction,
        system_prompt=system_prompt,
        keep_columns=keep_columns,
        require_columns=require_columns,
        require_solution=require_solution,
    )


def parse_dataset(specification: str, default_split: str = "test") -> tuple[str, str, str | None]:
    """
    Read `NAME`, `NAME:SPLIT` or `NAME:SPLIT:CONFIG` of an evaluation set.

    The split is `default_split` unless given; a local file has only `train`.
    """
    if Path(specification).exists():
        return specification, "train" if Path(specification).is_file() else default_split, None
    name, *rest = specification.split(":")
    if len(rest) > 2 or not all([name, *rest]):
        raise ValueError(f"A dataset must be given as NAME, NAME:SPLIT or NAME:SPLIT:CONFIG, got {specification!r}.")
    return name, rest[0] if rest else default_split, rest[1] if len(rest) == 2 else None


def fit_to_tokenizer(problems: Dataset, tokenizer: object) -> Dataset:
    """Turn messages into plain text for a base model without a chat template."""
    has_template = getattr(tokenizer, "chat_template", None)
    return problems if has_template or isinstance(problems[0]["prompt"], str) else to_plain_text(problems)
