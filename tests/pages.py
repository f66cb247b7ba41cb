"""Reading README and the pages of `docs` as the tests do."""

import re
from pathlib import Path

from markdown_it import MarkdownIt

_LINKS = ("link_open", "image")
ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def page(name: str) -> str:
    """Text of `docs/NAME.md`."""
    return (ROOT / "docs" / f"{name}.md").read_text()


def tables(text: str) -> list[list[list[str]]]:
    """Every table of a page, as rows of cells without bold; the row of dashes left out."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    plain = [re.sub(r"\*\*([^*|]+)\*\*", r"\1", table) for table in found]
    split = [[row[1:-1].split("|") for row in table.splitlines()] for table in plain]
    return [[[cell.strip() for cell in row] for row in table if "---" not in row[0]] for table in split]


def the_table(text: str, first_heading: str) -> list[list[str]]:
    """Rows of the one table whose first heading is this."""
    (table,) = [table for table in tables(text) if table[0][0] == first_heading]
    return table[1:]


def links(text: str) -> list[str]:
    """Targets of all links and pictures of a page."""
    # commonmark knows no tables, but it reads the links in their lines all the same
    tokens = [child for token in MarkdownIt("commonmark").parse(text) for child in token.children or []]
    return [str(token.attrs.get("href") or token.attrs.get("src")) for token in tokens if token.type in _LINKS]


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as mkdocs and GitHub make them."""
    tokens = MarkdownIt("commonmark").parse(text)
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
