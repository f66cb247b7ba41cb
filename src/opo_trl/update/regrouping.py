"""Whether the rows of a rollout batch may be regrouped into other micro-batches than TRL's."""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from .rollout_batch import ROW_TENSORS, SCALARS

logger = get_logger(__name__)


def regrouping_obstacle(batch: Mapping[str, Any], *, compiled: bool, device_type: str, router_loss: bool) -> str | None:
    """Return why this rollout batch must be cut as TRL cuts it; `None` if it need not."""
    if compiled:
        return "a compiled model needs fixed shapes"
    if device_type in ("xla", "neuron", "hpu"):
        return f"the device {device_type!r} needs fixed shapes"
    if router_loss:
        return "the router's auxiliary loss is a mean per micro-batch"
    unknown = sorted(batch.keys() - {*ROW_TENSORS, *SCALARS})
    return f"the rollout batch holds {unknown}, which cannot be cut row by row" if unknown else None


class ObstacleAgreement:
    """
    Makes one decision for all ranks: one may hold an image batch, or tool output, where another holds plain text.

    Every rank contributes two integers, gathered once per call. The text of an obstacle is exchanged, and logged,
    when it occurs for the first time.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Gathers the integers.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._obstacles: dict[tuple[tuple[int, ...], ...], str] = {}  # integers of all ranks -> words

    def agree(self, obstacle: str | None, batch: Mapping[str, Any]) -> str | None:
        """Return the obstacle of the first rank that has one, on all ranks, or that their batches differ in columns."""
        columns = sorted((name, str(getattr(value, "dtype", None))) for name, value in batch.items())
        own = torch.tensor([[fingerprint(obstacle), fingerprint(columns)]], device=self.accelerator.device)
        ranks = tuple(tuple(rank) for rank in self.accelerator.gather(own).tolist())  # W pairs
        if len(set(ranks)) == 1 and ranks[0][0] == 0:
            return None
        if ranks not in self._obstacles:
            reasons = [reason for reason in gather_object([obstacle]) if reason is not None]
            reason = reasons[0] if reasons else "the ranks' rollout batches hold different columns"
            if reason not in self._obstacles.values():
                logger.warning(
                    "The update keeps TRL's micro-batches, which is slower and has the same gradient: %s.", reason
                )
            self._obstacles[ranks] = reason
        return self._obstacles[ranks]


def fingerprint(value: object) -> int:
    """A positive integer that is the same in every process for values that print alike; 0 for `None`."""
    return 0 if value is None else int.from_bytes(sha256(repr(value).encode()).digest()[:7], "big") or 1
