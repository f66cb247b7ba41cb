"""The tasks of `gradient_variance.py` and `opo_vs_grpo.py`: a policy to start from, and problems for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from long_chains import LONGEST_SOLUTION, load_long_chains
from opo_trl.scripts.policies import EMBEDDED_MODEL, model_path
from opo_trl.scripts.problems import load_problems
from word_problems import LONGEST_COMPLETION, load_word_problems

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = str(ROOT / "outputs" / "smollm2")  # written by make_smollm2.py


class Task(NamedTuple):
    """A policy, its problems, and how OPO trains it to the stages at which the variance is measured."""

    policy: str
    load: Callable[[str, int], Dataset]  # split, number of problems -> columns prompt, solution, id
    max_completion_length: int
    stages: dict[str, int]  # optimizer steps before each stage
    training: dict[str, Any]  # arguments of OPOConfig
    sampling_stages: tuple[int, ...] = ()  # of `StagedSampler` in training, before the limit


TASKS = {
    "arithmetic": Task(
        policy=model_path(EMBEDDED_MODEL),
        load=lambda split, size: load_problems("arithmetic", split, num_arithmetic=size),
        max_completion_length=40,
        stages={"fresh": 0, "half-trained": 150, "trained": 300},  # as in the quickstart
        training={"learning_rate": 1e-4, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 4},
    ),
    "long_chains": Task(
        policy=str(ROOT / "benchmarks" / "long_chains_policy"),
        load=load_long_chains,
        max_completion_length=LONGEST_SOLUTION,
        stages={"fresh": 0, "half-trained": 20, "trained": 100},
        training={"learning_rate": 3e-4, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 2},
        sampling_stages=(48, 96, 192),
    ),
    "smollm2": Task(
        policy=SMOLLM2,
        load=load_word_problems,
        max_completion_length=LONGEST_COMPLETION,
        stages={"pre-trained": 0},
        training={},
    ),
}
