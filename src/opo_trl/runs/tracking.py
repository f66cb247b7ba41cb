"""Weights & Biases: a resumed run continues the run of its checkpoint, and each run's config has what it trains."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.integrations.integration_utils import WandbCallback

RUN_FILE = "wandb_run.json"  # in a checkpoint


class ResumedWandb(WandbCallback):
    """
    [`~transformers.integrations.WandbCallback`] that continues the run of the checkpoint that training resumes from.

    transformers 5.23 starts another run unless `WANDB_RUN_ID` is set (transformers#25032, closed without a change).
    Delete this when its callback keeps the run's name in the checkpoint.

    An active run or `WANDB_RUN_ID` takes precedence; `WANDB_RESUME=never` starts a new run.

    Args:
        description (`Callable`):
            Returns what the run's config has besides the training arguments; called when the run starts.
    """

    def __init__(self, description: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__()
        self.description = description
        self.resumed: dict[str, str] | None = None  # id, project and entity of the run to continue

    def resume_from(self, checkpoint: Path) -> None:
        """Continue the run of a checkpoint, where it has one."""
        path = checkpoint / RUN_FILE
        self.resumed = json.loads(path.read_text()) if path.is_file() else None

    def keep_run(self, checkpoint: Path) -> None:
        """Write which run a checkpoint belongs to."""
        import wandb

        run = wandb.run
        if run is not None:
            checkpoint.mkdir(parents=True, exist_ok=True)
            names = {"id": run.id, "project": run.project, "entity": run.entity}
            (checkpoint / RUN_FILE).write_text(json.dumps(names))

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Start the run, or continue the kept one, and add the description to its config."""
        import wandb

        if state.is_world_process_zero and self.resumed and wandb.run is None and not state.is_hyper_param_search:
            _continue(self.resumed, args.run_name)
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            wandb.config.update(dict(self.description()), allow_val_change=True)


def _continue(run: dict[str, str], name: str | None) -> None:
    import wandb

    resume: Any = os.getenv("WANDB_RESUME", "allow")
    if resume == "never" or os.getenv("WANDB_RUN_ID"):
        return
    wandb.init(
        id=run["id"],
        project=os.getenv("WANDB_PROJECT", run["project"]),
        entity=os.getenv("WANDB_ENTITY", run["entity"]) or None,
        name=name,
        resume=resume,
    )


def versions(*packages: str) -> dict[str, str]:
    """Return the version of each package that is installed; one imported from a checkout may not be."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
