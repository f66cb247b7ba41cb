"""
Train a causal language model on math problems with OPO.

Without a model and a dataset it trains the tiny policy of this repository on generated arithmetic, on a CPU, in a few
minutes (held-out pass@1 rises from about 0.4 to about 0.7); other arguments change that quickstart:

    opo-trl train
    opo-trl train --max_steps 100

A real model on GSM8K, on one GPU:

    opo-trl train \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name openai/gsm8k --dataset_config main \
        --output_dir outputs/gsm8k --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \
        --learning_rate 1e-6 --max_completion_length 512 --eval_strategy steps --eval_steps 100 \
        --num_eval_problems 256 --num_generations_eval 1 --per_device_eval_batch_size 64 --report_to wandb --push_to_hub

Add `--use_peft` for LoRA, and `--config file.yaml` to read arguments from a file (the command line takes precedence;
`examples/configs` has recipes for the paper's experiments). With `--push_to_hub`, missing write access to the Hub is an
error before anything loads; if a push fails later, no file is lost, and the exit status is 1.

`--model_name_or_path tiny_policy` names the tiny policy of the quickstart.

`--reward_funcs` takes other rewards than `math_verify_reward`: this package's, TRL's, or your own as `module:function`,
summed with `--reward_weights`. A function gets the columns of the dataset that it has parameters for. `--report`
measures pass@1 with math-verify all the same. Every metric is in `log.json` of the output directory as soon as it is
logged.

`--resume_from_checkpoint auto` resumes from the latest complete checkpoint in `--output_dir` if there is one, so that a
job scheduler can repeat one command; `true` requires one, and a path names one.

Where no accelerator is found, the script sets `--use_cpu`, `--bf16 false` and `--gradient_checkpointing false` unless
you set them, and prints that. An error before the first training step ends it with the message alone; `OPO_DEBUG=1`
keeps the traceback. `accelerate launch --quiet -m opo_trl.scripts.train_math` is the same without `opo-trl`; `--quiet`
keeps accelerate from adding a traceback of its own.
"""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from .. import OPOConfig, OPOTrainer
from ..data import drop_by_pass_rate, drop_overlapping, hold_out
from ..data.loading import has_splits
from ..evaluation import pass_rates
from ..evaluation.records_file import read_records
from ..on_policy.preflight import check_model_directory, explain_missing_model
from ..on_policy.reward_parameters import column_parameters
from ..runs.checkpoints import latest_complete
from ..runs.hub import PushError, claim_repository
from .devices import describe_choice
from .policies import model_path
from .problems import EMBEDDED_DATASET, fit_to_tokenizer, load_problems, parse_dataset
from .quickstart import NOTE, is_quickstart, or_quickstart
from .report_run import report_at_end
from .reporting import ConsoleProgress, RunLog, describe, measure, write_summary
from .resuming import check_saving, find_checkpoint
from .reward_functions import check_prompts, check_weights, load_reward_functions, pass_at_k_name
from .setup_phase import SetupPhase, on_all_ranks
from .train_arguments import (
    ABOUT_NAMES,
    MathScriptArguments,
    check_held_out,
    check_names,
    check_not_streamed,
    check_report,
    check_trackers,
    make_parser,
    measures_held_out,
)

QUICKSTART = Path(__file__).with_name("quickstart.yaml")


