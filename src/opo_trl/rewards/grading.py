r"""
The mathematics: whether two normal forms say the same. Runs in a worker process that may be killed at any time.

math-verify's parser reads the values and its `verify` compares expressions with variables. What it gets wrong is
decided before it is asked: shapes in `structure`, numbers and units in `quantities`, and here by the rules that the
comments state. A rule may refuse, or compare exactly; none guesses.
"""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify

from .quantities import same_number, split_unit, units_agree
from .structure import Collection, Node, Relation, Value, as_intervals, ascending, read

# Letters keep their case: in \pi(R^2 - r^2) they are two.
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")

# An answer may use these commands only: whatever else prints, hides or colours is not an answer.
_COMMANDS = {
    "frac", "binom", "sqrt", "pi", "infty", "cdot", "degree", "emptyset", "mathbb", "cup", "cap", "setminus",
    "overline", "text", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh",
    "tanh", "log", "ln", "exp", "lfloor", "rfloor", "lceil", "rceil", "begin", "end", "alpha", "beta", "gamma",
    "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma",
    "tau", "phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Sigma", "Phi", "Psi",
    "Omega", "ell", "mathcal", "vec", "hat", "bar", "circ", "prime",
}  # fmt: skip
# An answer may not leave a computation of these kinds to the grader, unless the solution does so, too.
_COMPUTATIONS = {
    "int", "iint", "oint", "sum", "prod", "lim", "det", "gcd", "lcm", "max", "min", "sup", "inf", "mod", "bmod", "pmod",
    "ldots", "prime",
}  # fmt: skip
_DERIVATIVE = re.compile(r"\\frac\{(?:d|\\partial)[^{}]*\}\{(?:d|\\partial)")
_BASED = re.compile(r"([-+]?[0-9A-Z.]+)_\{?(\d{1,2})\}?")
_DIGITS_WITH_INDEX = re.compile(r"[\d)]_|\\text\{[^{}]*\}_")  # the parser drops the index
_CHOICE = re.compile(r"\\text\{\([A-E]\)\}(?=[-\d.\\])(?P<value>(?:(?!\\text).)+)")  # `\textbf{(E)}\ 27`, as AMC has it
_SIDE_BY_SIDE = re.compile(  # but not where what follows is an argument: \log_{2}(8), \sin^2(x), \begin{array}{c}1
    r"(_(?:\{[^{}]*\}|\w).?|\\begin\{\w+\}(?:\{\w+\})?.?"
    r"|\\(?:sin|cos|tan|cot|sec|csc|log|ln|sinh|cosh|tanh)\^(?:\{[^{}]*\}|\w).?)"
    r"|(?<=[\d})!])(?=\\frac|\\binom|\()|(?<=[})!])(?=\d)"
)
_DETERMINANT = re.compile(r"\\begin\{[vV]matrix\}")
_DIGITS = 50  # two irrational numbers that agree to this many significant digits are the same

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its own alarms are off


def equal(gold: str, answer: str) -> bool:
    """Whether two normal forms say the same."""
    choice = _CHOICE.fullmatch(answer)
    return _same(read(gold), read(choice["value"] if choice else answer))


def probe(gold: str) -> None:
    """Do for a gold answer alone what comparing it takes, to find out whether that is possible within the limits."""
    _probe(read(gold))


def _probe(node: Node) -> None:
    if isinstance(node, Value):
        if same_number(node.text, "0") is None and (expression := _parse(split_unit(node.text)[0])) is not None:
            _agree_at_a_point(expression, sympy.Integer(0))
    else:
        for part in node.parts if isinstance(node, Collection) else node.members:
            _probe(part)


