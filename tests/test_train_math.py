"""`examples/train_math.py` as people run it: any model directory, any columns, saved and resumed; clear refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from opo_trl.rewards import math_verify_reward
from opo_trl.runs.checkpoints import MARKER
from opo_trl.runs.guarded_functions import RewardError
from opo_trl.scripts import reporting, train_math
from opo_trl.scripts.train_arguments import MathScriptArguments, check_trackers

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
QUICK = [
    "--use_cpu", "--bf16", "false", "--report_to", "none", "--max_completion_length", "4", "--num_generations", "2",
    "--per_device_train_batch_size", "4", "--logging_steps", "1", "--max_steps", "2", "--learning_rate", "1e-3",
]  # fmt: skip


@pytest.fixture
def gsm8k(tmp_path):
    """A file with GSM8K's columns."""
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"What is {n}+{n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*arguments):
    return train_math.main([*QUICK, *map(str, arguments)])


@pytest.mark.parametrize("kind", ["chat_model_dir", "base_model_dir"])
def test_any_model_directory_trains_saves_and_resumes(tmp_path, request, gsm8k, kind, capsys):
    """With its own pad token and chat template, and with neither."""
    model, output = request.getfixturevalue(kind), tmp_path / "out"
    common = ("--model_name_or_path", model, "--dataset_name", gsm8k, "--output_dir", output)
    run(*common, "--save_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1, "--num_eval_problems", 4,
        "--num_generations_eval", 1, "--per_device_eval_batch_size", 4)  # fmt: skip
    printed = capsys.readouterr().out
    assert "8 problems to train on, 4 held out, 2 x 2 completions per step" in printed
    assert "2/2 " in printed
    assert "held-out reward" in printed
    assert f"report written to {output / 'report.html'}\n" in printed
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    run(*common, "--max_steps", 3, "--save_steps", 1, "--resume_from_checkpoint", "true")
    assert json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    AutoModelForCausalLM.from_pretrained(output)
    AutoTokenizer.from_pretrained(output)


def test_one_command_starts_and_resumes(tmp_path, chat_model_dir, gsm8k, capsys, caplog):
    """As a scheduler repeats it: from nothing, after a kill in the middle of a save, and without a GPU."""
    output = tmp_path / "out"
    command = [
        "--model_name_or_path", chat_model_dir, "--dataset_name", gsm8k, "--output_dir", output, "--save_steps", 1,
        "--resume_from_checkpoint", "auto", "--report_to", "none", "--max_completion_length", 4, "--num_generations", 2,
        "--per_device_train_batch_size", 4, "--max_steps",
    ]  # fmt: skip
    train_math.main([*map(str, command), "2"])
    printed = capsys.readouterr().out
    assert printed.count("No accelerator found: using use_cpu=True, bf16=False, gradient_checkpointing=False.") == 1
    assert caplog.text.count(f"No complete checkpoint in '{output}': training starts from scratch.") == 1
    assert "no complete checkpoint" not in printed, "it is said once"
    (output / "checkpoint-2" / MARKER).unlink()
    train_math.main([*map(str, command), "3"])
    printed = capsys.readouterr().out
    assert f"Skipped as incomplete: checkpoint-2: {MARKER} is missing" in caplog.text
    assert f"resuming from {output / 'checkpoint-1'}" in printed
    assert json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    assert (output / "checkpoint-2" / MARKER).is_file()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("true", r"needs a complete checkpoint in '.*out' \(checkpoint-2: .* is missing.*\), got none\. Use resume"),
        ("{output}/checkpoint-2", r"checkpoint-2': trainer_state\.json is missing"),
        ("{output}/checkpoint-3", r"checkpoint-3', which is not a directory"),
    ],
)
def test_a_checkpoint_is_refused_before_anything_loads(tmp_path, monkeypatch, request_, message):
    output = tmp_path / "out"
    (output / "checkpoint-2").mkdir(parents=True)
    monkeypatch.setattr(train_math, "load_inputs", lambda *_: pytest.fail("problems and tokenizer are loaded"))
    with pytest.raises(ValueError, match=message):
        run("--output_dir", output, "--resume_from_checkpoint", request_.format(output=output))


