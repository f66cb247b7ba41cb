r"""
One way of writing each thing: the normal form of an answer's LaTeX, without any mathematics.

Two answers with the same normal form are the same answer. So a rule may stand here only if it changes how something is
written and never what it says.
"""

import re
import unicodedata

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "÷": "/", "∕": "/", "⁄": "/", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∞": r"\infty ", "°": r"\degree ", "º": r"\degree ", "√": r"\sqrt ",
    "∛": r"\sqrt[3] ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}",
    "∖": r"\setminus ", "⟨": r"\langle ", "⟩": r"\rangle ", "∠": r"\angle ", "△": r"\triangle ", "…": r"\ldots ",
    "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "，": ",", "。": ".", "（": "(", "）": ")", "∑": r"\sum ",
    "∫": r"\int ", "∏": r"\prod ", "€": r"\text{€}", "£": r"\text{£}", "¥": r"\text{¥}",
}  # fmt: skip
_GREEK = {
    character: "\\" + unicodedata.name(character).rsplit(" ", 1)[1].lower() + " "
    for character in "αβγδεζηθικλμνξπρστυφχψω"
    if not unicodedata.name(character).endswith("LAMDA")
} | {"λ": r"\lambda "}
_TRANSLATION = str.maketrans(_SIGNS | _GREEK)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

# Layout: prints nothing, or white space of some width.
_NOTHING = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])(?:\.(?!\d))?"
    r"|\\(?:displaystyle|textstyle|limits|nolimits|strut|mathstrut)(?![A-Za-z])"
)
_SPACE = re.compile(r"(?<!\\)\\[,;:> ]|(?<!\\)~|\\(?:quad|qquad|enspace|thinspace|space)(?![A-Za-z])|\s")

# Two ways of writing the same, one pair a line; a command ends where a letter no longer follows.
_SYNONYMS = [
    (re.compile(pattern.replace("END", "(?![A-Za-z])")), replacement)
    for pattern, replacement in [
        (r"^\s*\\boxed\s*\{(.*)\}\s*$", r"\1"),  # a box in a box
        (r"(?<=\d)(?:,\\!|\{,\})(?=\d{3}(?!\d))", ""),  # 12{,}000 and 12,\!000 cannot be lists
        (r"\\!", ""),
        (r"(?<!\\)\\\s*$", ""),  # what is left of a space at the end
        (r"\\\\\s*\[[\d.]+ ?(?:pt|ex|em|mm|cm)\]", r"\\\\"),  # the height of a row
        (r"\[\s*(\\begin\{(matrix|array)\}(?:(?!\\begin\{)[\s\S])*\\end\{\2\})\s*\]", r"(\1)"),
        (r"\\[dtc]fracEND", r"\\frac"),
        (r"\\[dt]binomEND", r"\\binom"),
        (r"\\leq(?:slant)?END", r"\\le "),
        (r"\\geq(?:slant)?END", r"\\ge "),
        (r"\\ltEND", "<"),
        (r"\\gtEND", ">"),
        (r"\\neqEND", r"\\ne "),
        (r"\\(?:times|ast)END|(?<!\*)\*(?!\*)", r"\\cdot "),
        (r"\\divEND", "/"),
        (r"\\colonEND", ":"),
        (r"\\lbraceEND", r"\\{"),
        (r"\\rbraceEND", r"\\}"),
        (r"\\lbrackEND", "["),
        (r"\\rbrackEND", "]"),
        (r"\\[lr]?vertEND|\\midEND", "|"),
        (r"\\varnothingEND|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:[dlc]|)dots[bcimo]?END|\.\.\.", r"\\ldots "),
        (r"\\mathbb\s*R\b|\\(?:R|[Rr]eals)END", r"\\mathbb{R}"),
        (r"(\\mathbb\{R\})\s*-\s*(?=\\\{)", r"\1\\setminus "),
        (r"\\bar\s*\{(\d+)\}", r"\\overline{\1}"),
        (r"\^\s*(?:\\circEND|\{\s*\\circ\s*\}|\\degreeEND|\{\s*\\degree\s*\})", r"\\degree "),
        (r"\\%", "%"),
        (r"(?<!\\)\$", ""),
        # Fonts: a letter is a letter, a word is text.
        (r"\\(?:math(?:rm|it|bf|sf)|bm|boldsymbol|operatorname)\s*\{\s*([A-Za-z]|\d+)\s*\}", r"\1 "),
        (r"^\s*\\math(?:rm|it|bf|sf)\s*\{((?:[^{}]|\{[^{}]*\})*\\(?:[^{}]|\{[^{}]*\})*)\}\s*$", r"\1"),
        (r"\\operatorname\*?\s*\{\s*([A-Za-z]+)\s*\}", r"\\\1 "),
        (r"\\(?:[mh]box|text(?:normal|bf|it|rm|sf|tt|up)?|math(?:rm|it|bf|sf))\s*\{", r"\\text{"),
        (r"\\text\{\s*\}", ""),
        (r"(?<=\d)\\text\{\s*([ixyzn])\s*\}", r"\1"),  # a letter, not a unit
        (r"\\text\{\s*\\\$\s*([\d.,]*\d)?\s*\}", r"\\$\1"),
        (r"\\text\{([^{}]*[A-Za-z])\s*\^(?:\{(\d)\}|(\d))\s*\}", r"\\text{\1}^\2\3"),  # square centimetres
        (r"\\text\{([^{}]*[A-Za-z])\s*\}\s*/\s*\\text\{\s*([A-Za-z][^{}]*)\}", r"\\text{\1/\2}"),
        (r"\\degree\s*([CF])(?![A-Za-z])", r"\\degree\\text{\1}"),
        (r"\(\s*([0-9A-Z]+)\s*\)(?=_)", r"\1"),  # digits with a base
        (r"\\text\{([0-9A-Z]+)\}(?=_)", r"\1"),  # the digits of a number with a base
        (r"^\s*\\text\{\s*([-+]?[\d.,]*\d)\s*\}\s*$", r"\1"),  # a number set in text, and nothing else
        (r"^\s*\\text\{\s*([-+]?[\d.,]*\d)\s+([A-Za-z][A-Za-z. ]*)\}\s*$", r"\1\\text{ \2}"),  # or with its unit
    ]
]  # fmt: skip
_ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1}
_COMMAND = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)


