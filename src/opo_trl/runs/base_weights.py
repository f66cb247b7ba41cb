"""The weights under an adapter, which rounding changes whenever the merged policy is sent to vLLM."""

from collections.abc import Callable
from typing import Any

import torch


def keep_base_weights(model: Any, synchronise: Callable[[], None]) -> Callable[[], None]:
    """
    Restore the weights under an adapter, bit by bit, after each transfer to vLLM.

    For a transfer, TRL 1.16 adds the adapter to them in place, and subtracts it again, which rounds twice. In bfloat16,
    each transfer would change weights that nothing trains and no checkpoint has, and a resumed run, or a user of the
    adapter, would have another policy. No issue is known; delete this when TRL merges into a copy.

    Args:
        model ([`~peft.PeftModel`]):
            Policy, whose base is frozen.
        synchronise (`Callable`):
            Sends the merged weights.

    Returns:
        `Callable`: The same. The first call copies the weights of the adapted layers to the memory of the host.
    """
    kept: list[tuple[Any, str, torch.nn.Parameter, torch.Tensor | None]] = []

    def synchronise_and_restore() -> None:
        if not kept:
            kept.extend(_copies(model))
        try:
            synchronise()
        finally:
            for layer in _adapted_layers(model):
                layer.merged_adapters.clear()  # not empty only where the transfer has been interrupted
            for layer, name, parameter, copy in kept:
                layer._parameters[name] = parameter  # quantized weights are replaced, not changed
                if copy is not None:
                    _local(parameter).copy_(copy)

    return synchronise_and_restore


def _copies(model: Any) -> list[tuple[Any, str, torch.nn.Parameter, torch.Tensor | None]]:
    layers = {id(base): base for base in (layer.get_base_layer() for layer in _adapted_layers(model))}
    return [
        (layer, name, parameter, _local(parameter).to("cpu", copy=True) if parameter.is_floating_point() else None)
        for layer in layers.values()
        for name, parameter in layer.named_parameters(recurse=False)
    ]


def _adapted_layers(model: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _local(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The part of a parameter that this rank holds."""
    data: Any = parameter.data
    return data.to_local() if hasattr(data, "to_local") else data
