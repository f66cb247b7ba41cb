"""
The package's architecture: what each part may import, and the tables and the tree that README and docs show of it.

    python tests/architecture.py    # writes them

`tests/test_architecture.py` holds the code to `LAYERS`, and the pages to what is written here.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "opo_trl"

# Part of the package -> the parts that it may import. A part is a folder, or a file beside them.
LAYERS: dict[str, set[str]] = {
    "algorithm": set(),
    "on_policy": set(),
    "update": set(),
    "rollouts": {"algorithm"},
    "runs": set(),
    "report": {"algorithm", "runs"},
    "rewards": set(),
    "data": {"rewards"},
    "evaluation": set(),
    "baselines": {"algorithm"},
    "config": {"on_policy", "runs"},
    "trainer": {"algorithm", "config", "evaluation", "on_policy", "report", "rollouts", "runs", "update"},
    "__init__": {"config", "runs", "trainer"},
    "scripts": {"__init__", "config", "data", "evaluation", "on_policy", "report", "rewards", "runs"},
}
TABLE, TREE = ROOT / "docs" / "design.md", ROOT / "README.md"


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_parts(path: Path) -> set[str]:
    """Other parts that a file imports, wherever in the file the import stands."""
    own, depth, parts = part_of(path), len(path.relative_to(PACKAGE).parts), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            parts |= {node.module.split(".")[0]} if node.module else {"__init__"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opo_trl"):
            parts.add([*node.module.split("."), "__init__"][1])
    return parts - {own}


def docstring(path: Path) -> str:
    """First paragraph of a module's docstring, in one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def table() -> str:
    """The parts of the package that each part imports."""
    lines = ["| part | imports |", "|---|---|"]
    for part in [part for part in LAYERS if part != "__init__"]:
        used = sorted(LAYERS[part] - {"__init__"})
        lines.append(f"| {_code(part)} | {', '.join(map(_code, used)) or 'no other part'} |")
    return "\n".join(lines)


def _code(part: str) -> str:
    return f"`{part}/`" if (PACKAGE / part).is_dir() else f"`{part}.py`"


def tree() -> str:
    """Folders and files of the package, each with the first sentence of its docstring."""
    lines = ["    src/opo_trl/"]
    for folder in folders():
        lines += [f"      {folder + '/':13} {first_sentence(PACKAGE / folder / '__init__.py')}"]
    for file in [part for part in LAYERS if (PACKAGE / f"{part}.py").is_file() and part != "__init__"]:
        lines += [f"      {file + '.py':13} {first_sentence(PACKAGE / f'{file}.py')}"]
    return "\n".join(lines)


def folders() -> list[str]:
    return [part for part in LAYERS if (PACKAGE / part).is_dir()]


def modules() -> str:
    """The modules of each folder."""
    lines = ["| folder | modules |", "|---|---|"]
    for folder in folders():
        names = sorted(path.stem for path in (PACKAGE / folder).glob("*.py") if path.stem != "__init__")
        lines.append(f"| {_code(folder)} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines)


def first_sentence(path: Path) -> str:
    return re.sub(r"\[?`?~?([\w.`]+)`?\]?", lambda m: m[0], docstring(path)).split(". ")[0].rstrip(".")


def replaced(text: str, pattern: str, drawn: str) -> str:
    found = re.findall(pattern, text, re.DOTALL)
    assert len(found) == 1, f"{len(found)} places for it"
    return text.replace(found[0], drawn)


def pages() -> dict[Path, str]:
    """What README and the design page should hold."""
    design = replaced(TABLE.read_text(), r"\| part \| imports \|\n.*?(?=\n\n)", table())
    return {
        TABLE: replaced(design, r"\| folder \| modules \|\n.*?(?=\n\n)", modules()),
        TREE: replaced(TREE.read_text(), r"    src/opo_trl/\n.*?(?=\n    examples/)", tree()),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
