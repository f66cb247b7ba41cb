"""
Write the address of the repository into every file that has it; `[project.urls]` of pyproject.toml has the current one.

    python .ci/set_repository.py https://github.com/OWNER/opo-trl           make set-repository URL=...
    python .ci/set_repository.py --check https://github.com/OWNER/opo-trl   fail if it is another one
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "README.md", "mkdocs.yml", "CITATION.cff", "docs/install.md")


def repository(root: Path) -> str:
    """The address that the files have now."""
    url: str = tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    return url


def set_repository(root: Path, url: str) -> None:
    """Replace the address in all files; what follows it in an address, such as `/issues`, stays."""
    if not re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+(?<!\.git)", url):
        raise ValueError(f"The address must be https://HOST/OWNER/NAME, without .git or a last slash, got {url!r}.")
    current = repository(root)
    for name in FILES:
        path = root / name
        path.write_text(path.read_text().replace(current, url))


def main(*arguments: str) -> None:
    if arguments[0] != "--check":
        set_repository(ROOT, *arguments)
    elif repository(ROOT) != arguments[1]:
        sys.exit(f"The files have {repository(ROOT)}: run `make set-repository URL={arguments[1]}` and commit.")


if __name__ == "__main__":
    main(*sys.argv[1:])
