"""An import loads what it needs: a package that one feature needs is imported by that feature."""

import subprocess
import sys

import pytest

from opo_trl.evaluation import self_bleu
from opo_trl.scripts import evaluate_math
from opo_trl.scripts.setup_phase import SetupPhase


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_trainer_loads_no_package_that_trl_does_not_load():
    """Not even sympy, math-verify or matplotlib; torch itself imports sympy, so what TRL loads is the reference."""
    run(
        "import sys\n"
        "from trl import GRPOConfig, GRPOTrainer\n"
        "before = set(sys.modules)\n"
        "import opo_trl.trainer\n"
        "added = {module.split('.')[0] for module in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "assert added == {'opo_trl'}, added\n"
        "unwanted = {'sacrebleu', 'math_verify', 'latex2sympy2_extended', 'matplotlib', 'pebble', 'loky'}\n"
        "assert not unwanted & set(sys.modules), unwanted & set(sys.modules)\n"
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
    with pytest.raises(ImportError, match=r"sacrebleu.* pip install 'opo-trl\[evaluate\]'"):
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
    assert "pip install 'opo-trl[evaluate]'" in error
    assert not (tmp_path / "out").exists()
