"""The command `opo-trl report`: a run's files as one HTML page. Loads no trainer, and plotly only to write a report."""

import argparse
import os
import sys
from typing import Any

from ..report.page import FILE_NAME, MAX_COMPLETIONS, write_report
from ..report.run_files import HOW_TO_LOG_COMPLETIONS


def make_parser(**options: Any) -> argparse.ArgumentParser:
    """Make the parser of the command line; the options are those of `argparse.ArgumentParser`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, epilog=HOW_TO_LOG_COMPLETIONS.partition(". ")[2], **options)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of a run of OPOTrainer or GRPOTrainer")
    parser.add_argument("--output", metavar="FILE", help=f"file to write (default: {FILE_NAME} in RUN_DIR)")
    parser.add_argument(
        "--max_completions",
        type=int,
        default=MAX_COMPLETIONS,
        metavar="N",
        help=f"with more completions, take those of evenly spaced steps (default: {MAX_COMPLETIONS})",
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=(), metavar="STEP", help="take the completions of these steps instead"
    )
    return parser


def main(arguments: list[str], **options: str) -> int:
    """Write the report, and return the exit status."""
    parsed = make_parser(**options).parse_args(arguments)
    try:
        path = write_report(parsed.run_dir, parsed.output, max_completions=parsed.max_completions, steps=parsed.steps)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("OPO_DEBUG", "0") not in ("", "0"):
            raise
        print(f"error: {error}\nSet OPO_DEBUG=1 for the traceback.", file=sys.stderr)
        return 1
    print(f"report written to {path}")
    return 0


def report_at_end(output_dir: str) -> None:
    """Write the report of a run that has just ended, where the extra `report` is installed, and print where it is."""
    try:
        print(f"report written to {write_report(output_dir)}", flush=True)
    except (ImportError, OSError, ValueError) as error:  # a run is not lost for want of its report
        print(f"{FILE_NAME} not written: {error}", flush=True)
