r"""
Measure models on math problems: pass@k, maj@k, diversity, length, entropy and KL, with intervals.

With no arguments it measures the tiny policy of this repository before and after the quickstart (`make train`), on a
CPU, in less than a minute:

    opo-trl evaluate

The paper's evaluation, on one GPU or several:

    opo-trl evaluate \
        --models deepseek-ai/DeepSeek-R1-Distill-Qwen-7B outputs/grpo outputs/opo --last_checkpoints 5 \
        --base_model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B \
        --datasets HuggingFaceH4/MATH-500:test HuggingFaceH4/aime_2024:train yentinglin/aime_2025:train \
        --num_samples 8 16 16 --temperature 0.6 --max_new_tokens 32768 --batch_size 512 --output_dir outputs/tables

Samples are drawn by vLLM where it is installed and by transformers otherwise. Records are appended as they come, so
that the same command resumes an interrupted run, with any number of processes.

Where no accelerator is found, models are loaded in float32 unless `--dtype` is set, and the script prints that. An
error before the first completion ends it with the message alone; `OPO_DEBUG=1` keeps the traceback.
"""

import gc
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..data.layouts import CATEGORY_COLUMNS
from ..evaluation import Record, average, problem_metrics
from ..evaluation.diversity import check_self_bleu
from ..evaluation.records_file import append_records, merge_parts, part_path, read_parts, read_records
from ..evaluation.sampling import TransformersSampler, record_seed, tokenize_prompt
from ..evaluation.scoring import score_completions
from ..on_policy.preflight import explain_missing_model
from .devices import describe_choice, why_on_cpu
from .evaluation_arguments import EvaluationArguments, make_parser
from .evaluation_report import Metrics, write_report
from .evaluation_tables import examples_without_answer, truncation_warning
from .judging import judge, shift
from .policies import Checkpoint, find_checkpoints, has_file, short_name
from .problems import fit_to_tokenizer, load_problems, parse_dataset
from .quickstart import NOTE, is_quickstart, or_quickstart
from .setup_phase import SetupPhase, on_all_ranks

# Models, datasets, and what only makes sense with those that are named.
ABOUT_NAMES = ("models", "datasets", "base_model", "last_checkpoints", "prompt_column", "solution_column")
QUICKSTART = Path(__file__).with_name("evaluate_quickstart.yaml")
_LONGEST_BY_DEFAULT = 4_096  # tokens; ends nearly all answers of instruct models, not those of reasoning models
_MOST_CATEGORIES = 30  # a column of more values is not one of categories


@dataclass(frozen=True)
class Task:
    """A dataset to measure on."""

    label: str
    problems: Dataset  # prompt, solution, id
    num_samples: int
    categories: dict[str, dict[str, str]]  # column -> problem id -> category


def load_tasks(args: EvaluationArguments) -> list[Task]:
    """Load every dataset."""
    tasks = []
    columns = CATEGORY_COLUMNS if args.category_columns is None else args.category_columns
    for specification, num_samples in zip(args.datasets, args.num_samples, strict=True):
        name, split, config = parse_dataset(specification)
        problems = load_problems(
            name,
            split,
            config=config,
            prompt_column=args.prompt_column,
            solution_column=args.solution_column,
            instruction=args.instruction,
            system_prompt=args.system_prompt,
            num_arithmetic=args.num_problems or 512,
            keep_columns=columns,
        )
        if args.num_problems is not None:
            problems = problems.select(range(min(args.num_problems, len(problems))))
        label = Path(name).stem if Path(name).is_file() else short_name(specification)
        kept = [column for column in columns if column in problems.column_names]
        categories = find_categories(problems, kept, all_columns=args.category_columns is not None)
        tasks.append(Task(label, problems.remove_columns(kept), num_samples, categories))
    named = {column for task in tasks for column in task.categories}
    if args.category_columns is not None and (missing := [name for name in columns if name not in named]):
        raise ValueError(
            f"--category_columns must name columns of a dataset, and none has {', '.join(missing)}. Leave it out "
            "for the known columns."
        )
    return tasks


