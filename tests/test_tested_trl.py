"""Only the minor release of TRL that was tested is admitted: by pip, and at run time where pip was told otherwise."""

import importlib
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

import opo_trl
from conftest import ROOT
from opo_trl.runs import tested_trl
from opo_trl.runs.tested_trl import ALLOW_UNTESTED, TESTED_TRL, check_trl


def test_pip_admits_the_tested_minor_releases_only():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (trl,) = (requirement for requirement in map(Requirement, dependencies) if requirement.name == "trl")
    releases = [f"{major}.{minor}" for major in (0, 1, 2) for minor in range(100)]
    for patch in (0, 9):
        assert {release for release in releases if f"{release}.{patch}" in trl.specifier} == set(TESTED_TRL)
    (tested,) = re.findall(r"^trl==(\d+\.\d+)\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert tested in TESTED_TRL


@pytest.mark.parametrize("installed", ["1.16.0", "1.16.7", "1.16.0.dev0"])
def test_a_tested_release_is_accepted(monkeypatch, installed):
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    monkeypatch.setattr(tested_trl, "version", lambda package: installed)
    check_trl()


@pytest.mark.parametrize("installed", ["1.15.2", "1.17.0.dev0", "1.160.0", "2.0.0"])
def test_any_other_is_refused_unless_it_is_being_tested(monkeypatch, caplog, installed):
    monkeypatch.setattr(tested_trl, "version", lambda package: installed)
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    check_trl()
    assert f"tested with TRL 1.16, got TRL {installed}" in caplog.text
    monkeypatch.delenv(ALLOW_UNTESTED)
    with pytest.raises(ImportError, match=f"make test-trl TRL={installed}`.*{ALLOW_UNTESTED}=1"):
        check_trl()


def test_an_untested_trl_is_refused_where_it_would_be_used(tmp_path, monkeypatch):
    """Metadata of a newer TRL lies in front of the installed one's: a new import of the trainer refuses it."""
    metadata = tmp_path / "trl-1.18.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.4\nName: trl\nVersion: 1.18.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    for module in ("opo_trl.trainer", "opo_trl.runs.reliable_runs"):
        importlib.import_module(module)
        monkeypatch.delitem(sys.modules, module)
    attempts = [
        lambda: opo_trl.OPOConfig,
        lambda: opo_trl.OPOTrainer,
        lambda: importlib.import_module("opo_trl.trainer"),
        lambda: importlib.import_module("opo_trl.runs.reliable_runs"),
    ]
    for attempt in attempts:
        with pytest.raises(ImportError, match=r"is tested with TRL 1\.16, got TRL 1\.18\.0\.") as refusal:
            attempt()
        assert "pip install 'trl==1.16.*'" in str(refusal.value)
