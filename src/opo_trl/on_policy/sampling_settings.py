"""
Which sampling settings leave the distribution of the policy unchanged.

Exactly on-policy means that completions are drawn from the distribution whose gradient is taken: the softmax of the
model's logits divided by `temperature`. This table names every setting of transformers' `GenerationConfig` and of
vLLM's `SamplingParams` that would draw from another one, with the values at which it does nothing. A contract test
compares it with the installed transformers, so that a new setting must be judged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import ProcessorMixin

# Setting -> the values at which it changes nothing. `temperature` is apart: it must equal the trainer's own.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    # Not sampling at all
    "do_sample": (True,),
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0.0),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    # Cutting the tail of the distribution
    "top_k": (None, 0, -1),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    # Reweighing tokens
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "presence_penalty": (None, 0.0),
    "frequency_penalty": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "sequence_bias": (None, {}),
    "logit_bias": (None, {}),
    "dola_layers": (None,),
    "watermarking_config": (None,),
    "logits_processors": (None, []),
    # Forbidding or forcing tokens
    "bad_words_ids": (None, []),
    "bad_words": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "allowed_token_ids": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "min_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "thinking_token_budget": (None, -1),
    "structured_outputs": (None,),
    "response_format": (None,),
    "repetition_detection": (None,),
    "guided_decoding": (None,),
    "trace_decode_token_ids": (None, []),
    # Answering another prompt than the one trained on
    "token_healing": (None, False),
    "truncate_prompt_tokens": (None,),
    # One seed for every request makes the K completions of a group the same one
    "seed": (None,),
    # A wrong number of completions, or tokens and log-probabilities that TRL would take for those that were sampled
    "num_return_sequences": (None, 1),
    "n": (None, 1),
    "stop_strings": (None,),
    "echo": (None, False),
    "logprobs": (None, 0),
    # Drawing from an approximation of the policy
    "cache_implementation": (
        None,
        "dynamic",
        "static",
        "offloaded",
        "offloaded_static",
        "paged",
        "sliding_window",
        "hybrid",
        "hybrid_chunked",
        "offloaded_hybrid",
        "offloaded_hybrid_chunked",
    ),
    "use_mtp": (None, False),
    "prompt_lookup_num_tokens": (None, 0),
    "speculation_type": (None,),
}

NEUTRAL_UNLESS_NONE = ("top_p", "top_k", "repetition_penalty")  # fields of OPOConfig, as its contract has them


def distribution_changes(settings: Mapping[str, Any]) -> list[str]:
    """
    Name the settings under which a sampler draws from another distribution than the policy.

    Args:
        settings (`Mapping[str, Any]`):
            Sampling settings by name, as in `GenerationConfig.to_dict()` or `SamplingParams`.

    Returns:
        `list[str]`: The names in `settings` whose value is not one of `NEUTRAL_VALUES`, sorted. Unknown names pass.
    """
    return sorted(name for name, value in settings.items() if value not in NEUTRAL_VALUES.get(name, (value,)))


def check_sampling_settings(settings: Mapping[str, Any], temperature: float) -> None:
    """
    Refuse a merged generation config that samples from another distribution than the policy.

    Args:
        settings (`Mapping[str, Any]`):
            The config as the backend uses it.
        temperature (`float`):
            Temperature of the distribution that is trained.

    Raises:
        ValueError: With the settings that change the distribution, and where to clear them.
    """
    changed = distribution_changes(settings)
    if settings["temperature"] != temperature:
        changed.append("temperature")
    if changed:
        listed = ", ".join(f"{name}={settings[name]!r}" for name in changed)
        fix = (
            "TRL leaves such settings to the model's generation_config.json: clear them there, or on the loaded model "
            f"with `model.generation_config.{changed[0]} = None`."
        )
        if changed[0] in NEUTRAL_UNLESS_NONE:  # the model cannot clear it: transformers has a default of its own
            fix = (
                f"`{changed[0]}` is None in OPOConfig, so that the model's generation config or transformers' default "
                f"applies. Leave `{changed[0]}` out."
            )
        raise ValueError(
            f"OPO samples from exactly the distribution that it trains, but the merged generation config has {listed}. "
            f"{fix}"
        )


def check_end_tokens(ends: int | Sequence[int] | None, known: Sequence[int]) -> None:
    """
    Refuse an end token after which TRL does not cut completions.

    transformers fills a completion with padding after its end. TRL cuts it after the end tokens of the model's
    generation config and the tokenizer's, so padding after another one would be trained as if it had been sampled.

    Args:
        ends (`int` or `Sequence[int]`, *optional*):
            `eos_token_id` of the generation config that TRL generates with.
        known (`Sequence[int]`):
            Tokens after which TRL cuts.

    Raises:
        ValueError: With the tokens and where to declare them.
    """
    unknown = sorted({*([] if ends is None else [ends] if isinstance(ends, int) else ends)} - {*known})
    if unknown:
        raise ValueError(
            f"A token that ends completions must be declared by the model: `generation_kwargs` sets `eos_token_id` to "
            f"{ends!r}, and TRL cuts completions after {list(known)} alone, so that the padding after {unknown} would "
            f"be trained. Set `model.generation_config.eos_token_id = {[*known, *unknown]}` before the trainer is "
            "built, and leave `eos_token_id` out of `generation_kwargs`."
        )


def check_generation_config(
    model: Any, generation_config: Any, temperature: float, processing_class: Any, *, merged: bool
) -> None:
    """
    Refuse a generation config under which transformers samples from another distribution than the policy.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy.
        generation_config ([`~transformers.GenerationConfig`]):
            What TRL generates with.
        temperature (`float`):
            Temperature of the distribution that is trained.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Of the policy.
        merged (`bool`):
            Whether transformers fills unset settings from the model's own generation config; continuous batching does
            not.

    Raises:
        ValueError: With the settings that change the distribution, and where to clear them.
    """
    if merged:
        generation_config, _ = model._prepare_generation_config(generation_config)
    settings = generation_config.to_dict()
    image_token = getattr(model.config, "image_token_id", None)
    if isinstance(processing_class, ProcessorMixin) and settings["suppress_tokens"] == [image_token]:
        del settings["suppress_tokens"]  # set by TRL: an image token cannot be part of a completion
    check_sampling_settings(settings, temperature)