def find_categories(problems: Dataset, columns: Sequence[str], all_columns: bool) -> dict[str, dict[str, str]]:
    """Category of each problem in each column; unless all columns are asked for, of those with 2 to 30 categories."""
    found = {}
    for column in columns:
        values = ["(none)" if value is None else str(value) for value in problems[column]]
        if all_columns or 2 <= len(set(values)) <= _MOST_CATEGORIES:
            found[column] = dict(zip(problems["id"], values, strict=True))
    return found


def complete(
    path: Path,
    units: list[list[tuple[int, int]]],
    ids: Sequence[str],
    work: Callable[[list[tuple[int, int]]], Sequence[Any]],
    what: str,
    state: PartialState,
) -> None:
    """
    Process the units of work that are not done yet, distributed over the processes, and append the records to a file.

    A unit is a list of (problem, sample) numbers. One process computes it, or computes it again, completely and in one
    batch: its records depend neither on the number of processes nor on where an earlier run was interrupted.
    """
    there = {(record["problem"], record["sample"]) for record in read_parts(path)}
    left = [unit for unit in units if not all((ids[problem], sample) in there for problem, sample in unit)]
    state.wait_for_everyone()  # all have seen the same records before any of them writes
    start = time.perf_counter()
    mine = left[state.process_index :: state.num_processes]
    for number, unit in enumerate(mine, start=1):
        append_records(part_path(path, state.process_index), work(unit))
        if number % max(len(mine) // 10, 1) == 0 or number == len(mine):
            seconds = (time.perf_counter() - start) / number * (len(mine) - number)
            state.print(f"  {path.stem}: {number}/{len(mine)} batches of {what}, {seconds:.0f} s left")
    state.wait_for_everyone()
    if state.is_main_process:
        merge_parts(path, ids)
    state.wait_for_everyone()


class Policy:
    """
    A checkpoint with its tokenizer; weights and engines are loaded when they are first needed.

    `tasks` are those that it samples; their longest prompt determines the longest sequence of a vLLM engine.
    """

    def __init__(
        self, checkpoint: Checkpoint, args: EvaluationArguments, device: torch.device, tasks: Sequence[Task] = ()
    ) -> None:
        self.checkpoint, self.args, self.device, self.tasks = checkpoint, args, device, tasks
        has_own = not checkpoint.is_adapter or has_file(checkpoint.path, "tokenizer_config.json")
        source = checkpoint.path if has_own else checkpoint.base
        with explain_missing_model(source):
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        self._model: Any = None
        self._sampler: Any = None

    @property
    def context(self) -> int | None:
        """The longest sequence that the model's config allows; `None` if it does not name one."""
        config = AutoConfig.from_pretrained(self.checkpoint.base).get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = AutoModelForCausalLM.from_pretrained(self.checkpoint.base, dtype=self.args.dtype)
            if self.checkpoint.is_adapter:
                self._model = PeftModel.from_pretrained(self._model, self.checkpoint.path).merge_and_unload()
            self._model.to(self.device).eval()
        return self._model

    @property
    def sampler(self) -> Any:
        if self._sampler is None:
            settings: dict[str, Any] = {
                "max_new_tokens": self.args.max_new_tokens,
                "temperature": self.args.temperature,
            }
            if use_vllm(self.args):
                from ..evaluation.vllm_sampling import VllmSampler

                self._sampler = VllmSampler(
                    self.checkpoint.base,
                    self.tokenizer,
                    adapter=self.checkpoint.path if self.checkpoint.is_adapter else None,
                    dtype=self.args.dtype,
                    max_model_len=self._longest_sequence(),
                    **settings,
                )
            else:
                self._sampler = TransformersSampler(self.model, self.tokenizer, **settings)
        return self._sampler

    def _longest_sequence(self) -> int:
        """Tokens of the longest prompt and completion: vLLM would otherwise reserve memory for the full context."""
        longest = max(_longest_prompt(self, task) for task in self.tasks) + cast(int, self.args.max_new_tokens)
        return longest if self.context is None else min(longest, self.context)


def records_path(args: EvaluationArguments, checkpoint: Checkpoint, task: Task) -> Path:
    return Path(args.output_dir) / "records" / checkpoint.label / f"{task.label}.jsonl"


def sample_task(policy: Policy, task: Task, args: EvaluationArguments, state: PartialState, setup: SetupPhase) -> None:
    """Sample and judge the completions of one checkpoint on one dataset."""
    problems = list(fit_to_tokenizer(task.problems, policy.tokenizer))
    ids = [problem["id"] for problem in problems]
    prompts = [tokenize_prompt(policy.tokenizer, problem["prompt"]) for problem in problems]
    # Prompts of similar lengths share a batch, the longest first, as they take longest.
    order = sorted(range(len(ids)), key=lambda number: (-len(prompts[number]), number))
    rows = [(number, sample) for number in order for sample in range(task.num_samples)]
    warned = False

    def work(unit: list[tuple[int, int]]) -> list[Record]:
        nonlocal warned
        seeds = [record_seed(args.seed, task.label, ids[number], sample) for number, sample in unit]
        sampler = policy.sampler  # loads the model
        setup.end()
        completions = sampler.sample([prompts[number] for number, _ in unit], seeds)
        share = sum(completion.truncated for completion in completions) / len(completions)
        # A run of hours should not end before this is known.
        if not warned and (warning := truncation_warning(share, cast(int, args.max_new_tokens))):
            state.print(f"  warning: {task.label}, a batch of {len(completions)}: {warning}")
            warned = True
        return judge([(problems[number], sample) for number, sample in unit], completions)

    path = records_path(args, policy.checkpoint, task)
    facts = {**_sampling_facts(policy.checkpoint, args), "problems": _digest(problems), "samples": task.num_samples}
    check_settings(path, facts, state)
    complete(path, _cut(rows, args.batch_size), ids, work, "sampling", state)


def score_task(
    policy: Policy, base: Policy, task: Task, records: list[Any], args: EvaluationArguments, state: PartialState
) -> list[Any]:
    """Entropy, and KL to the base model, of the completions of one checkpoint on one dataset."""
    problems = fit_to_tokenizer(task.problems, policy.tokenizer)
    ids = list(problems["id"])
    prompts = [tokenize_prompt(policy.tokenizer, prompt) for prompt in problems["prompt"]]
    sampled = {(record["problem"], record["sample"]): record["token_ids"] for record in records}
    rows = [(number, sample) for number in range(len(ids)) for sample in range(task.num_samples)]
    rows.sort(key=lambda row: (-len(prompts[row[0]]) - len(sampled[ids[row[0]], row[1]]), row))

    def work(unit: list[tuple[int, int]]) -> list[dict[str, Any]]:
        batch = [prompts[number] for number, _ in unit], [sampled[ids[number], sample] for number, sample in unit]
        own, others = (score_completions(one.model, *batch, temperature=args.temperature) for one in (policy, base))
        return [
            {
                "problem": ids[number],
                "sample": sample,
                **shift(scores, other),
            }
            for (number, sample), scores, other in zip(unit, own, others, strict=True)
        ]

    path = Path(args.output_dir) / "scores" / policy.checkpoint.label / f"{task.label}.jsonl"
    facts = {
        **_sampling_facts(policy.checkpoint, args),
        "base": base.checkpoint.fingerprint(),
        "completions": _digest(records),
    }
    check_settings(path, facts, state)
    complete(path, _cut(rows, args.scoring_batch_size), ids, work, "scoring", state)
    return [{**record, **score} for record, score in zip(records, read_records(path), strict=True)]


def check_settings(path: Path, facts: dict[str, Any], state: PartialState) -> None:
    """Raise on all processes if the existing records are of other weights, problems or settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".settings.json")
    facts = json.loads(json.dumps(facts))
    if written.is_file():
        before = json.loads(written.read_text())
        if before != facts:
            changed = sorted(name for name in facts.keys() | before.keys() if facts.get(name) != before.get(name))
            raise ValueError(
                f"{path} must be continued with the settings that it was begun with; changed: {', '.join(changed)}. "
                "Use another --output_dir, or delete these records."
            )
    state.wait_for_everyone()
    if state.is_main_process and not written.is_file():
        written.write_text(json.dumps(facts, indent=2) + "\n")


def use_vllm(args: EvaluationArguments) -> bool:
    return args.backend == "vllm" or (args.backend == "auto" and importlib.util.find_spec("vllm") is not None)


def claim_gpu(state: PartialState) -> None:
    """Make only its own GPU visible to this process: its vLLM engine takes the first that is visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = state.device.index or 0
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)


