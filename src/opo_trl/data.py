"""From any math dataset to the columns that the trainer and the reward read: `prompt` and `solution`."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
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
        ValueError: If a column is missing (with the columns found), the dataset is empty, or the file format is unknown.
    """
    dataset = _load(name_or_path, split, config)
    if len(dataset) == 0:
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


def check_prompt_dataset(dataset: Any, name: str, prompt_optional: bool = False, prompts_needed: int = 1) -> None:
    """
    Refuse a dataset on which training would fail late, or succeed without a single step.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset handed to the trainer. The length of an iterable one is unknown and is not checked.
        name (`str`):
            What the message calls it.
        prompt_optional (`bool`, *optional*, defaults to `False`):
            Whether an environment may supply the prompt.
        prompts_needed (`int`, *optional*, defaults to `1`):
            Prompts in one rollout batch: with fewer, TRL reports success after 0 steps.

    Raises:
        ValueError: If `prompt` is missing or there are too few rows.
    """
    columns = dataset.column_names if isinstance(dataset, Dataset | IterableDataset) else None
    if columns is not None and "prompt" not in columns and not prompt_optional:
        raise ValueError(
            f"`{name}` must have a column `prompt`, got the columns {columns}. Rename the problem's column, or load the "
            "dataset with opo_trl.data.load_math_dataset."
        )
    if isinstance(dataset, Dataset) and len(dataset) < prompts_needed:
        raise ValueError(
            f"`{name}` must have at least {prompts_needed} row(s), the prompts of one rollout batch, got {len(dataset)}. "
            "Add prompts, or lower per_device_train_batch_size or gradient_accumulation_steps, or raise num_generations."
        )


def check_tokenizer(dataset: Any, processing_class: Any) -> None:
    """
    Refuse a tokenizer that cannot render or pad the prompts of `dataset`.

    Raises:
        ValueError: If prompts are messages and there is no chat template, or there is neither a pad nor an eos token.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} must have a pad or an eos token, got neither. Set "
            "tokenizer.eos_token and pass the tokenizer as `processing_class`."
        )
    if isinstance(dataset, Dataset) and "prompt" in dataset.column_names and is_conversational(dataset[0]):
        if not processing_class.chat_template:
            raise ValueError(
                f"Prompts are messages, so the tokenizer must have a chat template; {tokenizer.name_or_path!r} has none. "
                "Set tokenizer.chat_template and pass the tokenizer as `processing_class`, or use plain-text prompts "
                "(opo_trl.data.to_plain_text)."
            )


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


def _find_column(
    dataset: Dataset, name_or_path: str, argument: str, column: str | None, known: tuple[str, ...]
) -> str:
    candidates = known if column is None else (column,)
    for candidate in candidates:
        if candidate in dataset.column_names:
            return candidate
    raise ValueError(
        f"`{argument}` must name a column of {name_or_path!r}: looked for {list(candidates)}, found "
        f"{dataset.column_names}. Pass `{argument}`."
    )
