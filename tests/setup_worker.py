"""One of two ranks that set up `train_math.py` while the other fails, disagrees, and finally makes the same mistake.

    torchrun --standalone --nproc_per_node 2 tests/setup_worker.py DIRECTORY ARGUMENT...

`tests/engine_worker.py` calls all of it but the last mistake, which ends the process.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from accelerate import PartialState

from opo_trl.scripts import train_math
from opo_trl.scripts.resuming import find_checkpoint
from opo_trl.scripts.setup_phase import SetupPhase


def result_of(function, *args):
    try:
        return function(*args)
    except ValueError as error:
        return str(error)


def find(request, output_dir):
    return find_checkpoint(SimpleNamespace(resume_from_checkpoint=request, output_dir=output_dir), PartialState())


def missing(*args):
    raise FileNotFoundError("problems.jsonl is not on this machine")


def set_up(directory, arguments):
    """Leave what each attempt of this rank came to."""
    rank = os.environ["RANK"]
    first, second = ("run", "elsewhere") if rank == "0" else ("elsewhere", "run")
    with mock.patch.object(train_math, "load_datasets", missing if rank == "1" else train_math.load_datasets):
        results = [
            result_of(train_math.main, arguments),
            result_of(find, "auto", directory / first),
            result_of(find, "true", directory / second),
        ]
    (directory / f"results.{rank}").write_text(json.dumps(results))


def main():
    directory, arguments = Path(sys.argv[1]), sys.argv[2:]
    set_up(directory, arguments)
    with SetupPhase() as setup:
        train_math.main([*arguments, "--learning_rat", "1"], setup)


if __name__ == "__main__":
    main()