def choose_max_new_tokens(
    policies: Sequence[Policy], tasks: Sequence[Task], given: int | None
) -> tuple[int, str | None]:
    """
    Find the longest completion, the same for all models, and what to print about it.

    Raises:
        ValueError: If a prompt fills the context of a model and no length is given.
    """
    context, model = min(
        ((policy.context, policy.checkpoint.label) for policy in policies if policy.context is not None),
        default=(None, ""),
    )
    if context is None:
        chosen = given or _LONGEST_BY_DEFAULT
        return chosen, None if given else f"max_new_tokens={chosen}, the default."
    longest = max(_longest_prompt(policy, task) for policy in policies for task in tasks)
    left = context - longest
    why = f"the context of {model} is {context} tokens and the longest prompt {longest}"
    if given is not None:
        return given, f"warning: max_new_tokens={given} does not fit: {why}." if given > left else None
    if left < 1:
        raise ValueError(f"A prompt must leave tokens for the completion: {why}. Use a model with a longer context.")
    chosen = min(_LONGEST_BY_DEFAULT, left)
    return chosen, f"max_new_tokens={chosen}, the default: {why}."


def _longest_prompt(policy: Policy, task: Task) -> int:
    problems = fit_to_tokenizer(task.problems, policy.tokenizer)
    return max(len(tokenize_prompt(policy.tokenizer, prompt)) for prompt in problems["prompt"])


