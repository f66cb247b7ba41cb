"""Which checkpoints are complete: a marker, written last, lists the files of each."""

import json
import os
import re
from pathlib import Path

MARKER = "opo_checkpoint.json"
TRAINER_STATE = "trainer_state.json"  # without it transformers cannot resume
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


def requested_checkpoint(request: str | bool | None, output_dir: Path) -> tuple[Path | None, dict[str, str]]:
    """
    Find the checkpoint that `resume_from_checkpoint` asks for, and refuse one that is missing or incomplete.

    Args:
        request (`str` or `bool`, *optional*):
            `"auto"` takes the latest complete checkpoint if there is one; `True` or `"true"` requires one; any other
            string is the path of a checkpoint; `None`, `False` or `"false"` asks for none. Case does not matter.
        output_dir (`Path`):
            Directory with `checkpoint-N` folders.

    Returns:
        `tuple[Path | None, dict[str, str]]`: The checkpoint, `None` for a start from the beginning; and the later ones
        that were skipped, each with the reason.

    Raises:
        ValueError: If `True` finds no complete checkpoint, or the one named does not exist or is incomplete.
    """
    word = str(request).lower()
    if request is None or word == "false":
        return None, {}
    if word in ("auto", "true"):
        checkpoint, skipped = latest_complete(output_dir)
        if checkpoint is None and word == "true":
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
            raise ValueError(
                f"resume_from_checkpoint={request} requires a complete checkpoint in {str(output_dir)!r}, got none"
                f"{f' ({reasons})' if reasons else ''}. Use 'auto' to start from the beginning where there is none, or "
                "name a checkpoint."
            )
        return checkpoint, skipped
    checkpoint = Path(str(request))
    reason = _why_not_resumable(checkpoint)
    if reason is not None:
        raise ValueError(
            f"resume_from_checkpoint requires a complete checkpoint, got {str(request)!r}: {reason}. Name a complete "
            "`checkpoint-N` directory, or use 'auto' for the latest one in output_dir."
        )
    return checkpoint, {}


def _why_not_resumable(checkpoint: Path) -> str | None:
    """Why training cannot be resumed from a directory, which may be a checkpoint of another trainer, without marker."""
    if not checkpoint.is_dir():
        return "there is no such directory"
    if (checkpoint / MARKER).exists():
        return incomplete_reason(checkpoint)
    return None if (checkpoint / TRAINER_STATE).is_file() else f"it holds no {TRAINER_STATE}"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
