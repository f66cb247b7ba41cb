"""The examples: each runs in this process, cut short, and the slow tests see the number that it promises."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import trl
from trl import GRPOConfig

import opo_trl
from conftest import ROOT
from opo_trl import OPOConfig
from opo_trl.runs.preemption import EXIT_CODE
from pages import page, the_table

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "notebooks" / "quickstart.ipynb"
SHORT = ("minimal", "own_reward", "own_baseline", "calculator", "pictures", "reliable_runs")
QUICK = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 16, "report_to": "none"}


@pytest.fixture
def cut_short(monkeypatch, tmp_path):
    """Let the configurations of examples have some other settings, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def use(**settings):
        for module, config in ((opo_trl, OPOConfig), (trl, GRPOConfig)):
            changed = lambda config=config, **own: config(**{**own, **settings})  # noqa: E731
            monkeypatch.setattr(module, config.__name__, changed)

    return use


def run(name, monkeypatch):
    path = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    return runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("name", SHORT)
def test_examples_are_short_and_begin_with_their_command(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 70
    assert f"python examples/{name}.py" in text.split('"""')[1]


@pytest.mark.parametrize("name", ["own_reward", "own_baseline", "pictures"])
def test_an_example_runs(name, monkeypatch, cut_short, capsys):
    cut_short(**QUICK)
    trainer = run(name, monkeypatch)["trainer"]
    assert trainer.state.global_step == 2
    assert re.search(r"^reward: \d+\.\d\d in the first steps, \d+\.\d\d in the last$", capsys.readouterr().out, re.M)


def test_the_calculator_writes_what_follows_its_calls_and_is_not_trained(monkeypatch, cut_short):
    cut_short(**QUICK)
    example = run("calculator", monkeypatch)
    trainer, problems = example["trainer"], example["problems"]
    sampled = example["rollout"](problems["prompt"][:32], trainer)
    tokenizer = trainer.processing_class
    assert sum(sampled["calls"]) > 8, "the tiny policy calls the calculator in about half of its completions"
    for ids, mask, calls in zip(sampled["completion_ids"], sampled["env_mask"], sampled["calls"], strict=True):
        before, written = "", []
        for token, own in zip(ids, mask, strict=True):
            text = tokenizer.decode([token])
            if not own and before.endswith("="):
                written.append([before, ""])
            if not own:
                written[-1][1] += text
            before += text
        assert len(written) == calls <= 2
        assert all(example["calculate"](call) == result for call, result in written)
    assert trainer.state.log_history[0]["calculator/calls"] > 0


def test_a_reliable_run_is_stopped_and_resumed_by_the_same_command(monkeypatch, cut_short, capsys):
    cut_short(max_steps=13, save_steps=50, per_device_train_batch_size=8, logging_steps=50)
    with pytest.raises(SystemExit) as end:
        run("reliable_runs", monkeypatch)
    assert end.value.code == EXIT_CODE
    assert [path.name for path in Path("outputs/reliable_runs").glob("checkpoint-*")] == ["checkpoint-12"]
    run("reliable_runs", monkeypatch)
    assert "resumed from step 12, ended with step 13" in capsys.readouterr().out


def cells():
    nbformat = pytest.importorskip("nbformat", reason="make setup installs it")
    return nbformat.read(NOTEBOOK, as_version=4).cells


def test_the_notebook_runs_cut_short(monkeypatch, cut_short):
    """Its cells one after the other in this process; in a kernel in the slow test."""
    import matplotlib

    matplotlib.use("Agg")
    cut_short(**QUICK)
    namespace = {}
    for cell in cells():
        if cell.cell_type == "code":
            exec(cell.source, namespace)
    assert namespace["trainer"].state.global_step == 2
    assert len(namespace["completions"]) == 8


def test_the_notebook_is_committed_with_the_outputs_of_a_run():
    code = [cell for cell in cells() if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not any(word in str(outputs) for word in ("Warning", "Traceback", "/home/", "site-packages"))
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_every_example_is_on_the_page():
    listed = {
        name for row in the_table(page("examples"), "command") for name in re.findall(r"[\w/]+\.(?:py|ipynb)", row[0])
    }
    there = {str(path.relative_to(ROOT)) for kind in ("*.py", "notebooks/*.ipynb") for path in EXAMPLES.glob(kind)}
    assert listed == there


# ---- Complete runs: the number that each docstring and the page promise


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rise", "at_least"),
    [("own_reward", 1.0, 15.0), ("own_baseline", 1.0, 15.0), ("calculator", 0.2, 0.85), ("pictures", 0.4, 0.65)],
)
def test_an_example_learns(name, rise, at_least, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    trainer = run(name, monkeypatch)["trainer"]
    rewards = [entry["reward"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert rewards[-1] > max(rewards[0] + rise, at_least)


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="make setup installs it")
    pytest.importorskip("ipykernel", reason="make setup installs it")
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, startup_timeout=300, resources=resources).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    rewards = [float(line.split()[1]) for line in printed.splitlines() if re.match(r" +\d+/40 ", line)]
    assert rewards[-1] > rewards[0] + 0.05
