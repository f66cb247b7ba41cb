"""Whether the rows of a rollout batch may be regrouped into other micro-batches than TRL's."""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from .rollout_batch import ROW_TENSORS, SCALARS


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


def agree_on_obstacle(accelerator: Accelerator, obstacle: str | None, batch: Mapping[str, Any]) -> str | None:
    """
    Return the same obstacle on all ranks: one may hold an image batch, or tool output, where another holds plain text.
    """
    ranks = gather_object([(obstacle, sorted(batch))])
    reasons = [reason for reason, _ in ranks if reason is not None]
    if not reasons and any(columns != ranks[0][1] for _, columns in ranks):
        reasons.append("the ranks' rollout batches hold different columns")
    return reasons[0] if reasons else None
