"""Every guarantee on the page on resuming names the tests that check it, and these tests exist."""

import ast
import re

from pages import ROOT, page, the_table

TESTS = ROOT / "tests"


def functions_of(file):
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_named_tests_exist():
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", page("restarts"))
    assert len(named) > 10
    for file, function in named:
        assert (TESTS / file).is_file(), file
        assert not function or function in functions_of(file), f"{file}::{function}"


def test_every_guarantee_has_a_test():
    guarantees = [row[0] for row in the_table(page("restarts"), "case")]
    tests = {row[0]: row[1] for row in the_table(page("restarts"), "tests of")}
    assert len(guarantees) > 10
    assert list(tests) == guarantees
    assert all("`test_" in named for named in tests.values())
