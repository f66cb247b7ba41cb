r"""
Numbers that can be read off their normal form exactly, and the units that stand beside them. No floats, no sympy.

Most answers are such numbers, so most verdicts fall here, in the training process, within microseconds.
"""

import re
from fractions import Fraction

_DECIMAL = re.compile(
    r"(?P<integer>\d{1,3}(?:,\d{3})+|\d*)(?:\.(?P<decimals>\d*))?(?:\\overline\{(?P<period>\d+)\})?"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})|\\cdot10\^(?:\{(?P<power>-?\d{1,3})\}|(?P<digit>\d)))?"
)
_FRACTION = re.compile(r"(?P<whole>\d*)(?:\\frac\{(?P<above>-?\d+)\}\{(?P<below>-?\d+)\})|(?P<left>\d+)/(?P<right>\d+)")

_MONEY = re.compile(r"([-+]?)(?:\\\$|\\text\{([€£¥])\})(.+)")
_UNIT = re.compile(
    r"(?P<value>.*[^\s\\^_{(\[])(?P<unit>%|\\degree|\\\$|\\text\{(?P<text>[^{}]*)\}(?:\^\{?(?P<power>\d)\}?)?"
    r"|(?<=[\d}]) (?P<bare>[A-Za-z.]{2,}(?: [A-Za-z.]{2,})*))"
)
_ANGLE = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")  # whose argument the degrees then belong to
# Degrees that are an argument, a power, a factor, or come before minutes, and are no unit of the value.
_OTHER_DEGREES = re.compile(_ANGLE.pattern + r"|\^|cis|\\degree(?=[\w(\\'])|^\\degree$")
# Words after a number that change what it says, instead of naming what is counted.
_NOT_UNITS = {
    "or", "and", "not", "but", "nor", "is", "are", "to", "than", "less", "least", "most", "about", "around",
    "half", "quarter", "double", "twice", "dozen", "hundred", "thousand", "million", "billion", "trillion", "base",
    "mod", "modulo", "plus", "minus", "times", "over", "pi", "squared", "cubed", "if", "when", "where", "for", "am",
    "pm", "factorial", "negative", "tenth", "hundredth", "thousandth", "millionth", "third", "fourth", "fifth",
    "sixth", "seventh", "eighth", "ninth", "eleventh", "twelfth", "halve", "bn", "k", "root",
    "choose", "inverse", "reciprocal",
}  # fmt: skip
_SHORT = {"cm", "mm", "km", "kg", "mg", "ft", "in", "lb", "mi", "yd", "hr", "ml"}  # bare letters that are no product
_SAME_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "kilometer": "km",
    "kilometre": "km", "meter": "m", "metre": "m", "inche": "in", "inch": "in", "feet": "ft", "foot": "ft",
    "mile": "mi", "yard": "yd", "pound": "lb", "kilogram": "kg", "gram": "g", "gm": "g", "hour": "hr", "minute": "min",
    "second": "sec", "liter": "l", "litre": "l", "usd": "dollar", "percent": "%", "percentage": "%", "pct": "%",
    "degree": "degree", "deg": "degree", "mph": "mi per hr", "€": "euro", "sq": "square", "cu": "cubic", "hrs": "hr",
    "lbs": "lb", "kgs": "kg", "cms": "cm", "yds": "yd", "h": "hr",
}  # fmt: skip
_MEASURES = _SHORT | set(_SAME_UNITS) | {word for unit in _SAME_UNITS.values() for word in unit.split()}


def plain_number(text: str) -> Fraction | None:
    """Exact value of an integer, decimal, fraction, mixed number or power of ten in normal form, or `None`."""
    digits = text.lstrip("+-")
    sign = -1 if "-" in text[:1] else 1
    if len(text) - len(digits) > 1:
        return None
    if match := _DECIMAL.fullmatch(digits):
        integer, decimals, period = (match[name] or "" for name in ("integer", "decimals", "period"))
        if (not integer and not decimals and not period) or (period and match["decimals"] is None):
            return None
        value = Fraction(int(integer.replace(",", "") + decimals or "0"), 10 ** len(decimals))
        if period:
            value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
        return sign * value * Fraction(10) ** int(match["exponent"] or match["power"] or match["digit"] or 0)
    if match := _FRACTION.fullmatch(digits):
        above, below = int(match["above"] or match["left"]), int(match["below"] or match["right"])
        if below == 0 or (match["whole"] and (above < 0 or below < 0)):
            return None
        return sign * (int(match["whole"] or 0) + Fraction(above, below))
    return None


