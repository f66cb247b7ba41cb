"""Where the answer is in a completion: plain text handling, no mathematics."""

from typing import Any

_BOX = r"\boxed{"


def final_text(completion: Any) -> str:
    """
    Return the text that answers: the last assistant message, after its thinking.

    Args:
        completion (`str`, `list[dict]`):
            A plain completion; messages with `role` and `content`; `content` may be a string or a list of parts.

    Returns:
        `str`: What follows the last `</think>`, or the whole text. Empty if there is no assistant message with text.
    """
    if isinstance(completion, str):
        text = completion
    else:
        contents = [message.get("content") for message in completion if message.get("role", "assistant") == "assistant"]
        content = contents[-1] if contents else ""
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content)
        text = content or ""
    return text.rsplit("</think>", 1)[-1]


def last_boxed(text: str) -> str | None:
    r"""Return what the last balanced `\boxed{...}` of `text` holds, or `None`, in one pass from the left."""
    boxed = None
    start = text.find(_BOX)
    while start != -1:
        depth, position = 1, start + len(_BOX)
        while position < len(text) and depth:
            if text[position] == "\\":
                position += 1  # an escaped brace is text
            elif text[position] in "{}":
                depth += 1 if text[position] == "{" else -1
            position += 1
        if depth:  # never closed: nor is any box after it that it would contain
            return boxed
        boxed = text[start + len(_BOX) : position - 1]
        start = text.find(_BOX, position)
    return boxed
