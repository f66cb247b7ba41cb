"""Which checkpoint `--resume_from_checkpoint auto`, `true` and a path stand for, and which of them is refused."""

import pytest

from opo_trl.runs.checkpoints import mark_complete, requested_checkpoint


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


@pytest.mark.parametrize("request_", [None, False, "false", "False"])
def test_nothing_is_resumed_unless_asked_for(output_dir, request_):
    assert requested_checkpoint(request_, output_dir) == (None, {})


@pytest.mark.parametrize("request_", [True, "true", "True", "auto", "AUTO"])
def test_the_latest_complete_checkpoint_is_taken(output_dir, request_):
    checkpoint, skipped = requested_checkpoint(request_, output_dir)
    assert checkpoint == output_dir / "checkpoint-9"
    assert list(skipped) == ["checkpoint-10"]


def test_auto_starts_from_the_beginning_where_nothing_is_complete_and_true_does_not(output_dir):
    (output_dir / "checkpoint-9" / "model.safetensors").unlink()
    checkpoint, skipped = requested_checkpoint("auto", output_dir)
    assert checkpoint is None
    assert skipped["checkpoint-9"] == "model.safetensors is missing"
    with pytest.raises(
        ValueError, match=r"got none \(checkpoint-10: .*; checkpoint-9: model.* is missing\)\. Use 'auto'"
    ):
        requested_checkpoint("true", output_dir)
    assert requested_checkpoint("auto", output_dir / "new") == (None, {})
    with pytest.raises(ValueError, match=r"requires a complete checkpoint in .*/new', got none\. Use 'auto'"):
        requested_checkpoint(True, output_dir / "new")


def test_a_named_checkpoint_must_be_there_and_complete(output_dir):
    complete = output_dir / "checkpoint-9"
    assert requested_checkpoint(str(complete), output_dir / "elsewhere") == (complete, {})
    # Without a marker it may be another trainer's.
    assert requested_checkpoint(str(output_dir / "checkpoint-10"), output_dir)[0] == output_dir / "checkpoint-10"
    (complete / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"checkpoint-9': model.safetensors has 3 bytes instead of 7"):
        requested_checkpoint(str(complete), output_dir)
    with pytest.raises(ValueError, match=r"checkpoint-11': there is no such directory"):
        requested_checkpoint(str(output_dir / "checkpoint-11"), output_dir)
    with pytest.raises(ValueError, match=r"it holds no trainer_state.json"):
        requested_checkpoint(str(output_dir), output_dir)