def load_datasets(
    script_args: MathScriptArguments, seed: int, with_eval: bool, reward_funcs: Sequence[Callable[..., Any]]
) -> tuple[Dataset, Dataset | None]:
    """
    Load the problems to train on and, if asked for, the held-out ones.

    Columns are `prompt`, `solution`, `id`, and those of the dataset that a reward function has a parameter for. Without
    a function that needs `solution`, problems need no answer.
    """
    name, eval_size = script_args.dataset_name, script_args.num_eval_problems
    assert name is not None
    parameters = column_parameters(reward_funcs)
    require_solution = parameters.pop("solution", False) or script_args.report

    def load(source: str, split: str, config: str | None, num_arithmetic: int = eval_size, **options: bool) -> Dataset:
        return load_problems(
            source,
            split,
            config=config,
            prompt_column=script_args.prompt_column,
            solution_column=script_args.solution_column,
            instruction=script_args.instruction,
            system_prompt=script_args.system_prompt,
            num_arithmetic=num_arithmetic,
            keep_columns=[column for column in parameters if column not in ("prompt", "id")],
            require_solution=require_solution,
            **options,
        )

    config, test_split = script_args.dataset_config, script_args.dataset_test_split
    train = load(name, script_args.dataset_train_split, config, script_args.num_train_problems or 8_000)
    held_out = None
    if with_eval:
        if script_args.eval_dataset_name is not None:
            other, split, own_config = parse_dataset(script_args.eval_dataset_name, test_split)
            if own_config is None and other == name:
                own_config = config
            # The columns on the command line are those of the training set, and perhaps of this one.
            held_out = load(other, split, own_config, require_columns=False)
        elif has_splits(name):
            held_out = load(name, test_split, config)
        if held_out is None:
            train, held_out = hold_out(train, eval_size, seed)
        else:
            held_out = held_out.select(range(min(eval_size, len(held_out))))
    for other in script_args.deduplicate_against or []:
        source, split, config = parse_dataset(other)
        evaluation_set = load_problems(
            source, split, config=config, instruction=script_args.instruction, require_solution=False
        )
        train = drop_overlapping(
            train, evaluation_set, ngram_size=script_args.overlap_ngram_size, instruction=script_args.instruction
        )
    if script_args.pass_rates is not None:
        rates = pass_rates(read_records(script_args.pass_rates))
        train = drop_by_pass_rate(train, rates, lowest=script_args.min_pass_rate, highest=script_args.max_pass_rate)
    if script_args.num_train_problems is not None and name != EMBEDDED_DATASET:
        train = train.shuffle(seed=seed).select(range(min(script_args.num_train_problems, len(train))))
    return train, held_out


def load_tokenizer(model_name: str, revision: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer ahead of the model, as the trainer would, to know whether it has a chat template."""
    check_model_directory(model_name)
    with explain_missing_model(model_name):
        return AutoTokenizer.from_pretrained(
            model_name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            padding_side="left",
            truncation_side="left",
        )


def load_inputs(
    script_args: MathScriptArguments, training_args: OPOConfig, model_args: ModelConfig
) -> tuple[str, PreTrainedTokenizerBase, Dataset, Dataset | None, list[Callable[..., Any]]]:
    """Load problems, tokenizer and rewards, so that their errors surface before a model loads."""
    check_names(script_args.dataset_name, model_args.model_name_or_path)
    functions = load_reward_functions(script_args.reward_funcs)
    check_weights(functions, training_args.reward_weights)
    training_args.pass_at_k_reward = pass_at_k_name(training_args.pass_at_k_reward, script_args.reward_funcs, functions)
    with_eval = measures_held_out(script_args, training_args)
    train_dataset, eval_dataset = load_datasets(script_args, training_args.seed, with_eval, functions)
    model_name = model_path(model_args.model_name_or_path)
    tokenizer = load_tokenizer(model_name, model_args.model_revision, training_args.trust_remote_code)
    train_dataset = fit_to_tokenizer(train_dataset, tokenizer)
    check_prompts(functions, train_dataset[0]["prompt"])
    return model_name, tokenizer, train_dataset, eval_dataset and fit_to_tokenizer(eval_dataset, tokenizer), functions


def make_trainer(
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    reward_funcs: list[Callable[..., Any]],
    training_args: OPOConfig,
    model_args: ModelConfig,
) -> OPOTrainer:
    """Make the trainer, whose progress is one line per logging step, and whose log is a file."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = OPOTrainer(
        model=model_name,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ConsoleProgress)
    trainer.add_callback(RunLog)
    return trainer


