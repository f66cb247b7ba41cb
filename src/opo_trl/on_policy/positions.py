"""Giving a model the positions at which its tokens were sampled."""

import inspect
from typing import Any

from torch import nn


def count_positions_from_the_first_token(model: Any) -> None:
    """
    Have a model with absolute positions count them from the first token of each row, as samplers do.

    TRL pads prompts on the left and hands the model no positions. GPT-2, GPT-BigCode, GPT-Neo and XGLM then count the
    padding too: the loss is that of a row which is shifted by its padding, and no longer that of the row which
    `generate` or vLLM has sampled (no issue of TRL is known). Rotary positions are relative, so that padding does not
    change them; models with them are left alone.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy; changed in place.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = causal.base_model
    takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
    if takes_positions and not getattr(causal.config.get_text_config(), "rope_parameters", None):
        backbone.register_forward_pre_hook(_add_positions, with_kwargs=True)


def _add_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    mask = kwargs.get("attention_mask")  # (B, T)
    given = kwargs.get("position_ids") is not None or kwargs.get("past_key_values") is not None
    if given or mask is None or mask.dim() != 2:
        return None
    return args, {**kwargs, "position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0)}
