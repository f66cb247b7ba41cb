"""
A training run that resumes where it can, to be killed from outside or at a file of a save; see test_checkpoints.py.

    python tests/killed_run.py OUTPUT_DIR

PLAIN=1 takes TRL's trainer with reliable runs in place of OPOTrainer. With KILL_IN_SAVE=NAME:N it kills itself as it
opens the N-th file of that name in a checkpoint, or, for the marker, as it is about to put it into its place.
"""

import conftest  # noqa: F401  the environment of the tests, before anything else is imported

# isort: split
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import TrainerCallback

from opo_trl.runs.checkpoints import MARKER, latest_complete
from plain import plain_trainer
from test_resume import sampling_trainer
from tiny import tiny_model


class PrintSteps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", flush=True)


def kill_in_save(name: str, count: int) -> None:
    seen: Counter[str] = Counter()

    def watch(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename") or "checkpoint-" not in str(arguments[0]):
            return
        is_marker = event == "os.rename" and name == MARKER
        if is_marker or (event == "open" and Path(str(arguments[0])).name == name and "w" in str(arguments[1])):
            seen[name] += 1
            if seen[name] == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def main() -> None:
    output_dir = Path(sys.argv[1])
    if os.environ.get("KILL_IN_SAVE"):
        name, count = os.environ["KILL_IN_SAVE"].split(":")
        kill_in_save(name, int(count))
    make_trainer = plain_trainer if os.environ.get("PLAIN") else sampling_trainer
    trainer = make_trainer(output_dir, tiny_model(), num_steps=40)
    trainer.add_callback(PrintSteps())
    trainer.train(resume_from_checkpoint=latest_complete(output_dir)[0] is not None or None)
    torch.save(trainer.model.state_dict(), output_dir / "final.pt")


if __name__ == "__main__":
    main()
