"""The page on resuming names tests that exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "restarts.md"


def functions_of(file):
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_a_test_that_exists():
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", PAGE.read_text())
    assert len(named) > 10
    for file, function in named:
        assert (TESTS / file).is_file(), file
        assert not function or function in functions_of(file), f"{file}::{function}"


def test_every_promise_has_a_test():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert rows
    for row in rows:
        assert "`test_" in row.rsplit("|", 2)[1], row
