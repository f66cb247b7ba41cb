"""The command `opo-trl`: what it loads, how it sets accelerate's arguments apart, and what it passes on."""

import importlib
import inspect
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path
from subprocess import CalledProcessError

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import opo_trl
from conftest import ROOT
from opo_trl import OPOConfig
from opo_trl.scripts import cli

TINY = ["--model_name_or_path", "tiny_policy", "--dataset_name", "arithmetic", "--num_train_problems", "16",
        "--num_generations", "2", "--per_device_train_batch_size", "4", "--max_completion_length", "4",
        "--max_steps", "1", "--report_to", "none"]  # fmt: skip
ENDLESS = [sys.executable, "-m", "opo_trl.scripts.cli", "train", "--cpu", *TINY, "--max_steps", "100000",
           "--logging_steps", "1", "--save_steps", "100000", "--output_dir", "run"]  # fmt: skip


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_the_command_is_installed_with_the_package():
    (entry,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
    assert entry[0] == "opo-trl"
    assert EntryPoint(*entry, group="console_scripts").load() is cli.main


def test_accelerate_has_no_default_to_warn_about_on_a_cpu(monkeypatch, tmp_path, caplog):
    from accelerate.commands import launch
    from accelerate.commands.config import config_args

    for module in (launch, config_args):
        monkeypatch.setattr(module, "default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    filled = launch._validate_launch_command(cli.with_defaults(cli.parse_launch("train", [])))[0]
    assert "had defaults used instead" not in caplog.text
    accelerates = launch._validate_launch_command(cli.parse_launch("train", []))[0]
    assert vars(filled) == vars(accelerates)
    given = cli.with_defaults(cli.parse_launch("train", ["--num_processes", "2", "--mixed_precision", "bf16"]))
    assert (given.num_processes, given.mixed_precision) == (2, "bf16")
    configured = cli.with_defaults(cli.parse_launch("train", ["--accelerate_config", "zero3"]))
    assert configured.num_processes is None


@pytest.mark.parametrize(
    ("arguments", "devices", "visible", "expected"),
    [
        (["--num_processes", "1"], 8, None, "0"),
        (["--num_processes", "1"], 8, "3", "3"),
        (["--num_processes", "1", "--gpu_ids", "2"], 8, None, "2"),
        (["--num_processes", "1", "--config_file", "one.yaml"], 8, None, "5"),
        (["--num_processes", "1", "--accelerate_config", "multi_gpu"], 8, None, "0"),
        (["--num_processes", "1"], 1, None, None),
    ],
)
def test_one_process_sees_one_of_several_gpus(monkeypatch, tmp_path, arguments, devices, visible, expected):
    """TRL would spread a model that it loads by name over all. The user's choice and accelerate's come first."""
    from accelerate.commands import launch

    (tmp_path / "one.yaml").write_text("distributed_type: 'NO'\ngpu_ids: '5'\nmixed_precision: 'no'\nnum_machines: 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    seen = []

    def launched(parsed):
        checked = launch._validate_launch_command(parsed)[0]
        of_accelerate = {} if checked.gpu_ids in (None, "all") else {"CUDA_VISIBLE_DEVICES": checked.gpu_ids}
        seen.append((os.environ | of_accelerate).get("CUDA_VISIBLE_DEVICES"))

    monkeypatch.setattr(launch, "launch_command", launched)
    assert cli.launch("evaluate", arguments) == 0
    assert seen == [expected]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (1, True)),
        (["--max_steps", "3"], (1, True)),
        (["--num_processes", "2"], (2, False)),
        (["--multi_gpu"], (None, False)),
        (["--gpu_ids", "2"], (None, False)),
        (["--accelerate_config", "zero3"], (None, False)),
        (["--model_name_or_path", "m", "--dataset_name", "d"], (None, False)),
    ],
)
def test_the_quickstart_is_one_process_on_the_cpu(monkeypatch, arguments, expected):
    launched = []
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)  # without one, accelerate has its own way
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    assert cli.launch("train", arguments) == 0
    assert [(parsed.num_processes, parsed.cpu) for parsed in launched] == [expected]


