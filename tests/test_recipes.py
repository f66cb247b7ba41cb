"""Every recipe of `examples/configs` passes the parser of the script that it is for, and says what it claims."""

import re
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig, TrlParser

from opo_trl import OPOConfig
from opo_trl.scripts import evaluate_math, train_math

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RECIPES = [*sorted((EXAMPLES / "configs").glob("*.yaml")), train_math.QUICKSTART, evaluate_math.QUICKSTART]
ON_A_CPU = ["--use_cpu", "--bf16", "false"]
# Recipe: GPUs, questions and completions per question in one step, longest completion, start of the model's name.
PAPER = {
    "paper_a": (8, 256, 16, 8192, "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
    "paper_b": (8, 256, 8, 24576, "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
    "paper_app_b": (8, 256, 8, 8192, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"),
}


def training_arguments(path):
    parser = TrlParser((train_math.MathScriptArguments, OPOConfig, ModelConfig))
    return parser.parse_args_and_config(["--config", str(path), *ON_A_CPU])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_accepted_whole(path):
    """The parser raises for a field that no longer exists; OPOConfig for one that contradicts OPO."""
    settings = yaml.safe_load(path.read_text())
    if path.stem.startswith("evaluate"):
        parsed = TrlParser((evaluate_math.EvaluationArguments,)).parse_args_and_config(["--config", str(path)])
    else:
        parsed = training_arguments(path)
    values = {name: value for part in parsed for name, value in vars(part).items()}
    for name, value in settings.items():
        if name not in ("bf16", "report_to", "num_samples"):  # overridden here; lists after parsing
            assert values[name] == value, name


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_are_the_papers_settings(name):
    gpus, questions, completions, longest, model = PAPER[name]
    path = next(path for path in RECIPES if path.stem == name)
    script_args, config, model_args = training_arguments(path)
    assert config.generation_batch_size * gpus == questions * completions  # the batch of one process here
    assert (config.num_generations, config.max_completion_length) == (completions, longest)
    assert model_args.model_name_or_path == model
    assert (config.temperature, config.top_p, config.learning_rate, config.max_steps) == (0.6, 1.0, 1e-6, 500)
    assert script_args.deduplicate_against
    # Each value says where it comes from.
    lines = [line for line in path.read_text().splitlines() if re.match(r"\w+:", line)]
    unsaid = [line for line in lines if not re.search(r"# .", line) and not line.startswith("output_dir")]
    assert not unsaid


def test_the_papers_evaluation():
    path = next(path for path in RECIPES if path.stem == "evaluate_paper")
    (args,) = TrlParser((evaluate_math.EvaluationArguments,)).parse_args_and_config(["--config", str(path)])
    assert args.num_samples == [8, 16, 16]
    assert (args.temperature, args.max_new_tokens, args.last_checkpoints) == (0.6, 32_768, 5)
