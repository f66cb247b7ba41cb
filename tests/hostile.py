r"""
What a policy under optimisation may write, and what a broken dataset may hold: `HOSTILE` maps a name to a completion
and a solution. Nothing here may hang, crash, fill or stop the process that asks for a reward.
"""

import math
from decimal import Decimal
from pathlib import Path

import numpy as np


def box(answer):
    return f"\\boxed{{{answer}}}"


NESTED_FRACTION = "1"
for _ in range(60):
    NESTED_FRACTION = f"\\frac{{1}}{{1+{NESTED_FRACTION}}}"


class Silent:
    """A solution of a type that nobody foresaw."""


# Answers that evaluate to something huge, or that do not terminate when compared.
ANSWERS = {
    "power tower": "9^{9^{9^{9^9}}}",
    "power tower in bare notation": "9^9^9^9^9^9",
    "power of ten": "10^{10^{10}}",
    "power of a million": "2^{10^{9}}",
    "power modulo": "7^{10^{10}} \\bmod 10",
    "power in an exponent": "x^{9^{9^{9}}}",
    "root of a power tower": "\\sqrt{9^{9^{9^9}}}",
    "negative power tower": "9^{-9^{9^9}}",
    "power difference": "(10^{10^8}+1) - 10^{10^8}",
    "fractional power tower": "(\\frac{3}{2})^{10^{9}}",
    "factorial": "(10^{9})!",
    "factorial of a plain number": "100000000!",
    "factorial of factorials": "((9!)!)!",
    "many factorials": "9!!!!!!!",
    "factorial quotient": "\\frac{10000000!}{9999999!}",
    "factorial power": "(10^{6}!)^{10^{6}}",
    "binomial": "\\binom{20000}{10000}",
    "huge binomial": "\\binom{10^{9}}{5\\cdot10^{8}}",
    "binomial with symbols": "\\binom{n^{10^{9}}}{10^{9}}",
    "permutation": "P(10^9, 10^8)",
    "falling factorial": "(100000000)_{(50000000)}",
    "sum": "\\sum_{k=1}^{10^{12}} \\frac{1}{k^2}",
    "product": "\\prod_{k=1}^{10^{9}} k",
    "integral": "\\int_0^{\\infty} e^{-x^2} \\sin(x^3) \\ln(x+1) dx",
    "nested integrals": "\\int_0^1 \\int_0^1 \\int_0^1 \\sin(xyz)^{17} dx dy dz",
    "limit": "\\lim_{n \\to \\infty} (1+\\frac{1}{n})^{n^{n^{n}}}",
    "derivative": "\\frac{d}{dx} x^{x^{x^{x^{x^{x}}}}}",
    "expanded power": "(a+b+c+d+e+f)^{300}",
    "expanded power against a solution": "(x+1)^{4000}-(x+1)^{4000}+13",
    "trigonometric powers": "\\sin^{200}(x)\\cos^{200}(x)\\tan^{200}(x)+13",
    "nested roots": "\\sqrt{2+" * 50 + "\\sqrt{2}" + "}" * 50,
    "nested fractions": NESTED_FRACTION,
    "nested trigonometry": "\\sin(" * 60 + "x" + ")" * 60,
    "nested logarithms": "\\ln(" * 60 + "10" + ")" * 60,
    "sum of radicals": "+".join(f"\\sqrt{{{p}}}" for p in range(2, 90)),
    "product of radicals": "".join(f"(\\sqrt{{{p}}}+\\sqrt[3]{{{p}}})" for p in range(2, 30)),
    "many variables": "(" + "+".join("abcdfghjklmnopqrstuvwxyz") + ")^{40}",
    "many solutions": ", ".join(f"\\sqrt{{{n}}}" for n in range(70)),
    "identity matrix": "eye(20000)",
    "matrix power": "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}^{10^{9}}",
    "inverse of a matrix of symbols": "\\begin{pmatrix} a&b&c&d\\\\e&f&g&h\\\\j&k&l&m\\\\n&o&p&q \\end{pmatrix}^{-50}",
    "determinant": "\\det\\begin{pmatrix}" + "\\\\".join("&".join("abcdfgh") for _ in range(7)) + "\\end{pmatrix}",
    "wide matrix": "\\begin{pmatrix}" + "&".join("1" * 400) + "\\end{pmatrix}",
    "equation of high degree": "x^{500}+y^{500}=z^{500}",
    "chain of equations": "=".join(["x"] * 400),
    "chain of inequalities": "<".join(["x"] * 400),
    "union of intervals": "\\cup".join(f"({n},{n + 1})" for n in range(100)),
    "long number": "1" * 999,
    "long decimal": "0." + "3" * 990,
    "tiny number": "10^{-10^{10}}",
    "exponent of a float": "1e999999999",
    "absolute values": "|" * 300 + "x" + "|" * 300,
    "floor of a tower": "\\lfloor 9^{9^{9^9}} \\rfloor",
    "greatest common divisor": "\\gcd(10^{10^9}, 6^{10^9})",
    "logarithm of a tower": "\\log_{2} 9^{9^{9^9}}",
    "repeating decimal": "0.\\overline{" + "142857" * 150 + "}",
    "division by zero": "\\frac{1}{0}",
    "zero to the zero": "0^0",
    "infinity less infinity": "\\infty-\\infty",
    "alternating signs": "-" * 900 + "13",
    "plus-minus": "\\pm" * 300 + "1",
    "commas": "," * 900,
    "backslashes": "\\" * 901 + "13",
    "dollars": "$" * 900,
    "percent signs": "13" + "%" * 900,
    "carets": "2" + "^" * 900,
    "underscores": "x" + "_{1}" * 200,
    "null bytes": "1\x003",
    "lone surrogate": "13\ud800",
    "combining characters": "1" + "\u0301" * 900 + "3",
    "right to left": "\u202e31\u202c",
    "zero width": "1\u200b3",
    "digits of other scripts": "١٣",
    "emoji": "🔥" * 300,
    "spaces": "1" + " " * 900 + "3",
    "thin spaces": "1" + "\\," * 300 + "3",
    "begin without end": "\\begin{pmatrix}" * 60,
    "unknown commands": "\\def\\x{\\x\\x}\\x",
    "text in text": "\\text{" * 60 + "13" + "}" * 60,
}

