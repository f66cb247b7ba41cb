"""Following a run: what Weights & Biases and TensorBoard are told, read back from their files by their own readers."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opo_trl.baselines import opo_advantages
from opo_trl.runs.checkpoints import MARKER
from opo_trl.runs.tracking import RUN_FILE, ResumedWandb
from test_resume import STEPS, sampling_trainer
from tiny import GROUP_SIZE, SCRIPT, scripted_trainer, tiny_model

RESUMED_AT = 4  # in the middle of the second epoch


@dataclass(frozen=True)
class Tracked:
    """A run's files, as `wandb leet inspect` reads them."""

    id: str
    project: str
    config: dict
    history: list[dict]
    tables: list[dict]


def read_run(directory):
    """The only run in a directory; W&B's own reader knows the format of its log."""
    (log,) = directory.rglob("*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(log)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in printed.splitlines()]
    config = {}
    for record in records:
        config |= record.get("config", {}).get("update", {})
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    tables = [json.loads(path.read_text()) for path in directory.rglob("*.table.json")]
    return Tracked(run["run_id"], run["project"], config, history, tables)


@pytest.fixture(scope="module")
def wandb_in(tmp_path_factory):
    """Sends W&B's files of one run into a directory of its own, which it returns."""
    patch = pytest.MonkeyPatch()
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_PROJECT", "WANDB_ENTITY"):
        patch.delenv(name, raising=False)
    patch.setenv("WANDB_SILENT", "true")
    patch.setenv("WANDB_CONSOLE", "off")

    def into(name):
        wandb.teardown()  # so that the next run reads the environment anew
        directory = tmp_path_factory.mktemp(name)
        patch.setenv("WANDB_DIR", str(directory))
        return directory

    yield into
    wandb.teardown()
    patch.undo()


@pytest.fixture(scope="module")
def runs(wandb_in, tmp_path_factory):
    """A whole run and one resumed from its middle, both tracked; and the weights of one that was never tracked."""
    output, again = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("resumed")
    directory = wandb_in("first")
    whole = sampling_trainer(output, tiny_model(), report_to="wandb", log_completions=True)
    whole.train()
    wandb.finish()
    first = read_run(directory)
    directory = wandb_in("second")
    resumed = sampling_trainer(again, tiny_model(), report_to="wandb", log_completions=True)
    resumed.train(resume_from_checkpoint=str(output / f"checkpoint-{RESUMED_AT}"))
    wandb.finish()
    untracked = sampling_trainer(tmp_path_factory.mktemp("untracked"), tiny_model(), save_strategy="no")
    untracked.train()
    weights = [trainer.model.state_dict() for trainer in (whole, resumed, untracked)]
    return first, read_run(directory), weights, output


def baseline_of_each_step(run):
    return {row["train/global_step"]: row["train/opo/baseline"] for row in run.history if "train/reward" in row}


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_wandb_run(runs):
    first, second, _, output = runs
    baselines = [baseline_of_each_step(run) for run in (first, second)]
    assert second.id == first.id
    assert second.project == first.project == "huggingface"
    assert list(baselines[0]) == list(range(1, STEPS + 1))
    assert list(baselines[1]) == list(range(RESUMED_AT + 1, STEPS + 1)), "no gap, and nothing of before again"
    assert baselines[1].items() <= baselines[0].items()
    listed = json.loads((output / f"checkpoint-{RESUMED_AT}" / MARKER).read_text())["files"]
    assert RUN_FILE in listed, "the marker vouches for it"


@pytest.mark.slow
def test_wandb_changes_no_bit(runs):
    """Neither tracking nor resuming with it draws from the generators that training draws from."""
    whole, resumed, untracked = runs[2]
    for name, value in untracked.items():
        assert torch.equal(whole[name], value), name
        assert torch.equal(resumed[name], value), name


@pytest.mark.slow
def test_the_config_tells_the_settings_and_the_contract(runs):
    config = runs[0].config
    assert (config["learning_rate"], config["length_exponent"]) == (1e-2, 1.0)
    opo = config["opo"]
    assert opo["exactly_on_policy"] is True
    assert (opo["baseline_weight"], opo["length_exponent"]) == ("length", 1.0)
    assert (opo["contract"]["num_iterations"], opo["contract"]["beta"], opo["contract"]["epsilon"]) == (1, 0.0, None)
    assert opo["contract"]["steps_per_generation"] == opo["contract"]["gradient_accumulation_steps"] == 4
    assert set(opo["versions"]) == {"opo-trl", "trl", "transformers", "torch"}
    assert opo["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_the_completions_table_holds_opos_advantages(wandb_in, tmp_path):
    """Against the script: what was sampled, what it was worth, and the advantage that training took."""
    directory = wandb_in("table")
    trainer = scripted_trainer(tmp_path, report_to="wandb", log_completions=True, per_device_train_batch_size=24)
    trainer.train()
    wandb.finish()
    table, *again = read_run(directory).tables
    assert all(other["data"] == table["data"] for other in again), "TRL logs the last one once more at the end"
    columns = {name: [row[i] for row in table["data"]] for i, name in enumerate(table["columns"])}
    assert columns["step"] == [1] * 24
    rows = [row for prompt in columns["prompt"][::GROUP_SIZE] for row in SCRIPT[prompt]]
    assert columns["completion"] == [text for text, _ in rows]
    rewards = torch.tensor([float("nan") if reward is None else reward for _, reward in rows]).view(-1, GROUP_SIZE)
    lengths = torch.tensor([len(text) + 1 for text, _ in rows]).view(-1, GROUP_SIZE)
    expected = opo_advantages(rewards, lengths).flatten().tolist()
    assert columns["advantage"] == pytest.approx(expected, abs=1e-6)
    assert any(advantage != 0 for advantage in expected)


@pytest.mark.parametrize(
    ("variables", "started"),
    [
        ({}, {"id": "kept", "project": "mine", "entity": "us", "resume": "allow"}),
        ({"WANDB_PROJECT": "other", "WANDB_RESUME": "must"}, {"project": "other", "resume": "must"}),
        ({"WANDB_RUN_ID": "chosen"}, {"project": "huggingface", "id": None}),
        ({"WANDB_RESUME": "never"}, {"project": "huggingface", "id": None}),
    ],
)
def test_who_wants_another_run_says_so(tmp_path, monkeypatch, variables, started):
    """What wandb.init is asked for; variables that it reads by itself are left to it."""
    (tmp_path / RUN_FILE).write_text(json.dumps({"id": "kept", "project": "mine", "entity": "us"}))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = scripted_trainer(tmp_path / "out", report_to="wandb")
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, ResumedWandb))
    callback.resume_from(tmp_path)
    asked = []

    def stop(**arguments):
        asked.append(arguments)
        raise InterruptedError

    monkeypatch.setattr(wandb, "init", stop)
    with pytest.raises(InterruptedError):
        callback.setup(trainer.args, trainer.state, trainer.model)
    assert {name: asked[0].get(name) for name in started} == started


def test_a_run_that_the_user_has_started_is_left_alone(wandb_in, tmp_path):
    directory = wandb_in("own")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / RUN_FILE).write_text(json.dumps({"id": "kept", "project": "mine", "entity": ""}))
    wandb.init(id="own", project="theirs")
    trainer = scripted_trainer(tmp_path, report_to="wandb")
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, ResumedWandb))
    callback.resume_from(tmp_path / "checkpoint")
    trainer.train()
    wandb.finish()
    run = read_run(directory)
    assert (run.id, run.project) == ("own", "theirs")
    assert list(baseline_of_each_step(run)) == [1]
    assert run.config["opo"]["exactly_on_policy"] is True


def test_tensorboard_gets_every_metric(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = scripted_trainer(tmp_path, report_to="tensorboard", max_steps=2)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    for name in ("reward", "grad_norm", "entropy", "opo/baseline", "opo/padding_fraction"):
        logged = [entry[name] for entry in trainer.state.log_history if name in entry]
        scalars = events.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [1, 2]
        assert [scalar.value for scalar in scalars] == pytest.approx(logged, rel=1e-6)
    (arguments,) = events.Tensors("args/text_summary")
    assert '"length_exponent": 1.0' in arguments.tensor_proto.string_val[0].decode()
