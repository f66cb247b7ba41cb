"""The scripts' command line: TRL's parser, without abbreviations, and with the closest name for an unknown one."""

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

# What --help lists first, by the module that defines an argument.
OTHERS = "other arguments"
SECTIONS = {
    "opo_trl.config": "OPO (OPOConfig)",
    "opo_trl.": "this script",
    "trl.": "TRL",
    "transformers.": "transformers",
    "": OTHERS,
}

_STRINGS_TOO = {"debug"}  # lists for which transformers also takes one string, of several words


class ScriptParser(TrlParser):
    """
    [`~trl.TrlParser`] that accepts only complete argument names, and raises a `ValueError` for every mistake.

    argparse takes `--learning_rat` for `--learning_rate`, prints a usage of several screens for an invalid value, and
    TRL reports unknown arguments only after the configuration has been built.

    Args:
        dataclass_types (`Iterable[type]`):
            As in [`~trl.TrlParser`].
        defaults (`Callable[[Set[str]], dict[str, Any]]`, *optional*):
            Given the names of all arguments on the command line and in the config file, returns values for others.
        **options:
            Options of `argparse.ArgumentParser`, such as `prog` and `description`.

    Attributes:
        chosen (`dict[str, Any]`):
            What `defaults` returned, after parsing.
        on_command_line (`set[str]`):
            Names of the arguments on the command line, those of the config file apart, after parsing.
    """

    def __init__(
        self,
        dataclass_types: Iterable[Any],
        defaults: Callable[[Set[str]], dict[str, Any]] = lambda given: {},
        **options: Any,
    ) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **options)
        for action in self._actions:  # of `--no_x`, whose help is that of `--x` otherwise
            if action.const is False and action.option_strings[0].startswith("--no_"):
                action.help = f"Sets --{action.dest} to false."
        self._choose = defaults
        self._in_file: set[str] = set()
        self.chosen: dict[str, Any] = {}
        self.on_command_line: set[str] = set()

    def parse_args_and_config(self, args: Iterable[str] | None = None, **options: Any) -> Any:
        """Parse as [`~trl.TrlParser`] does; the config file may also be given as `--config=FILE`."""
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            words += word.split("=", 1) if word.startswith("--config=") else [word]
        if words[-1:] == ["--config"]:
            raise ValueError("--config must be followed by the path of a YAML file.")
        if "--config" in words and not Path(file := words[words.index("--config") + 1]).exists():
            raise ValueError(f"--config must name a YAML file, there is no {file!r}.")
        try:
            return super().parse_args_and_config(words, **options)
        except yaml.YAMLError as error:
            raise ValueError(f"--config must name a YAML file that can be read: {error}") from error

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take the config file's values, one for a list as a list of one, and refuse names that no argument has."""
        lists = {action.dest for action in self._actions if action.nargs == "+"} - _STRINGS_TOO
        for name in lists.intersection(config):
            if config[name] is not None and not isinstance(config[name], list):
                config[name] = [config[name]]
        remaining = super().set_defaults_with_config(**config)
        unknown = [name for name in config if f"--{name}" in remaining[::2]]
        if unknown:
            raise ValueError(f"Unknown name(s) in the config file: {', '.join(map(self._with_closest, unknown))}.")
        self._in_file = set(config)
        return remaining

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse as argparse does, with the chosen defaults, and refuse what it does not know."""
        args = sys.argv[1:] if args is None else list(args)
        named = {word.partition("=")[0] for word in args}
        self.on_command_line = {action.dest for action in self._actions if named.intersection(action.option_strings)}
        given = self.on_command_line | self._in_file
        self.chosen = {name: value for name, value in self._choose(given).items() if name not in given}
        self.set_defaults(**self.chosen)
        parsed, unknown = super().parse_known_args(args, namespace)
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if unknown:
            raise ValueError(
                f"Unknown argument(s): {', '.join(map(self._with_closest, flags or unknown))}. --help lists them all."
            )
        return parsed, unknown

    def format_help(self) -> str:
        """Describe the arguments by the package that defines them: OPO's own first, transformers' last."""
        sections: dict[str, list[Any]] = {title: [] for title in SECTIONS.values()}
        for action in self._actions:
            if action.dest != "help":
                sections[self._section_of(action.dest)].append(action)
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage(f"{self.prog} [--config FILE.yaml] [--argument VALUE ...]", [], [])
        formatter.add_text(self.description)
        formatter.add_text("--config FILE.yaml reads arguments from a file; those of the command line take precedence.")
        formatter.add_text(self.epilog)  # before several screens of arguments, after which nobody would see it
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return str(formatter.format_help())

    def _section_of(self, name: str) -> str:
        """Title of the section of an argument: of this package if it defines it, or that of the first class with it."""
        classes = [base for dataclass_type in self.dataclass_types for base in reversed(dataclass_type.__mro__)]
        classes.sort(key=lambda base: not base.__module__.startswith("opo_trl."))
        for base in classes:
            if name in inspect.get_annotations(base):
                return next(title for prefix, title in SECTIONS.items() if base.__module__.startswith(prefix))
        return OTHERS

    def error(self, message: str) -> Any:
        """Raise instead of printing the usage of every argument and exiting."""
        raise ValueError(f"{message}. --help describes every argument.")

    def _with_closest(self, name: str) -> str:
        """An unknown name, followed by the arguments that it resembles, if it resembles any."""
        options = {option for action in self._actions for option in action.option_strings} | {"--config"}
        known = sorted(option[2:] for option in options if option.startswith("--") and "-" not in option[2:])
        dashes = "--" if name.startswith("-") else ""
        plain = name.lstrip("-").replace("-", "_")
        # A misspelled name; or a part of one, such as `temp` or `batch_size`, to which others are closer in letters.
        close = difflib.get_close_matches(plain, known, n=1, cutoff=0.75)
        parts = [option for option in known if f"_{plain}_" in f"_{option}_" or option.startswith(plain)]
        close = close or sorted(parts, key=lambda option: not option.startswith(plain))[:4]
        return f"{name} (did you mean {' or '.join(dashes + option for option in close)}?)" if close else name
