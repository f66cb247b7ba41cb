"""Leaves the settings of a run where its report finds them, readable without unpickling `training_args.bin`."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..runs.tracking import versions
from .run_files import SETTINGS


class RunSettings(TrainerCallback):
    """
    Writes `training_args.json` to the output directory when training begins. Tokens, such as `hub_token`, are left out.

    Args:
        **run (`Any`):
            What the arguments do not have, such as the model's name.
    """

    def __init__(self, **run: Any) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        settings = {name: value for name, value in args.to_dict().items() if not name.endswith("_token")}
        packages = versions("opo-trl", "trl", "transformers", "torch")
        content = {**self.run, "versions": packages, "args": settings}
        path = Path(args.output_dir, SETTINGS)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, default=str) + "\n")
