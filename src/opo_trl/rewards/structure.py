r"""
The shape of an answer, read off its normal form: a list, a set, a tuple or interval, a chain of relations, one value.

Text only: what a value says is for `grading` to find out. math-verify would read `(1, 2)` as an interval and a bare
`1, 2` as a set, and compare either with the other.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

EQUALITIES = {"=", r"\in", r"\approx"}
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_RELATIONS = EQUALITIES | set(_FLIPPED) | {r"\ne"}

_TOKEN = re.compile(
    r"\\text\{[^{}]*\}|\\begin\{[a-z]+\}|\\end\{[a-z]+\}|\\[A-Za-z]+|\\.|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|.",
    re.DOTALL,
)
_OPENING = {"(": "(", "[": "[", "{": "{", r"\{": r"\{", r"\langle": "("}
_CLOSING = {")": ")", "]": "]", "}": "}", r"\}": r"\}", r"\rangle": ")"}
_THOUSANDS = re.compile(r"(?<![\d,._])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_NAME = re.compile(
    r"(?:m?\\(?:angle|triangle) ?)?"
    r"(?:(?![ei](?![A-Za-z_(']))[A-Za-z]|\\(?!pi(?![A-Za-z]))(?:[a-z]*alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|phi"
    r"|omega|ell|Delta|vec\{[A-Za-z]\}|hat\{[A-Za-z]\}|overline\{[A-Za-z]+\}|text\{[A-Za-z ]+\}"
    r")|[A-Z]{2,}|\|[A-Z]{2}\|)'*(?:_(?:\w|\\[a-z]+|\{[^{}=<>]*(?:\{[^{}=<>]*\}[^{}=<>]*)?\}))?(?:\^\{-1\})?(?:\([^()=<>]*\))?"
)
_PROBABILITY = re.compile(r"P\([^()]+\)")


@dataclass(frozen=True)
class Value:
    """One number, expression, matrix or word."""

    text: str


@dataclass(frozen=True)
class Collection:
    r"""Several values. `kind` is `list`, `or`, `set`, `union`, or the two brackets of a tuple or an interval."""

    kind: str
    parts: tuple["Node", ...]
    text: str

    @property
    def is_ordered(self) -> bool:
        return self.kind not in ("list", "or", "set", "union")


@dataclass(frozen=True)
class Relation:
    """Members with a sign between each two: `x = 2 = 4/2`, `1 < x \\le 2`, `x \\in [0, 1)`."""

    members: tuple["Node", ...]
    signs: tuple[str, ...]
    text: str

    @property
    def is_equality(self) -> bool:
        return EQUALITIES.issuperset(self.signs)

    @property
    def name(self) -> str:
        """What the relation gives the value of, `x` in `x = 2`; empty if the first member is more than a name."""
        return self.members[0].text if self.is_equality and is_name(self.members[0]) else ""

    @property
    def values(self) -> tuple["Node", ...]:
        r"""The members that must all be the answer: without the name, and without what is only approximately so."""
        last = self.signs.index(r"\approx") if r"\approx" in self.signs else len(self.signs)
        members = self.members[: last + 1] if last or not self.name else self.members
        return members[1:] if self.name else members


Node = Value | Collection | Relation


def read(text: str, outermost: bool = True) -> Node:
    """Return the shape of a normal form."""
    text = text.strip()
    parts, joined_by_or = _split_list(text, outermost)
    if len(parts) > 1:
        nodes = [read(part, outermost) for part in parts]
        first, rest = nodes[0], nodes[1:]
        if isinstance(first, Relation) and first.name and not any(isinstance(node, Relation) for node in rest):
            values = _collection("list", [first.members[-1], *rest], text)  # x = 1, 2
            return Relation((*first.members[:-1], values), first.signs, text)
        return _collection("or" if joined_by_or else "list", nodes, text)

    members, signs = _split(text, _RELATIONS)
    if signs and not members[0] and signs[0] in ("=", r"\approx"):
        return read(text.removeprefix(signs[0]), outermost)
    if signs:
        return Relation(tuple(read(member, outermost) for member in members), tuple(signs), text)

    pieces, _ = _split(text, {r"\cup"})
    if len(pieces) > 1:
        return _collection("union", [read(piece, False) for piece in pieces], text)

    if brackets := _enclosing(text):
        opening, closing, inner = brackets
        parts, _ = _split_list(inner, False)
        if opening == r"\{" and closing == r"\}":
            return _collection("set", [read(part, False) for part in parts], text)
        if len(parts) > 1 or opening != "(" or closing != ")":
            return Collection(opening + closing, tuple(read(part, False) for part in parts), text)
        return read(inner, False)

    if r"\pm" in text or r"\mp" in text:
        upper = re.sub(r"\\pm(?![A-Za-z])", "+", re.sub(r"\\mp(?![A-Za-z])", "-", text))
        lower = re.sub(r"\\pm(?![A-Za-z])", "-", re.sub(r"\\mp(?![A-Za-z])", "+", text))
        return Collection("list", (Value(upper), Value(lower)), text)
    if outermost:
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return Value(text)


def is_name(node: Node) -> bool:
    r"""Whether a node is only a name: `x`, `f(2)`, `AB`, `P(A)`, `\angle ABC`, `(x, y)`, but not `2x` or `\sqrt{x}`."""
    if isinstance(node, Collection):
        return node.is_ordered and all(is_name(part) for part in node.parts)
    if not isinstance(node, Value) or not (_NAME.fullmatch(node.text) or _PROBABILITY.fullmatch(node.text)):
        return False
    name, _, argument = node.text.partition("(")
    # x(x-2) is a product, and x^{-1} a power.
    return name not in argument and ("^{-1}" not in name or name[0].isupper() or name[0] in "fgh")


def ascending(relation: Relation) -> Relation:
    r"""An inequality written from small to large: `x > 3` as `3 < x`."""
    if not {">", r"\ge"}.intersection(relation.signs):
        return relation
    signs = tuple(_FLIPPED.get(sign, sign) for sign in reversed(relation.signs))
    return Relation(tuple(reversed(relation.members)), signs, relation.text)


def as_intervals(node: Node) -> Node:
    r"""What inequalities say of one name, as intervals: `2 \le x < 5` as `[2,5)`, `x \ne 3` as a union."""
    if node == Value(r"\mathbb{R}"):
        return _interval("(", Value(r"-\infty"), Value(r"\infty"), ")")
    if isinstance(node, Collection) and node.kind in ("or", "union"):
        members = [member for part in node.parts if isinstance(part, Relation) for member in part.members]
        if len({member.text for member in members if is_name(member)}) > 1:
            return node  # of several names
        pieces = [as_intervals(part) for part in node.parts]
        return _collection("union", pieces, node.text) if pieces != list(node.parts) else node
    if not isinstance(node, Relation) or node.is_equality:
        return node
    relation = ascending(node)
    left, right = {"<": "(", r"\le": "["}, {"<": ")", r"\le": "]"}
    match relation.members, relation.signs:
        case (name, value), (r"\ne",) if is_name(name):
            below, above = Value(r"-\infty"), Value(r"\infty")
            return _collection(
                "union", [_interval("(", below, value, ")"), _interval("(", value, above, ")")], node.text
            )
        case (name, value), (sign,) if is_name(name) and sign in right:
            return _interval("(", Value(r"-\infty"), value, right[sign])
        case (value, name), (sign,) if is_name(name) and sign in left:
            return _interval(left[sign], value, Value(r"\infty"), ")")
        case (low, name, high), (first, second) if is_name(name) and first in left and second in right:
            return _interval(left[first], low, high, right[second])
    return node


def _interval(opening: str, low: Node, high: Node, closing: str) -> Collection:
    return Collection(opening + closing, (low, high), f"{opening}{low.text},{high.text}{closing}")


def _collection(kind: str, nodes: list[Node], text: str) -> Collection:
    """A collection without order; a list within it, such as a plus-minus, is part of it."""
    parts: list[Node] = []
    for node in nodes:
        parts.extend(node.parts if isinstance(node, Collection) and node.kind == "list" else [node])
    return Collection(kind, tuple(parts), text)


def _tokens(text: str) -> Iterator[tuple[str, int, int]]:
    """Tokens with their start and the depth of brackets around them; a bracket itself is inside."""
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _OPENING or token.startswith(r"\begin{"):
            depth += 1
        yield token, match.start(), depth
        if token in _CLOSING or token.startswith(r"\end{"):
            depth -= 1


def _split(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """The pieces of `text` between the separators outside all brackets, and these separators."""
    pieces, found, start = [], [], 0
    for token, position, depth in _tokens(text):
        if depth == 0 and token in separators:
            pieces.append(text[start:position])
            found.append(token)
            start = position + len(token)
    return [*pieces, text[start:]], found


def _split_list(text: str, outermost: bool) -> tuple[list[str], bool]:
    """The elements of a list, and whether it says "or"."""
    thousands = {m.start() + i for m in _THOUSANDS.finditer(text) for i, c in enumerate(m[0]) if c == ","}
    parts, start, says_or = [], 0, False
    for token, position, depth in _tokens(text):
        says = token[6:-1] if token.startswith(r"\text{") else ""
        words = re.findall(r"[a-z]+", says)
        separates = (
            (token in (",", ";") and not (outermost and position in thousands))
            or token in ("and", "or")
            or (re.fullmatch(r"[a-z, ]+", says) and {"and", "or"}.issuperset(words))
        )  # fmt: skip
        if depth == 0 and separates:
            parts.append(text[start:position])
            start = position + len(token)
            says_or = says_or or token == "or" or "or" in words
    return [part for part in [*parts, text[start:]] if part.strip()], says_or


def _enclosing(text: str) -> tuple[str, str, str] | None:
    """The brackets that enclose all of `text`, and their content."""
    tokens = list(_tokens(text))
    if len(tokens) < 2 or tokens[0][0] not in _OPENING or tokens[-1][0] not in _CLOSING or tokens[0][0] == "{":
        return None
    if any(token in _CLOSING and depth == 1 for token, _, depth in tokens[:-1]):
        return None  # closes before the end, as in (x+1)(x+2)
    opening, closing = tokens[0][0], tokens[-1][0]
    return _OPENING[opening], _CLOSING[closing], text[len(opening) : tokens[-1][1]]
