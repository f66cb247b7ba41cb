"""The arguments of `evaluate_math.py`, apart from the script: `opo-trl evaluate --help` loads no model code."""

from dataclasses import dataclass, field

from ..data.layouts import INSTRUCTION
from .command_line import ScriptParser
from .devices import evaluation_defaults

BACKENDS = ("auto", "vllm", "transformers")


@dataclass
class EvaluationArguments:
    """
    Arguments of this script.

    Args:
        models (`list[str]`):
            Names or directories of models or LoRA adapters; the first is the one that others are compared with.
        datasets (`list[str]`):
            `NAME`, `NAME:SPLIT` or `NAME:SPLIT:CONFIG`, where `NAME` is a dataset on the Hub, a local file, a saved
            dataset, or `arithmetic`. The split is `test` unless given, for a local file `train`.
        output_dir (`str`):
            Where records, summary.json, table.md and the plots go.
        base_model (`str`, *optional*):
            Starting policy. With it, entropy and KL(policy || base) are measured.
        num_samples (`list[int]`, *optional*, defaults to `[8]`):
            Completions per problem: one number for all datasets, or one for each.
        temperature (`float`, *optional*, defaults to `0.6`):
            Sampling temperature, above 0. No tail is cut off (top-p 1).
        max_new_tokens (`int`, *optional*):
            Longest completion, in tokens. By default 4096, or what the context of every model leaves after the longest
            prompt, if that is less.
        num_problems (`int`, *optional*):
            Use only this many problems of each dataset, the first ones; for `arithmetic`, how many are generated
            (512 by default). By default all problems are used.
        category_columns (`list[str]`, *optional*):
            Columns for tables per category. By default those of `subject`, `type`, `problem_type`, `level` and `source`
            that a dataset has, with 2 to 30 values.
        last_checkpoints (`int`, *optional*, defaults to `0`):
            Measure this many of the last `checkpoint-*` of a training directory and average them; `0` takes its final
            model.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions sampled at a time by one process; with vLLM, completions in flight.
        scoring_batch_size (`int`, *optional*, defaults to `16`):
            Completions at a time for entropy and KL.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        instruction, system_prompt, prompt_column, solution_column:
            As in `train_math.py`.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"vllm"`, `"transformers"`, or `"auto"`: vLLM where it is installed.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the models; `"float32"` where no accelerator is found.
    """

    models: list[str] = field(metadata={"help": "Models, checkpoints, training directories or adapters."})
    datasets: list[str] = field(metadata={"help": "NAME, NAME:SPLIT or NAME:SPLIT:CONFIG of each dataset."})
    output_dir: str = field(metadata={"help": "Where records, tables and plots go."})
    base_model: str | None = field(default=None, metadata={"help": "Starting policy, for entropy and KL."})
    num_samples: list[int] = field(default_factory=lambda: [8], metadata={"help": "Completions per problem."})
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest completion, in tokens; by default 4096, or what the context leaves."}
    )
    num_problems: int | None = field(
        default=None, metadata={"help": "Use only this many problems of each dataset, the first ones."}
    )
    category_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns for tables per category, such as level."}
    )
    last_checkpoints: int = field(default=0, metadata={"help": "Average this many of the last checkpoints of a run."})
    batch_size: int = field(default=64, metadata={"help": "Completions sampled at a time by one process."})
    scoring_batch_size: int = field(default=16, metadata={"help": "Completions at a time for entropy and KL."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    instruction: str = field(default=INSTRUCTION, metadata={"help": "Line added to each problem; '' adds nothing."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message put before each problem."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the problem."})
    solution_column: str | None = field(default=None, metadata={"help": "Column of the answer."})
    backend: str = field(default="auto", metadata={"help": "auto, vllm or transformers."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the models."})

    def __post_init__(self) -> None:
        if len(self.num_samples) == 1:
            self.num_samples = self.num_samples * len(self.datasets)
        if len(self.num_samples) != len(self.datasets) or min(self.num_samples) < 1:
            raise ValueError(
                f"--num_samples must be one number for all {len(self.datasets)} datasets or one for each, at least 1, "
                f"got {self.num_samples}."
            )
        if self.temperature <= 0:
            raise ValueError(f"--temperature must be above 0, got {self.temperature}.")
        for name in ("max_new_tokens", "num_problems"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}. Leave it out for the default.")
        if self.backend not in BACKENDS:
            raise ValueError(f"--backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}.")


def make_parser(**options: str) -> ScriptParser:
    """Make the parser of the script's command line; the options are those of `argparse.ArgumentParser`."""
    return ScriptParser((EvaluationArguments,), evaluation_defaults, **options)
