"""
Measure a policy on math problems. Without arguments: the quickstart's policy before and after training.

    accelerate launch --quiet examples/evaluate_math.py

It is part of the package, so `accelerate launch --quiet -m opo_trl.scripts.evaluate_math` does the same without a
checkout; its source, `src/opo_trl/scripts/evaluate_math.py`, has the commands for real models.
"""

from opo_trl.scripts.evaluate_math import run

if __name__ == "__main__":
    run()
