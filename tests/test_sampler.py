"""The sampler is the policy: the table of settings, and what a model's own generation config slips in."""

import pytest
import torch
from peft import LoraConfig
from transformers import GenerationConfig

from opo_trl import OPOTrainer
from opo_trl.on_policy.sampling_settings import NEUTRAL_VALUES, distribution_changes
from tiny import scripted_dataset, scripted_trainer, tiny_config, tiny_model, tiny_tokenizer

# Settings of GenerationConfig that do not change the sampling distribution: stopping, computation, return values.
HARMLESS = {
    "_from_model_config", "transformers_version", "is_assistant",
    "max_length", "max_new_tokens", "max_time", "early_stopping", "length_penalty",
    "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id",
    "use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile", "continuous_batching_config",
    "low_memory", "prefill_chunk_size", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "return_dict_in_generate", "remove_invalid_values", "renormalize_logits",
    # These shape an assistant's guesses, which the model then accepts or rejects; TRL passes no assistant.
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
    "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind",
}  # fmt: skip


def test_every_setting_of_the_installed_transformers_is_judged():
    """A setting that a new release adds fails here, by name, before it silently changes the sampling distribution."""
    settings = set(GenerationConfig().to_dict()) - {"temperature"}
    assert settings - HARMLESS - set(NEUTRAL_VALUES) == set()
    assert set(NEUTRAL_VALUES) & HARMLESS == set()


def test_distribution_changes_names_values_not_keys():
    assert distribution_changes({"top_p": 1, "top_k": 0, "min_p": None, "unknown": 3, "temperature": 0.3}) == []
    assert distribution_changes({"top_p": 0.9, "num_beams": 4, "do_sample": False}) == [
        "do_sample",
        "num_beams",
        "top_p",
    ]


def sampling_trainer(tmp_path, model, **overrides):
    """A trainer that really generates, for which the model's generation config matters."""
    return scripted_trainer(tmp_path, model, rollout=None, reward_funcs=lambda completions, **_: [0.0] * 8, **overrides)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 0.1),
        ("typical_p", 0.9),
        ("num_beams", 2),
        ("epsilon_cutoff", 0.01),
        ("no_repeat_ngram_size", 3),
        ("encoder_repetition_penalty", 1.2),
        ("bad_words_ids", [[5]]),
        ("suppress_tokens", [5]),
        ("min_new_tokens", 4),
        ("top_h", 0.4),
        ("stop_strings", ["."]),
    ],
)
def test_what_leaks_from_the_models_generation_config_is_refused(tmp_path, name, value):
    model = tiny_model()
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=rf"generation config has {name}=.*model\.generation_config\.{name} = None"):
        sampling_trainer(tmp_path, model)
    setattr(model.generation_config, name, None)
    sampling_trainer(tmp_path, model)


def test_an_adapter_does_not_hide_what_leaks(tmp_path):
    model = tiny_model()
    model.generation_config.typical_p = 0.5
    with pytest.raises(ValueError, match=r"typical_p=0\.5"):
        sampling_trainer(tmp_path, model, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))


def test_what_does_not_leak_trains(tmp_path):
    """Qwen2.5-Instruct ships such values; TRL sets these fields itself, so they have no effect."""
    model = tiny_model()
    model.generation_config.update(top_p=0.8, top_k=20, repetition_penalty=1.05, temperature=0.7, do_sample=False)
    sampling_trainer(tmp_path, model, max_completion_length=4).train()


def test_a_neutral_minimum_probability_shuts_the_leak(tmp_path):
    model = tiny_model()
    model.generation_config.min_p = 0.1
    sampling_trainer(tmp_path, model, min_p=0.0)


def test_an_open_top_k_falls_back_to_50_and_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"top_k=50.* `top_k` is None in OPOConfig.* Leave `top_k` out"):
        sampling_trainer(tmp_path, tiny_model(), top_k=None)


@pytest.mark.parametrize("ends", [5, [1, 5]])
def test_an_end_token_that_trl_does_not_cut_at_is_refused(tmp_path, ends):
    """Padding after it would be trained; where the model declares it, completions are cut there."""
    settings = {"generation_kwargs": {"eos_token_id": ends}, "max_completion_length": 24}
    with pytest.raises(
        ValueError, match=r"padding after \[5\] would be trained.*generation_config.eos_token_id = \[1, 5\]"
    ):
        sampling_trainer(tmp_path, tiny_model(), **settings)
    model = tiny_model()
    model.generation_config.eos_token_id = [1, 5]
    trainer = sampling_trainer(tmp_path, model, **settings)
    completions, _ = trainer._generate_single_turn([[7, 8]] * 64, None, {}, 4)
    assert not any({1, 5}.intersection(ids[:-1]) for ids in completions)
    assert any(ids[-1] == 5 for ids in completions)


def test_the_sampler_is_looked_at_again_when_training_starts(tmp_path):
    trainer = sampling_trainer(tmp_path, tiny_model())
    trainer.model.generation_config.typical_p = 0.5
    with pytest.raises(ValueError, match=r"typical_p=0\.5"):
        trainer.train()


def test_continuous_batching_does_not_merge_the_models_config(tmp_path):
    model = tiny_model()
    model.generation_config.typical_p = 0.5
    sampling_trainer(tmp_path, model, use_transformers_continuous_batching=True)


def test_a_rollout_function_samples_by_itself(tmp_path):
    model = tiny_model()
    model.generation_config.min_p = 0.1
    scripted_trainer(tmp_path, model)


def test_samples_follow_the_policy(tmp_path):
    """The first sampled token of many completions against the model's own probabilities, at a temperature not 1."""
    seen = []
    trainer = OPOTrainer(
        tiny_model(),
        lambda completions, completion_ids, **_: seen.extend(ids[0] for ids in completion_ids) or [0.0] * len(seen),
        tiny_config(
            tmp_path, per_device_train_batch_size=4096, num_generations=4096, max_completion_length=1, temperature=0.7
        ),
        scripted_dataset(1),
        processing_class=tiny_tokenizer(),
    )
    prompt = torch.tensor([trainer.processing_class("one")["input_ids"]])
    with torch.no_grad():
        expected = (trainer.model(prompt).logits[0, -1] / 0.7).softmax(dim=-1)
    trainer.train()
    frequency = torch.bincount(torch.tensor(seen), minlength=len(expected)) / len(seen)
    assert (frequency - expected).abs().max() < 4 * (0.25 / len(seen)) ** 0.5
