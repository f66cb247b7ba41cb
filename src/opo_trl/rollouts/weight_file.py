"""Weights in a file that a trainer writes and vLLM's workers read: complete or absent, each with its own version."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class WeightFileError(RuntimeError):
    """A file is not the complete weights of the version that was asked for."""


def write_weights(directory: Path, version: str, named_params: Iterable[tuple[str, torch.Tensor]]) -> Path:
    """
    Write weights under a name that no file has had before, and under that name only once they are on the disk.

    Args:
        directory (`Path`):
            Existing directory.
        version (`str`):
            Version of the weights: the name of the file, and an entry of its header.
        named_params (`Iterable[tuple[str, torch.Tensor]]`):
            Each tensor is copied as it comes: an adapter is merged for as long as the iterator runs, in place.

    Returns:
        `Path`: The file.

    Raises:
        OSError: If it cannot be written; no part of it is left then.
    """
    weights = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named_params}
    path = directory / f"{version}.safetensors"
    part = directory / f"{version}.part"
    try:
        save_file(weights, part, metadata={"version": version})
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)  # atomic
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def read_weights(path: Path, version: str) -> dict[str, torch.Tensor]:
    """
    Read a file that [`write_weights`] has written.

    Args:
        path (`Path`):
            The file.
        version (`str`):
            Version that it must hold.

    Returns:
        `dict[str, torch.Tensor]`: The weights by name, on the CPU.

    Raises:
        WeightFileError: If the file is absent, incomplete or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            held = (file.metadata() or {}).get("version")
            if held != version:
                raise WeightFileError(f"{path} must hold the weights of version {version!r}, got {held!r}.")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise WeightFileError(f"{path} cannot be read as weights: {error}") from error


def unusable_directory(directory: Path) -> str | None:
    """Return why weights cannot be written into a directory, or `None` if they can."""
    if not directory.is_dir():
        return "it is not a directory"
    try:
        with tempfile.NamedTemporaryFile(dir=directory):
            return None
    except OSError as error:
        return str(error)
