"""Giving a model the positions at which its tokens were sampled."""

import inspect
from typing import Any

from torch import nn


def count_positions_from_the_first_token(model: Any) -> None:
    """
    Have a model count positions from the first token of each row, as samplers do, where the count matters.

    TRL pads prompts on the left and hands the model no positions. GPT-2, GPT-BigCode, GPT-Neo and XGLM then count the
    padding too: the loss is that of a row which is shifted by its padding, and no longer that of the row which
    `generate` or vLLM has sampled (no issue of TRL is known). Rotary positions are relative, so that padding does not
    change them, except relative to the prefix of PEFT's prefix tuning, which has no padding after it in `generate`.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy; changed in place.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone, config = causal.base_model, causal.config.get_text_config()
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return
    if not getattr(config, "rope_parameters", None):
        backbone.register_forward_pre_hook(_add_positions, with_kwargs=True)
    elif config is causal.config:  # vision-language models have rotary positions of several dimensions
        backbone.register_forward_pre_hook(_add_positions_after_prefix, with_kwargs=True)


def _add_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    mask = kwargs.get("attention_mask")  # (B, P + T), with P tokens of a tuned prefix, if there is one
    if kwargs.get("position_ids") is not None or mask is None or mask.dim() != 2:
        return None
    tokens = next(each for each in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if each is not None)
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, P + T)
    return args, {**kwargs, "position_ids": positions[:, -tokens.size(1) :]}


def _add_positions_after_prefix(
    module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    return None if kwargs.get("past_key_values") is None else _add_positions(module, args, kwargs)