def _same(gold: Node, answer: Node) -> bool:
    if gold.text == answer.text or _same_words(gold.text, answer.text):
        return True
    # Inequalities may be given as intervals and the other way round; two inequalities are compared as they are written.
    if not (_is_inequality(gold) and _is_inequality(answer)):
        gold, answer = as_intervals(gold), as_intervals(answer)
    match gold, answer:
        case Relation(), Relation():
            return _same_relation(gold, answer)
        case _, Relation():
            # x = 2 says 2, and 2 = 4/2 says 2, but 2x = 4 or x^2 - 4 = 0 do not say 2, nor 0.
            return answer.is_equality and all(_same(gold, value) for value in answer.values)
        case Relation(), _:
            return gold.is_equality and all(_same(value, answer) for value in gold.values)
        case Collection(), Collection():
            return _same_collection(gold, answer) or _same_set(gold, answer)
        case Value(), Value():
            return _same_value(gold.text, answer.text)
    return _same_set(gold, answer)


def _is_inequality(node: Node) -> bool:
    return isinstance(node, Relation) and not node.is_equality


def _same_collection(gold: Collection, answer: Collection) -> bool:
    if len(gold.parts) != len(answer.parts):
        return False
    if gold.is_ordered or answer.is_ordered:  # tuples and intervals: the same brackets, the same order
        return gold.kind == answer.kind and all(map(_same, gold.parts, answer.parts))
    if (gold.kind == "union") != (answer.kind == "union"):
        return False
    # Several names given values are no list of values: in x = 1, y = 2 it matters which is which.
    # In x_1 = 1, x_2 = 2 it does not, for a solution without names.
    names = [
        {part.name.partition("_")[0] for part in side.parts if isinstance(part, Relation)} for side in (gold, answer)
    ]
    if any(len(side) > 1 for side in names) and len(names[0]) != len(names[1]):
        return False
    words_alone = all(isinstance(part, Value) and _words(part.text) is not None for part in gold.parts)
    if words_alone and gold.kind != "set":
        return all(map(_same, gold.parts, answer.parts))  # words may be a ranking
    unmatched = list(answer.parts)
    for part in gold.parts:
        match = next((other for other in unmatched if _same(part, other)), None)
        if match is None:
            return False
        unmatched.remove(match)
    return True


def _same_set(gold: Node, answer: Node) -> bool:
    """Unions, complements and intersections, compared as sets of numbers."""
    if not any(command in gold.text + answer.text for command in (r"\cup", r"\cap", r"\setminus", r"\mathbb")):
        return False
    if not _is_plain(gold.text, answer.text):
        return False
    sets = [_parse(node.text) for node in (gold, answer)]
    return all(isinstance(one, sympy.Set) for one in sets) and _verify(*sets)


def _same_relation(gold: Relation, answer: Relation) -> bool:
    if not gold.is_equality or not answer.is_equality:
        gold, answer = ascending(gold), ascending(answer)
        return gold.signs == answer.signs and all(map(_same, gold.members, answer.members))
    if gold.name and not any(_has_names(value) for value in gold.values):
        # The solution gives a name its value: the answer must, too. 2x = 10 restates x = 5.
        return answer.name == gold.name and all(_same(gold.values[-1], value) for value in answer.values)
    if gold.signs != ("=",) or answer.signs != ("=",):
        return False
    if all(map(_same, gold.members, answer.members)):
        return True
    if not _is_plain(gold.text, answer.text):
        return False
    sides = [_parse(member.text) for relation in (gold, answer) for member in relation.members]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return False
    # Two equations of a curve or plane are the same if their differences of sides are proportional.
    ratio = sympy.simplify((sides[0] - sides[1]) / (sides[2] - sides[3]))
    return bool(ratio.is_number and ratio.is_finite and ratio.is_zero is False)


def _has_names(node: Node) -> bool:
    expression = _parse(node.text) if isinstance(node, Value) else None
    return isinstance(expression, sympy.Basic) and bool(expression.free_symbols)


