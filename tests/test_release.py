"""What a release relies on: the guide to TRL's seams, one version, the changelog, declared dependencies."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import opo_trl
from conftest import ROOT

SOURCE = ROOT / "src" / "opo_trl"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
FEATURES = (
    "evaluate",
    "plot",
    "report",
    "wandb",
)  # extras whose packages are imported, inside of functions alone
EXTRAS = [Requirement(line) for extra in FEATURES for line in PROJECT["optional-dependencies"][extra]]
OPTIONAL = {"vllm"}  # comes with TRL's extra


def test_every_seam_is_in_the_guide_for_when_trl_moves():
    tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_contract.py").read_text(), re.MULTILINE)
    assert re.findall(r"^\| `(test_\w+)` \|", (ROOT / "docs" / "maintaining.md").read_text(), re.MULTILINE) == tests


def test_the_version_is_written_once():
    assert opo_trl.__version__ == PROJECT["version"], "run `make setup` after a change of the version"
    elsewhere = [ROOT / "README.md", ROOT / "CITATION.cff", *(ROOT / "docs").rglob("*.md"), *SOURCE.rglob("*.py")]
    assert [path for path in elsewhere if PROJECT["version"] in path.read_text()] == []
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()


def test_the_changelog_has_a_section_and_a_link_for_each_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert re.findall(r"^\[(.+?)\]: \S+$", text, re.MULTILINE) == versions
    if not Version(PROJECT["version"]).is_devrelease:
        assert PROJECT["version"] in versions


def test_dependencies_have_a_floor_and_the_tested_versions_are_among_them():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    tested = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in [*REQUIREMENTS, *EXTRAS]:
        assert any(specifier.operator == ">=" for specifier in requirement.specifier), requirement
        assert tested[canonicalize_name(requirement.name)] in requirement.specifier


def test_no_page_or_message_installs_from_the_package_index():
    """Where the package is not yet, so that the name could be anybody's. To be deleted with the first release."""
    files = [*ROOT.glob("*.md"), *(path for top in ("docs", "src", "examples") for path in (ROOT / top).rglob("*.*"))]
    texts = {path: path.read_text() for path in files if path.suffix in (".md", ".py", ".yaml")}
    assert len(texts) > 100
    installs = re.compile(r"(?:pip3?|uv) (?:add|install)\b(?:[^\n`]*\s)?['\"]?opo[-_]trl\b")
    allowed = ROOT / "docs" / "maintaining.md"  # which names this test
    assert [path for path, text in texts.items() if installs.search(text) and path != allowed] == []
    assert installs.search("pip install -U 'opo-trl[plot]'")
    assert not installs.search("pip install git+https://example.org/me/opo-trl")


def test_what_is_imported_is_declared():
    required = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    by_extras = {canonicalize_name(requirement.name) for requirement in EXTRAS}
    of_module = packages_distributions()
    for path in SOURCE.rglob("*.py"):
        module_code = ast.parse(path.read_text())
        for node in ast.walk(module_code):
            declared = required if node in module_code.body else required | by_extras
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                modules = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for module in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - OPTIONAL:
                distributions = {canonicalize_name(name) for name in of_module[module]}
                assert distributions & declared, f"{path.name} imports {module}"
