"""The pages on resuming and on TRL's features name the tests of what they say, and these tests exist."""

import ast
import re

import pytest

from pages import ROOT, page, the_table

TESTS = ROOT / "tests"


def functions_of(file):
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", ["restarts", "trl_features"])
def test_the_named_tests_exist(name):
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", page(name))
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


def test_every_feature_is_supported_or_not_and_has_a_test():
    for feature, supported, _, named in the_table(page("trl_features"), "feature"):
        assert supported in ("yes", "partly", "no"), feature
        assert "`test_" in named or named == "not run", feature