def _same_value(gold: str, answer: str) -> bool:
    if ":" in gold + answer:
        return False  # ratios and times are compared as they are written
    if _BASED.fullmatch(gold) or _BASED.fullmatch(answer):
        # A number with a base is these digits in this base: 2112_6 is neither 2112_7 nor 2112.
        one, other = (_BASED.fullmatch(text) for text in (gold, answer))
        return one is not None and other is not None and one.groups() == other.groups()
    if any(_DIGITS_WITH_INDEX.search(text) for text in (gold, answer)) or re.fullmatch("[A-Z]{3,}", gold):
        return False  # nor is a word of capitals a product, whose factors could be in any order
    if (decided := same_number(gold, answer)) is not None:
        return decided
    (gold, gold_unit), (answer, answer_unit) = split_unit(gold), split_unit(answer)
    if not units_agree(gold_unit, answer_unit) or not _is_plain(gold, answer):
        return False
    one, other = _parse(gold), _parse(answer)
    if one is None or other is None:
        return False
    if (gold_unit == "%") != (answer_unit == "%") and not (
        isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr)
    ):
        return False
    if _same_expression(one, other):
        return True
    if gold_unit == "%" and not answer_unit:
        return _same_expression(one / 100, other)
    return answer_unit == "%" and not gold_unit and _same_expression(one, other / 100)


def _is_plain(gold: str, answer: str) -> bool:
    """Whether the answer uses known commands only, and leaves nothing to compute that the solution does not."""
    used, allowed = (set(re.findall(r"\\([A-Za-z]+)", text)) for text in (answer, gold))
    if (_DERIVATIVE.search(answer) and not _DERIVATIVE.search(gold)) or r"\text" in answer or "'" in answer:
        return False
    if re.search("[A-Za-z]'", gold) or (_DETERMINANT.search(answer) and not _DETERMINANT.search(gold)):
        return False  # the parser would drop the prime, and compute the determinant
    # Digits that only white space or a brace sets apart are not one number, nor a product.
    if re.search(r"\d [\d.]|(?<![A-Za-z\]}])\{", re.sub(r"\\[{}]|[\^_]", "x", answer)):
        return False
    return used <= (_COMMANDS - _COMPUTATIONS) | allowed


def _same_words(gold: str, answer: str) -> bool:
    """Whether two normal forms are the same text or time. Capitals matter only where the letters may be names."""
    one, other = _words(gold), _words(answer)
    if one is None or other is None:
        return False
    if one == other:
        return True
    is_text = r"\text{" in gold or r"\text{" in answer
    may_be_names = not is_text and any(re.fullmatch("[A-Z]+", words) for words in (one, other))  # ABC is not abc
    return not may_be_names and _folded(gold) == _folded(answer)


def _words(text: str) -> str | None:
    r"""What a text or a time says, `\text{(E)}` and `E` being the same; `None` if it is mathematics."""
    if not re.search(r"\\text\{[^{}]*[A-Za-z]", text) and not re.fullmatch(
        r"[A-Za-z]|[A-Za-z][A-Za-z ,.'()-]{2,}|.*\d:\d.*", text
    ):
        return None
    # Brackets around more than one letter, and what stands between digits, may be mathematics.
    text = re.sub(r"\\text\{\s*,?\s*and\s*\}", ",", text)
    words = re.sub(r"(?<![A-Za-z])\(([A-Za-z])\)", r"\1", re.sub(r"\\text\{([^{}]*)\}", r"\1", text))
    words = re.sub(r"\s*,?\s*\band\b\s*", ",", words)
    return re.sub(r"\.(?!\d)|(?<!\d)\s+|\s+(?!\d)", "", words)


def _folded(text: str) -> str | None:
    """The words of a text without capitals: those within `\\text`, or, if there is none, all of two letters or more."""
    where = r"\\text\{[^{}]*\}" if r"\text{" in text else "^.*$"
    lower = re.sub(where, lambda part: re.sub(r"[A-Za-z](?:\.?[A-Za-z])+", lambda word: word[0].lower(), part[0]), text)
    return _words(lower)


