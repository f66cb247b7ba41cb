"""The dtype that a vLLM engine computes in: the trainer's own, unless another one is asked for."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

DTYPES = (None, "auto", "float32", "bfloat16", "float16")


def check_vllm_dtype(dtype: str | None, mode: str) -> None:
    """
    Refuse an engine dtype that vLLM does not know, or that would have no effect.

    Args:
        dtype (`str`, *optional*):
            As in [`OPOConfig`].
        mode (`str`):
            `"colocate"` or `"server"`.

    Raises:
        ValueError: With the value and how to fix it.
    """
    if dtype not in DTYPES:
        raise ValueError(
            f"`vllm_dtype` must be {' or '.join(repr(name) for name in DTYPES)}, got {dtype!r}. Leave `vllm_dtype` out "
            "for the dtype that the trainer computes in."
        )
    if dtype is not None and mode == "server":
        raise ValueError(
            f"`vllm_dtype` is for the engine that the trainer starts, got {dtype!r} with `vllm_mode='server'`. Leave "
            f"`vllm_dtype` out, and start the server with `--dtype {dtype}`."
        )


def trainer_dtype(args: Any, model: Any) -> str:
    """
    Name the dtype that the training forward computes in: that of mixed precision, or else of the weights.

    Args:
        args ([`OPOConfig`]):
            The run's configuration.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy.

    Returns:
        `str`: A name that vLLM takes, such as `"bfloat16"`.
    """
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else _name(model.dtype)


@contextmanager
def built_with_dtype(args: Any, model: Callable[[], Any]) -> Iterator[None]:
    """
    Give a dtype to the engine that TRL starts in the meantime.

    TRL 1.16 has no setting for it and passes none (no issue is filed). vLLM then takes the dtype of the model's config,
    or bfloat16 where that is float32: a float32 policy would be sampled in bfloat16. Delete this once TRL passes one.

    Args:
        args ([`OPOConfig`]):
            The run's configuration.
        model (`Callable`):
            Returns the policy, which is loaded when the engine is started.
    """
    if not args.use_vllm:
        yield
        return
    from trl.generation import vllm_generation  # imports vLLM, which takes long

    original = getattr(vllm_generation, "LLM", None)  # not there without vLLM, which TRL reports
    if original is None:
        yield
        return

    def build(*positional: Any, **settings: Any) -> Any:
        return original(*positional, **{"dtype": args.vllm_dtype or trainer_dtype(args, model()), **settings})

    vllm_generation.LLM = build
    try:
        yield
    finally:
        vllm_generation.LLM = original


def engine_dtype(generation: Any) -> str | None:
    """
    Name the dtype that an engine computes in.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            TRL's engine. In server mode the main process alone has a connection.

    Returns:
        `str`, or `None` where the engine does not report it.
    """
    if hasattr(generation, "llm"):
        return _name(generation.llm.llm_engine.model_config.dtype)
    if hasattr(generation, "vllm_client"):
        try:
            server = generation.vllm_client.get_server_info()
        except RuntimeError as error:  # its development endpoints are closed
            logger.info("The vLLM server does not report its dtype: %s", error)
            return None
        dtype = server["model_config"].get("dtype")
        return None if dtype is None else _name(dtype)
    return None


def warn_of_other_dtype(generation: Any, args: Any, model: Any) -> None:
    """
    Warn if an engine computes in another dtype than the trainer: their log-probabilities differ by its rounding.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            TRL's engine.
        args ([`OPOConfig`]):
            The run's configuration.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy.
    """
    served, trained = engine_dtype(generation), trainer_dtype(args, model)
    if served is None or served == trained:
        return
    server = args.vllm_mode == "server"
    fix = f"Restart the server with `--dtype {trained}`" if server else "Leave `vllm_dtype` out"
    logger.warning(
        "The vLLM engine computes in %s and the trainer in %s, so that their log-probabilities differ by more than "
        "either's rounding. %s, or train in %s.",
        served,
        trained,
        fix,
        served,
    )


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
