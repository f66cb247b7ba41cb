"""Which checkpoints are complete: a marker, written last, lists the files of each."""

import json
import logging
import os
import re
from pathlib import Path

MARKER = "opo_checkpoint.json"
_STATE = "trainer_state.json"  # transformers writes it into every checkpoint
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

logger = logging.getLogger(__name__)


def mark_complete(checkpoint: Path) -> None:
    """
    Mark a checkpoint as complete: flush every file to the disk, then write the marker that lists them.

    Args:
        checkpoint (`Path`):
            Directory in which all ranks have written all their files.
    """
    files = {str(path.relative_to(checkpoint)): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    written = checkpoint / f"{MARKER}.part"
    for own in (MARKER, written.name):  # a save that was killed may have left one of them
        files.pop(own, None)
    for path in files.values():
        _flush(path)
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
    except ValueError:
        return f"{MARKER} cannot be read"
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


def warn_of_earlier_run(output_dir: Path) -> None:
    """Warn that a run which starts from scratch saves beside the checkpoints of another one."""
    checkpoint, _ = latest_complete(output_dir)
    if checkpoint is not None:
        logger.warning(
            "Training starts from scratch, and %s is of an earlier run. `resume_from_checkpoint='auto'` will take the "
            "checkpoint of the highest step, of whichever run it is. Use another output_dir for each run.",
            checkpoint,
        )


def checkpoint_to_resume(resume_from_checkpoint: str | Path | bool | None, output_dir: str | Path) -> Path | None:
    """
    Find the checkpoint that a run resumes from; needs neither the model nor a trainer. Call it in one process.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*):
            `"auto"` takes the latest complete checkpoint in `output_dir` if there is one, `True` or `"true"` requires
            one; `None`, `False` or `"false"` asks for none; anything else names a checkpoint, which may have been saved
            without a marker. Case does not matter.
        output_dir (`str`):
            Directory with `checkpoint-N` folders.

    Returns:
        `Path` or `None`: The checkpoint, `None` to start from scratch.

    Raises:
        ValueError: If the checkpoint does not exist or is incomplete, with what is missing.
    """
    word = str(resume_from_checkpoint or False).lower()
    if word == "false":
        return None
    if word not in ("true", "auto"):
        return _named_checkpoint(Path(str(resume_from_checkpoint)))
    checkpoint, skipped = latest_complete(Path(output_dir))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    where = f"{str(output_dir)!r}{f' ({reasons})' if reasons else ''}"
    if checkpoint is not None and reasons:
        logger.warning("Resuming from %s. Skipped as incomplete: %s", checkpoint, reasons)
    elif checkpoint is not None:
        logger.info("Resuming from %s.", checkpoint)
    elif word == "true":
        raise ValueError(
            f"resume_from_checkpoint=True needs a complete checkpoint in {where}, got none. Use "
            "resume_from_checkpoint='auto' to start from scratch where there is none, or name a checkpoint to resume "
            "from one without a marker."
        )
    else:
        logger.warning("No complete checkpoint in %s: training starts from scratch.", where)
    return checkpoint


def _named_checkpoint(checkpoint: Path) -> Path:
    """Refuse a checkpoint that lacks what its marker lists, as after half a download; it may have no marker."""
    if not checkpoint.is_dir():
        raise ValueError(
            f"resume_from_checkpoint must be a checkpoint's directory, got {str(checkpoint)!r}, which is not a "
            "directory. Use 'auto' to resume from the latest complete checkpoint in output_dir if there is one."
        )
    if (checkpoint / MARKER).exists():
        reason = incomplete_reason(checkpoint)
    else:
        reason = None if (checkpoint / _STATE).is_file() else f"{_STATE} is missing"
    if reason is not None:
        raise ValueError(
            f"resume_from_checkpoint needs a complete checkpoint, got {str(checkpoint)!r}: {reason}. Copy or download "
            "it again, or resume from another one."
        )
    return checkpoint


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
