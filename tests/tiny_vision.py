"""A tiny random vision-language model and its processor, and problems with pictures."""

from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from tiny import VOCABULARY, tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZE, PATCH = 8, 4  # four image tokens for each picture


def tiny_processor() -> LlavaProcessor:
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def tiny_vision_model() -> LlavaForConditionalGeneration:
    """Large initial weights, as `tiny_model` has."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=16, intermediate_size=16, image_size=SIZE, patch_size=PATCH, **sizes
            ),
            text_config=LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                vocab_size=len(VOCABULARY) + 1,
                max_position_embeddings=512,
                **sizes,
            ),
            image_token_id=len(VOCABULARY),
        )
    )


def picture_problems(pictures_of_each: list[int]) -> Dataset:
    """One problem for each entry, with so many pictures of different colours and sizes."""
    rows = [
        {
            "prompt": [{"role": "user", "content": "what " * (1 + problem)}],
            "images": [
                Picture.new("RGB", (9 + problem, 12 + i), (200 - 60 * problem, 90 * i, 40 + 50 * problem))
                for i in range(number)
            ],
        }
        for problem, number in enumerate(pictures_of_each)
    ]
    message = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_list(rows, features=Features({"prompt": List(message), "images": List(Image())}))
