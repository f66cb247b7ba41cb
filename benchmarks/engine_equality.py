"""
Difference between N optimizer steps under each engine and the same steps in one process: the table of docs/engines.md.

    make engines-table        # about 3 minutes on two cores; sets up DeepSpeed

Two CPU processes under plain data parallel, FSDP2, ZeRO-2 and ZeRO-3 train on the same scripted rollouts as one
process. Groups are split across ranks, and the rows with a non-zero advantage are distributed unevenly over the ranks.
Each cell is the norm of the difference between the trained weights, divided by the norm of the update of one process.
Writes results/engine_equality.json.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from engines import (
    CASES,
    ENGINES,
    EVERY_ENGINE,
    Outcome,
    loaded_difference,
    relative_difference,
    single_process,
    two_processes,
)
from measuring import RESULTS, provenance

NAMES = {"ddp": "data parallel", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
RESULT = RESULTS / "engine_equality.json"


def measure(engine: str, references: dict[str, Outcome], directory: Path) -> dict[str, float | str]:
    """Run all cases under one engine; returns the cells of its row."""
    outcomes = two_processes(engine, [*EVERY_ENGINE, "generating"], directory)
    ran = {outcome.engine for outcome in outcomes.values()}
    if ran != {ENGINES[engine]}:
        raise RuntimeError(f"{engine} must run {ENGINES[engine]}, but accelerate ran {ran}.")
    row: dict[str, float | str] = {
        "samples, trains, evaluates": "yes" if len(outcomes["generating"].logs) == 2 else "no"
    }
    row |= {case: relative_difference(outcomes[case], references[case], case) for case in EVERY_ENGINE}
    row["saved and loaded"] = max(loaded_difference(outcomes[case], case) for case in ("full", "LoRA", "DoRA"))
    return row


def markdown(rows: dict[str, dict[str, float | str]]) -> str:
    """The table, one row per engine."""
    columns = list(next(iter(rows.values())))
    lines = [f"| engine | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for engine, row in rows.items():
        cells = (value if isinstance(value, str) else f"{value:.0e}" if value else "0" for value in row.values())
        lines.append(f"| {NAMES[engine]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    rows: dict[str, dict[str, float | str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        references = {case: single_process(case, Path(directory, "one process", case)) for case in EVERY_ENGINE}
        for engine in ENGINES:
            print(f"{NAMES[engine]} ...", file=sys.stderr, flush=True)
            rows[engine] = measure(engine, references, Path(directory, engine))
    result = {
        **provenance("accelerate", "deepspeed", "peft"),
        "rows": rows,
        "steps": CASES["full"]["max_steps"],
        "processes": 2,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