def test_arguments_that_ask_for_checkpoints_need_a_save_strategy(tmp_path, monkeypatch, capsys):
    """`save_strategy="no"` is that of the quickstart's config file."""
    monkeypatch.setattr(train_math, "load_inputs", lambda *_: pytest.fail("problems and tokenizer are loaded"))
    quickstart = ["--config", str(train_math.QUICKSTART), "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"--save_steps 10 needs --save_strategy steps, got save_strategy='no'"):
        train_math.main([*quickstart, "--save_steps", "10", "--resume_from_checkpoint", "auto"])
    with pytest.raises(pytest.fail.Exception):
        train_math.main([*quickstart, "--resume_from_checkpoint", "auto"])
    assert "Pass --save_strategy steps --save_steps N to save regularly." in capsys.readouterr().out
    saving = ["--save_strategy", "steps", "--save_steps", "10", "--resume_from_checkpoint", "auto"]
    with pytest.raises(pytest.fail.Exception):
        train_math.main([*quickstart, *saving])
    assert "warning" not in capsys.readouterr().out


def test_training_problems_are_filtered(tmp_path, chat_model_dir, gsm8k, capsys):
    """12 problems: 3 overlap with the evaluation set; of the others 2 always pass and 1 was not measured."""
    rows = [json.loads(line) for line in Path(gsm8k).read_text().splitlines()]
    evaluation_set, records = tmp_path / "test.jsonl", tmp_path / "records.jsonl"
    without_answers = [row | {"answer": ""} for row in rows[:3]]
    evaluation_set.write_text("".join(json.dumps(row) + "\n" for row in without_answers))
    records.write_text(
        "".join(
            json.dumps({"problem": str(n), "sample": sample, "reward": float(n in (5, 6) or sample == 0)}) + "\n"
            for n in range(11)
            for sample in range(2)
        )
    )
    run("--model_name_or_path", chat_model_dir, "--dataset_name", gsm8k, "--output_dir", tmp_path / "out",
        "--deduplicate_against", evaluation_set, "--overlap_ngram_size", 4, "--pass_rates", records,
        "--max_steps", 1)  # fmt: skip
    assert "6 problems to train on" in capsys.readouterr().out


def test_a_report_names_the_files_that_it_has_written(tmp_path, monkeypatch, capsys):
    found = {"pass@1": 0.5, "interval": (0.25, 0.75), "mean_length": 3.0}
    state = SimpleNamespace(global_step=1, log_history=[])
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path), seed=0), state=state)
    (tmp_path / "curves.png").write_text("of an earlier run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    train_math.make_report(lambda path: found, found, trainer, start=0.0)
    printed = capsys.readouterr().out
    assert "curves.png not drawn: matplotlib is not installed" in printed
    assert printed.endswith(f"written to {tmp_path}: summary.json\n")


def load_datasets(**arguments):
    return train_math.load_datasets(MathScriptArguments(**arguments), 0, True, [math_verify_reward])


def test_a_saved_dataset_without_splits_is_not_evaluated_on_its_training_problems(tmp_path, gsm8k):
    rows = [json.loads(line) for line in Path(gsm8k).read_text().splitlines()]
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    train, held_out = load_datasets(dataset_name=str(tmp_path / "one"), num_eval_problems=4)
    assert (len(train), len(held_out)) == (8, 4)
    assert not {str(prompt) for prompt in train["prompt"]} & {str(prompt) for prompt in held_out["prompt"]}
    parts = {"train": Dataset.from_list(rows[:7]), "test": Dataset.from_list(rows[7:])}
    DatasetDict(parts).save_to_disk(tmp_path / "several")
    train, held_out = load_datasets(dataset_name=str(tmp_path / "several"))
    assert (len(train), len(held_out)) == (7, 5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HuggingFaceH4/MATH-500", ("HuggingFaceH4/MATH-500", "validation", None)),
        ("HuggingFaceH4/MATH-500:test", ("HuggingFaceH4/MATH-500", "test", None)),
        ("EleutherAI/hendrycks_math:test:algebra", ("EleutherAI/hendrycks_math", "test", "algebra")),
        ("openai/gsm8k", ("openai/gsm8k", "validation", "main")),
        ("openai/gsm8k:test:socratic", ("openai/gsm8k", "test", "socratic")),
    ],
)
def test_an_evaluation_set_has_its_own_split_and_configuration(monkeypatch, name, expected):
    loaded = []

    def load(name, split, *, config, prompt_column, require_columns=True, **options):
        loaded.append((name, split, config, prompt_column, require_columns))
        return Dataset.from_dict({"prompt": [f"{split} problem"], "solution": ["1"], "id": ["0"]})

    monkeypatch.setattr(train_math, "load_problems", load)
    load_datasets(
        dataset_name="openai/gsm8k",
        dataset_config="main",
        dataset_test_split="validation",
        prompt_column="question",
        eval_dataset_name=name,
    )
    assert loaded == [("openai/gsm8k", "train", "main", "question", True), (*expected, "question", False)]


