"""
Evaluate a policy on math problems. Without arguments, evaluates the quickstart's policy before and after training.

    accelerate launch --quiet examples/evaluate_math.py

The script is part of the package: `accelerate launch --quiet -m opo_trl.scripts.evaluate_math` does the same
without a checkout. Its source, `src/opo_trl/scripts/evaluate_math.py`, has the commands for larger models.
"""

from opo_trl.scripts.cli import run_script

if __name__ == "__main__":
    run_script("evaluate")
