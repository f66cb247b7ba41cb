"""Extension of griffe: docstrings in the form of TRL become the Markdown that mkdocstrings renders."""

import inspect
import re
from typing import Any

import griffe

_SECTIONS = {"Args": "Arguments", "Parameters": "Parameters", "Returns": "Returns", "Raises": "Raises"}
# An item of a section: `name (`type`, *optional*):` or `ValueError:`, its text beginning on that line or the next.
_ITEM = re.compile(r"(?P<names>[\w*][\w*, ]*?)(?: \((?P<type>.+)\))?:(?: (?P<text>.+))?")
# A reference as in [`~trl.GRPOConfig`]: shown by its last name.
_REFERENCE = re.compile(r"\[`~?(?:[\w.]+\.)?(\w+)`\](?!\(|\[)")


def to_markdown(docstring: str) -> str:
    """
    Return a docstring of TRL's form as Markdown.

    Args:
        docstring (`str`):
            Text with sections such as `Args:` and items such as this one.
    """
    lines, section = [], None
    for line in inspect.cleandoc(docstring).splitlines():
        if line.rstrip(":") in _SECTIONS and line.endswith(":"):
            section = line[:-1]
            lines += ["", f"**{_SECTIONS[section]}**", ""]
            continue
        if line and not line.startswith(" "):
            section = None
        lines.append(_in_section(line[4:], section) if section else line)
    return _REFERENCE.sub(r"`\1`", "\n".join(lines))


def _in_section(line: str, section: str) -> str:
    """A line of a section without its indent: an item becomes one of a list, and its text stays within it."""
    item = None if section == "Returns" or line.startswith(" ") else _ITEM.fullmatch(line)
    if item is None:
        return line
    names = ", ".join(f"**`{name}`**" for name in item["names"].split(", "))
    kind = f" ({item['type']})" if item["type"] else ""
    return f"- {names}{kind}: {item['text'] or ''}"


class FromTrlsForm(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