def split_unit(text: str) -> tuple[str, str]:
    r"""
    Split the normal form of a quantity into its value and its unit, `5\text{ cm}^2` into `5` and `cm^2`.

    The unit is empty where there is none, or where the words beside the number say more than what is counted.
    """
    value, unit = _split_unit(text)
    if r"\degree" in value and not _OTHER_DEGREES.search(value):  # 180\degree-60\degree, 90\degree-x
        return value.replace(r"\degree", ""), unit or "degree"
    return value, unit


def _split_unit(text: str) -> tuple[str, str]:
    if match := _MONEY.fullmatch(text):
        value, unit = _split_unit(match[3])
        if unit != "dollar" and not unit.startswith(("dollar per ", "per ")):  # \$18 per day, but \$18 million is more
            value, unit = match[3], ""
        currency = _SAME_UNITS.get(match[2], match[2]) if match[2] else "dollar"
        return match[1] + value, f"{currency} {unit.removeprefix('dollar').strip()}".strip()
    match = _UNIT.fullmatch(text)
    if match is None or (match["unit"] == r"\degree" and _ANGLE.search(match["value"])):
        return text, ""
    if match["text"] is None and match["bare"] is None:
        return match["value"], {"%": "%", r"\degree": "degree", r"\$": "dollar"}[match["unit"]]
    said = (match["text"] or match["bare"]).replace(".", ". ").replace("/", " per ")
    words = [word.strip(".,()").lower() for word in said.split()]
    words = [word if word in _NOT_UNITS else _singular(word) for word in words if word]
    if not words or _NOT_UNITS.intersection(words) or any(character.isdigit() for word in words for character in word):
        return text, ""
    unknown = [word for word in words if word not in _MEASURES]
    if match["bare"] is not None and any(len(word) < 3 or not re.search("[aeiou]", word) for word in unknown):
        return text, ""  # a product of letters
    if unknown and not re.search(r"\d|\\pi", match["value"]):
        return text, ""  # n\text{ odd} counts nothing
    return match["value"].rstrip(), _unit(words, match["power"])


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _unit(words: list[str], power: str | None) -> str:
    names = [_SAME_UNITS.get(word, word) for word in words]
    for prefix, exponent in (("square", "2"), ("cubic", "3")):
        if prefix in names:
            names.remove(prefix)
            power = power or exponent
    return " ".join(names) + (f"^{power}" if power else "")


def units_agree(one: str, other: str) -> bool:
    """A unit may be left out, and so may `per day` after dollars. Two different ones are two different answers."""
    shorter, longer = sorted((one, other))
    if not shorter or one == other or (shorter == "dollar" and longer.startswith("dollar per ")):
        return True
    return {one, other} in ({"degree", "c"}, {"degree", "f"})  # of temperature


def same_number(gold: str, answer: str) -> bool | None:
    """Whether two quantities in normal form are equal, or `None` if either is more than a number with a unit."""
    (gold_text, gold_unit), (answer_text, answer_unit) = split_unit(gold), split_unit(answer)
    gold_value, answer_value = plain_number(gold_text), plain_number(answer_text)
    if gold_value is None or answer_value is None:
        return None
    if not units_agree(gold_unit, answer_unit):
        return False
    return gold_value == answer_value or percent_of(gold_value, gold_unit, answer_unit) == percent_of(
        answer_value, answer_unit, gold_unit
    )


def percent_of(value: Fraction, unit: str, other_unit: str) -> Fraction:
    """What a percentage means beside a bare number: 7.2 % is 7.2 as it is written, or 0.072 as it is meant."""
    return value / 100 if unit == "%" and not other_unit else value
