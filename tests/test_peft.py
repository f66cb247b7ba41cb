"""Adapters: moved by the same gradient, saved, loaded back, carried on with, merged."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.generation.vllm_generation import VLLMGeneration

from opo_trl.runs.base_weights import keep_base_weights
from test_trainer import WHOLE_SCRIPT, reinforce_update, scripted_groups
from tiny import relative_error, scripted_trainer, tiny_model, tiny_tokenizer, update_of

ADAPTERS = {
    "LoRA": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "DoRA": {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
}


@pytest.fixture(params=ADAPTERS)
def adapter(request):
    return ADAPTERS[request.param]


def peft_model(adapter):
    """Random adapter weights, so that both factors have a gradient; a dropout that would show if it were on."""
    torch.manual_seed(1)
    return get_peft_model(tiny_model(), LoraConfig(**adapter, lora_dropout=0.5, init_lora_weights=False))


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([tiny_tokenizer()("fifteen twenty two")["input_ids"]])).logits


def transfer_to_nothing(model, fails=False):
    """TRL's walk through the weights that vLLM would get, with the adapter merged."""
    generation = object.__new__(VLLMGeneration)
    generation.model = model
    generation._dist = SimpleNamespace(gather_params=lambda parameters: nullcontext(), is_fsdp=False)
    walk = generation._iter_named_params()
    if fails:
        next(walk)
        raise KeyboardInterrupt
    return {name: weight.clone() for name, weight in walk}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_transfer_to_vllm_leaves_the_base_and_the_policy_as_they_were(kind):
    """In bfloat16, adding an adapter and subtracting it again rounds to other weights."""
    model = peft_model(ADAPTERS[kind]).to(torch.bfloat16)
    before, logits = base_weights(model), logits_of(model)
    sent = []
    transfer = keep_base_weights(model, lambda: sent.append(transfer_to_nothing(model)))
    for _ in range(3):
        transfer()
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(model).items())
    assert torch.equal(logits_of(model), logits)
    assert all(torch.equal(weight, sent[0][name]) for name, weight in sent[2].items())
    assert any(not torch.equal(weight, before[name]) for name, weight in sent[0].items()), "merged"
    interrupted = keep_base_weights(model, lambda: transfer_to_nothing(model, fails=True))
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(logits_of(model), logits)
    for _ in range(3):
        transfer_to_nothing(model)
    assert any(not torch.equal(weight, before[name]) for name, weight in base_weights(model).items()), "TRL's own"


def base_weights(model):
    """The frozen part, by the names that it has without an adapter."""
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    return {name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in frozen.items()}


def test_an_adapter_is_moved_by_the_same_gradient(tmp_path, adapter):
    trainer = scripted_trainer(tmp_path, peft_model(adapter), **WHOLE_SCRIPT)
    update = update_of(trainer)
    assert all("lora_" in name for name in update)
    assert relative_error(update, reinforce_update(peft_model(adapter), scripted_groups())) < 1e-5


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The tiny model in 4 bits, anew at each call, as QLoRA has it."""
    pytest.importorskip("bitsandbytes", reason="`make test-slow` installs bitsandbytes")
    directory = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(directory)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patched:
        # On a CPU with AVX512-BF16, bitsandbytes 0.50 packs weights anew when it samples, which fails for matrices
        # that are narrower than a block of 64, as the tiny model's are.
        patched.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield lambda: AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=settings)


@pytest.mark.slow
def test_an_adapter_of_a_quantized_base_is_moved_by_the_same_gradient(tmp_path, quantized):
    def adapted():
        torch.manual_seed(1)
        return get_peft_model(quantized(), LoraConfig(**ADAPTERS["LoRA"], init_lora_weights=False))

    base = quantized()
    assert type(base.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    trainer = scripted_trainer(tmp_path, adapted(), **WHOLE_SCRIPT)
    adapter = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapter} == {torch.bfloat16}, "as TRL has it, too coarse to compare"
    for parameter, exact in zip(adapter, (p for p in adapted().parameters() if p.requires_grad), strict=True):
        parameter.data = exact.data
    update = update_of(trainer)
    assert all("lora_" in name for name in update)
    assert relative_error(update, reinforce_update(adapted(), scripted_groups())) < 1e-5
    assert relative_error(update, reinforce_update(peft_model(ADAPTERS["LoRA"]), scripted_groups())) > 1e-2, "4 bits"
    start = dict(base.named_parameters())
    assert all(torch.equal(value, start[name]) for name, value in base_weights(trainer.model).items())


def test_an_adapter_of_a_peft_config_really_moves_and_the_base_does_not(tmp_path, adapter):
    trainer = scripted_trainer(tmp_path, peft_config=LoraConfig(**adapter), max_steps=2)
    update = update_of(trainer)
    assert all(update[name].abs().max() > 0 for name in update), "a second step moves lora_A, too"
    assert {"lora_A", "lora_B"} <= {name.split(".")[-3] for name in update if name.endswith("weight")}
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    start = tiny_model().state_dict()
    assert all(torch.equal(value, start[name]) for name, value in base_weights(trainer.model).items())


def test_a_saved_adapter_loads_back_and_goes_on(tmp_path, adapter):
    trainer = scripted_trainer(tmp_path / "first", peft_model(adapter))
    trainer.train()
    trainer.save_model()
    assert not list((tmp_path / "first").glob("model*.safetensors")), "the base model is not part of an adapter"
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "first", is_trainable=True)
    assert torch.equal(logits_of(loaded), logits_of(trainer.model))
    assert not torch.equal(logits_of(loaded), logits_of(peft_model(adapter)))
    update = update_of(scripted_trainer(tmp_path / "second", loaded))
    assert all("lora_" in name and value.abs().max() > 0 for name, value in update.items())


def test_a_merged_export_needs_no_peft(tmp_path, adapter):
    trainer = scripted_trainer(tmp_path, peft_model(adapter))
    trainer.train()
    expected = logits_of(trainer.model)
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(tiny_model()), expected, atol=1e-2)


def test_an_adapter_that_cannot_move_is_refused(tmp_path, adapter):
    """What `from_pretrained` gives by default. TRL silently trains it, and saves what it was given (trl#6700)."""
    peft_model(adapter).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="must have a trainable parameter, got a PeftModel"):
        scripted_trainer(tmp_path / "run", frozen)


def test_a_frozen_model_is_refused_and_a_fresh_adapter_on_it_is_not(tmp_path):
    frozen = tiny_model().requires_grad_(False)
    with pytest.raises(ValueError, match="must have a trainable parameter, got a LlamaForCausalLM with none"):
        scripted_trainer(tmp_path, frozen)
    scripted_trainer(tmp_path, frozen, peft_config=LoraConfig(**ADAPTERS["LoRA"]))
