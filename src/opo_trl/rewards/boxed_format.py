"""Reward for giving the final answer where the grader looks for it."""

from typing import Any

from .text import final_text, last_boxed


def boxed_format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    r"""
    Reward 1.0 for a completion whose final text holds a closed, non-empty `\boxed{...}`, 0.0 for any other.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions as text or messages.
        **kwargs:
            Ignored; a TRL trainer passes more than this function needs.

    Returns:
        `list[float]`: One reward per completion.
    """
    return [float(bool((last_boxed(final_text(completion)) or "").strip())) for completion in completions]
