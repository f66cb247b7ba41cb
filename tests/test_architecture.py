"""The architecture as tests/architecture.py has it: imports one way, and the pages that show it."""

import pytest

from architecture import LAYERS, PACKAGE, imported_parts, pages, part_of


def test_imports_point_one_way():
    assert {part_of(path) for path in PACKAGE.rglob("*.py")} == set(LAYERS)
    for path in PACKAGE.rglob("*.py"):
        assert imported_parts(path) <= LAYERS[part_of(path)], path


def test_there_is_no_cycle():
    remaining = dict(LAYERS)
    while remaining:
        free = [part for part, uses in remaining.items() if not uses & remaining.keys()]
        assert free, f"a cycle among {sorted(remaining)}"
        for part in free:
            del remaining[part]


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_pages_show_the_architecture(path):
    assert path.read_text() == pages()[path], "run `python tests/architecture.py`"