def test_lora(tmp_path, chat_model_dir, gsm8k):
    output = tmp_path / "out"
    run("--model_name_or_path", chat_model_dir, "--dataset_name", gsm8k, "--output_dir", output, "--use_peft")
    assert (output / "adapter_config.json").is_file()
    assert not (output / "model.safetensors").exists()


def test_a_report_measures_the_checkpoint_loaded_back(tmp_path, chat_model_dir, gsm8k):
    output = tmp_path / "out"
    summary = run(
        "--model_name_or_path", chat_model_dir, "--dataset_name", gsm8k, "--output_dir", output, "--report",
        "--num_eval_problems", 4, "--report_samples", 2, "--seed", 5, "--eval_strategy", "steps", "--eval_steps", 1,
        "--num_generations_eval", 1, "--per_device_eval_batch_size", 4,
    )  # fmt: skip
    assert summary == json.loads((output / "summary.json").read_text())
    assert {
        "pass@1_before", "pass@1_before_interval", "pass@1_after", "pass@1_after_interval", "n", "steps", "seconds",
        "mean_length_before", "mean_length_after", "seed", "commit",
    } <= summary.keys()  # fmt: skip
    assert (summary["n"], summary["steps"], summary["seed"]) == (4, 2, 5)
    assert (output / "curves.png").stat().st_size > 10_000
    log = json.loads((output / "log.json").read_text())
    assert [entry["step"] for entry in log if "reward" in entry] == [1, 2]


def test_a_report_measures_the_revision_that_is_trained(tmp_path, chat_model_dir, gsm8k, monkeypatch):
    """Also after training, where a directory of an adapter is loaded with its base model."""
    output, loaded = tmp_path / "out", []

    def recorded(auto_class):
        def from_pretrained(name, **options):
            loaded.append((str(name), options["revision"], options["trust_remote_code"]))
            return auto_class.from_pretrained(name, **options)

        return SimpleNamespace(from_pretrained=from_pretrained)

    monkeypatch.setattr(reporting, "AutoTokenizer", recorded(AutoTokenizer))
    monkeypatch.setattr(reporting, "AutoModelForCausalLM", recorded(AutoModelForCausalLM))
    run("--model_name_or_path", chat_model_dir, "--dataset_name", gsm8k, "--output_dir", output, "--report",
        "--num_eval_problems", 2, "--report_samples", 1, "--max_steps", 1, "--model_revision", "v1",
        "--trust_remote_code", "true")  # fmt: skip
    assert loaded == [(str(chat_model_dir), "v1", True)] * 2 + [(str(output), "v1", True)] * 2


def test_the_quickstart_is_what_runs_without_arguments(monkeypatch, tmp_path):
    """Cut short: the same command path, three steps."""
    config = {**yaml.safe_load(train_math.QUICKSTART.read_text()), "output_dir": str(tmp_path / "out"), "max_steps": 3}
    config.update(eval_steps=3, num_eval_problems=64, report_samples=1, num_train_problems=200)
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(train_math, "QUICKSTART", tmp_path / "short.yaml")
    monkeypatch.setattr(sys, "argv", ["train_math.py"])
    summary = train_math.main()
    assert 0.30 < summary["pass@1_before"] < 0.70
    assert summary["steps"] == 3


def test_other_arguments_change_the_quickstart():
    script_args, training_args, model_args, notes = train_math.parse(["--max_steps", "7", "--output_dir", "elsewhere"])
    assert (script_args.dataset_name, model_args.model_name_or_path) == ("arithmetic", "tiny_policy")
    assert (training_args.max_steps, training_args.num_generations) == (7, 8)
    assert notes[0].startswith("No model and no dataset are named: this is the quickstart")
    with pytest.raises(ValueError, match="--dataset_name must name the problems"):
        train_math.main(["--dataset_config", "main", "--output_dir", "elsewhere"])
    assert not any("quickstart" in note for note in train_math.parse([])[3])


