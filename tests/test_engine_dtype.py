"""The engine computes in the trainer's dtype, and another one is warned about with both names."""

import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.generation import vllm_generation

from opo_trl.on_policy.engine_dtype import check_vllm_dtype, engine_dtype, trainer_dtype, warn_of_other_dtype
from policy_engine import PolicyEngine
from tiny import scripted_trainer, tiny_model

AUTO = "bfloat16"  # what vLLM makes of a float32 model, if asked for "auto"


class FakeLLM:
    """The part of `vllm.LLM` that knows its dtype."""

    def __init__(self, model, dtype="auto", **settings):
        served = torch.__dict__[AUTO if dtype == "auto" else dtype]
        self.asked_for = dtype
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(dtype=served))


class ColocatedEngine(PolicyEngine):
    """Builds its `LLM` as TRL does: by the name in TRL's module, without a dtype."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.llm = vllm_generation.LLM(model="a name")


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_generation, "LLM", FakeLLM, raising=False)
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", ColocatedEngine)

    def make(**settings):
        trainer = scripted_trainer(tmp_path, use_vllm=True, **settings)
        assert vllm_generation.LLM is FakeLLM, "the name must be what it was"
        return trainer

    return make


def test_the_engine_gets_the_trainers_dtype(make_trainer, caplog):
    assert make_trainer().vllm_generation.llm.asked_for == "float32"
    assert make_trainer(bf16=True).vllm_generation.llm.asked_for == "bfloat16"
    assert make_trainer(model=tiny_model().bfloat16()).vllm_generation.llm.asked_for == "bfloat16"
    assert "computes in" not in caplog.text


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_another_dtype_is_warned_about_with_both_names(make_trainer, caplog, dtype):
    engine = make_trainer(vllm_dtype=dtype).vllm_generation
    assert (engine.llm.asked_for, engine_dtype(engine)) == (dtype, "bfloat16")
    (message,) = [record.getMessage() for record in caplog.records if "computes in" in record.getMessage()]
    assert message.startswith("The vLLM engine computes in bfloat16 and the trainer in float32")
    assert "Leave `vllm_dtype` out" in message


def test_an_engine_that_fails_to_start_leaves_trls_name_alone(make_trainer, monkeypatch):
    def fail(**settings):
        raise OSError("no memory")

    monkeypatch.setattr(vllm_generation, "LLM", fail)
    with pytest.raises(OSError, match="no memory"):
        make_trainer()
    assert vllm_generation.LLM is fail


def test_a_dtype_that_a_later_trl_passes_is_kept(make_trainer, monkeypatch):
    class Later(PolicyEngine):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.llm = vllm_generation.LLM(model="a name", dtype="float16")

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Later)
    assert make_trainer().vllm_generation.llm.asked_for == "float16"


def test_an_adapter_counts_by_its_base_model():
    """PEFT keeps adapters in float32 beside a base model in bfloat16."""
    model = get_peft_model(tiny_model().bfloat16(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    args = SimpleNamespace(bf16=False, fp16=False)
    assert trainer_dtype(args, model) == "bfloat16"
    assert trainer_dtype(SimpleNamespace(bf16=False, fp16=True), model) == "float16"


SERVER = SimpleNamespace(bf16=False, fp16=False, vllm_mode="server")


def server(dtype=None, closed=False):
    def get_server_info():
        if closed:
            raise RuntimeError("does not expose its development endpoints")
        return {"model_config": {"dtype": dtype}}

    return SimpleNamespace(vllm_client=SimpleNamespace(get_server_info=get_server_info))


def test_a_servers_dtype_is_compared(caplog):
    warn_of_other_dtype(server("torch.float32"), SERVER, tiny_model())
    assert not caplog.records
    warn_of_other_dtype(server("torch.bfloat16"), SERVER, tiny_model())
    assert "computes in bfloat16 and the trainer in float32" in caplog.text
    assert "Restart the server with `--dtype float32`" in caplog.text


def test_an_unknown_dtype_is_no_warning(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_other_dtype(server(closed=True), SERVER, tiny_model())
        warn_of_other_dtype(SimpleNamespace(), SERVER, tiny_model())  # a rank without a connection
    assert not caplog.records


@pytest.mark.parametrize(
    ("dtype", "mode", "match"),
    [
        ("fp32", "colocate", r"`vllm_dtype` must be None or 'auto' or .*, got 'fp32'"),
        ("float32", "server", r"got 'float32' with `vllm_mode='server'`.* `--dtype float32`"),
    ],
)
def test_a_dtype_without_effect_is_refused(dtype, mode, match):
    with pytest.raises(ValueError, match=match):
        check_vllm_dtype(dtype, mode)
    check_vllm_dtype(None, mode)
