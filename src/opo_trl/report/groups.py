"""The completions of a run in the groups that share a baseline, from the rows of TRL's completions tables."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

Messages = list[tuple[str, str]]  # role and text; plain text has the role ""

NO_ANSWER = "no answer"  # a verdict of `math_verify_reward`
_OWN = "opo/"
_NOT_REWARDS = {"step", "prompt", "completion", "advantage", "image", "images"}


@dataclass(frozen=True)
class Completion:
    """
    One row of a completions table. What the table does not have is `None`.

    Attributes:
        messages (`list[tuple[str, str]]`):
            Role and text of each message; one without a role for plain text.
        rewards (`dict[str, float | None]`):
            What each reward function returned.
        reward (`float`, *optional*):
            Their weighted sum, which is trained: where the run has logged it, or with one reward function.
        advantage (`float`, *optional*), length (`int`, *optional*), baseline (`float`, *optional*),
        truncated (`bool`, *optional*):
            As logged.
        extra (`dict[str, Any]`):
            Columns that reward functions have logged.
        tokens (`list[str]`, *optional*), logps (`list[float]`, *optional*):
            Text and log-probability of each token.
    """

    messages: Messages
    rewards: dict[str, float | None]
    reward: float | None
    advantage: float | None
    length: int | None
    baseline: float | None
    truncated: bool | None
    extra: dict[str, Any]
    tokens: list[str] | None = None
    logps: list[float | None] | None = None

    @property
    def unscorable(self) -> bool:
        """Whether no reward function returned a number."""
        return all(value is None for value in self.rewards.values())

    @property
    def verdict(self) -> str | None:
        """What `math_verify_reward` has logged about the answer."""
        found = (value for name, value in self.extra.items() if name.endswith("verdict") and value is not None)
        return next(found, None)


@dataclass(frozen=True)
class Group:
    """
    The completions of one prompt.

    Attributes:
        step (`int`):
            Optimizer step after which the table was written.
        split (`str`, *optional*):
            `"train"` or `"eval"`; None where the run has not logged it.
        prompt (`list[tuple[str, str]]`):
            Role and text of each message.
        completions (`list[Completion]`):
            In the order of the table.
        solution (`str`, *optional*):
            The dataset's column `solution`.
    """

    step: int
    split: str | None
    prompt: Messages
    completions: list[Completion]
    solution: str | None = None

    def scores(self, function: str | None = None) -> list[float]:
        """Rewards of the completions that have one: of a function, or as they are trained."""
        values = [
            completion.reward if function is None else completion.rewards.get(function)
            for completion in self.completions
        ]
        return [value for value in values if value is not None]

    def none_positive(self, function: str | None = None) -> bool:
        """Whether no completion has a reward above 0, and one has a reward."""
        scores = self.scores(function)
        return bool(scores) and max(scores) <= 0

    def all_equal(self, function: str | None = None) -> bool:
        """Whether all completions that have a reward have the same, in a group of two or more."""
        scores = self.scores(function)
        return len(self.completions) > 1 and bool(scores) and min(scores) == max(scores)


def group_rows(rows: Iterable[dict[str, Any]], reward_names: Sequence[str] = ()) -> list[Group]:
    """
    Divide the rows of one completions table into groups.

    Rows in sequence with the same prompt are one group. Rows of OPO's trainer have the group's position as well, so
    that a prompt that comes twice in sequence makes two.

    Args:
        rows (`Iterable[dict[str, Any]]`):
            Rows of one table, in its order.
        reward_names (`Sequence[str]`, *optional*):
            Columns that are rewards. Without any, those that are numbers and neither TRL's nor OPO's.

    Returns:
        `list[Group]`, in the order of the table.
    """
    rows = list(rows)
    names = [name for name in reward_names if rows and name in rows[0]] or _numeric_columns(rows)
    key = lambda row: (row.get("opo/split"), row.get("opo/group"), row["prompt"])  # noqa: E731
    return [
        Group(
            row["step"],
            row.get("opo/split"),
            _messages(row["prompt"]),
            [_completion(each, names) for each in same],
            row.get("opo/solution"),
        )
        for same in (list(each) for _, each in groupby(rows, key))
        for row in same[:1]
    ]


def _numeric_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    columns = [name for name in (rows[0] if rows else {}) if name not in _NOT_REWARDS and not name.startswith(_OWN)]
    return [
        name
        for name in columns
        if all(row[name] is None or is_number(row[name]) for row in rows) and any(row[name] is not None for row in rows)
    ]


def _completion(row: dict[str, Any], reward_names: Sequence[str]) -> Completion:
    rewards = {name: finite(row[name]) for name in reward_names}
    trained = row.get("opo/reward", rewards[reward_names[0]] if len(reward_names) == 1 else None)
    known = {*_NOT_REWARDS, *reward_names}
    length = row.get("opo/length")
    return Completion(
        messages=_messages(row["completion"]),
        rewards=rewards,
        reward=finite(trained),
        advantage=finite(row.get("advantage")),
        length=None if length is None else int(length),
        baseline=finite(row.get("opo/baseline")),
        truncated=row.get("opo/truncated"),
        extra={name: value for name, value in row.items() if name not in known and not name.startswith(_OWN)},
        tokens=row.get("opo/tokens"),
        logps=row.get("opo/token_logps"),
    )


def finite(value: Any) -> float | None:
    """A number, or `None` for NaN, which tables have where a reward function returned None and JSON cannot express."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return None
    return float(value)


def _messages(content: Any) -> Messages:
    if isinstance(content, str):
        return [("", content)]
    return [(message.get("role") or "", _text(message)) for message in content]


def _text(message: dict[str, Any]) -> str:
    """Text of a chat message: what it says, pictures by name, and tool calls as JSON."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(block.get("text") or f"[{block.get('type')}]" for block in content)
    calls = [json.dumps(_without_none(call), ensure_ascii=False) for call in message.get("tool_calls") or []]
    reasoning = message.get("reasoning_content") or message.get("thinking")
    return "\n".join([*([reasoning] if reasoning else []), *([content] if content else []), *calls])


def _without_none(value: Any) -> Any:
    """A value of a table without the keys that only other rows have."""
    if isinstance(value, dict):
        return {name: _without_none(each) for name, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value
