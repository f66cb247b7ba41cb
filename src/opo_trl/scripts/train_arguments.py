"""The arguments of `train_math.py`, apart from the script: `opo-trl train --help` loads no trainer."""

import ast
import inspect
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig, ScriptArguments

from ..data.layouts import INSTRUCTION
from .command_line import ScriptParser
from .devices import training_defaults

# The model, the problems, and what only makes sense with a model or problems that are named.
ABOUT_NAMES = (
    "model_name_or_path", "model_revision", "dataset_name", "dataset_config", "dataset_train_split",
    "dataset_test_split", "eval_dataset_name", "prompt_column", "solution_column", "deduplicate_against", "pass_rates",
)  # fmt: skip

# What a run usually sets, which --help names before it describes some 250 arguments.
USUAL = (
    "model_name_or_path", "dataset_name", "output_dir", "num_generations", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_completion_length", "max_steps", "learning_rate", "eval_strategy",
    "logging_steps", "save_steps", "report_to",
)  # fmt: skip
_TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow", "swanlab", "comet_ml")  # packages of these names
USUALLY = f"A run usually sets {', '.join(f'--{name}' for name in USUAL)}."


@dataclass
class MathScriptArguments(ScriptArguments):
    """
    Arguments of this script, besides those of TRL's scripts.

    Args:
        dataset_name (`str`):
            Name on the Hub; a local .json, .jsonl, .parquet or .csv file; a saved dataset; or `arithmetic`, generated.
        prompt_column (`str`, *optional*):
            Column of the problem; by default the first of `problem`, `question` and `prompt` that exists. A dataset in
            `eval_dataset_name` that does not have it is read as by default; likewise `solution_column`.
        solution_column (`str`, *optional*):
            Column of the answer; by default the first of `answer` and `solution`. GSM8K's `####` is understood.
            Needed only if a reward function requires `solution`, or with `--report`.
        instruction (`str`, *optional*):
            Line added to each problem; an empty string adds nothing.
        system_prompt (`str`, *optional*):
            System message put before each problem.
        eval_dataset_name (`str`, *optional*):
            Where held-out problems come from, as `NAME`, `NAME:SPLIT` or `NAME:SPLIT:CONFIG`. The split is
            `dataset_test_split` unless given; `dataset_config` applies only where `NAME` is `dataset_name`. By default
            the split `dataset_test_split` of `dataset_name`, and for a local file or a saved dataset without splits
            problems held out of the training ones.
        num_train_problems (`int`, *optional*):
            Use at most this many problems for training.
        num_eval_problems (`int`, *optional*, defaults to `512`):
            Number of held-out problems.
        deduplicate_against (`list[str]`, *optional*):
            Evaluation sets, as `NAME`, `NAME:SPLIT` or `NAME:SPLIT:CONFIG`, the split `test` unless given: training
            problems that share `overlap_ngram_size` words in a row with one of theirs are dropped.
        overlap_ngram_size (`int`, *optional*, defaults to `13`):
            Number of words in a row that make an overlap.
        pass_rates (`str`, *optional*):
            Records of `evaluate_math.py` on the training problems: only problems with
            `min_pass_rate < pass rate < max_pass_rate` are trained on.
        min_pass_rate (`float`, *optional*, defaults to `0.0`):
            Problems must pass more often than this.
        max_pass_rate (`float`, *optional*, defaults to `1.0`):
            Problems must pass less often than this.
        reward_funcs (`list[str]`, *optional*):
            Reward functions: `math_verify_reward` (the default) and `boxed_format_reward` of this package;
            `accuracy_reward`, `reasoning_accuracy_reward`, `think_format_reward` and `get_soft_overlong_punishment`
            (with 1280 and 256 tokens) of TRL; or `module:function` of your own, which gets the columns that it has
            parameters for. `--reward_weights` weighs them.
        report (`bool`, *optional*, defaults to `False`):
            Measure held-out pass@1 before training and on the checkpoint loaded back, and write summary.json and
            curves.png. One process loads the complete model for it, so not with ZeRO-3; the others wait, but no longer
            than `ddp_timeout`.
        report_samples (`int`, *optional*, defaults to `4`):
            Completions per held-out problem in these two measurements.
    """

    prompt_column: str | None = field(default=None, metadata={"help": "Column of the problem."})
    solution_column: str | None = field(default=None, metadata={"help": "Column of the answer."})
    instruction: str = field(default=INSTRUCTION, metadata={"help": "Line added to each problem; '' adds nothing."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message put before each problem."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Where held-out problems come from (NAME, NAME:SPLIT, NAME:SPLIT:CONFIG). The split is "
            "dataset_test_split unless given; prompt_column and solution_column apply where it has them."
        },
    )
    num_train_problems: int | None = field(default=None, metadata={"help": "Train on at most this many problems."})
    num_eval_problems: int = field(default=512, metadata={"help": "Number of held-out problems."})
    deduplicate_against: list[str] | None = field(
        default=None, metadata={"help": "Evaluation sets (NAME, NAME:SPLIT, NAME:SPLIT:CONFIG) to keep out."}
    )
    overlap_ngram_size: int = field(default=13, metadata={"help": "Words in a row that make an overlap."})
    pass_rates: str | None = field(
        default=None, metadata={"help": "Records of evaluate_math.py: drop what always or never passes."}
    )
    min_pass_rate: float = field(default=0.0, metadata={"help": "Problems must pass more often than this."})
    max_pass_rate: float = field(default=1.0, metadata={"help": "Problems must pass less often than this."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions, math_verify_reward by default: boxed_format_reward; TRL's accuracy_reward, "
            "reasoning_accuracy_reward, think_format_reward, get_soft_overlong_punishment (1280 and 256 tokens); or "
            "module:function. --reward_weights weighs them."
        },
    )
    report: bool = field(default=False, metadata={"help": "Measure pass@1 before and after; write summary and plot."})
    report_samples: int = field(default=4, metadata={"help": "Completions per held-out problem in these."})


