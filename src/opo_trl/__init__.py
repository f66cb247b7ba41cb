"""OPO, On-Policy RL with Optimal reward baseline (arXiv 2505.23585), on TRL's `GRPOTrainer`."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .runs.tested_trl import check_trl

if TYPE_CHECKING:
    from .config import OPOConfig
    from .trainer import OPOTrainer

__all__ = ["OPOConfig", "OPOTrainer"]
__version__ = version("opo-trl")

# TRL takes seconds to import, so a name is resolved when it is first asked for: `import opo_trl` costs nothing, and
# `opo_trl.baselines` costs torch alone.
_LAZY = {"OPOConfig": ".config", "OPOTrainer": ".trainer"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        check_trl()
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