def check_names(what: str, names: Sequence[str], given: Sequence[str]) -> None:
    """Check that names differ, since they become folders and rows of a table."""
    if len(set(names)) != len(given):
        raise ValueError(f"--{what} must differ from each other in name, got {given}.")


def sample_all(
    checkpoints: Sequence[Checkpoint],
    tasks: list[Task],
    args: EvaluationArguments,
    state: PartialState,
    setup: SetupPhase,
) -> None:
    """Sample from every checkpoint before any is scored: an engine needs the memory that scoring would hold."""
    for checkpoint in checkpoints:
        state.print(f"sampling from {checkpoint.label}")
        policy = Policy(checkpoint, args, state.device, tasks)
        for task in tasks:
            sample_task(policy, task, args, state, setup)
        del policy
        gc.collect()
        torch.cuda.empty_cache()


@dataclass
class Measured:
    """
    Metrics of records, and some of their completions.

    Args:
        metrics (`dict`):
            method -> checkpoint -> dataset -> metrics, on the main process.
        examples (`dict`):
            method -> dataset -> completions without an answer, of the method's last checkpoint.
        unscorable (`int`):
            How many completions have no reward.
    """

    metrics: dict[str, dict[str, dict[str, Metrics]]] = field(default_factory=dict)
    examples: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    unscorable: int = 0


