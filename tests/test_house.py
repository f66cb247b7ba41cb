"""The rules of the house that can be counted: sizes, nothing copied, one version, dependencies, the layout."""

import ast
import inspect
import re
import sys
import textwrap
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from trl import GRPOTrainer

import opo_trl
from conftest import ROOT
from opo_trl import OPOConfig, OPOTrainer
from opo_trl.runs.pushing import PushingTrainer
from opo_trl.runs.resumable import ResumableTrainer

SOURCE = ROOT / "src" / "opo_trl"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
FEATURES = ("evaluate", "plot", "wandb")  # extras whose packages the package imports, inside of functions alone
EXTRAS = [Requirement(line) for extra in FEATURES for line in PROJECT["optional-dependencies"][extra]]
OPTIONAL = {"vllm"}  # comes with TRL's extra
LONGEST_FUNCTION = 60  # lines from `def` to the last one, without the docstring

# TRL has no name for the key of its own metrics, `self._metrics[mode]`.
IDIOMS = {"mode = 'train' if self.model.training else 'eval'"}


@pytest.mark.parametrize(("name", "limit"), [("baselines.py", 100), ("trainer.py", 400)])
def test_the_algorithm_and_its_trainer_stay_readable(name, limit):
    assert len((SOURCE / name).read_text().splitlines()) < limit


def test_functions_fit_a_screen():
    too_long = []
    for path in [*SOURCE.rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) is not None else None
                lines = node.end_lineno - node.lineno + 1
                if docstring is not None:
                    lines -= docstring.end_lineno - docstring.lineno + 1
                if lines > LONGEST_FUNCTION:
                    too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert too_long == []


def telling_statements(source):
    """
    Statements of some code by what they say: layout, quotes and comments aside; of a compound one its head.

    Left out are calls of the parent, which are the opposite of a copy, and what says too little to be one: at most four
    names, attributes and constants, such as `return output` or `self.model_wrapped = self.model`.
    """
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if not isinstance(node, ast.stmt) or isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Try):
            continue
        parts = [field for name, field in ast.iter_fields(node) if name not in ("body", "orelse", "type_comment")]
        heads = [part for field in parts for part in (field if isinstance(field, list) else [field])]
        said = [
            part
            for head in heads
            if isinstance(head, ast.AST)
            for part in ast.walk(head)
            if isinstance(part, ast.Name | ast.Attribute | ast.Constant)
        ]
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        code = ast.unparse(node).partition("\n")[0] if hasattr(node, "body") else ast.unparse(node)
        if len(said) > 4 and not is_text and "super()" not in code:
            found.add(code)
    return found


def statements_of_parents(child):
    parents = [cls for cls in child.__mro__[1:] if cls is not object and not cls.__module__.startswith("opo_trl")]
    return set().union(*(telling_statements(inspect.getsource(parent)) for parent in parents))


@pytest.mark.parametrize("child", [OPOConfig, ResumableTrainer, PushingTrainer, OPOTrainer])
def test_no_statement_of_a_parent_is_copied(child):
    """Word for word, that is: a copy under other names is for the reviewer to see."""
    own = telling_statements(inspect.getsource(child))
    assert len(own) > 10
    assert own & statements_of_parents(child) - IDIOMS == set()


def test_a_copied_body_would_be_seen():
    body = inspect.getsource(GRPOTrainer._compute_loss)
    assert len(telling_statements(body) & statements_of_parents(OPOTrainer)) > 5


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


def test_the_readme_lists_every_file_of_the_package():
    layout = (ROOT / "README.md").read_text().partition("## Layout\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^ {6,}(\w+\.py|\w+/) ", layout, re.MULTILINE)
    files = [path.name for path in SOURCE.glob("*.py") if path.name != "__init__.py"]
    rooms = [f"{path.parent.name}/" for path in SOURCE.glob("*/__init__.py")]
    assert sorted(listed) == sorted([*files, *rooms])
