"""From any math dataset to the columns that the trainer and the reward read."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .layouts import INSTRUCTION, final_answer

if TYPE_CHECKING:
    from .filters import drop_by_pass_rate, drop_overlapping
    from .loading import hold_out, load_math_dataset, to_plain_text

__all__ = [
    "INSTRUCTION",
    "drop_by_pass_rate",
    "drop_overlapping",
    "final_answer",
    "hold_out",
    "load_math_dataset",
    "to_plain_text",
]

# The package datasets takes seconds to import, so these names are resolved when they are first used.
_LAZY = {
    "drop_by_pass_rate": ".filters",
    "drop_overlapping": ".filters",
    "hold_out": ".loading",
    "load_math_dataset": ".loading",
    "to_plain_text": ".loading",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
