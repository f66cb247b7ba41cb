"""Tiny models, tokenizers and scripted rollouts that several tests and the distributed worker share."""

import math
import string
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opo_trl import OPOConfig, OPOTrainer

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<unk>"]
VOCABULARY = [*SPECIAL, *string.ascii_letters, *string.digits, *" \n+-*/=?.,:;#$'\"(){}[]<>\\%&^_!|"]


def tiny_tokenizer(pad_token: str | None = "<pad>", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad_token,
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=chat_template,
    )


def tiny_model(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Large initial weights, so that log-probabilities differ between tokens and gradients are far from 0."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            **{"vocab_size": len(VOCABULARY), "max_position_embeddings": 512, **config},
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


# One group of completions per prompt, with the reward of each. Lengths vary within and between groups, since equal
# lengths hide every mistake with lengths; None is unscorable; the third group is uninformative.
SCRIPT: dict[str, list[tuple[str, float | None]]] = {
    "one": [("a", 1.0), ("bbbbbbb", 0.3), ("ccc", -0.2), ("ddddddddddd", 0.9)],
    "three": [("a longer answer", 0.0), ("x", 0.7), ("of several words", None), ("yy", 0.1)],
    "fifteen": [("same", 0.4), ("reward", 0.4), ("for", 0.4), ("all of them", 0.4)],
    "twenty two": [("0123456789 0123456789", 1.0), ("01", 0.0), ("012345", 1.0), ("0", 0.0)],
    "six": [("p", 0.25), ("pq", 0.5), ("pqr", 0.75), ("pqrstuvw", 1.0)],
    "seven!": [("k", None), ("kl", None), ("klm", 2.5), ("klmn", None)],
}
GROUP_SIZE = 4


def scripted_dataset(num_prompts: int = len(SCRIPT)) -> Dataset:
    return Dataset.from_dict({"prompt": list(SCRIPT)[:num_prompts]})


def scripted_rollout(
    prompts: list[str], trainer: Any, script: dict[str, list[tuple[str, float | None]]] = SCRIPT
) -> dict[str, Any]:
    """Play the script: the n-th row of a group gets the n-th completion, on whichever rank it lands."""
    tokenizer = trainer.processing_class
    first = trainer.accelerator.process_index * len(prompts)
    group_size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    rows = [script[prompt][(first + i) % group_size] for i, prompt in enumerate(prompts)]
    completion_ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text, _ in rows]
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completion_ids,
        "logprobs": [[0.0] * len(ids) for ids in completion_ids],
        "score": [score for _, score in rows],
    }


EMPTY = {"x", "ccc", "01"}  # completions that `rollout_with_empty_completions` leaves without a token


def rollout_with_empty_completions(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """The script, with some completions of zero tokens: a backend may return those."""
    output = scripted_rollout(prompts, trainer)
    empty = [trainer.processing_class.decode(ids[:-1]) in EMPTY for ids in output["completion_ids"]]
    for name in ("completion_ids", "logprobs"):
        output[name] = [[] if none else row for none, row in zip(empty, output[name], strict=True)]
    return output


def rollout_with_every_column(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """The script with the log-probabilities of a sampler with other numerics, and tool output in its completions."""
    output = scripted_rollout(prompts, trainer)
    logprobs = [
        [-4.0 + 1.5 * math.sin(7 * token + i) for i, token in enumerate(ids)] for ids in output["completion_ids"]
    ]
    env_mask = [[int(i % 3 != 1) for i in range(len(ids))] for ids in output["completion_ids"]]
    return {**output, "logprobs": logprobs, "env_mask": env_mask}


def scripted_reward(completions: list[Any], score: list[float | None], **kwargs: Any) -> list[float | None]:
    return score


class TokenBaseline(OPOTrainer):
    """Token t is compared with the rewards weighed by each completion's tokens up to t."""

    weigh_tokens = True

    def baseline(self, rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        energy = weights.cumsum(dim=2)
        weighted = (energy * rewards.unsqueeze(2)).sum(dim=1, keepdim=True)
        return weighted / energy.sum(dim=1, keepdim=True).clamp(min=1e-9)


def tiny_config(output_dir: Any, **overrides: Any) -> OPOConfig:
    """Plain SGD at learning rate 1 without clipping: the update is minus the gradient."""
    settings: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "num_generations": GROUP_SIZE,
        "max_completion_length": 32,
        "shuffle_dataset": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return OPOConfig(str(output_dir), **{**settings, **overrides})


def scripted_trainer(
    output_dir: Any, model: Any = None, rollout: Callable[..., dict[str, Any]] = scripted_rollout, **overrides: Any
) -> OPOTrainer:
    names = ("reward_funcs", "train_dataset", "eval_dataset", "peft_config", "processing_class", "callbacks")
    names += ("environment_factory", "optimizers", "reward_processing_classes", "tools")
    arguments = {name: overrides.pop(name) for name in names if name in overrides}
    return OPOTrainer(
        model=tiny_model() if model is None else model,
        args=tiny_config(output_dir, **overrides),
        rollout_func=rollout,
        **{
            "reward_funcs": scripted_reward,
            "train_dataset": scripted_dataset(),
            "processing_class": tiny_tokenizer(),
            **arguments,
        },
    )


def update_of(trainer: OPOTrainer) -> dict[str, torch.Tensor]:
    """Train and return how much each trainable parameter moved."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    return {name: p.detach() - before[name] for name, p in trainer.model.named_parameters() if p.requires_grad}


def relative_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, over all parameters together."""
    assert actual.keys() == expected.keys()
    difference = sum((actual[name] - expected[name]).square().sum() for name in expected)
    scale = sum(value.square().sum() for value in expected.values())
    assert scale > 0, "an update of 0 proves nothing"
    return float((difference / scale).sqrt())
