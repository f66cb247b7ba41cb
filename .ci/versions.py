"""
What `.ci/test_versions` installs, read from pyproject.toml.

    python .ci/versions.py lowest       every dependency at its floor, as pip constraints; torch as it is tested
    python .ci/versions.py newest-trl   the newest TRL that pip would take, if constraints.txt has another one
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTED = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def lowest() -> list[str]:
    extras = [
        requirement
        for extra in ("evaluate", "wandb", "plot", "report")
        for requirement in PROJECT["optional-dependencies"][extra]
    ]
    floors = {
        requirement.name: part.version
        for requirement in map(Requirement, [*PROJECT["dependencies"], *extras])
        for part in requirement.specifier
        if part.operator == ">="
    }
    # An older torch for the CPU alone is not on PyPI.
    return [f"{name}=={version}" for name, version in {**floors, "torch": TESTED["torch"]}.items()]


def newest_trl() -> list[str]:
    (trl,) = (requirement for requirement in PROJECT["dependencies"] if Requirement(requirement).name == "trl")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    report = subprocess.run([*command, "--report", "-", trl], stdout=subprocess.PIPE, check=True).stdout
    newest = json.loads(report)["install"][0]["metadata"]["version"]
    return [newest] if Version(newest) != Version(TESTED["trl"]) else []


if __name__ == "__main__":
    print(*{"lowest": lowest, "newest-trl": newest_trl}[sys.argv[1]](), sep="\n")
