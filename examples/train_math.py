"""
Train a causal language model on math problems with OPO. Without arguments, runs the quickstart on a CPU, in minutes.

    accelerate launch --quiet examples/train_math.py

The script is part of the package: `accelerate launch --quiet -m opo_trl.scripts.train_math` does the same
without a checkout. Its source, `src/opo_trl/scripts/train_math.py`, has the commands for larger models.
"""

from opo_trl.scripts.cli import run_script

if __name__ == "__main__":
    run_script("train")