HOSTILE = {
    **{name: (box(answer), "13") for name, answer in ANSWERS.items()},
    # The same against a solution that needs mathematics, so that nothing is settled by a glance at the solution.
    "power tower against an expression": (box("9^{9^{9^{9^9}}}"), "2x+\\sqrt{3}"),
    "factorial against an expression": (box("(10^{9})!"), "\\sqrt{2}"),
    "two towers": (box("9^{9^{9^{9}}}"), "9^{9^{9}}"),
    "expanded power against its neighbour": (box("(x+y+z)^{200}+1"), "(x+y+z)^{200}"),
    "radicals that nearly agree": (box("+".join(f"\\sqrt{{{n}}}" for n in range(2, 40))), "\\sqrt{2}+161"),
    # Text.
    "opening brackets": (box("(" * 150_000), "13"),
    "opening braces": ("\\boxed{" + "{" * 150_000, "13"),
    "closing braces": ("}" * 150_000 + box("13"), "13"),
    "opened boxes": ("\\boxed{" * 30_000, "13"),
    "nested boxes": ("\\boxed{" * 5_000 + "13" + "}" * 5_000, "13"),
    "many boxes": (box("13") * 20_000, "13"),
    "thinking tags": ("<think>" * 20_000 + "</think>" * 20_000 + box("13"), "13"),
    "long text": ("a " * 500_000 + box("13"), "13"),
    "nesting": (box("(" * 300 + "13" + ")" * 300), "13"),
    # Wrong types.
    "no completion": (None, "13"),
    "number for a completion": (13, "13"),
    "bytes for a completion": (b"\\boxed{13}", "13"),
    "list of nothing": ([], "13"),
    "list of texts": (["\\boxed{13}"], "13"),
    "message without content": ([{"role": "assistant"}], "13"),
    "message of a number": ([{"role": "assistant", "content": 13}], "13"),
    "part without text": ([{"role": "assistant", "content": [{"type": "image"}, None, 3, {"text": None}]}], "13"),
    # Solutions.
    "solution of a factorial": (box("13"), "(10^{9})!"),
    "solution of a power tower": (box("x+1"), "9^{9^{9^{9^9}}}"),
    "solution of a binomial": (box("\\sqrt{2}"), "\\binom{20000}{10000}"),
    "solution of brackets": (box("13"), "(" * 5_000),
    "long solution": (box("13"), "1+" * 50_000 + "1"),
    "broken solution": (box("13"), "\\frac{1}{"),
    "object for a solution": (box("13"), Silent()),
    "list for a solution": (box("13"), ["13", "14"]),
    "NaN for a solution": (box("13"), math.nan),
    "infinity for a solution": (box("13"), math.inf),
    "array for a solution": (box("13"), np.arange(100_000)),
    "huge integer for a solution": (box("13"), 10**5_000),
    "decimal for a solution": (box("13"), Decimal("1e999999")),
    "path for a solution": (box("13"), Path("13")),
    "bytes for a solution": (box("13"), b"13"),
}

INJECTIONS = [
    "__import__('os').system('touch {path}')",
    "__import__(\"subprocess\").run(['touch','{path}'])",
    "eval(\"open('{path}','w')\")",
    "exec(compile(\"open('{path}','w')\",'','exec'))",
    "open('{path}','w').write('x')",
    "().__class__.__bases__[0].__subclasses__()",
    "(lambda: open('{path}', 'w'))()",
    "\\text{__import__('os').system('touch {path}')}",
    "x = __import__('os').system('touch {path}')",
    "\\frac{__import__('os').system('touch {path}')}{1}",
    "\\operatorname{exec}(1)",
    "\\operatorname{eval}(1)",
    "\\mathrm{Symbol}('x')",
    'S(\'__import__("os").system("touch {path}")\')',
    "\\input{/etc/passwd}",
    "\\include{{path}}",
    "\\immediate\\write18{touch {path}}",
    "\\openout1={path}",
    "$(touch {path})",
    "`touch {path}`",
    "; touch {path} #",
    "{{7*7}}",
    "%(x)s",
    "1;import os;os.system('touch {path}')",
    "1 if __import__('os').system('touch {path}') else 2",
    "[x for x in open('/etc/passwd')]",
    "f'{__import__(\"os\").getpid()}'",
    "\\begin{verbatim}import os\\end{verbatim}",
    "1 + sympify('__import__(\"os\").getpid()')",
    "Integer(13)",
    "globals()",
    "__builtins__",
    "\\lambda x: open('{path}','w')",
    "print(1)",
    "!touch {path}",
]
