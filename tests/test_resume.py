"""A resumed run is bitwise identical to an uninterrupted one, with real sampling and over more than one epoch."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tiny import scripted_trainer, tiny_model

PROMPTS = ["one", "three", "fifteen", "twenty two", "six", "seven!", "a last one"]  # the last is left out of each epoch
STEPS_PER_EPOCH, STEPS = 3, 8


def letters_reward(completions, **kwargs):
    """Favours letters, so that every sampled completion has a reward of its own."""
    return [sum(character.isalpha() for character in text) / (1 + len(text)) for text in completions]


def starts_with_a_digit(completions, **kwargs):
    """Most completions miss it, so that many groups are uninformative."""
    return [float(text[:1].isdigit()) for text in completions]


REFILLED = {"max_refill_rounds": 2, "reward_funcs": starts_with_a_digit}


def lora_model():
    torch.manual_seed(1)
    return get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def sampling_trainer(output_dir, model, num_steps=STEPS, **settings):
    """Eight completions of two prompts a step, sampled for real; Adam, a schedule and clipping have state, too."""
    return scripted_trainer(
        output_dir,
        model,
        rollout=None,
        shuffle_dataset=True,
        max_completion_length=12,
        max_steps=num_steps,
        optim="adamw_torch",
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        max_grad_norm=0.5,
        **{
            "reward_funcs": letters_reward,
            "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "save_strategy": "steps",
            "save_steps": 1,
            **settings,
        },
    )


def without_times(history):
    """What two runs must log alike: all but what a clock measures."""
    clocked = ("step_time", "time/", "tokens_per_second/")
    return [{k: v for k, v in entry.items() if not k.startswith(clocked)} for entry in history]


def prompts_of_each_step(trainer):
    """Prompts as they come into a step, in order."""
    seen = []
    generate = trainer._generate_and_score_completions

    def record(inputs):
        seen.append(tuple(dict.fromkeys(row["prompt"] for row in inputs)))
        return generate(inputs)

    trainer._generate_and_score_completions = record
    return seen


@pytest.fixture(scope="module", params=[tiny_model, lora_model], ids=["full", "LoRA"])
def undisturbed(request, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed")
    trainer = sampling_trainer(output_dir, request.param())
    prompts = prompts_of_each_step(trainer)
    trainer.train()
    return request.param, output_dir, trainer, prompts


def test_every_epoch_has_an_order_of_its_own(undisturbed):
    *_, prompts = undisturbed
    assert len(prompts) == STEPS
    first, second = prompts[:STEPS_PER_EPOCH], prompts[STEPS_PER_EPOCH : 2 * STEPS_PER_EPOCH]
    assert first != second
    for epoch in (first, second):
        assert len({prompt for step in epoch for prompt in step}) == 6


@pytest.mark.parametrize("step", [1, 3, 4, 6, 7])  # in the first, second and third epoch, and where two of them meet
def test_a_resumed_run_ends_in_the_same_bits(undisturbed, tmp_path, step):
    make_model, output_dir, uninterrupted, prompts = undisturbed
    trainer = sampling_trainer(tmp_path, make_model())
    resumed_prompts = prompts_of_each_step(trainer)
    torch.manual_seed(step)  # whatever the random state is: the checkpoint's counts
    trainer.train(resume_from_checkpoint=str(output_dir / f"checkpoint-{step}"))
    assert resumed_prompts == prompts[step:]
    expected = uninterrupted.model.state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert without_times(trainer.state.log_history[:-1]) == without_times(uninterrupted.state.log_history[:-1])
