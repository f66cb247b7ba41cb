"""The models that a command line names: the tiny policy of this repository, checkpoints, adapters, Hub models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from ..on_policy.preflight import check_model_directory

EMBEDDED_MODEL = "tiny_policy"


@dataclass(frozen=True)
class Checkpoint:
    """A model to measure: `base` is the model under an adapter, else the model itself."""

    label: str
    path: str
    base: str

    @property
    def is_adapter(self) -> bool:
        return self.base != self.path

    def fingerprint(self) -> Any:
        """What tells a model from one trained later into the same folder."""
        files = [file for file in sorted(Path(self.path).glob("*")) if file.suffix in (".safetensors", ".bin")]
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files] or self.path


def model_path(name: str) -> str:
    """Where a model is: for the tiny policy its directory, for any other name the name itself."""
    return str(Path(__file__).resolve().parent / EMBEDDED_MODEL) if name == EMBEDDED_MODEL else name


def find_checkpoints(model: str, last: int) -> list[Checkpoint]:
    """The checkpoints that a name on the command line stands for: itself, or the last ones of a training run."""
    label, path = short_name(model), Path(model_path(model))
    check_model_directory(model)
    if not path.is_dir():
        return [Checkpoint(label, model, _base_of(model))]
    steps = sorted(int(folder.name.split("-")[1]) for folder in path.glob("checkpoint-[0-9]*"))
    if last and steps:
        if len(steps) < last:
            raise ValueError(f"--last_checkpoints must be at most {len(steps)}, those in {model}, got {last}.")
        folders = {f"{label}-checkpoint-{step}": path / f"checkpoint-{step}" for step in steps[-last:]}
    elif (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        folders = {label: path}
    else:
        raise ValueError(
            f"A model directory must hold a model or an adapter, and {model} holds neither. It holds {len(steps)} "
            "checkpoints; --last_checkpoints N measures the last N."
        )
    return [Checkpoint(name, str(folder), _base_of(str(folder))) for name, folder in folders.items()]


def short_name(name: str) -> str:
    """A name that can be a folder's and a table's: the last two parts of a path."""
    parts = [part for part in Path(name).parts if part not in ("/", "..", "outputs")]
    return "-".join(parts[-2:]).replace(":", "-")


def has_file(model: str, name: str) -> bool:
    """Whether a directory, or a repository on the Hub, has a file; not if there is no such repository."""
    try:
        found = cached_file(
            model,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        return False
    return found is not None


def _base_of(model: str) -> str:
    """The model under an adapter, in a directory or on the Hub; or the model itself, if it is none."""
    is_adapter = not has_file(model, CONFIG_NAME) and has_file(model, ADAPTER_CONFIG_NAME)
    return str(PeftConfig.from_pretrained(model).base_model_name_or_path) if is_adapter else model