@lru_cache(maxsize=512)
def _parse(text: str) -> Any:
    """The sympy object that a value stands for, with exact numbers; `None` if it does not parse."""
    # Degrees within an expression are an angle; the parser would drop them.
    text = re.sub(r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})\\degree", r"{(\1\\cdot\\frac{\\pi}{180})}", text)
    # Of two factors side by side, only a whole number before a fraction of two numbers is a mixed number. The parser
    # takes any two for one: 2(3) and \binom{2}{1}\binom{3}{1} would be 5.
    text = re.sub(r"(?<![\w.})^])(\d+)(\\frac\{\d+\}\{\d+\})", r"(\1+\2)", text)
    text = _SIDE_BY_SIDE.sub(lambda match: match[1] or r"\cdot ", text)
    try:
        parsed = latex2sympy(text, is_real=True, normalization_config=_NORMALIZATION, conversion_config=_CONVERSION)
    except MemoryError:
        raise
    except Exception:  # that is what the parser raises for whatever it cannot read
        return None
    return _exact(parsed)


def _exact(parsed: Any) -> Any:
    """The same with decimals as fractions and the letter i as the imaginary unit."""
    if isinstance(parsed, sympy.MatrixBase):
        return parsed.applyfunc(_exact)
    if not isinstance(parsed, sympy.Basic):
        return None
    exact = {number: sympy.Rational(str(number)) for number in parsed.atoms(sympy.Float)}
    exact |= {symbol: sympy.I for symbol in parsed.atoms(sympy.Symbol) if symbol.name == "i"}
    return parsed.xreplace(exact) if exact else parsed


def _same_expression(gold: Any, answer: Any) -> bool:
    if isinstance(gold, sympy.MatrixExpr):
        gold = gold.doit()
    if isinstance(answer, sympy.MatrixExpr):
        answer = answer.doit()
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return gold.shape == answer.shape and all(map(_same_expression, gold.flat(), answer.flat()))
    if isinstance(gold, sympy.Set) and isinstance(answer, sympy.Set):
        return _verify(gold, answer)
    if not isinstance(gold, sympy.Expr) or not isinstance(answer, sympy.Expr):
        return False
    if not gold.free_symbols and not answer.free_symbols and not _has_functions(gold, answer):
        return _same_constant(gold, answer)
    # What differs at a point differs: that is quick to see, and verify takes whatever is below 1e-15 for zero.
    return _agree_at_a_point(gold, answer) and _verify(gold, answer)


def _has_functions(*expressions: Any) -> bool:
    return any(expression.atoms(sympy.core.function.AppliedUndef) for expression in expressions)


def _verify(gold: Any, answer: Any) -> bool:
    return verify(gold, answer, strict=True, timeout_seconds=None)


def _same_constant(gold: Any, answer: Any) -> bool:
    """Rational numbers exactly; others by 50 significant digits, and by algebra where the value is nearly zero."""
    gold, answer = gold.doit(), answer.doit()
    if not (gold.is_finite and answer.is_finite):
        return gold == answer and gold in (sympy.oo, -sympy.oo)
    if gold.is_Rational and answer.is_Rational:
        return bool(gold == answer)
    if gold.is_rational is not None and answer.is_rational is not None and gold.is_rational != answer.is_rational:
        return False
    values: Sequence[Any] = [number.evalf(_DIGITS + 10, maxn=1000) for number in (gold, answer)]
    if not all(value.is_number and value.atoms(sympy.Float, sympy.Rational) for value in values):
        return False
    difference, size = abs(values[0] - values[1]), max(map(abs, values))
    if difference <= size * sympy.Float(10) ** -_DIGITS:
        return True
    return bool(difference < sympy.Float(10) ** -_DIGITS and (gold - answer).equals(0))


def _agree_at_a_point(gold: Any, answer: Any) -> bool:
    if not isinstance(gold, sympy.Expr) or not isinstance(answer, sympy.Expr):
        return True
    names = sorted(gold.free_symbols | answer.free_symbols, key=str)
    point = {name: sympy.Rational(sympy.prime(position + 5), 7) for position, name in enumerate(names)}
    values = [expression.subs(point) for expression in (gold, answer)]
    if any(value.free_symbols or not value.is_finite or _has_functions(value) for value in values):
        return True  # no value there, such as that of an unknown function: nothing to hold against them
    return _same_constant(*values)
