"""The quickstart: what a command runs whose arguments do not name what it works on."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def names_any(arguments: Iterable[str], options: Iterable[str]) -> bool:
    """Whether a command line has one of these options, given without dashes; the beginning of one counts, too."""
    words = {word.partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    return any(f"__{option}".startswith(word) for option in options for word in words)


def or_quickstart(arguments: Sequence[str], options: Iterable[str], config: Path) -> list[str]:
    """The arguments, on top of the quickstart's config file if they have no config file and none of these options."""
    return [*arguments] if names_any(arguments, ("config", *options)) else ["--config", str(config), *arguments]
