"""
Train a causal language model on math problems with OPO. Without arguments: the quickstart, on a CPU, in minutes.

    accelerate launch examples/train_math.py

The script is part of the package, so `accelerate launch -m opo_trl.scripts.train_math` does the same without a
checkout; its source, `src/opo_trl/scripts/train_math.py`, has the commands for real models.
"""

from opo_trl.scripts.train_math import main

if __name__ == "__main__":
    main()
