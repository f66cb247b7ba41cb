r"""
The code blocks of Markdown pages: found, and the Python ones run offline with whatever opo_trl is installed.

    python tests/code_blocks.py README.md docs/reward.md

A page's blocks run in order in one namespace, in an empty directory, on the CPU. One that cannot run there says
why on the line before it:

    <!-- not run: needs a GPU -->

Three things stand in for what a test does not have, and nothing else is changed:

    the name of a Hub model (`HUB_MODELS`)       the directory of a tiny chat model, made by tests/tiny.py
    the name of a Hub dataset (`HUB_DATASETS`)   a directory with a few rows of its columns, in `train` and `test`
    every OPOConfig and GRPOConfig               trains on the CPU, as `ON_THE_CPU` says

A name that is in neither table fails, since nothing is downloaded: add it, or mark the block.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from markdown_it import MarkdownIt

HUB_MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
_GSM8K = [{"question": f"What is {n} + {n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(1, 17)]
_MATH = [
    {"problem": f"What is ${n}^2$?", "solution": f"It is $\\boxed{{{n**2}}}$.", "answer": str(n**2)} for n in range(16)
]
HUB_DATASETS: dict[str, tuple[str, list[dict[str, str]]]] = {  # name -> its configuration and rows
    "openai/gsm8k": ("main", _GSM8K),
    "HuggingFaceH4/MATH-500": ("default", _MATH),
    "HuggingFaceH4/aime_2024": ("default", _MATH),
}
ON_THE_CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "max_completion_length": 8,
    "report_to": "none",
}

_OFFLINE = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "WANDB_MODE": "offline",
}
_MARKER = re.compile(r"<!--\s*not run:\s*(.+?)\s*-->")
_FENCE = re.compile(r"^\s*(```|~~~)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    path: Path
    line: int  # of its first line of code, counted from 1
    language: str  # first word after the fence, in lower case; "" for a block that is only indented
    text: str
    not_run: str | None  # why it is not run, where a marker says so

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


def read_blocks(path: str | Path) -> list[Block]:
    """Every code block of a Markdown page, fenced or indented, those of mkdocs's admonitions and tabs included."""
    path = Path(path)
    return list(_blocks(path, path.read_text(encoding="utf-8"), 0))


def _blocks(path: Path, text: str, offset: int) -> Iterator[Block]:
    lines = text.splitlines()
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "fence":
            before, first, language = token.map[0], token.map[0] + 1, token.info.strip(" {.}").split(" ")[0].lower()
        elif token.type == "code_block" and _FENCE.search(token.content):
            # Indented, but with fences: the inside of an admonition or a tab, which is Markdown again.
            yield from _blocks(path, token.content, offset + token.map[0])
            continue
        elif token.type == "code_block":
            before, first, language = token.map[0], token.map[0], ""
        else:
            continue
        marker = _MARKER.fullmatch(next((line.strip() for line in reversed(lines[:before]) if line.strip()), ""))
        yield Block(path, offset + first + 1, language, token.content, marker and marker[1])


def run_python(path: str | Path) -> int:
    """
    Run the Python blocks of a page, in order and in one namespace, under the stand-ins.

    Args:
        path (`str` or `Path`):
            The page.

    Returns:
        `int`: The number of blocks that ran. What one raises comes through, with page and line in its traceback.
    """
    path = Path(path).resolve()
    blocks = [block for block in read_blocks(path) if block.language == "python" and block.not_run is None]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, stand_ins(Path(folder)) as names:
        working_directory = Path(folder, "work")
        working_directory.mkdir()
        with contextlib.chdir(working_directory):
            for block in blocks:
                source = "\n" * (block.line - 1) + _with_stand_ins(block.text, names)
                exec(compile(source, str(path), "exec"), namespace)
    return len(blocks)


@contextlib.contextmanager
def stand_ins(folder: Path) -> Iterator[dict[str, str]]:
    """Make the tiny model and the datasets in a folder, and let configs train on the CPU; gives path by Hub name."""
    from trl import GRPOConfig

    from opo_trl import OPOConfig
    from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

    model = folder / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(model)
    names = dict.fromkeys(HUB_MODELS, str(model))
    for number, (name, (config, rows)) in enumerate(HUB_DATASETS.items()):
        dataset = folder / f"dataset-{number}"
        dataset.mkdir()
        for split in ("train", "test"):
            (dataset / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files = "".join(f"\n  - split: {split}\n    path: {split}.jsonl" for split in ("train", "test"))
        card = f"---\nconfigs:\n- config_name: {config}\n  data_files:{files}\n---\n"
        (dataset / "README.md").write_text(card, encoding="utf-8")
        names[name] = str(dataset)
    with contextlib.ExitStack() as patches:
        for config_class in (OPOConfig, GRPOConfig):
            patched = _on_the_cpu(config_class.__post_init__)
            patches.enter_context(mock.patch.object(config_class, "__post_init__", patched))
        patches.enter_context(mock.patch("datasets.config.HF_DATASETS_CACHE", folder / "cache"))
        yield names


def _on_the_cpu(post_init: Any) -> Any:
    def with_settings(config: Any) -> None:
        for name, value in ON_THE_CPU.items():
            setattr(config, name, value)
        post_init(config)

    return with_settings


def _with_stand_ins(source: str, names: dict[str, str]) -> str:
    for name, path in names.items():
        source = re.sub(rf"([\"']){re.escape(name)}\1", lambda _, path=path: repr(path), source)
    return source


def main(pages: list[str]) -> None:
    os.environ.update(_OFFLINE)
    for page in pages:
        print(f"{page}: {run_python(page)} Python blocks ran", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
