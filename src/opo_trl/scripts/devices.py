"""What the scripts choose by themselves where there is no accelerator. `--help` imports this file, but not torch."""

import os
from collections.abc import Set
from typing import Any

_ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


def why_on_cpu() -> str | None:
    """Why a script runs on the CPU, or `None` if it has an accelerator to use."""
    import torch
    from accelerate.utils import parse_flag_from_env
    from transformers.utils.import_utils import is_torch_xla_available

    if parse_flag_from_env("ACCELERATE_USE_CPU"):  # by `accelerate launch`, from its config file or `--cpu`
        return "ACCELERATE_USE_CPU is set"
    if torch.accelerator.is_available() or is_torch_xla_available():
        return None
    return "No accelerator found"


def training_defaults(given: Set[str]) -> dict[str, Any]:
    """
    What `train_math.py` sets where there is no accelerator: with TRL's defaults, bf16 and activation checkpointing,
    transformers would refuse to run.

    Args:
        given (`Set[str]`):
            Names of the arguments that the user has set, which decide what is left to choose.
    """
    from accelerate.utils import parse_flag_from_env

    # With use_cpu, accelerate would replace a sharding engine by plain data parallelism without any message.
    if why_on_cpu() is None or any(map(parse_flag_from_env, _ENGINES)) or given & {"deepspeed", "fsdp"}:
        return {}
    defaults: dict[str, Any] = {"use_cpu": True}
    if "fp16" not in given and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no":
        defaults["bf16"] = False
    if "activation_checkpointing" not in given:  # the other name of the field, from transformers 5.23 on
        defaults["gradient_checkpointing"] = False
    return defaults


def evaluation_defaults(given: Set[str]) -> dict[str, Any]:
    """What `evaluate_math.py` sets where there is no accelerator: the precision that every CPU computes in."""
    return {} if why_on_cpu() is None else {"dtype": "float32"}


def describe_choice(chosen: dict[str, Any]) -> str | None:
    """One line about the arguments chosen, or `None` if there are none."""
    settings = ", ".join(f"{name}={value}" for name, value in chosen.items())
    arguments = ", ".join(f"--{name}" for name in chosen)
    return f"{why_on_cpu()}: using {settings}. To override: {arguments}." if chosen else None