def train(trainer: OPOTrainer, checkpoint: str | None) -> None:
    """Train, and end with one sentence instead of a traceback where Ctrl-C interrupts it."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        saved, _ = latest_complete(Path(trainer.args.output_dir))
        state = f"the latest checkpoint is {saved}" if saved else "there is no checkpoint"
        trainer.accelerator.print(
            f"Interrupted in step {trainer.state.global_step + 1}: {state}. SIGTERM saves one before the run ends."
        )
        raise SystemExit(128 + signal.SIGINT) from None


def make_report(
    measure_pass_at_1: Callable[[str], dict[str, Any]],
    before: dict[str, Any],
    trainer: OPOTrainer,
    start: float,
    **facts: Any,
) -> dict[str, Any]:
    """Measure the saved model, and write what the run did; on the main process."""
    output_dir = trainer.args.output_dir
    after = measure_pass_at_1(output_dir)
    summary = write_summary(
        output_dir,
        before,
        after,
        trainer.state.log_history,
        steps=trainer.state.global_step,
        seconds=round(time.perf_counter() - start, 1),
        seed=trainer.args.seed,
        **facts,
    )
    print(f"pass@1 after:  {describe(after)}", flush=True)
    written = " and ".join(name for name in ("summary.json", "curves.png") if Path(output_dir, name).exists())
    print(f"written to {output_dir}: {written}", flush=True)
    return summary


def parse(arguments: list[str]) -> tuple[MathScriptArguments, OPOConfig, ModelConfig, list[str]]:
    """Parse the command line; the last result is what to print: the choices without an accelerator, a warning."""
    parser = make_parser()
    script_args, training_args, model_args = parser.parse_args_and_config(
        or_quickstart(arguments, ABOUT_NAMES, QUICKSTART)
    )
    check_not_streamed(script_args)
    check_held_out(script_args, training_args, parser.on_command_line)
    check_report(script_args)
    check_trackers(training_args)
    notes = [describe_choice(parser.chosen), check_saving(training_args, parser.on_command_line)]
    if arguments and is_quickstart(arguments, ABOUT_NAMES):
        notes.insert(0, NOTE)
    return script_args, training_args, model_args, [note for note in notes if note is not None]


def main(arguments: list[str] | None = None, setup: SetupPhase | None = None) -> dict[str, Any] | None:
    start = time.perf_counter()
    setup = setup or SetupPhase()
    script_args, training_args, model_args, notes = parse(sys.argv[1:] if arguments is None else arguments)
    disable_progress_bars()
    state = PartialState()
    for note in notes:
        state.print(note)
    checkpoint = find_checkpoint(training_args, state)
    claim_repository(training_args)  # the trainer does so, too, but after the measurement of a report

    model_name, tokenizer, train_dataset, eval_dataset, reward_funcs = on_all_ranks(
        state, lambda: load_inputs(script_args, training_args, model_args)
    )
    state.print(
        f"{len(train_dataset)} problems to train on, {len(eval_dataset) if eval_dataset else 0} held out, "
        f"{training_args.generation_batch_size // training_args.num_generations} x {training_args.num_generations} "
        "completions per step"
    )
    if training_args.eval_strategy != "no" and training_args.pass_at_k_reward is None:
        state.print("no eval_pass@k: --pass_at_k_reward names the reward whose value 1 means that an answer is correct")

    measure_pass_at_1 = partial(
        measure,
        problems=eval_dataset,
        num_samples=script_args.report_samples,
        max_new_tokens=training_args.max_completion_length,
        temperature=training_args.temperature,
        seed=training_args.seed,
        device=training_args.device,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    before = None
    if script_args.report:
        before = on_all_ranks(state, lambda: measure_pass_at_1(model_name) if state.is_main_process else None)
    if before is not None:
        print(f"pass@1 before: {describe(before)}", flush=True)

    trainer = make_trainer(model_name, tokenizer, train_dataset, eval_dataset, reward_funcs, training_args, model_args)
    trainer.add_callback(setup)
    train(trainer, checkpoint)
    with suppress(PushError):  # raised again at the end, when everything else is done
        trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"model saved to {training_args.output_dir}")

    summary = None
    if before is not None:
        assert eval_dataset is not None
        facts = {"n": len(eval_dataset), "samples_per_problem": script_args.report_samples}
        summary = make_report(measure_pass_at_1, before, trainer, start, **facts)
    failed_push: PushError | None = None
    if training_args.push_to_hub:
        name = script_args.dataset_name
        try:
            trainer.push_to_hub(dataset_name="generated arithmetic" if name == EMBEDDED_DATASET else name)
            trainer.accelerator.print(f"pushed to https://huggingface.co/{trainer.hub_model_id}")
        except PushError as error:  # on all ranks
            failed_push = error
    if trainer.accelerator.is_main_process:
        report_at_end(training_args.output_dir)  # after the push: a report of megabytes belongs to no model repository
    if failed_push is not None:
        trainer.accelerator.wait_for_everyone()  # a launcher ends the main process once another one has failed
        raise failed_push
    trainer.end()
    return summary


def run() -> None:
    """Run the script with the command line's arguments; a mistake in them ends it with one sentence."""
    with SetupPhase() as phase:
        main(setup=phase)


if __name__ == "__main__":
    run()
