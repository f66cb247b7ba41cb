"""Records on disk: JSON lines, appended as they come by one process each, merged at the end."""

import glob
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .records import Record


def read_records(path: str | Path) -> list[Record]:
    """
    Read a file of records, one JSON object a line.

    A last line without its end is what a killed run leaves of a record, and is no record.

    Raises:
        ValueError: If any other line is not JSON, naming it.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records: list[Record] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"Every line of {path} must be a JSON object; line {number} is not: {error}.") from error
    return records


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Append records and put them on disk, after cutting off what a killed run left of a last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        file.flush()
        os.fsync(file.fileno())


def part_path(path: Path, rank: int) -> Path:
    """File that process `rank` appends to on the way to `path`."""
    return path.with_name(f"{path.stem}.part-{rank}.jsonl")


def read_parts(path: Path) -> list[Record]:
    """Every record there is on the way to `path`, by however many processes."""
    return [record for part in ([path] if path.exists() else []) + _parts(path) for record in read_records(part)]


def merge_parts(path: Path, problems: Sequence[str]) -> list[Record]:
    """
    Write all records into `path`, in the order of `problems` and samples, each once, and remove the parts.

    The order depends neither on the number of processes nor on interruptions, so that equal runs leave equal files.
    """
    order = {problem: number for number, problem in enumerate(problems)}
    unique = {(order[record["problem"]], record["sample"]): record for record in read_parts(path)}
    records = [unique[key] for key in sorted(unique)]
    merged = path.with_suffix(".merged")
    merged.unlink(missing_ok=True)
    append_records(merged, records)
    merged.replace(path)
    for part in _parts(path):
        part.unlink()
    return records


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.part-*.jsonl"))
