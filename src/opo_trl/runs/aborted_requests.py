"""An engine in the training process, after a generation that was interrupted."""

from collections.abc import Callable
from typing import Any


def abort_on_error(generation: Any) -> Callable[..., Any]:
    """
    Abort the engine's unfinished requests if a generation ends with an exception, such as that of Ctrl-C.

    vLLM 0.31 keeps them: the next generation would continue them, and return their completions before its own. No issue
    is known; delete this when vLLM aborts them itself.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            TRL's generation in colocate mode.

    Returns:
        `Callable`: Its `generate`, which then raises the same exception.
    """
    generate = generation.generate

    def generate_or_abort(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except BaseException:
            engine = generation.llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise

    return generate_or_abort
