"""
What a release must hold: run by `make test-build` in an environment that has nothing but the built wheel and its
extras.

    python tests/check_distributions.py dist

The package must be the installed one, the wheel must hold it and nothing else, its commands must run outside of a
checkout, and the sdist must be enough to build the same wheel from, byte for byte, and to run the tests.
"""

import hashlib
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

import opo_trl

ROOT = Path(__file__).resolve().parents[1]
QUICK_TESTS = [
    f"tests/test_{name}.py"
    for name in ("baselines", "config", "contract", "release", "imports", "repository", "tested_trl")
]


def check_installation() -> None:
    """What was imported is what pip put into site-packages, typed."""
    package = Path(opo_trl.__file__).parent
    assert package == Path(sysconfig.get_path("purelib"), "opo_trl"), f"opo_trl comes from {package}"
    assert (package / "py.typed").is_file()


def check_wheel(wheel: Path) -> None:
    """The package's files (code, the scripts' configurations, the tiny policy), its metadata, and nothing else."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert wheel.name == f"opo_trl-{version}-py3-none-any.whl"
    assert opo_trl.__version__ == version
    source = ROOT / "src"
    files = [path for path in (source / "opo_trl").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {str(path.relative_to(source)) for path in files}
    names = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    metadata = {f"opo_trl-{version}.dist-info/{name}" for name in names}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert held == expected | metadata, f"missing or too many: {sorted(held ^ (expected | metadata))}"


def check_commands(folder: Path) -> None:
    """`opo-trl`, and `accelerate launch -m`, train and evaluate the tiny policy far from a checkout."""
    command = str(Path(sysconfig.get_path("scripts"), "opo-trl"))
    printed = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
    assert printed == f"opo-trl {opo_trl.__version__}\n"
    scripts = Path(opo_trl.__file__).parent / "scripts"
    train = ["--config", str(scripts / "quickstart.yaml"), "--max_steps", "1", "--num_eval_problems", "8"]
    evaluate = ["--config", str(scripts / "evaluate_quickstart.yaml"), "--num_problems", "8", "--num_samples", "2"]
    subprocess.run([command, "train", "--cpu", *train], cwd=folder, check=True)
    launcher = ["accelerate.commands.launch", "--quiet", "--cpu", "-m"]
    run_module(*launcher, "opo_trl.scripts.evaluate_math", *evaluate, folder=folder)
    assert (folder / "outputs" / "evaluation" / "summary.json").is_file()


def check_sdist(sdist: Path, wheel: Path, folder: Path) -> None:
    """The same wheel comes out of it, and its tests run on the installed package."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    run_module("build", "--no-isolation", "--wheel", "--outdir", str(folder / "dist"), folder=source)
    (rebuilt,) = (folder / "dist").iterdir()
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, rebuilt)}
    assert len(digests) == 1, "the sdist builds another wheel"
    # Every test file must import, which takes the examples and the data that the tests read.
    run_module("pytest", "--quiet", "--quiet", "--collect-only", folder=source)
    run_module("pytest", "--quiet", "-m", "not slow", *QUICK_TESTS, folder=source)


def run_module(*arguments: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", *arguments], cwd=folder, check=True)


def main(directory: str) -> None:
    check_installation()
    (wheel,), (sdist,) = Path(directory).glob("*.whl"), Path(directory).glob("*.tar.gz")
    check_wheel(wheel)
    with tempfile.TemporaryDirectory() as folder:
        check_commands(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        check_sdist(sdist, wheel.resolve(), Path(folder))
    print(f"{wheel.name} and {sdist.name} are complete")


if __name__ == "__main__":
    main(*sys.argv[1:])