def test_help_and_version_load_no_module_that_takes_seconds():
    printed = run(
        "import sys\n"
        "from opo_trl.scripts.cli import main\n"
        "assert main([]) == 0\n"
        "for option in ('--help', '--version'):\n"
        "    try:\n"
        "        main([option])\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'accelerate', 'datasets', 'numpy', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    assert printed.count("Train a language model with OPO.") == 2
    assert printed.endswith(f"opo-trl {opo_trl.__version__}\n")


def sections(text):
    """Options of each section of a help text, in order."""
    parts = re.split(r"^(\S.*):$", text, flags=re.MULTILINE)[1:]
    return {
        title: re.findall(r"^  (--\w+)", body, re.MULTILINE)
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    }


def test_help_of_train_lists_the_fields_of_opo_first_and_those_of_transformers_last(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = cli.describe("train", prog="train")
    assert text.startswith("usage: train [--config FILE.yaml]")
    found = sections(text)
    assert list(found) == ["OPO (OPOConfig)", "this script", "TRL", "transformers"]
    own = set(inspect.get_annotations(OPOConfig))
    assert own <= {option[2:] for option in found["OPO (OPOConfig)"]} <= own | {f"no_{name}" for name in own}
    assert "--num_train_problems" in found["this script"]
    assert {"--num_generations", "--dataset_name", "--model_name_or_path"} <= set(found["TRL"])
    assert {"--learning_rate", "--output_dir"} <= set(found["transformers"])
    every = [option for options in found.values() for option in options]
    assert len(every) == len(set(every)) > 200
    usual = importlib.import_module("opo_trl.scripts.train_arguments").USUAL
    assert {f"--{name}" for name in usual} <= set(every)


def test_what_help_prints_first_is_what_the_parser_has(monkeypatch):
    """The fields of `OPOConfig`, read from its source, as those of the class; the defaults and the help, too."""
    monkeypatch.setenv("COLUMNS", "200")
    options = {"prog": "train", "description": "Train."}
    complete = importlib.import_module("opo_trl.scripts.train_arguments").make_parser(**options).format_help()
    first = cli.describe_own("train", **options)
    assert sorted(first.splitlines()) == sorted(complete.partition("\nTRL:\n")[0].splitlines())
    assert cli.describe("train", **options).startswith(first)


@pytest.mark.parametrize("script", ["train_math", "evaluate_math"])
def test_help_of_the_files_that_accelerate_launches(monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", [f"examples/{script}.py", "--max_steps", "3", "--help"])
    runpy.run_path(str(ROOT / "examples" / f"{script}.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: {script}.py [--config FILE.yaml]")


def test_help_of_evaluate(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = sections(cli.describe("evaluate"))
    assert list(found) == ["this script"]
    assert found["this script"][:2] == ["--models", "--datasets"]


# ---- Arguments of accelerate and of the script


@pytest.mark.parametrize(
    ("arguments", "expected", "script_arguments"),
    [
        ("", {}, ""),
        ("--max_steps 3", {}, "--max_steps 3"),
        ("--max_steps 3 --num_processes 2 --seed 4", {"num_processes": 2}, "--max_steps 3 --seed 4"),
        ("--num-processes=2 --max_steps=3", {"num_processes": 2}, "--max_steps=3"),
        ("--multi_gpu --report --cpu", {"multi_gpu": True, "cpu": True}, "--report"),
        ("--config_file a.yaml --config b.yaml", {"config_file": "a.yaml"}, "--config b.yaml"),
        ("--mixed_precision bf16 --bf16 false", {"mixed_precision": "bf16"}, "--bf16 false"),
        ("--models a --num_machines 2 b", {"num_machines": 2}, "--models a b"),
        ("--gradient_accumulation_steps 4", {"gradient_accumulation_steps": None}, "--gradient_accumulation_steps 4"),
        ("--debug underflow_overflow", {"debug": None}, "--debug underflow_overflow"),
        ("--quiet -q", {"quiet": False}, ""),
        ("--unknown 1 stray", {}, "--unknown 1 stray"),  # the script reports them
        ("--no_python -m", {"no_python": None, "module": True}, "--no_python -m"),
    ],
)
def test_arguments_of_accelerate_are_set_apart(arguments, expected, script_arguments):
    parsed = cli.parse_launch("train", arguments.split())
    assert (parsed.training_script, parsed.module) == ("opo_trl.scripts.train_math", True)
    assert parsed.training_script_args == script_arguments.split()
    assert {name: getattr(parsed, name) for name in expected} == expected


def test_the_names_that_both_have_are_the_scripts():
    accelerates = {action.dest for action in launch_command_parser()._actions if action.option_strings}
    both = set()
    for _, _, module in cli.COMMANDS.values():
        parser = importlib.import_module(f"opo_trl.scripts.{module}").make_parser()
        both |= accelerates & {action.dest for action in parser._actions}
    assert both == cli.NOT_ACCELERATES - {"module", "no_python"}


def test_a_config_of_accelerate_by_name_or_by_path(tmp_path):
    config = Path(cli.parse_launch("train", ["--accelerate_config", "zero3", "--num_processes", "2"]).config_file)
    assert (config.name, config.parent.name) == ("zero3.yaml", "accelerate_configs")
    (tmp_path / "mine.yaml").write_text("num_processes: 1")
    mine = str(tmp_path / "mine.yaml")
    assert cli.parse_launch("train", [f"--accelerate_config={mine}"]).config_file == mine
    with pytest.raises(ValueError, match=r"must be a file or one of .*fsdp2.*zero3.*, got 'zero9'\. Pass"):
        cli.parse_launch("train", ["--accelerate_config", "zero9"])
    with pytest.raises(ValueError, match="Only one of --accelerate_config and --config_file"):
        cli.parse_launch("train", ["--accelerate_config", "zero3", "--config_file", mine])


def test_the_named_configs_set_what_those_of_the_examples_set():
    """The engines are tested with the files of the examples; those that TRL ships must agree with them."""
    for path in (ROOT / "examples" / "accelerate_configs").glob("*.yaml"):
        if path.stem in ("fsdp2", "multi_gpu", "zero2", "zero3"):
            named = cli.parse_launch("train", ["--accelerate_config", path.stem]).config_file
            settings = yaml.safe_load(Path(named).read_text())
            assert yaml.safe_load(path.read_text()).items() <= settings.items(), path


# ---- What is passed on


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (CalledProcessError(75, "python"), 75),  # stopped by SIGTERM, resumable
        (CalledProcessError(-9, "python"), 137),
        (ChildFailedError("train", {1: ProcessFailure(1, 123, 75, "no-error-file")}), 75),
        (ChildFailedError("train", {0: ProcessFailure(0, 123, -15, "no-error-file")}), 143),
        (SignalException("got signal", signal.SIGTERM), 143),
        (ValueError("You can only use one of `--cpu`, `--multi_gpu`"), 1),
    ],
)
def test_the_exit_status_is_that_of_the_script(monkeypatch, capsys, error, status):
    launched = []

    def launch_command(args):
        launched.append(args.training_script)
        if error is not None:
            raise error

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    assert cli.main(["evaluate", "--models", "m"]) == status
    assert launched == ["opo_trl.scripts.evaluate_math"]
    if isinstance(error, ValueError):
        assert capsys.readouterr().err.startswith("error: You can only use one of")
        monkeypatch.setenv("OPO_DEBUG", "1")
        with pytest.raises(ValueError, match="You can only use one of"):
            cli.main(["evaluate"])


def test_a_training_without_a_model_or_problems_is_not_launched(monkeypatch, capsys):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    assert cli.main(["train", "--num_processes", "1", "--dataset_name", "d"]) == 1
    assert "error: --model_name_or_path must name a causal language model" in capsys.readouterr().err
    assert cli.main(["train", "--model_name_or_path=m", "--max_steps", "1"]) == 1
    assert "error: --dataset_name must name the problems" in capsys.readouterr().err
    assert launched == []
    assert cli.main(["train", "--dataset_config", "main"]) == 1, "of a dataset that is not named"
    named = ["--model_name_or_path=m", "--dataset-name", "d"]
    for complete in ([], ["--num_processes", "1"], ["--config", "run.yaml"], named, ["--max_steps", "2"]):
        assert cli.main(["train", *complete]) == 0
    assert len(launched) == 5


@pytest.mark.slow
def test_train_runs_outside_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--cpu", *TINY, "--output_dir", "run"]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_mistake_is_reported_in_one_sentence(capfd):
    assert cli.main(["train", *TINY, "--num_processes", "1", "--learning_rat", "3"]) == 1
    printed = capfd.readouterr().err
    assert "error: Unknown argument(s): --learning_rat (did you mean --learning_rate?)." in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_sigterm_reaches_the_script_and_its_exit_status_comes_back(tmp_path):
    """A preempted run saves, and its scheduler can tell by the exit status that it is to be repeated."""
    with subprocess.Popen(ENDLESS, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert next((line for line in process.stdout if re.match(r" *3/100000 ", line)), None), "no third step"
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
            assert process.wait(timeout=60) == 75
        finally:
            process.kill()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "trainer_state.json").is_file()
    assert len(json.loads((tmp_path / "run" / "log.json").read_text())) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_ends_the_run_with_one_sentence(tmp_path, terminal):
    """A terminal sends it to all processes; `kill -INT` to one."""
    # A shell starts what is to run in the background with SIGINT ignored, and so do its tests.
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True,
               "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # fmt: skip
    with subprocess.Popen(ENDLESS, cwd=tmp_path, **options) as process:
        try:
            assert next((line for line in process.stdout if re.match(r" *3/100000 ", line)), None), "no third step"
            (os.killpg if terminal else os.kill)(process.pid, signal.SIGINT)
            rest, _ = process.communicate(timeout=120)
            assert process.returncode == 130
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert re.search(r"^Interrupted in step \d+: there is no checkpoint\.", rest, re.MULTILINE)
    assert "Traceback" not in rest


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["trian"])
    assert end.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


# ---- The minimal example

MINIMAL = ROOT / "examples" / "minimal.py"


def test_the_minimal_example_is_short():
    assert len(MINIMAL.read_text().splitlines()) <= 40


@pytest.mark.parametrize("model", ["the tiny policy", "another model"])
def test_the_minimal_example_runs(tmp_path, monkeypatch, capsys, request, model):
    """All of it but the number of steps."""
    arguments = [] if model == "the tiny policy" else [str(request.getfixturevalue("chat_model_dir"))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(MINIMAL), *arguments])
    quick = {"max_steps": 2, "logging_steps": 1, "report_to": "none"}
    monkeypatch.setattr(opo_trl, "OPOConfig", lambda **settings: OPOConfig(**{**settings, **quick}))
    trainer = runpy.run_path(str(MINIMAL))["trainer"]
    assert trainer.state.global_step == 2
    assert re.search(r"^reward: \d\.\d\d in the first steps, \d\.\d\d in the last$", capsys.readouterr().out, re.M)
    assert (tmp_path / "outputs" / "minimal").is_dir()


@pytest.mark.slow
def test_the_minimal_example_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(MINIMAL)])
    rewards = runpy.run_path(str(MINIMAL))["rewards"]
    assert rewards[-1] > rewards[0] + 0.1
