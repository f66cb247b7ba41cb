"""Making the training forward that of the network that sampled."""

from torch import nn
from transformers import PreTrainedConfig


def disable_dropout(model: nn.Module) -> None:
    """
    Switch off all randomness of a model's training forward.

    That is more than dropout modules: attention layers keep a rate as a plain number, some architectures read it from
    their config at every forward, others drop complete layers, and routers add noise to what they see. A config whose
    rates are set to 0 is also saved with 0.

    Args:
        model (`torch.nn.Module`):
            Model, or an adapter around one; changed in place.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        config = getattr(module, "config", None)
        for owner in (module, config) if isinstance(config, PreTrainedConfig) else (module,):
            rates = [name for name in vars(owner) if "drop" in name or "jitter" in name]
            for name in rates:
                if isinstance(getattr(owner, name), float):
                    setattr(owner, name, 0.0)
