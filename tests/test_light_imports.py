"""An import loads what it needs: a package that one feature needs is imported by that feature."""

import subprocess
import sys

import pytest

from opo_trl.evaluation import self_bleu
from opo_trl.scripts import evaluate_math
from opo_trl.scripts.setup_phase import SetupPhase


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True)


# Most of the time goes into what TRL's configuration imports: one process imports it, and its fork checks the help.
TRAINER_AND_HELP = """
import os, sys
from trl import GRPOConfig
if not (child := os.fork()):
    try:
        from opo_trl.scripts.cli import main
        assert main(["train", "--max_steps", "3", "--help"]) == 0
        assert main(["evaluate", "-h"]) == 0
        unwanted = {"opo_trl.trainer", "trl.trainer.grpo_trainer", "opo_trl.evaluation"}
        assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the help of the commands"
from trl import GRPOTrainer
before = set(sys.modules)
import opo_trl.trainer
added = {module.split(".")[0] for module in set(sys.modules) - before} - sys.stdlib_module_names
assert added == {"opo_trl"}, added
unwanted = {"sacrebleu", "math_verify", "latex2sympy2_extended", "matplotlib", "pebble", "loky"}
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
"""


@pytest.mark.slow
def test_the_trainer_loads_no_package_that_trl_does_not_load_and_help_of_the_commands_no_trainer():
    """Not even sympy, math-verify or matplotlib; torch itself imports sympy, so what TRL loads is the reference."""
    run(TRAINER_AND_HELP)


def test_help_of_this_packages_arguments_loads_nothing_that_takes_seconds():
    run(
        "import sys\n"
        "from opo_trl.scripts import cli\n"
        "sys.argv = ['evaluate_math.py', '--help']\n"
        "cli.run_script('evaluate')\n"
        "assert '--baseline_weight' in cli.describe_own('train')\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'numpy', 'peft'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )


def test_the_evaluation_metrics_load_numpy_alone():
    run(
        "import sys\n"
        "sys.modules['sacrebleu'] = None  # as where it is not installed\n"
        "import opo_trl.evaluation.pass_at_k, opo_trl.evaluation\n"
        "unwanted = {'torch', 'transformers', 'trl', 'matplotlib', 'sympy'}\n"
        "assert not unwanted & set(sys.modules), unwanted & set(sys.modules)\n"
    )


def test_self_bleu_without_sacrebleu_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"sacrebleu.*`evaluate`: pip install sacrebleu"):
        self_bleu(["one text", "another text"])


@pytest.mark.parametrize("num_samples", [1, 2])
def test_evaluation_without_sacrebleu_is_refused_before_it_samples(tmp_path, monkeypatch, capsys, num_samples):
    """One completion per problem has no Self-BLEU, and is measured."""
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    arguments = ["--models", "tiny_policy", "--datasets", "arithmetic", "--num_problems", "4", "--max_new_tokens", "4",
                 "--backend", "transformers", "--output_dir", str(tmp_path / "out")]  # fmt: skip
    if num_samples == 1:
        assert evaluate_math.main([*arguments, "--num_samples", "1"])["models"]
        return
    with pytest.raises(SystemExit), SetupPhase() as setup:
        evaluate_math.main([*arguments, "--num_samples", "2"], setup)
    error = capsys.readouterr().err
    assert error.startswith("error: Self-BLEU needs the package sacrebleu")
    assert "pip install sacrebleu" in error
    assert not (tmp_path / "out").exists()
