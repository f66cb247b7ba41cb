"""Which checkpoint `--resume_from_checkpoint auto`, `true` and a path stand for, and which of them is refused."""

import pytest

from opo_trl.runs.checkpoints import checkpoint_to_resume, mark_complete


@pytest.fixture
def output_dir(tmp_path):
    """A complete checkpoint of step 9, and a later one whose save was interrupted."""
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "trainer_state.json").write_text("{}")
    mark_complete(tmp_path / "checkpoint-9")
    return tmp_path


@pytest.mark.parametrize("request_", [None, False, "", "false", "False"])
def test_nothing_is_resumed_unless_asked_for(output_dir, request_):
    assert checkpoint_to_resume(request_, output_dir) is None


@pytest.mark.parametrize("request_", [True, "true", "True", "auto", "AUTO"])
def test_the_latest_complete_checkpoint_is_taken_and_the_skipped_ones_are_logged(output_dir, request_, caplog):
    assert checkpoint_to_resume(request_, output_dir) == output_dir / "checkpoint-9"
    assert "Skipped as incomplete: checkpoint-10" in caplog.text


def test_auto_starts_from_the_beginning_where_nothing_is_complete_and_true_does_not(output_dir):
    (output_dir / "checkpoint-9" / "model.safetensors").unlink()
    assert checkpoint_to_resume("auto", output_dir) is None
    with pytest.raises(ValueError, match=r"\(checkpoint-10: .*; checkpoint-9: model.* is missing\), got none\. Use"):
        checkpoint_to_resume("true", output_dir)
    assert checkpoint_to_resume("auto", output_dir / "new") is None
    with pytest.raises(ValueError, match=r"needs a complete checkpoint in .*/new', got none\. Use"):
        checkpoint_to_resume(True, output_dir / "new")


def test_a_named_checkpoint_must_be_there_and_complete(output_dir):
    complete = output_dir / "checkpoint-9"
    assert checkpoint_to_resume(str(complete), output_dir / "elsewhere") == complete
    # Without a marker it may be another trainer's.
    assert checkpoint_to_resume(str(output_dir / "checkpoint-10"), output_dir) == output_dir / "checkpoint-10"
    (complete / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"checkpoint-9': model.safetensors has 3 bytes instead of 7"):
        checkpoint_to_resume(str(complete), output_dir)
    with pytest.raises(ValueError, match=r"checkpoint-11', which is not a directory"):
        checkpoint_to_resume(str(output_dir / "checkpoint-11"), output_dir)
    with pytest.raises(ValueError, match=r"trainer_state.json is missing"):
        checkpoint_to_resume(str(output_dir), output_dir)
