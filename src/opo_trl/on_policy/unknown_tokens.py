"""That a tokenizer has tokens for the prompts: what it has none for, the policy cannot tell apart."""

import logging
from typing import Any

from datasets import Dataset

_NUM_PROMPTS = 64
_LARGEST_SHARE = 0.05
_SHOWN = 60

logger = logging.getLogger(__name__)


def warn_of_unknown_tokens(dataset: Any, processing_class: Any) -> None:
    """
    Warn if more than 5 % of the tokens of the first 64 prompts are the tokenizer's unknown token.

    Rewards and gradient norms look healthy in such a run, and the policy learns nothing about the problems.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset handed to the trainer; any other kind is not looked at.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor that holds one.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    unknown = _unknown_token(tokenizer)
    if unknown is None or not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        return
    texts = [_text(prompt) for prompt in dataset[:_NUM_PROMPTS]["prompt"]]
    unknown_id = tokenizer.convert_tokens_to_ids(unknown)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    # A text that spells the unknown token, such as a question mark, means it.
    counts = [max(0, ids.count(unknown_id) - text.count(unknown)) for ids, text in zip(encoded, texts, strict=True)]
    share = sum(counts) / max(1, sum(map(len, encoded)))
    if share > _LARGEST_SHARE:
        worst = counts.index(max(counts))
        logger.warning(
            "%.0f %% of the tokens of the prompts are the unknown token %r: the tokenizer %s has no token for these "
            "parts, and the policy cannot tell them apart. It reads %r as %r. Use a model whose tokenizer has tokens "
            "for the prompts, or prompts of the characters that this one has.",
            100 * share,
            unknown,
            tokenizer.name_or_path,
            texts[worst][:_SHOWN],
            tokenizer.decode(encoded[worst])[:_SHOWN],
        )


def _unknown_token(tokenizer: Any) -> str | None:
    """The token for what has none; a fast tokenizer's model may have one that its configuration does not name."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return getattr(tokenizer, "unk_token", None) or getattr(model, "unk_token", None)


def _text(prompt: Any) -> str:
    """The text of a prompt: itself, or the contents of its messages, without images."""
    if isinstance(prompt, str):
        return prompt
    contents = [message.get("content") for message in prompt]
    return "\n".join(content for content in contents if isinstance(content, str))
