"""Which checkpoints are complete: a marker, written last, lists the files of each."""

import json
import os
import re
from pathlib import Path

MARKER = "opo_checkpoint.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def mark_complete(checkpoint: Path) -> None:
    """
    Mark a checkpoint as complete: flush every file to the disk, then write the marker that lists them.

    Args:
        checkpoint (`Path`):
            Directory in which all ranks have written all their files.
    """
    files = {str(path.relative_to(checkpoint)): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    files.pop(MARKER, None)
    for path in files.values():
        _flush(path)
    written = checkpoint / f"{MARKER}.part"
    written.write_text(json.dumps({"files": {name: path.stat().st_size for name, path in files.items()}}, indent=1))
    _flush(written)
    written.replace(checkpoint / MARKER)  # atomic: a partial marker is never seen
    _flush(checkpoint)


def unmark(checkpoint: Path) -> None:
    """Remove the marker before anything in a checkpoint is written again."""
    (checkpoint / MARKER).unlink(missing_ok=True)


def incomplete_reason(checkpoint: Path) -> str | None:
    """Return why a checkpoint is incomplete, or `None` if it is complete."""
    try:
        files = json.loads((checkpoint / MARKER).read_text())["files"]
    except FileNotFoundError:
        return f"{MARKER} is missing: the save did not finish"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def latest_complete(output_dir: Path) -> tuple[Path | None, dict[str, str]]:
    """
    Find the complete checkpoint with the highest step.

    Args:
        output_dir (`Path`):
            Directory with `checkpoint-N` folders.

    Returns:
        `tuple[Path | None, dict[str, str]]`: The checkpoint, `None` if none is complete; and the later ones that were
        skipped, each with the reason.
    """
    numbered = {int(match[1]): path for path in output_dir.glob("*") if (match := _CHECKPOINT.fullmatch(path.name))}
    skipped: dict[str, str] = {}
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        reason = incomplete_reason(checkpoint)
        if reason is None:
            return checkpoint, skipped
        skipped[checkpoint.name] = reason
    return None, skipped


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
