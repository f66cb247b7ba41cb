"""One of two ranks that set up `train_math.py` while the other fails, disagrees, and finally makes the same mistake."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

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


def main():
    directory, arguments, rank = Path(sys.argv[1]), sys.argv[2:], os.environ["RANK"]
    if rank == "1":
        train_math.load_datasets = missing
    first, second = ("run", "elsewhere") if rank == "0" else ("elsewhere", "run")
    results = [
        result_of(train_math.main, arguments),
        result_of(find, "auto", directory / first),
        result_of(find, "true", directory / second),
    ]
    (directory / f"results.{rank}").write_text(json.dumps(results))
    with SetupPhase() as setup:
        train_math.main([*arguments, "--learning_rat", "1"], setup)


if __name__ == "__main__":
    main()
