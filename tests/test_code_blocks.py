"""The code blocks of pages are found, run in order, and fail where they stand."""

import traceback

import pytest

from code_blocks import HUB_DATASETS, HUB_MODELS, read_blocks, run_python

PAGE = """\
# A page

<!-- not run: needs a GPU -->
```python
raise SystemExit("a marked block must not run")
```

    make train

1. In a list:

   ```sh
   ls
   ```

!!! note
    A note.

    ```python title="in mkdocs's note"
    steps = 3
    ```

~~~ {.Python .annotate}
steps += 1
raise ValueError(steps)
~~~
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_blocks_are_found_with_line_language_and_marker(page):
    found = [(block.line, block.language, block.not_run) for block in read_blocks(page)]
    assert found == [
        (5, "python", "needs a GPU"),
        (8, "", None),
        (13, "sh", None),
        (20, "python", None),
        (24, "python", None),
    ]
    assert [block.text for block in read_blocks(page)][1:4] == ["make train\n", "ls\n", "steps = 3\n"]


def test_blocks_run_in_one_namespace_and_fail_at_their_line(page):
    with pytest.raises(ValueError, match="4") as caught:
        run_python(page)
    frame = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (frame.filename, frame.lineno, frame.line) == (str(page), 25, "raise ValueError(steps)")


def test_models_datasets_and_configs_have_stand_ins(tmp_path):
    lines = [
        "from datasets import load_dataset",
        "from opo_trl import OPOConfig",
        "from transformers import AutoConfig",
    ]
    lines += [f"assert AutoConfig.from_pretrained('{name}').hidden_size == 32" for name in HUB_MODELS]
    lines += [
        f'assert load_dataset("{name}", "{config}", split="test").column_names == {list(rows[0])}'
        for name, (config, rows) in HUB_DATASETS.items()
    ]
    lines += ["config = OPOConfig('out', max_steps=1000)", "assert config.use_cpu and config.max_steps == 2"]
    path = tmp_path / "page.md"
    path.write_text("\n".join(["```python", *lines, "```"]))
    assert run_python(path) == 1


def test_what_has_no_stand_in_fails(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("```python\nfrom transformers import AutoConfig\nAutoConfig.from_pretrained('some/model')\n```")
    with pytest.raises(OSError, match="couldn't connect"):
        run_python(path)
