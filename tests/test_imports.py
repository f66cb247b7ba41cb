"""What an import costs, and what it may depend on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import opo_trl

PACKAGE = Path(opo_trl.__file__).parent

# Within the rewards: text, then what a worker process runs, what starts the workers, and what a trainer calls.
ALLOWED_IN_REWARDS = {
    "__init__": {"boxed_format", "math_verify"},
    "text": set(),
    "boxed_format": {"text"},
    "latex": set(),
    "quantities": set(),
    "structure": set(),
    "grading": {"quantities", "structure"},
    "worker": {"grading"},
    "worker_pool": {"worker"},
    "judge": {"latex", "quantities", "worker", "worker_pool"},
    "restating": {"latex", "text"},
    "math_verify": {"judge", "restating", "text", "worker_pool"},
}


def loaded_after(statement):
    code = f"import sys; {statement}; print([m for m in ('torch', 'transformers', 'trl', 'sympy') if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_package_costs_nothing_to_import():
    assert loaded_after("import opo_trl; opo_trl.__version__") == "[]"


def test_the_algorithm_costs_torch_alone():
    assert "trl" not in loaded_after("import opo_trl.baselines, opo_trl.algorithm.metrics")


def test_the_rewards_cost_nothing_to_import_and_start_nothing():
    code = (
        "import opo_trl.rewards, sys, threading, multiprocessing\n"
        "heavy = {'torch', 'transformers', 'trl', 'sympy', 'math_verify', 'pebble', 'loky', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert threading.active_count() == 1\n"
        "assert not multiprocessing.active_children()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_worker_loads_the_mathematics_alone():
    assert loaded_after("import opo_trl.rewards.worker, opo_trl.rewards.grading") == "['sympy']"


def test_public_names_are_sorted_and_resolve():
    assert opo_trl.__all__ == sorted(opo_trl.__all__)
    for name in opo_trl.__all__:
        assert getattr(opo_trl, name).__name__ == name
        assert name in dir(opo_trl)
    with pytest.raises(AttributeError, match="no attribute 'GRPOTrainer'"):
        opo_trl.GRPOTrainer  # noqa: B018


def test_imports_within_the_rewards_point_one_way():
    files = {path.stem: path for path in (PACKAGE / "rewards").glob("*.py")}
    assert set(files) == set(ALLOWED_IN_REWARDS)
    for name, path in files.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        siblings = [
            [node.module] if node.module else [alias.name for alias in node.names] for node in nodes if node.level == 1
        ]
        assert {sibling for group in siblings for sibling in group} <= ALLOWED_IN_REWARDS[name], path