def test_every_off_policy_setting_is_named_at_once():
    with pytest.raises(ValueError, match=r"`num_iterations` must be 1, got 2.*`beta` must be 0.0, got 0.04"):
        train_math.parse(["--num_iterations", "2", "--beta", "0.04"])


def test_held_out_problems_that_nothing_measures_are_refused(gsm8k, chat_model_dir):
    named = ["--model_name_or_path", str(chat_model_dir), "--dataset_name", str(gsm8k), "--num_eval_problems", "4"]
    with pytest.raises(ValueError, match="--dataset_streaming must be left out"):
        train_math.parse([*named, "--dataset_streaming"])
    with pytest.raises(ValueError, match="--num_eval_problems 4 needs --eval_strategy steps or --report"):
        train_math.parse(named)
    for measured in (["--report"], ["--eval_strategy", "steps", "--eval_steps", "1"]):
        train_math.parse([*named, *measured])


def test_ctrl_c_ends_a_run_with_one_sentence(tmp_path, capsys):
    def interrupted(resume_from_checkpoint):
        raise KeyboardInterrupt

    trainer = SimpleNamespace(
        train=interrupted,
        args=SimpleNamespace(output_dir=str(tmp_path)),
        state=SimpleNamespace(global_step=4),
        accelerator=SimpleNamespace(print=print),
    )
    with pytest.raises(SystemExit) as ended:
        train_math.train(trainer, None)
    assert ended.value.code == 130
    assert "Interrupted in step 5: there is no checkpoint." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "{gsm8k}"], "--model_name_or_path must name a causal.* tiny_policy"),
        (["--model_name_or_path", "no such model"], "--dataset_name must name the problems"),
        (
            ["--dataset_name", "{gsm8k}", "--model_name_or_path", "m", "--prompt_column", "text"],
            r"found \[.question., .answer.\]",
        ),
        (["--dataset_name", "{gsm8k}", "--epsilon", "0.2"], "`epsilon` must be None"),
        (["--dataset_name", "{gsm8k}", "--num_generations", "3"], "`per_device_train_batch_size` to 3 or 6"),
        (["--dataset_name", "{gsm8k}", "--model_name_or_path", "{model}/no"], "there is no such directory"),
        (
            ["--dataset_name", "{gsm8k}", "--model_name_or_path", "{model}", "--per_device_train_batch_size", "64"],
            r"at least 32 row\(s\), the prompts of one rollout batch, got 12",
        ),
    ],
)
def test_mistakes_are_named_before_a_model_loads(tmp_path, gsm8k, chat_model_dir, monkeypatch, arguments, message):
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *_, **__: pytest.fail("model loaded"))
    filled = [argument.format(gsm8k=gsm8k, model=chat_model_dir) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        run("--output_dir", tmp_path / "out", *filled)


# ---- The log on the disk


def log_of(output):
    return json.loads((output / "log.json").read_text())


def test_metrics_without_a_value_are_shown_on_the_console(capsys):
    """TRL logs None where nothing could be scored. An error on the main process would leave the other ranks waiting."""
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=9)
    progress = reporting.ConsoleProgress()
    progress.on_train_begin(None, state, None)
    capsys.readouterr()
    progress.on_log(None, state, None, logs={"eval_reward": None})
    assert capsys.readouterr().out.split() == ["3/9", "held-out", "reward", "-"]
    progress.on_log(None, state, None, logs={"reward": None, "tokens_per_second/generated": None})
    assert capsys.readouterr().out.split()[1] == "-"
    progress.on_log(None, state, None, logs={"eval_reward": 0.5})
    assert capsys.readouterr().out.endswith("held-out reward 0.500\n")


@pytest.mark.parametrize(
    ("settings", "steps_with_reward"),
    [
        (["--save_strategy", "no"], [1, 2, 2]),  # the last entry has the summary of the run
        (["--logging_strategy", "epoch", "--num_train_epochs", "1", "--max_steps", "-1"], [6, 6]),
        (["--logging_steps", "50", "--save_strategy", "no"], [2]),
        (["--logging_strategy", "no", "--save_strategy", "no"], [2]),
    ],
)
def test_every_setting_leaves_the_metrics_on_the_disk(tmp_path, chat_model_dir, gsm8k, settings, steps_with_reward):
    output = tmp_path / "out"
    run("--model_name_or_path", chat_model_dir, "--dataset_name", gsm8k, "--output_dir", output, *settings)
    steps = [entry["step"] for entry in log_of(output) if "reward" in entry or "train_runtime" in entry]
    assert steps == steps_with_reward
    assert any("opo/informative_fraction" in entry for entry in log_of(output))


