"""Which checkpoints are whole: a marker, written last, that lists what belongs to one."""

import json
import os
import re
from pathlib import Path

MARKER = "opo_checkpoint.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def mark_whole(checkpoint: Path) -> None:
    """
    Declare a checkpoint whole: every file is on the disk, and the marker, which names them, comes after them.

    Args:
        checkpoint (`Path`):
            Directory in which all ranks have written everything.
    """
    files = {str(path.relative_to(checkpoint)): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    files.pop(MARKER, None)
    for path in files.values():
        _flush(path)
    written = checkpoint / f"{MARKER}.part"
    written.write_text(json.dumps({"files": {name: path.stat().st_size for name, path in files.items()}}, indent=1))
    _flush(written)
    written.replace(checkpoint / MARKER)  # at once: there is no half a marker
    _flush(checkpoint)


def unmark(checkpoint: Path) -> None:
    """Take the marker away before anything in a checkpoint is written anew."""
    (checkpoint / MARKER).unlink(missing_ok=True)


def what_is_missing(checkpoint: Path) -> str | None:
    """Return why a checkpoint is not whole, or `None` if it is."""
    try:
        files = json.loads((checkpoint / MARKER).read_text())["files"]
    except FileNotFoundError:
        return f"{MARKER} is missing: the save did not come to its end"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def newest_whole(output_dir: Path) -> tuple[Path | None, dict[str, str]]:
    """
    Find the whole checkpoint with the highest step.

    Args:
        output_dir (`Path`):
            Directory with `checkpoint-N` folders.

    Returns:
        `tuple[Path | None, dict[str, str]]`: The checkpoint, `None` if no one is whole; and the newer ones that were
        passed over, each with the reason.
    """
    numbered = {int(match[1]): path for path in output_dir.glob("*") if (match := _CHECKPOINT.fullmatch(path.name))}
    passed_over: dict[str, str] = {}
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        reason = what_is_missing(checkpoint)
        if reason is None:
            return checkpoint, passed_over
        passed_over[checkpoint.name] = reason
    return None, passed_over


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
