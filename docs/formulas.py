"""Hook of mkdocs: formulas become MathML when the site is built, so that a page needs no script and no network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What `pymdownx.arithmatex` leaves: \(...\) in a span, \[...\] in a div.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return _FORMULA.sub(_to_mathml, content)


def _to_mathml(match: re.Match[str]) -> str:
    tag, formula = match.groups()
    mathml = convert(html.unescape(formula).strip(), display="inline" if tag == "span" else "block")
    return mathml if tag == "span" else f'<div class="formula">{mathml}</div>'
