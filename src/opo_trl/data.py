"""From any math dataset to the columns that the trainer and the reward read: `prompt` and `solution`."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from trl import is_conversational

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."

# Columns that hold the problem and its answer in the datasets people train on, in order of preference: MATH has both a
# worked `solution` and a bare `answer`, and the reward wants the answer.
PROMPT_COLUMNS = ("problem", "question", "prompt")
SOLUTION_COLUMNS = ("answer", "solution")
_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_math_dataset(
    name_or_path: str,
    split: str = "train",
    *,
    config: str | None = None,
    prompt_column: str | None = None,
    solution_column: str | None = None,
    instruction: str | None = INSTRUCTION,
    system_prompt: str | None = None,
) -> Dataset:
    r"""
    Load math problems as message prompts with their final answers.

    Args:
        name_or_path (`str`):
            Name of a dataset on the Hub; a local `.json`, `.jsonl`, `.parquet` or `.csv` file; or a directory written
            by [`~datasets.Dataset.save_to_disk`].
        split (`str`, *optional*, defaults to `"train"`):
            Split to load. A local file has only `"train"`.
        config (`str`, *optional*):
            Configuration of a Hub dataset, such as `"main"` for GSM8K.
        prompt_column (`str`, *optional*):
            Column of the problem. `None` takes the first of `problem`, `question` and `prompt` that exists.
        solution_column (`str`, *optional*):
            Column of the answer. `None` takes the first of `answer` and `solution` that exists.
        instruction (`str`, *optional*):
            Line added to each problem. `None` or an empty string adds nothing.
        system_prompt (`str`, *optional*):
            System message put before each problem.

    Returns:
        [`~datasets.Dataset`] with `prompt` (a list of messages) and `solution` (a string: what follows `####` in
        GSM8K's answers, else the column as text), and no other column.

    Raises:
        ValueError: If a column is missing (with the columns found), the dataset is empty, or the file is of another
            format.
    """
    empty_file = Path(name_or_path).is_file() and Path(name_or_path).stat().st_size == 0
    dataset = None if empty_file else _load(name_or_path, split, config)
    if not dataset:
        raise ValueError(f"A dataset to train on needs at least one row; {name_or_path!r} has none in split {split!r}.")
    prompt_column = _find_column(dataset, name_or_path, "prompt_column", prompt_column, PROMPT_COLUMNS)
    solution_column = _find_column(dataset, name_or_path, "solution_column", solution_column, SOLUTION_COLUMNS)

    def to_messages(row: dict[str, Any]) -> dict[str, Any]:
        problem = row[prompt_column]
        if is_conversational({"prompt": problem}):
            messages = list(problem)
        else:
            messages = [{"role": "user", "content": f"{problem}\n{instruction}" if instruction else str(problem)}]
        if system_prompt:
            messages = [{"role": "system", "content": system_prompt}, *messages]
        return {"prompt": messages, "solution": final_answer(row[solution_column])}

    return dataset.map(to_messages, remove_columns=dataset.column_names, load_from_cache_file=False)


def final_answer(solution: Any) -> str:
    """Return what follows the last `####` of a GSM8K answer, and any other solution as text."""
    return str(solution).rsplit("####", 1)[-1].strip()


def hold_out(dataset: Dataset, size: int, seed: int) -> tuple[Dataset, Dataset]:
    """
    Split off `size` rows for evaluation, and drop from the rest every row whose prompt is among them.

    Raises:
        ValueError: If `size` leaves nothing to train on.
    """
    if not 0 < size < len(dataset):
        raise ValueError(
            f"The held-out part must leave rows to train on: it must be between 1 and {len(dataset) - 1}, got {size}."
        )
    parts = dataset.train_test_split(test_size=size, seed=seed)
    held_out = {str(prompt) for prompt in parts["test"]["prompt"]}
    return parts["train"].filter(lambda row: str(row["prompt"]) not in held_out), parts["test"]


def to_plain_text(dataset: Dataset) -> Dataset:
    """Turn message prompts into plain text, one message a line, for a base model without a chat template."""

    def join(row: dict[str, Any]) -> dict[str, str]:
        return {"prompt": "".join(f"{message['content']}\n" for message in row["prompt"])}

    return dataset.map(join, load_from_cache_file=False)


def _load(name_or_path: str, split: str, config: str | None) -> Dataset:
    path = Path(name_or_path)
    if path.is_file():
        if path.suffix not in _FILE_FORMATS:
            raise ValueError(f"A local dataset must be one of {sorted(_FILE_FORMATS)}, got {name_or_path!r}.")
        return load_dataset(_FILE_FORMATS[path.suffix], data_files=str(path), split=split)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(name_or_path)
        return saved[split] if isinstance(saved, DatasetDict) else saved
    return load_dataset(name_or_path, name=config, split=split)


def _find_column(dataset: Dataset, name_or_path: str, argument: str, column: str | None, known: tuple[str, ...]) -> str:
    candidates = known if column is None else (column,)
    for candidate in candidates:
        if candidate in dataset.column_names:
            return candidate
    raise ValueError(
        f"`{argument}` must name a column of {name_or_path!r}: looked for {list(candidates)}, found "
        f"{dataset.column_names}. Pass `{argument}`."
    )