def test_a_run_that_dies_leaves_its_log_and_a_resumed_one_continues_it(tmp_path, chat_model_dir, gsm8k, monkeypatch):
    """It dies in step 3, and step 2, after the checkpoint, is trained and logged again, once in the file."""
    output, calls = tmp_path / "out", []

    def dying(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 3:
            raise KeyError("killed")
        return [float(len(text[0]["content"])) for text in completions]

    monkeypatch.setattr("opo_trl.scripts.reward_functions.rewards.math_verify_reward", dying)
    command = ("--model_name_or_path", chat_model_dir, "--dataset_name", gsm8k, "--output_dir", output,
               "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1)  # fmt: skip
    with pytest.raises(RewardError, match="killed"):
        run(*command)
    first = log_of(output)
    assert [entry["step"] for entry in first] == [1, 2]
    log = output / "log.json"
    log.write_text(json.dumps([*first, {"step": 3, "reward": 9.0}]))  # as if it had died later
    run(*command, "--resume_from_checkpoint", "auto")
    assert log_of(output)[:2] == first
    assert [entry["step"] for entry in log_of(output) if "grad_norm" in entry] == [1, 2, 3, 4]


# ---- Rewards of the command line

REWARDS = """
def length(completions, **kwargs):
    return [float(len(completion[0]["content"]) > 2) for completion in completions]

limit = 3
"""
COLUMNS = """
def level_reward(prompts, completions, level, **kwargs):
    assert kwargs["solution"] == [None] * len(level) and "unused" not in kwargs
    assert [prompt[-1]["content"] for prompt in prompts] == [f"{n}+{n}?" for n in level]
    return [float(n) for n in level]
"""


def test_rewards_of_the_command_line(tmp_path, chat_model_dir, gsm8k, monkeypatch, capsys):
    """This package's, TRL's and the user's own, weighed; pass@k by the name that was given."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    output = tmp_path / "out"
    run("--model_name_or_path", chat_model_dir, "--dataset_name", gsm8k, "--output_dir", output, "--max_steps", 1,
        "--reward_funcs", "own_rewards:length", "boxed_format_reward", "accuracy_reward",
        "get_soft_overlong_punishment", "--reward_weights", 2, 1, 1, 1, "--pass_at_k_reward", "own_rewards:length",
        "--eval_strategy", "steps", "--eval_steps", 1, "--num_eval_problems", 2, "--num_generations_eval", 2,
        "--per_device_eval_batch_size", 4)  # fmt: skip
    logged = {name: value for entry in log_of(output) for name, value in entry.items()}
    assert logged["rewards/boxed_format_reward/mean"] == logged["rewards/accuracy_reward/mean"] == 0
    assert logged["rewards/soft_overlong_punishment_reward/mean"] == 0
    assert logged["reward"] == pytest.approx(2 * logged["rewards/length/mean"])
    assert logged["eval_pass@1"] == pytest.approx(logged["eval_rewards/length/mean"])
    assert "no eval_pass@k" not in capsys.readouterr().out


def test_a_reward_gets_the_columns_that_it_names(tmp_path, chat_model_dir, monkeypatch):
    """With held-out problems, without answers, and without the line that is added to problems."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reward_with_columns.py").write_text(COLUMNS)
    rows = [{"question": f"{n}+{n}?", "level": n, "unused": n} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--model_name_or_path", chat_model_dir, "--dataset_name", tmp_path / "rows.jsonl", "--output_dir",
               tmp_path / "out", "--max_steps", 1, "--reward_funcs", "reward_with_columns:level_reward",
               "--instruction", "", "--eval_strategy", "steps", "--eval_steps", 1, "--num_eval_problems", 2,
               "--num_generations_eval", 2, "--per_device_eval_batch_size", 4]  # fmt: skip
    run(*command)
    assert any("eval_rewards/level_reward/mean" in entry for entry in log_of(tmp_path / "out"))
    with pytest.raises(ValueError, match="`solution_column` must name a column"):
        run(*command, "--report")
    with pytest.raises(ValueError, match="`solution_column` must name a column"):
        run(*command, "--reward_funcs", "math_verify_reward")


def test_a_run_without_a_reward_for_pass_at_k_reports_it(tmp_path, chat_model_dir, gsm8k, capsys):
    run("--model_name_or_path", chat_model_dir, "--dataset_name", gsm8k, "--output_dir", tmp_path, "--max_steps", 1,
        "--reward_funcs", "boxed_format_reward", "--eval_strategy", "steps", "--eval_steps", 1,
        "--num_eval_problems", 2, "--num_generations_eval", 2, "--per_device_eval_batch_size", 4)  # fmt: skip
    assert "no eval_pass@k: --pass_at_k_reward names the reward" in capsys.readouterr().out
    assert not any("eval_pass@1" in entry for entry in log_of(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward_funcs", "acuracy"], r"no reward 'acuracy'\. Use math_verify_reward, boxed_format_reward, acc"),
        (["--reward_funcs", "no_such_module:f"], "the module 'no_such_module' cannot be imported: No module named"),
        (["--reward_funcs", "no_such_module.f"], "the module 'no_such_module' cannot be imported: No module named"),
        (["--reward_funcs", "own_rewards:lenght"], r"own_rewards\.py has no 'lenght'; it has length\."),
        (["--reward_funcs", "own_rewards:limit"], "own_rewards:limit must be a function of the completions"),
        (["--reward_funcs", "own_rewards:length", "own_rewards.length"], "called differently.* got 'length' twice"),
        (["--reward_weights", "1", "0.5"], r"of the 1 reward function\(s\) \(math_verify_reward\), got \[1.0, 0.5\]"),
        (["--pass_at_k_reward", "accuracy_reward"], "must name one of the reward functions"),
        (["--reward_funcs", "accuracy_reward", "--model_name_or_path", "tiny_policy"], "reward reads messages"),
    ],
)
def test_mistakes_in_rewards_are_named_before_anything_loads(
    tmp_path, gsm8k, chat_model_dir, monkeypatch, arguments, message
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.setattr(train_math, "make_trainer", lambda *_: pytest.fail("the trainer is made"))
    with pytest.raises(ValueError, match=message):
        run("--output_dir", tmp_path, "--dataset_name", gsm8k, "--model_name_or_path", chat_model_dir, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chat_model_dir", "base_model_dir"])
def test_accelerate_launch_on_real_problems(tmp_path, request, shared_data, kind):
    """The command of the documentation, in a process of its own, on GSM8K."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file",
        str(EXAMPLES / "accelerate_configs" / "cpu.yaml"), str(EXAMPLES / "train_math.py"), *QUICK,
        "--model_name_or_path", str(request.getfixturevalue(kind)),
        "--dataset_name", str(shared_data / "gsm8k_train.jsonl"), "--output_dir", str(tmp_path / "out"),
        "--save_steps", "1", "--resume_from_checkpoint", "auto",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    for extra in ([], ["--max_steps", "3"]):
        result = subprocess.run([*command, *extra], env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    assert "7473 problems to train on" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "rise"), [(42, 0.20), (1, 0.15)])
def test_the_quickstart_learns(tmp_path, seed, rise):
    """`make train` with its own seed and another, fixed before it was run."""
    arguments = ["--config", str(train_math.QUICKSTART), "--seed", str(seed), "--output_dir", str(tmp_path)]
    summary = train_math.main(arguments)
    assert 0.35 <= summary["pass@1_before"] <= 0.60
    assert summary["pass@1_after"] - summary["pass@1_before"] >= rise


def test_a_report_under_zero_3_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"--report loads the model in one process.*`opo-trl evaluate`"):
        train_math.parse([*QUICK, "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path),
                          "--report", "--num_eval_problems", "4"])  # fmt: skip


def test_a_tracker_that_is_not_installed_is_refused_before_the_model_loads(tmp_path, monkeypatch, gsm8k):
    known = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr(known, lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=r"got wandb, which is not\. Install wandb, or pass --report_to none"):
        run(
            "--model_name_or_path",
            "no/model",
            "--dataset_name",
            gsm8k,
            "--output_dir",
            tmp_path,
            "--report_to",
            "wandb",
        )
    check_trackers(SimpleNamespace(report_to=["tensorboard", "own_tracker"]))


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert reporting.commit() is None
