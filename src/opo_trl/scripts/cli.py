"""
The command `opo-trl`: the scripts under `accelerate launch`, as `trl grpo` runs TRL's.

    opo-trl train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k --num_processes 8
    opo-trl evaluate --models outputs/gsm8k --datasets openai/gsm8k:test:main --output_dir outputs/evaluation
    opo-trl report outputs/gsm8k

Arguments of `accelerate launch` and of the script may be mixed. Modules that take seconds to import are imported where
they are needed, so that `opo-trl --help` and `opo-trl --version` return at once.
"""

import argparse
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from .. import __version__

# Command -> what it does, the module to launch, the module of its arguments.
COMMANDS = {
    "train": ("Train a language model with OPO.", "train_math", "train_arguments"),
    "evaluate": ("Measure pass@k, maj@k, diversity and length of models.", "evaluate_math", "evaluation_arguments"),
}
REPORT = "Write curves, times and completions of a run into one HTML file."  # runs in this process, without accelerate

# Arguments of `accelerate launch` that go to the script all the same: the script has its own of that name, or this
# command decides them.
NOT_ACCELERATES = {"help", "debug", "gradient_accumulation_steps", "module", "no_python"}

SECONDS_TO_END = 10.0  # that a script may take after Ctrl-C before it is taken to have missed it

_OTHERS = "\nTRL:\n"  # the heading of the first section of help that needs TRL's configuration