def measure_all(
    methods: dict[str, list[Checkpoint]],
    base: Policy | None,
    tasks: list[Task],
    args: EvaluationArguments,
    state: PartialState,
) -> Measured:
    """Compute the metrics of every checkpoint on every dataset."""
    measured = Measured()
    for method, checkpoints in methods.items():
        measured.metrics[method], measured.examples[method] = {}, {}
        for checkpoint in checkpoints:
            state.print(f"measuring {checkpoint.label}")
            policy = Policy(checkpoint, args, state.device)
            found = measured.metrics[method][checkpoint.label] = {}
            for task in tasks:
                records = read_records(records_path(args, checkpoint, task))
                measured.unscorable += sum(record["reward"] is None for record in records)
                measured.examples[method][task.label] = examples_without_answer(records)
                if base is not None:
                    records = score_task(policy, base, task, records, args, state)
                if state.is_main_process:
                    found[task.label] = problem_metrics(records)
    return measured


def load_inputs(
    args: EvaluationArguments, state: PartialState
) -> tuple[dict[str, list[Checkpoint]], list[Task], Policy | None]:
    """Find the checkpoints by method, and load datasets and tokenizers, whose errors then surface before sampling."""
    if max(args.num_samples) > 1:
        check_self_bleu()
    methods = {short_name(model): find_checkpoints(model, args.last_checkpoints) for model in args.models}
    tasks = load_tasks(args)
    check_names("models", list(methods), args.models)
    check_names("datasets", [task.label for task in tasks], args.datasets)
    policies = [Policy(one, args, state.device) for checkpoints in methods.values() for one in checkpoints]
    limit, reason = choose_max_new_tokens(policies, tasks, args.max_new_tokens)
    if reason is not None:
        state.print(reason)
    args.max_new_tokens = limit
    state.print(f"temperature={args.temperature:g}, top-p 1, max_new_tokens={limit}, num_samples={args.num_samples}")
    base = None
    if args.base_model is not None:
        (base_checkpoint,) = find_checkpoints(args.base_model, last=0)
        base = Policy(base_checkpoint, args, state.device)
    return methods, tasks, base


def main(arguments: list[str] | None = None, setup: SetupPhase | None = None) -> dict[str, Any] | None:
    start = time.perf_counter()
    setup = setup or SetupPhase()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    (args,) = parser.parse_args_and_config(or_quickstart(arguments, ABOUT_NAMES, QUICKSTART))
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    on_cpu = why_on_cpu() is not None or not torch.cuda.is_available()
    # One process may wait hours for another's last batch.
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    if arguments and is_quickstart(arguments, ABOUT_NAMES):
        state.print(NOTE)
    if parser.chosen:
        state.print(describe_choice(parser.chosen))
    if state.device.type == "cuda" and use_vllm(args):
        claim_gpu(state)

    methods, tasks, base = on_all_ranks(state, lambda: load_inputs(args, state))
    sample_all(
        [checkpoint for checkpoints in methods.values() for checkpoint in checkpoints], tasks, args, state, setup
    )
    setup.end()
    measured = measure_all(methods, base, tasks, args, state)
    if not state.is_main_process:
        return None
    return write_report(
        Path(args.output_dir),
        {
            method: {task.label: average([one[task.label] for one in each.values()]) for task in tasks}
            for method, each in measured.metrics.items()
        },
        {method: each for method, each in measured.metrics.items() if len(each) > 1},
        {task.label: task.categories for task in tasks},
        examples_without_answer=measured.examples,
        arguments=asdict(args),
        problems={task.label: len(task.problems) for task in tasks},
        processes=state.num_processes,
        unscorable=measured.unscorable,
        seconds=round(time.perf_counter() - start, 1),
    )


def _cut(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _sampling_facts(checkpoint: Checkpoint, args: EvaluationArguments) -> dict[str, Any]:
    names = ("temperature", "max_new_tokens", "batch_size", "seed", "dtype")
    backend = "vllm" if use_vllm(args) else "transformers"
    return {"model": checkpoint.fingerprint(), "backend": backend, **{name: getattr(args, name) for name in names}}


def _digest(rows: Any) -> str:
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def run() -> None:
    """Run the script with the command line's arguments; a mistake in them ends it with one sentence."""
    with SetupPhase() as phase:
        main(setup=phase)


if __name__ == "__main__":
    run()
