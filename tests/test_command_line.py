"""The scripts' command line: complete names, the closest one for a mistake, and what a CPU alone makes them choose."""

import pytest
import yaml
from transformers.debug_utils import DebugOption
from trl import ModelConfig

from opo_trl import OPOConfig
from opo_trl.scripts import devices, evaluate_math, train_math
from opo_trl.scripts.command_line import ScriptParser
from opo_trl.scripts.train_arguments import make_parser

COMMON = ["--output_dir", "x", "--report_to", "none"]


@pytest.fixture(autouse=True)
def plain_launch(monkeypatch):
    """No launcher has set anything, and there is no accelerator."""
    for variable in ("USE_CPU", "MIXED_PRECISION", "USE_DEEPSPEED", "USE_FSDP"):
        monkeypatch.delenv(f"ACCELERATE_{variable}", raising=False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


def parse(*arguments):
    """The training configuration of a command line, and what was chosen for it."""
    parser = ScriptParser((train_math.MathScriptArguments, OPOConfig, ModelConfig), devices.training_defaults)
    return parser.parse_args_and_config([*COMMON, *map(str, arguments)])[1], parser.chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1e-5"], r"argument\(s\): --learning_rat \(did you mean --learning_rate\?\)\. --help"),
        (["--learning-rat=1e-5"], r"--learning-rat \(did you mean --learning_rate\?\)"),
        (["-max_steps", "3"], r"-max_steps \(did you mean --max_steps\?\)"),
        (["--epochs", "2"], r"--epochs \(did you mean --num_train_epochs\?\)"),
        (["--model", "m"], r"--model \(did you mean --model_init_kwargs or --model_name_or_path or"),
        (["--max_step", "3", "--xyzzy"], r"--max_step \(did you mean --max_steps\?\), --xyzzy\. --help"),
        (["train.jsonl"], r"Unknown argument\(s\): train\.jsonl\. --help"),
        (["--max_steps", "many"], "--max_steps/--max-steps: invalid int value: 'many'"),
        (["--config"], "--config must be followed by the path"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_with_what_was_meant(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(*arguments)
    assert len(str(error.value)) < 300


def test_a_mistake_in_the_config_file_is_named_before_the_configuration_is_built(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"learning_rat": 1e-5, "max_steps": 3}))
    monkeypatch.setattr(OPOConfig, "__post_init__", lambda self: pytest.fail("built"))
    with pytest.raises(ValueError, match=r"config file: learning_rat \(did you mean learning_rate\?\)\.$"):
        parse("--config", path)
    path.write_text("max_steps: [3")
    with pytest.raises(ValueError, match="--config must name a YAML file that can be read"):
        parse("--config", path)
    with pytest.raises(ValueError, match=r"there is no .*no\.yaml"):
        parse("--config", tmp_path / "no.yaml")


def test_one_value_in_the_config_file_is_a_list_of_one(tmp_path):
    """As on the command line; the letters of a name are not names."""
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump({"reward_funcs": "my_rewards:close", "reward_weights": 0.5, "debug": "underflow_overflow"})
    )
    script, config, model = make_parser().parse_args_and_config([*COMMON, "--config", str(path)])
    assert (script.reward_funcs, config.reward_weights, config.debug) == (
        ["my_rewards:close"],
        [0.5],
        [DebugOption.UNDERFLOW_OVERFLOW],
    )
    for modules, expected in (("all-linear", "all-linear"), (["q_proj", "v_proj"], ["q_proj", "v_proj"])):
        path.write_text(yaml.safe_dump({"lora_target_modules": modules}))
        *_, model = make_parser().parse_args_and_config([*COMMON, "--config", str(path)])
        assert model.lora_target_modules == expected
    path.write_text(yaml.safe_dump({"models": "a/b", "datasets": "openai/gsm8k:test:main", "num_samples": 8}))
    (args,) = evaluate_math.make_parser().parse_args_and_config(["--config", str(path), "--output_dir", "x"])
    assert (args.models, args.datasets, args.num_samples) == (["a/b"], ["openai/gsm8k:test:main"], [8])


def test_the_config_file_may_follow_an_equals_sign(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"max_steps": 3, "seed": 4}))
    assert parse(f"--config={path}", "--seed", 5)[0].max_steps == 3
    assert parse(f"--config={path}", "--seed", 5)[0].seed == 5


@pytest.mark.parametrize("flag", ["--output", "--temp", "--num_problem"])
def test_evaluate_math_refuses_abbreviations(tmp_path, flag):
    with pytest.raises(ValueError, match=rf"Unknown argument\(s\): {flag} "):
        evaluate_math.main(["--models", "m", "--datasets", "d", "--output_dir", str(tmp_path), flag, "1"])


def test_without_an_accelerator_training_is_on_the_cpu_in_float32():
    config, chosen = parse()
    assert (config.use_cpu, config.bf16, config.gradient_checkpointing) == (True, False, False)
    assert devices.describe_choice(chosen) == (
        "No accelerator found: using use_cpu=True, bf16=False, gradient_checkpointing=False. To override: "
        "--use_cpu, --bf16, --gradient_checkpointing."
    )


def test_what_the_user_sets_is_not_chosen(tmp_path, monkeypatch):
    config, chosen = parse("--bf16", "true", "--gradient_checkpointing")
    assert (config.use_cpu, config.bf16, config.gradient_checkpointing) == (True, True, True)
    assert chosen == {"use_cpu": True}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"use_cpu": True, "bf16": True}))
    config, chosen = parse("--config", path)
    assert (config.bf16, chosen) == (True, {"gradient_checkpointing": False})
    config, chosen = parse("--use_cpu", "--bf16", "false", "--no_gradient_checkpointing")
    assert devices.describe_choice(chosen) is None
    if hasattr(config, "activation_checkpointing"):  # the field's newer name
        assert parse("--activation_checkpointing")[0].gradient_checkpointing
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config, chosen = parse()
    assert config.bf16
    assert "bf16" not in chosen


def test_with_an_accelerator_nothing_is_chosen(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert devices.training_defaults(set()) == devices.evaluation_defaults(set()) == {}
    with pytest.raises(ValueError, match="bf16"):  # transformers' own, as there is none
        parse()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as `accelerate launch --cpu` does
    config, chosen = parse()
    assert (config.use_cpu, config.bf16) == (True, False)
    assert devices.describe_choice(chosen).startswith("ACCELERATE_USE_CPU is set: using use_cpu=True")


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_an_engine_is_not_replaced_by_plain_data_parallelism(monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    assert devices.training_defaults(set()) == {}


def test_the_configuration_itself_keeps_the_behaviour_of_transformers():
    with pytest.raises(ValueError, match="bf16"):
        OPOConfig("x", report_to="none")


def test_a_negative_option_has_its_own_help():
    helps = {action.option_strings[0]: action.help for action in make_parser()._actions}
    assert helps["--no_skip_uninformative"] == "Sets --skip_uninformative to false."
    assert "same gradient in less time" in helps["--skip_uninformative"]


def test_evaluation_without_an_accelerator_is_in_float32():
    parser = ScriptParser((evaluate_math.EvaluationArguments,), devices.evaluation_defaults)
    arguments = ["--models", "m", "--datasets", "d", "--output_dir", "x"]
    assert parser.parse_args_and_config(arguments)[0].dtype == "float32"
    assert parser.chosen == {"dtype": "float32"}
    assert parser.parse_args_and_config([*arguments, "--dtype", "bfloat16"])[0].dtype == "bfloat16"
    assert parser.chosen == {}
