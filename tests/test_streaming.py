"""A streamed step has the gradient, the metrics and the failures of one that is not, against a stand-in server."""

import pytest
from peft import LoraConfig

from opo_trl.rollouts import watched_session
from tiny import SCRIPT, relative_error, update_of
from vllm_stand_in import vllm_stand_in
from waves_script import ONE_BY_ONE, UNEVEN, ScriptedServer, finish_in_batches, score, streaming_trainer


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(watched_session, "POLL_SECONDS", 0.2)
    with vllm_stand_in() as stand_in:
        yield stand_in


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
@pytest.mark.parametrize("batches", [ONE_BY_ONE, UNEVEN, [list(SCRIPT)]], ids=["one by one", "uneven", "all at once"])
def test_the_gradient_is_that_of_a_step_that_is_not_streamed(tmp_path, server, loss_type, batches):
    script = ScriptedServer(server)
    plain = update_of(streaming_trainer(tmp_path / "plain", server, stream_rollouts=False, loss_type=loss_type))
    trainer = streaming_trainer(tmp_path / "streamed", server, loss_type=loss_type)
    waves = finish_in_batches(trainer, script, batches)
    assert relative_error(update_of(trainer), plain) < 2e-6
    assert [sorted(wave) for wave in waves] == [sorted(list(SCRIPT).index(p) for p in batch) for batch in batches]


def logged(trainer):
    return next(entry for entry in trainer.state.log_history if "reward" in entry)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.5},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 12, "skip_uninformative": False},
        {"gradient_accumulation_steps": 24, "per_device_train_batch_size": 1, "loss_type": "dr_grpo"},
        {"gradient_accumulation_steps": 2, "num_generations": 3, "per_device_train_batch_size": 9},
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)},
        {"baseline_weight": "uncertainty"},
        {"baseline_weight": "uncertainty", "vllm_importance_sampling_correction": False},
        {"reward_funcs": [score, lambda completions, **_: [len(c) / 20 for c in completions]]},
    ],
    ids=["clipped", "all rows", "more micro-batches than groups", "split groups", "LoRA", "uncertainty", "forwards",
         "two rewards"],
)  # fmt: skip
def test_a_step_is_logged_as_one_that_is_not_streamed(tmp_path, server, settings):
    script = ScriptedServer(server)
    plain = streaming_trainer(tmp_path / "plain", server, stream_rollouts=False, **settings)
    trainer = streaming_trainer(tmp_path / "streamed", server, **settings)
    finish_in_batches(trainer, script, UNEVEN)
    expected = update_of(plain)
    assert relative_error(update_of(trainer), expected) < 2e-6
    theirs, ours = logged(plain), logged(trainer)
    streamed = {"streaming/waves", "streaming/generation_seconds"}
    assert ours.keys() == theirs.keys() | streamed
    timed = {name for name in ours if "time" in name or "per_second" in name} | streamed
    for name in theirs.keys() - timed - {"opo/padding_fraction"}:  # other rows share a micro-batch
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6, nan_ok=True), name
