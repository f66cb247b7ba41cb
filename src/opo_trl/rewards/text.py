"""Where the answer and the solution are in what a dataset and a policy wrote: plain text handling, no mathematics."""

import re
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

ThinkPolicy = Literal["after", "required", "ignored"]

_TOKEN = re.compile(r"\\+boxed\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER_IS = re.compile(r"(?:answer\s*(?:is\b|:)\s*:?|####)", re.IGNORECASE)


def final_text(completion: Any, think: ThinkPolicy = "after") -> str:
    """
    Return the text that answers: the last assistant message, after its thinking.

    Args:
        completion (`str`, `list[dict]`):
            A plain completion; messages with `role` and `content`; `content` may be a string or a list of parts.
        think (`str`, *optional*, defaults to `"after"`):
            `"after"`: the text after the last `</think>`, up to a `<think>` that is never closed; the complete text if
            there are no tags. `"required"`: the same, but empty without a `</think>`. `"ignored"`: always the complete
            text.

    Returns:
        `str`: Empty if there is no assistant message with text, whatever the type of `completion`.
    """
    text = last_text(completion)
    if think == "ignored":
        return text
    _, closed, answer = text.rpartition("</think>")
    if think == "required" and not closed:
        return ""
    return answer.split("<think>", 1)[0]


def last_text(messages: Any, role: str = "assistant") -> str:
    """Return a text as it is, or the text of the last message of a role; empty if there is none."""
    if isinstance(messages, str):
        return messages
    if not isinstance(messages, list):
        return ""
    found = [message for message in messages if isinstance(message, dict) and message.get("role", role) == role]
    contents = [message.get("content") for message in found]
    content = contents[-1] if contents else ""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def last_boxed(text: str) -> str | None:
    r"""Return what the last closed `\boxed{...}` of `text` holds, or `None`, in one pass from the left."""
    boxed = None
    opened: list[int | None] = []  # where the content of a box starts; None for any other brace
    for token in _TOKEN.finditer(text):
        if token[0] == "{":
            opened.append(None)
        elif token[0] == "}":
            start = opened.pop() if opened else None
            if start is not None:
                boxed = text[start : token.start()].strip()
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.end())
    return boxed


def stated_answer(text: str) -> str | None:
    r"""Return the boxed answer; or what follows the last `####`, `answer is` or `answer:` on its line; or `None`."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    stated = _ANSWER_IS.split(text)
    if len(stated) == 1:
        return None
    lines = stated[-1].strip().splitlines()
    return lines[0].strip(" *") if lines else None


def solution_text(solution: Any) -> str:
    """
    Return the bare LaTeX of a gold answer: without GSM8K's `####`, an outer box, or dollar signs around it.

    A number is written out in full, an integral float as the integer it is; `None` and NaN are empty, and so is what
    holds several values, such as a list.
    """
    if solution is None or isinstance(solution, list | tuple | set | dict):
        return ""
    try:
        text = str(solution)
        if not isinstance(solution, str):
            number = Decimal(text)
            text = format(number, "f") if number.is_finite() else ""
    except InvalidOperation:
        pass  # not a number: it is compared as what it prints
    except ValueError:
        return ""  # an integer of more digits than Python prints
    text = text.rsplit("####", 1)[-1].strip()
    boxed = last_boxed(text)
    text = (text if boxed is None else boxed).strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            if opening not in inner:
                text = inner.strip()
            break
    return "" if text == "$" else text