def check_names(dataset: str | None, model: str | None) -> None:
    """
    Refuse a command line that names no problems, or no model, before anything is read.

    Raises:
        ValueError: If one of them is `None`.
    """
    if dataset is None:
        raise ValueError(
            "--dataset_name must name the problems to train on, got nothing. Pass a Hub name or a local file, or leave "
            "--model_name_or_path and --config out as well for the quickstart."
        )
    if model is None:
        raise ValueError(
            "--model_name_or_path must name a causal language model, got nothing. Pass a Hub name, a directory, or "
            "tiny_policy, which is part of this package, or leave --dataset_name and --config out as well for the "
            "quickstart."
        )


def check_not_streamed(script_args: MathScriptArguments) -> None:
    """
    Refuse an argument of TRL's scripts that this one would ignore.

    Raises:
        ValueError: If `dataset_streaming` is set.
    """
    if script_args.dataset_streaming:
        raise ValueError(
            "--dataset_streaming must be left out: this script counts, checks and holds out problems, so it loads all "
            "of them. In Python, OPOTrainer takes a streamed dataset."
        )


def measures_held_out(script_args: MathScriptArguments, args: Any) -> bool:
    """Whether a run with these arguments of the script and of the trainer needs held-out problems."""
    return args.eval_strategy != "no" or script_args.report


def check_held_out(script_args: MathScriptArguments, args: Any, on_command_line: Set[str]) -> None:
    """
    Refuse a number of held-out problems for a run that measures none.

    Args:
        script_args ([`MathScriptArguments`]):
            Arguments of the script.
        args ([`OPOConfig`]):
            Arguments of the trainer.
        on_command_line (`Set[str]`):
            Names of the arguments on the command line; a config file may have more than a run needs.

    Raises:
        ValueError: If `num_eval_problems` is on the command line, and there is neither an evaluation nor a report.
    """
    if (
        script_args.num_eval_problems
        and not measures_held_out(script_args, args)
        and "num_eval_problems" in on_command_line
    ):
        raise ValueError(
            f"--num_eval_problems {script_args.num_eval_problems} needs --eval_strategy steps or --report, without "
            "which no problem is held out. Add one of them, or leave --num_eval_problems out."
        )


def check_report(script_args: MathScriptArguments) -> None:
    """
    Refuse to measure pass@1 in one process where transformers would shard the model across all of them.

    To be called when the trainer's arguments are built, which reads DeepSpeed's configuration.

    Args:
        script_args ([`MathScriptArguments`]):
            Arguments of the script.

    Raises:
        ValueError: If `report` is set under ZeRO-3.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if script_args.report and is_deepspeed_zero3_enabled():
        raise ValueError(
            "--report loads the model in one process, which waits for the others under ZeRO-3: it must not be set "
            "there. Measure with `opo-trl evaluate`, before and after, or use ZeRO-2 or FSDP."
        )


def check_trackers(args: Any) -> None:
    """
    Refuse a tracker that is not installed: transformers does so after it has loaded the model.

    Args:
        args ([`OPOConfig`]):
            Arguments of the trainer.

    Raises:
        ValueError: With the packages that are missing.
    """
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    missing = [name for name in args.report_to if name in _TRACKERS and name not in available]
    if missing:
        raise ValueError(
            f"--report_to must name trackers that are installed, got {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not. Install {' and '.join(missing)}, or pass --report_to none."
        )


def make_parser(**options: str) -> ScriptParser:
    """Make the parser of the script's command line; the options are those of `argparse.ArgumentParser`."""
    from .. import OPOConfig  # TRL's configuration, which it extends, takes seconds to import
    from ..config import CONTRACT

    parser = ScriptParser((MathScriptArguments, OPOConfig, ModelConfig), training_defaults, epilog=USUALLY, **options)
    own = inspect.get_annotations(OPOConfig)  # fields whose help lists the allowed values
    choices = {rule.field: rule.choices for rule in CONTRACT if rule.field not in own}
    for action in parser._actions:
        if action.dest == "resume_from_checkpoint":
            action.help = (
                "Checkpoint to resume from: a directory; 'true' for the latest complete one in --output_dir; 'auto' "
                "for that one, or a start from scratch if there is none."
            )
        elif action.dest in choices:
            action.help = f"{action.help} OPO accepts only {choices[action.dest]}."
    return parser


def make_quick_parser(**options: Any) -> ScriptParser:
    """Make a parser without the fields of TRL's and transformers' configurations: it describes, and parses nothing."""
    return ScriptParser((MathScriptArguments, own_fields_of_opo_config(), ModelConfig), epilog=USUALLY, **options)


def own_fields_of_opo_config() -> Any:
    """The fields that `OPOConfig` defines itself, as a class of its name, from its source: nothing is imported."""
    source = Path(__file__).parents[1] / "config.py"
    nodes = ast.parse(source.read_text(encoding="utf-8")).body
    (definition,) = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name == "OPOConfig"]
    definition.bases = []
    definition.body = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
    namespace = {"dataclass": dataclass, "field": field, "__name__": "opo_trl.config"}
    exec(compile(ast.Module([definition], []), str(source), "exec"), namespace)
    return namespace["OPOConfig"]