def normalize(text: str) -> str:
    r"""Return the normal form of LaTeX, or of the plain and unicode notation that models mix with it."""
    text = _NOTHING.sub("", _from_unicode(text))
    for pattern, replacement in _SYNONYMS:
        text = pattern.sub(replacement, text)
    text = _brace_arguments(_SPACE.sub(" ", text))
    # Digits in groups of three, set apart by (thin) spaces, are one number.
    text = re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d.,]? ?\d)", lambda number: number[0].replace(" ", ""), text)
    # A comma may be part of a number, but not if white space follows it: then it sets two numbers apart.
    text = re.sub(r"(?<=\d), (?=\d)", ";", text)
    # White space says something between two words or numbers, and between a command and a letter; nowhere else.
    text = re.sub(r" +", " ", text)
    text = re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])|(?<=\d) (?=[A-Za-z](?![A-Za-z]))", "", text)
    text = re.sub(r"(\\[A-Za-z]+) (?=[^A-Za-z])", r"\1", text)
    text = text.rstrip(".,;: ")
    while text.startswith("{") and matching_brace(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def is_too_deep(text: str, limit: int) -> bool:
    """Whether brackets, of any kind, are nested more than `limit` deep."""
    depth = 0
    for character in text:
        if character in "([{":
            depth += 1
            if depth > limit:
                return True
        elif character in ")]}":
            depth -= 1
    return False


def matching_brace(text: str, start: int) -> int:
    """Return where the brace at `start` closes, or -1."""
    depth = 0
    position = start
    while position < len(text):
        if text[position] == "\\":
            position += 1  # an escaped brace is text
        elif text[position] in "{}":
            depth += 1 if text[position] == "{" else -1
            if not depth:
                return position
        position += 1
    return -1


def _from_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda raised: f"^{{{raised[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda lowered: f"_{{{lowered[0].translate(_LOWERED)}}}", text)
    text = re.sub(r"√\s*(\d+)", r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    return "".join(map(_ascii, text)).translate(_TRANSLATION)


def _ascii(character: str) -> str:
    kind = unicodedata.decomposition(character).split(" ", 1)[0]
    if kind == "<fraction>":  # ½
        numerator, _, denominator = unicodedata.normalize("NFKC", character).partition("⁄")
        return rf"\frac{{{numerator}}}{{{denominator}}}"
    if kind in ("<wide>", "<noBreak>", "<font>"):
        return unicodedata.normalize("NFKC", character)
    category = unicodedata.category(character)
    return "" if category == "Cf" else " " if category == "Zs" else character  # of zero width; of any width


def _brace_arguments(text: str) -> str:
    r"""Put one pair of braces around each argument, as in `\frac12`, `\frac{\pi}2`, `\sqrt2` or `\frac{{1}}{2}`."""
    pieces = []
    position = 0
    while position < len(text):
        token = _COMMAND.match(text, position)
        assert token is not None  # any character is a token
        pieces.append(token[0])
        position = token.end()
        if token[0] == r"\sqrt" and (degree := re.compile(r"\s*(\[[^\[\]]*\])").match(text, position)):
            pieces.append(degree[1])
            position = degree.end()
        for _ in range(_ARGUMENTS.get(token[0], 0)):
            argument, position = _argument(text, position)
            pieces.append("{" + argument + "}")
    return "".join(pieces)


def _argument(text: str, position: int) -> tuple[str, int]:
    """The argument at `position`, without braces, and where it ends."""
    while text[position : position + 1] == " ":
        position += 1
    closing = matching_brace(text, position) if text[position : position + 1] == "{" else -1
    if closing == -1:
        token = _COMMAND.match(text, position)
        return (token[0], token.end()) if token else ("", position)
    inner = _brace_arguments(text[position + 1 : closing]).strip()
    while inner.startswith("{") and matching_brace(inner, 0) == len(inner) - 1:
        inner = inner[1:-1].strip()
    return inner, closing + 1
