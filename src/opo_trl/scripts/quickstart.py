"""The quickstart: what a command runs whose arguments do not name what it works on."""

from collections.abc import Iterable, Sequence
from pathlib import Path

NOTE = "No model and no dataset are named: this is the quickstart, with the other arguments on top of it."


def names_any(arguments: Iterable[str], options: Iterable[str]) -> bool:
    """Whether a command line has one of these options, given without dashes."""
    words = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in arguments if word.startswith("--")}
    return not words.isdisjoint(options)


def is_quickstart(arguments: Iterable[str], options: Iterable[str]) -> bool:
    """
    Whether a command runs the quickstart.

    Args:
        arguments (`Iterable[str]`):
            Command line.
        options (`Iterable[str]`):
            Options, without dashes, that name what the command works on, or that only make sense with it.
    """
    return not names_any(arguments, ("config", *options))


def or_quickstart(arguments: Sequence[str], options: Iterable[str], config: Path) -> list[str]:
    """The arguments, on top of the quickstart's config file if they run it."""
    return ["--config", str(config), *arguments] if is_quickstart(arguments, options) else [*arguments]
