"""What a host of the repository reads: workflows, templates, hooks, and the repository's own address."""

import importlib.util
import re
import shutil
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

from conftest import ROOT

GITHUB = ROOT / ".github"
ACTIONS = {
    "actions/checkout",
    "actions/setup-python",
    "actions/upload-artifact",
    "actions/download-artifact",
    "pypa/gh-action-pypi-publish",
    "./.github/workflows/tests.yml",
}


def read(path):
    return yaml.safe_load(path.read_text())


def jobs(name):
    return read(GITHUB / "workflows" / f"{name}.yml")["jobs"]


def steps(job):
    return job.get("steps", [{"uses": job.get("uses")}])


def test_workflows_run_the_stages_of_ci_run_which_are_targets_of_the_makefile():
    (stages,) = re.findall(r"^stages=\((.+)\)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    job = jobs("tests")["stage"]
    assert job["strategy"]["matrix"]["stage"] == stages.split()
    assert job["steps"][-1]["run"] == ".ci/run ${{ matrix.stage }}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(stages.split()) <= set(targets)
    triggers = read(GITHUB / "workflows" / "tests.yml")[True]  # YAML 1.1 reads the key `on` so
    assert {"push", "pull_request", "workflow_call"} <= triggers.keys()


def test_a_release_is_published_without_a_token_after_all_tests():
    release = jobs("release")
    assert [release["build"]["needs"], release["publish"]["needs"]] == ["tests", "build"]
    assert release["tests"] == {"uses": "./.github/workflows/tests.yml"}
    assert {name: job.get("permissions") for name, job in release.items() if "permissions" in job} == {
        "publish": {"id-token": "write"}
    }
    published = release["publish"]["steps"][-1]
    assert published["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert "with" not in published


@pytest.mark.parametrize("name", ["tests", "release"])
def test_workflows_name_known_actions_and_no_host(name):
    used = [step["uses"] for job in jobs(name).values() for step in steps(job) if step.get("uses")]
    assert {action.partition("@")[0] for action in used} <= ACTIONS
    text = (GITHUB / "workflows" / f"{name}.yml").read_text()
    assert "://" not in text
    assert "secrets." not in text


def test_issue_forms_have_what_github_asks_for():
    forms = [read(path) for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len(forms) == 2
    for form in forms:
        assert {"name", "description", "body"} <= form.keys()
        assert all(item["attributes"]["label"] for item in form["body"])
        identifiers = [item["id"] for item in form["body"]]
        assert len(identifiers) == len(set(identifiers))


def test_hooks_run_the_tools_of_make_check_in_the_projects_versions():
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    tools = [hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]]
    checked = re.findall(r"^\t\$\(BIN\)/(ruff|mypy)\b", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(tools) == set(checked)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(tools) <= {Requirement(line).name for line in project["optional-dependencies"]["dev"]}


# ---- The repository's address


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("set_repository", ROOT / ".ci" / "set_repository.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy_of_the_files(script, tmp_path):
    for name in script.FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_one_setting_fills_in_the_repository_everywhere(script, copy_of_the_files):
    before, after = script.repository(ROOT), "https://git.example.org/group/opo-trl"
    script.set_repository(copy_of_the_files, after)
    for name in script.FILES:
        old, new = (ROOT / name).read_text(), (copy_of_the_files / name).read_text()
        assert before in old, f"{name} does not name the repository: take it out of FILES"
        assert new == old.replace(before, after)
    urls = tomllib.loads((copy_of_the_files / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == after
    assert urls["Issues"] == f"{after}/issues"
    script.set_repository(copy_of_the_files, before)
    assert all((copy_of_the_files / name).read_bytes() == (ROOT / name).read_bytes() for name in script.FILES)


@pytest.mark.parametrize(
    "url", ["", "git@example.org:me/opo-trl", "https://example.org", "https://example.org/me/x.git"]
)
def test_an_address_that_links_cannot_be_made_of_is_refused(script, copy_of_the_files, url):
    with pytest.raises(ValueError, match="The address must be https://HOST/OWNER/NAME"):
        script.set_repository(copy_of_the_files, url)


def test_the_repository_is_named_in_no_other_file(script):
    """Else it would keep the placeholder. What explains how to set it names an example of an address."""
    explains = {ROOT / "Makefile", ROOT / "docs" / "maintaining.md", ROOT / ".ci" / "set_repository.py"}
    folders = ("src", "docs", "examples", "benchmarks", ".github", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".yml")]
    others = {*files, *ROOT.glob("*.md"), ROOT / "Makefile"} - explains - {ROOT / name for name in script.FILES}
    assert [path for path in others if script.repository(ROOT) in path.read_text()] == []


def test_a_release_from_another_repository_is_refused(script):
    script.main("--check", script.repository(ROOT))
    with pytest.raises(SystemExit, match=r"make set-repository URL=https://example\.org/me/opo-trl"):
        script.main("--check", "https://example.org/me/opo-trl")
