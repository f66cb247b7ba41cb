"""Models with random weights in the shapes of real ones, and a tokenizer for them: nothing is downloaded."""

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 256  # words of the tokenizer; a model may have more
TOY = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
QWEN2 = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    # Qwen2.5-0.5B and Qwen2.5-1.5B
    "0.5b": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2},
    "1.5b": {"vocab_size": 151_936, "hidden_size": 1_536, "intermediate_size": 8_960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2},
}  # fmt: skip
SIZES = ("toy", *QWEN2)
TOKENS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def random_model(size: str, longest: int, **config: Any) -> LlamaForCausalLM | Qwen2ForCausalLM:
    """
    Make a model with random weights: what they are does not matter for time, memory or the equality of gradients.

    Args:
        size (`str`):
            `"toy"`, a Llama; or `"tiny"`, `"0.5b"` or `"1.5b"`, a Qwen2 with tied embeddings.
        longest (`int`):
            Most tokens of a sequence.
        **config:
            Other fields of the configuration.
    """
    torch.manual_seed(0)
    if size == "toy":
        settings = {**TOY, "num_attention_heads": 4, "initializer_range": 0.05, "max_position_embeddings": longest}
        return LlamaForCausalLM(LlamaConfig(**{**settings, **TOKENS, **config}))
    settings = {**QWEN2[size], "tie_word_embeddings": True, "rope_theta": 1e6, "max_position_embeddings": longest}
    return Qwen2ForCausalLM(Qwen2Config(**{**settings, **TOKENS, **config}))


def word_tokenizer(pad_token: str = "t0", words: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer of the words t0, t1 and so on; t1 ends a text."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(words)}, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, end = (AddedToken(word, single_word=True, special=True) for word in (pad_token, "t1"))  # t1 is no part of t12
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, padding_side="left")
