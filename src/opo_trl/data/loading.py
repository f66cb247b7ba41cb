"""Loading math problems: any source, any columns, into `prompt`, `solution` and `id`."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from trl import is_conversational

from .layouts import (
    ID_COLUMNS,
    INSTRUCTION,
    OTHER_COLUMNS,
    PROMPT_COLUMNS,
    SOLUTION_COLUMNS,
    are_worked,
    final_answer,
    is_svamp,
    is_verl,
    svamp_problem,
    verl_answer,
    verl_problem,
)

_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

logger = logging.getLogger(__name__)


def load_math_dataset(
    name_or_path: str,
    split: str = "train",
    *,
    config: str | None = None,
    prompt_column: str | None = None,
    solution_column: str | None = None,
    instruction: str | None = INSTRUCTION,
    system_prompt: str | None = None,
    keep_columns: Sequence[str] = (),
    require_columns: bool = True,
    require_solution: bool = True,
) -> Dataset:
    r"""
    Load math problems as message prompts with their final answers.

    Knows the columns of GSM8K, MATH and MATH-500, AIME, AMC, SVAMP, DeepScaleR, Skywork-OR1-RL-Data, DAPO-Math-17k,
    OpenR1-Math, NuminaMath and Big-Math. Rows without a problem or an answer and all but the first of equal problems
    are dropped, their numbers logged.

    Args:
        name_or_path (`str`):
            Name of a dataset on the Hub; a local `.json`, `.jsonl`, `.parquet` or `.csv` file; or a directory written
            by [`~datasets.Dataset.save_to_disk`].
        split (`str`, *optional*, defaults to `"train"`):
            Split to load. A local file has only `"train"`; a saved [`~datasets.Dataset`] has no splits, and all of it
            is loaded.
        config (`str`, *optional*):
            Configuration of a Hub dataset, such as `"main"` for GSM8K.
        prompt_column (`str`, *optional*):
            Column of the problem. `None` takes the first of `problem`, `question` and `prompt` that exists.
        solution_column (`str`, *optional*):
            Column of the answer. `None` takes the first of `answer` and `solution` that exists.
        instruction (`str`, *optional*):
            Line added to each problem. `None` or an empty string adds nothing.
        system_prompt (`str`, *optional*):
            System message put before each problem; a prompt of messages must not begin with another one.
        keep_columns (`Sequence[str]`, *optional*, defaults to `()`):
            Further columns to keep as they are, such as `level`, where the dataset has them.
        require_columns (`bool`, *optional*, defaults to `True`):
            Whether the dataset must have `prompt_column` and `solution_column`. `False` takes the known columns in
            place of one that it does not have.
        require_solution (`bool`, *optional*, defaults to `True`):
            Whether each problem must have an answer. `False`, for rewards that need none, keeps problems without one,
            with `solution` `None`, and loads datasets without a column of answers.

    Returns:
        [`~datasets.Dataset`] with `prompt` (a list of messages), `solution` (a string: what follows `####`, or what the
        last box holds, or else the column as text) and `id` (a string: the dataset's own id where it has one that is
        unique, else the row's number), and no other column than those of `keep_columns`.

    Raises:
        ValueError: If a column is missing (with the columns found), an answer is a list or a dictionary, a saved
            dataset does not have the split, a prompt has a system message besides `system_prompt`, no problem with an
            answer is left, the file does not exist or is of another format, or `keep_columns` names a column that is
            written here.
    """
    if written := {"prompt", "solution", "id"}.intersection(keep_columns):
        raise ValueError(
            f"`keep_columns` must not name prompt, solution or id, which are written here, got {sorted(written)}. "
            "Rename the column in the dataset."
        )
    empty_file = Path(name_or_path).is_file() and Path(name_or_path).stat().st_size == 0
    dataset = None if empty_file else _load(name_or_path, split, config)
    if not dataset:
        raise ValueError(f"A dataset to train on needs at least one row; {name_or_path!r} has none in split {split!r}.")
    if not require_columns:
        prompt_column = prompt_column if prompt_column in dataset.column_names else None
        solution_column = solution_column if solution_column in dataset.column_names else None
    problem_of, answer_of = _readers(dataset, name_or_path, prompt_column, solution_column, require_solution)
    ids = _ids(dataset)
    kept = [column for column in keep_columns if column in dataset.column_names]
    # Neither problems nor answers are in the other columns, which may hold long generations.
    read = {*PROMPT_COLUMNS, *SOLUTION_COLUMNS, *OTHER_COLUMNS, prompt_column, solution_column, *kept}
    dataset = dataset.select_columns([column for column in dataset.column_names if column in read])
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    dropped = Counter[str]()
    for row_id, row in zip(ids, dataset, strict=True):
        problem, answer = problem_of(row), answer_of(row)
        several = isinstance(answer, list | dict)
        if several and (require_solution or solution_column is not None):
            raise ValueError(
                f"An answer must be a string or a number, {name_or_path!r} has {answer!r} for {problem!r}. Write the "
                "answer itself into a column, and pass it as `solution_column`."
            )
        solution = "" if several else final_answer(answer)
        text = " ".join(str(problem or "").split())
        if not text:
            dropped["without a problem"] += 1
            continue
        if require_solution and not solution:
            dropped["without an answer"] += 1
            continue
        if text in seen:
            dropped["a duplicate"] += 1
            continue
        seen.add(text)
        if is_conversational({"prompt": problem}):
            messages = list(problem)
        else:
            messages = [{"role": "user", "content": f"{problem}\n{instruction}" if instruction else str(problem)}]
        if system_prompt:
            if messages[0]["role"] == "system":
                raise ValueError(
                    f"`system_prompt` is put before each prompt, which must not begin with a system message; in "
                    f"{name_or_path!r} one does: {messages[0]['content']!r}. Leave `system_prompt` out, or remove the "
                    "message from the dataset."
                )
            messages = [{"role": "system", "content": system_prompt}, *messages]
        others = {name: row[name] for name in kept}
        rows.append({"prompt": messages, "solution": solution or None, "id": row_id, **others})
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not rows:
        raise ValueError(
            f"A dataset to train on needs at least one problem with an answer; {name_or_path!r} has {counts}. "
            "Pass `solution_column` if the answers are elsewhere."
        )
    if dropped:
        logger.warning("Dropped %d of %d rows of %s: %s.", dropped.total(), len(ids), name_or_path, counts)
    return Dataset.from_list(rows)


def hold_out(dataset: Dataset, size: int, seed: int) -> tuple[Dataset, Dataset]:
    """
    Split off `size` rows for evaluation, and drop from the rest every row whose prompt is among them.

    Args:
        dataset ([`~datasets.Dataset`]):
            Problems with a `prompt`.
        size (`int`):
            Number of rows to hold out.
        seed (`int`):
            Seed of the draw.

    Returns:
        `tuple[Dataset, Dataset]`: The problems to train on, and those held out.

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


def has_splits(name_or_path: str) -> bool:
    """Whether a dataset can have a split for evaluation: a local file and a saved `Dataset` cannot."""
    path = Path(name_or_path)
    return not (path.is_file() or (path / "dataset_info.json").is_file())


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
    if path.suffix in _FILE_FORMATS and not path.exists():
        raise ValueError(
            f"A local dataset must exist, got {name_or_path!r}. Correct the path; this directory is {Path.cwd()}."
        )
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(name_or_path)
        if not isinstance(saved, DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(
                f"The split must be one that {name_or_path!r} has, {sorted(saved)}, got {split!r}. Pass `split` "
                "(`--dataset_train_split` of `opo-trl train`, `NAME:SPLIT` for an evaluation set), or save the "
                "dataset with that split."
            )
        return saved[split]
    return load_dataset(name_or_path, name=config, split=split)


def _readers(
    dataset: Dataset,
    name_or_path: str,
    prompt_column: str | None,
    solution_column: str | None,
    require_solution: bool,
) -> tuple[Callable[[dict[str, Any]], Any], Callable[[dict[str, Any]], Any]]:
    """How to read the problem and the answer out of a row."""
    columns = dataset.column_names
    if prompt_column is None and solution_column is None:
        if is_svamp(columns):
            return svamp_problem, lambda row: row["Answer"]
        if is_verl(columns):
            return verl_problem, verl_answer
    prompt = _find_column(columns, name_or_path, "prompt_column", prompt_column, PROMPT_COLUMNS)
    if not require_solution and solution_column is None and not set(SOLUTION_COLUMNS).intersection(columns):
        return lambda row: row[prompt], lambda row: None
    solution = _find_column(columns, name_or_path, "solution_column", solution_column, SOLUTION_COLUMNS)
    worked = are_worked(dataset[solution])

    def answer_of(row: dict[str, Any]) -> Any:
        is_proof = row.get("question_type") == "proof" or (worked and "\\boxed" not in str(row[solution]))
        return None if is_proof else row[solution]

    return lambda row: row[prompt], answer_of


def _ids(dataset: Dataset) -> list[str]:
    """The dataset's own ids, if they are there and unique, else the numbers of the rows."""
    for column in ID_COLUMNS:
        if column in dataset.column_names:
            ids = dataset[column]
            break
    else:
        ids = [(info or {}).get("index") for info in dataset["extra_info"]] if _has_extra_info(dataset) else []
    if None not in ids and len(set(ids)) == len(dataset):
        return [str(value) for value in ids]
    return [str(number) for number in range(len(dataset))]


def _has_extra_info(dataset: Dataset) -> bool:
    return "extra_info" in dataset.column_names and isinstance(dataset[0]["extra_info"], dict)


def _find_column(
    columns: list[str], name_or_path: str, argument: str, column: str | None, known: tuple[str, ...]
) -> str:
    candidates = known if column is None else (column,)
    for candidate in candidates:
        if candidate in columns:
            return candidate
    raise ValueError(
        f"`{argument}` must name a column of {name_or_path!r}: looked for {list(candidates)}, found "
        f"{columns}. Pass `{argument}`."
    )