MIXED = (
    "Arguments of `accelerate launch`, such as --num_processes and --config_file, are passed on to it; `accelerate "
    "launch --help` lists them. --accelerate_config takes the path of its config file, or the name of one that TRL "
    "ships, such as zero3. "
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status: that of the script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="opo-trl",
        description="On-policy RL of language models with the optimal reward baseline.",
        epilog="`opo-trl COMMAND --help` describes the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, (description, _, _) in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    commands.add_parser("report", help=REPORT, add_help=False)
    command = parser.parse_args(arguments[:1]).command
    if command is None:
        parser.print_help()
        return 0
    if command == "report":
        from .report_run import main as report

        return report(arguments[1:], prog="opo-trl report", description=REPORT)
    if {"-h", "--help"} & set(arguments[1:]):
        print_help(command, prog=f"opo-trl {command}", description=f"{COMMANDS[command][0]} {MIXED}")
        return 0
    return launch(command, arguments[1:])


def run_script(command: str) -> None:
    """Run a command's script in this process, as a file that `accelerate launch` starts; help loads no trainer."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print_help(command, prog=os.path.basename(sys.argv[0]), description=COMMANDS[command][0])
    else:
        importlib.import_module(f".{COMMANDS[command][1]}", __package__).run()


def print_help(command: str, **options: str) -> None:
    """Print a command's arguments: OPO's and the script's at once, then those of TRL and transformers."""
    beginning = describe_own(command, **options)
    try:
        print(beginning, end="", flush=True)
        print(describe(command, **options).removeprefix(beginning), end="", flush=True)
    except BrokenPipeError:  # of `| head`, or a pager that was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe(command: str, **options: str) -> str:
    """Describe a command's arguments: OPO's first, then the script's, TRL's and transformers'."""
    return describe_own(command, **options) + _sections_of_others(_arguments_of(command).make_parser(**options))


def describe_own(command: str, **options: str) -> str:
    """Describe the arguments that this package defines, without a module that takes seconds to import."""
    module = _arguments_of(command)
    make_parser = getattr(module, "make_quick_parser", module.make_parser)
    text = str(make_parser(**options).format_help())
    return text.partition(_OTHERS)[0]


def _sections_of_others(parser: Any) -> str:
    _, heading, sections = str(parser.format_help()).partition(_OTHERS)
    return heading + sections


def _arguments_of(command: str) -> Any:
    return importlib.import_module(f".{COMMANDS[command][2]}", __package__)


def launch(command: str, arguments: list[str]) -> int:
    """Run a command's script by `accelerate launch` in this process, without its traceback for a script that fails."""
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        parsed = parse_launch(command, arguments)
        if command == "train":
            _check_names(parsed.training_script_args)
            parsed = for_quickstart(parsed)
        limit_gpus(parsed)
        with _pass_sigterm_on():
            launch_command(with_defaults(parsed))
    except CalledProcessError as error:  # one process, started by accelerate itself
        return _exit_status(error.returncode)
    except ChildFailedError as error:  # several, started by torch, which has logged what each of them raised
        rank, failure = error.get_first_failure()
        print(f"error: rank {rank} ended with exit status {_exit_status(failure.exitcode)}", file=sys.stderr)
        return _exit_status(failure.exitcode)
    except KeyboardInterrupt:
        _end_children()
        return _exit_status(-signal.SIGINT)
    except SignalException as error:  # to this process; torch has passed it on and waited for the ranks
        return _exit_status(-error.sigval)
    except (ValueError, OSError) as error:
        if os.environ.get("OPO_DEBUG", "0") not in ("", "0"):
            raise
        print(f"error: {error}\nSet OPO_DEBUG=1 for the traceback.", file=sys.stderr)
        return 1
    return 0


def parse_launch(command: str, arguments: list[str]) -> argparse.Namespace:
    """
    Parse a command line as `accelerate launch` would the equivalent one, with the script's arguments set apart.

    Args:
        command (`str`):
            `"train"` or `"evaluate"`.
        arguments (`list[str]`):
            Arguments of accelerate and of the script, in any order.

    Returns:
        `argparse.Namespace`: What `launch_command` takes. `training_script_args` are the script's arguments.

    Raises:
        ValueError: If `--accelerate_config` names no config file, or `--config_file` is given as well.
    """
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.prog, parser.usage = f"opo-trl {command}", f"opo-trl {command} [arguments]"
    parser.add_argument("--accelerate_config")
    for_accelerate, for_script = _split(arguments, parser)
    module = f"{__package__}.{COMMANDS[command][1]}"
    parsed = parser.parse_args([*for_accelerate, "--module", module, *for_script])
    parsed.quiet = False  # with --quiet, accelerate exits with 1 whatever the script's exit status is
    if parsed.accelerate_config is not None:
        if parsed.config_file is not None:
            raise ValueError("Only one of --accelerate_config and --config_file may be given. Leave one out.")
        parsed.config_file = _find_config(parsed.accelerate_config)
    return parsed


def for_quickstart(parsed: argparse.Namespace) -> argparse.Namespace:
    """Start the quickstart in one process on the CPU, unless the command says otherwise, also where there are GPUs."""
    from .quickstart import is_quickstart
    from .train_arguments import ABOUT_NAMES

    says_otherwise = any(
        getattr(parsed, name)
        for name in ("num_processes", "config_file", "gpu_ids", "multi_gpu", "use_fsdp", "use_deepspeed", "tpu")
    )
    if is_quickstart(parsed.training_script_args, ABOUT_NAMES) and not says_otherwise:
        parsed.num_processes, parsed.cpu = 1, True
    return parsed


def limit_gpus(parsed: argparse.Namespace) -> None:
    """Let a single process see one of several GPUs, unless the user has chosen: TRL would spread a model over all."""
    import torch

    several = torch.cuda.is_available() and torch.cuda.device_count() > 1
    if several and parsed.num_processes == 1:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # accelerate's own choice of `gpu_ids` comes after it


def with_defaults(parsed: argparse.Namespace) -> argparse.Namespace:
    """
    Set what `accelerate launch` would set itself without a config file, with a warning for each value.

    The number of processes stays accelerate's where there is an accelerator: it reports how many it uses.
    """
    import torch
    from accelerate.commands.config.config_args import default_config_file

    if parsed.config_file is not None or (os.path.isfile(default_config_file) and not parsed.cpu):
        return parsed
    defaults = {"num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    if not torch.accelerator.is_available():
        defaults["num_processes"] = 0  # as accelerate counts GPUs: one process, on the CPU
    for name, value in defaults.items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, value)
    return parsed


def _split(arguments: list[str], launcher: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Separate accelerate's arguments, with their values, from the script's."""
    options = {
        option: action
        for action in launcher._actions
        if action.dest not in NOT_ACCELERATES
        for option in action.option_strings
    }
    for_accelerate: list[str] = []
    for_script: list[str] = []
    words = iter(arguments)
    for word in words:
        name, has_value, _ = word.partition("=")
        if name not in options:
            for_script.append(word)
            continue
        for_accelerate.append(word)
        if options[name].nargs != 0 and not has_value:
            for_accelerate += [value for value in [next(words, None)] if value is not None]
    return for_accelerate, for_script


def _check_names(arguments: list[str]) -> None:
    """Refuse a script's arguments without problems or a model: the script would after importing the trainer."""
    from .quickstart import is_quickstart, names_any
    from .train_arguments import ABOUT_NAMES, check_names

    if names_any(arguments, ("config",)) or is_quickstart(arguments, ABOUT_NAMES):
        return  # the config file names them, or the quickstart's does
    dataset, model = (
        name if names_any(arguments, (name,)) else None for name in ("dataset_name", "model_name_or_path")
    )
    check_names(dataset, model)


def _find_config(name: str) -> str:
    """Path of a config file of accelerate's: the file of that name, or the one that TRL ships."""
    if Path(name).is_file():
        return name
    trl: Any = importlib.util.find_spec("trl")  # found without importing it
    folder = Path(trl.submodule_search_locations[0], "accelerate_configs")
    shipped = {path.stem: str(path) for path in folder.glob("*.yaml")}
    if name not in shipped:
        raise ValueError(
            f"--accelerate_config must be a file or one of {', '.join(sorted(shipped))}, got {name!r}. Pass the path "
            "of a config file that `accelerate config` has written, or one of these names."
        )
    return shipped[name]


@contextmanager
def _pass_sigterm_on() -> Iterator[None]:
    """
    Pass SIGTERM on to the script, which then saves at a step boundary.

    `accelerate launch` does not with one process (1.15; no issue is known): to be deleted when it does.
    """
    import psutil

    def pass_on(number: int, frame: Any) -> None:
        children = psutil.Process().children()
        if not children:
            sys.exit(_exit_status(-number))
        for child in children:
            child.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_children() -> None:
    """Wait for the script, to which a terminal sends Ctrl-C as well, and interrupt it if the signal came here alone."""
    import psutil

    _, running = psutil.wait_procs(psutil.Process().children(), timeout=SECONDS_TO_END)
    for child in running:
        child.send_signal(signal.SIGINT)
    psutil.wait_procs(running)


def _exit_status(code: int) -> int:
    """Exit status of a process, with that of shells for one that was killed by a signal."""
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
