"""A vision-language model: a tiny LLaVA with random weights learns to name the colour of a picture.

    python examples/pictures.py    # a minute on a CPU

The reward, the share of completions that name the colour, goes from about 0.2 to about 0.8.
"""

import transformers
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture
from tokenizers import Tokenizer, models, pre_tokenizers

from opo_trl import OPOConfig, OPOTrainer

COLOURS = ("red", "green", "blue")
WORDS = ["<pad>", "<eos>", "<unk>", "<image>", "which", "colour", *COLOURS]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def tiny_llava():
    """Pictures of 8 x 8 pixels, in four patches; any vision-language model and its processor can replace it."""
    transformers.set_seed(0)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "padding_side": "left"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special
    )
    resize = transformers.LlavaImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    layout = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = transformers.LlavaProcessor(resize, tokenizer, chat_template=TEMPLATE, **layout)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(image_size=8, patch_size=4, initializer_range=0.2, **sizes)
    text = transformers.LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=WORDS.index("<image>"))
    return transformers.LlavaForConditionalGeneration(config), processor


def names_the_colour(completions, colour, **kwargs):
    texts = [completion[0]["content"].strip() for completion in completions]
    return [float(text == name) for text, name in zip(texts, colour, strict=True)]


message = {"role": Value("string"), "content": Value("string")}
features = Features({"prompt": List(message), "images": List(Image()), "colour": Value("string")})
prompt = [{"role": "user", "content": "which colour"}]
pictures = {name: [Picture.new("RGB", (16, 16), name)] for name in COLOURS}
rows = [{"prompt": prompt, "images": pictures[name], "colour": name} for name in COLOURS * 100]
settings = {"max_steps": 60, "logging_steps": 10, "save_strategy": "no", "report_to": "none"}
settings |= {"num_generations": 8, "per_device_train_batch_size": 48, "learning_rate": 3e-3, "max_completion_length": 1}
settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}  # on a GPU, remove this line
model, processor = tiny_llava()
config = OPOConfig(output_dir="outputs/pictures", **settings)
problems = Dataset.from_list(rows, features=features)
trainer = OPOTrainer(model, names_the_colour, config, problems, processing_class=processor)
trainer.train()
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print(f"reward: {rewards[0]:.2f} in the first steps, {rewards[-1]:.2f} in the last")
