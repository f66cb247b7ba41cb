"""What else GRPOTrainer offers and no other file runs: each gives the same update, or is refused in a sentence."""

import asyncio
import shutil

import pytest
import torch
from peft import PrefixTuningConfig
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.optimization import get_constant_schedule

from opo_trl.runs.guarded_functions import RewardError
from test_resume import letters_reward
from test_trainer import WHOLE_SCRIPT, reinforce_update, scripted_groups
from tiny import (
    GROUP_SIZE,
    SCRIPT,
    VOCABULARY,
    relative_error,
    scripted_dataset,
    scripted_reward,
    scripted_trainer,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    update_of,
)


def check_update(trainer, script=SCRIPT, tolerance=1e-5):
    assert relative_error(update_of(trainer), reinforce_update(tiny_model(), scripted_groups(script))) < tolerance


# Rewards


def test_an_async_reward_that_times_out_on_some_rows_leaves_them_out(tmp_path):
    """The function's own time limit decides; None stands for a row that it did not score."""

    async def slow_judge(completions, score, **kwargs):
        async def judge(row, score):
            await asyncio.sleep(60 if row % GROUP_SIZE == 2 else 0)
            return score

        async def limited(row, score):
            try:
                return await asyncio.wait_for(judge(row, score), timeout=0.05)
            except TimeoutError:
                return None

        return await asyncio.gather(*(limited(row, score) for row, score in enumerate(score)))

    script = {p: [(text, None if i == 2 else r) for i, (text, r) in enumerate(rows)] for p, rows in SCRIPT.items()}
    trainer = scripted_trainer(tmp_path, reward_funcs=slow_judge, **WHOLE_SCRIPT)
    check_update(trainer, script)
    unscored = [reward for rows in script.values() for _, reward in rows].count(None)
    assert trainer.state.log_history[0]["opo/unscorable_fraction"] == pytest.approx(unscored / 24)


async def times_out(completions, **kwargs):
    await asyncio.wait_for(asyncio.sleep(60), timeout=0.01)


async def cancels_what_it_waits_for(completions, **kwargs):
    task = asyncio.ensure_future(asyncio.sleep(60))
    task.cancel()
    await task


@pytest.mark.parametrize(
    ("reward", "error"), [(times_out, "TimeoutError"), (cancels_what_it_waits_for, "CancelledError")]
)
def test_an_async_reward_that_times_out_as_a_whole_is_raised(tmp_path, reward, error):
    """On two ranks, one of which fails: test_distributed.py."""
    with pytest.raises(RewardError, match=f"'{reward.__name__}' failed on rank 0: {error}"):
        scripted_trainer(tmp_path, reward_funcs=[scripted_reward, reward]).train()


def test_a_reward_model_scores_beside_a_function(tmp_path):
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    judge = LlamaForSequenceClassification(
        LlamaConfig(num_labels=1, vocab_size=len(VOCABULARY), pad_token_id=0, initializer_range=0.5, **sizes)
    ).eval()
    tokenizer = tiny_tokenizer()

    def total(prompt, text, reward):
        with torch.no_grad():
            score = judge(torch.tensor([tokenizer(prompt + text)["input_ids"]])).logits.item()
        return score + (reward or 0.0)

    script = {p: [(text, total(p, text, r)) for text, r in rows] for p, rows in SCRIPT.items()}
    trainer = scripted_trainer(
        tmp_path,
        reward_funcs=[judge, scripted_reward],
        reward_processing_classes=[tiny_tokenizer(), None],
        **WHOLE_SCRIPT,
    )
    check_update(trainer, script)


# The update


def test_the_users_own_optimizer_and_schedule(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = scripted_trainer(
        tmp_path,
        model,
        optimizers=(optimizer, get_constant_schedule(optimizer)),
        learning_rate=1e-9,
        **WHOLE_SCRIPT,
    )
    check_update(trainer)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(  # its workers take five seconds to end
            {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2},
            marks=pytest.mark.slow,
        ),
        {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
        {"log_completions": True, "log_unique_prompts": True, "num_completions_to_print": 1},
        {"include_num_input_tokens_seen": "all", "average_tokens_across_devices": False},
        {"label_smoothing_factor": 0.1, "debug": "underflow_overflow"},
    ],
)
def test_settings_that_leave_the_update_as_it_is(tmp_path, settings):
    check_update(scripted_trainer(tmp_path, per_device_train_batch_size=12, gradient_accumulation_steps=2, **settings))


def continuous_batching_trainer(output_dir, **settings):
    return scripted_trainer(
        output_dir,
        rollout=None,
        reward_funcs=letters_reward,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"max_memory_percent": 0.05},
        max_completion_length=8,
        **settings,
    )


def test_continuous_batching_samples_and_trains(tmp_path):
    trainer = continuous_batching_trainer(tmp_path)
    update = update_of(trainer)
    assert any(value.abs().max() > 0 for value in update.values())
    assert abs(trainer.state.log_history[0]["loss"]) < 1e-6


def test_an_evaluation_with_continuous_batching_is_one(tmp_path):
    trainer = continuous_batching_trainer(
        tmp_path,
        eval_dataset=scripted_dataset(),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
    )
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [entry["step"] for entry in evaluated] == [1, 2]
    assert all("eval_opo/informative_fraction" in entry for entry in evaluated)


def test_prefix_tuning_moves_the_prefix_alone(tmp_path):
    trainer = scripted_trainer(
        tmp_path,
        rollout=None,
        reward_funcs=letters_reward,
        peft_config=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        max_completion_length=6,
    )
    (moved,) = update_of(trainer).values()
    assert moved.abs().max() > 0


def test_checkpointing_some_of_the_layers_is_not_supported(tmp_path):
    """Nor by TRL 1.16, which hands transformers' own options on to torch when it switches checkpointing back on."""
    kwargs = {"every_n_layers": 2}
    trainer = scripted_trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    with pytest.raises(ValueError, match="Unexpected keyword arguments: every_n_layers"):
        trainer.train()


def test_an_lm_head_in_float32(tmp_path):
    check_update(scripted_trainer(tmp_path, cast_lm_head_to_fp32=True, **WHOLE_SCRIPT))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_makes_the_same_step(tmp_path, monkeypatch, caplog, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    for name in ("BACKEND", "MODE"):  # the arguments set these, for accelerate
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    trainer = scripted_trainer(
        tmp_path,
        per_device_train_batch_size=12,
        gradient_accumulation_steps=2,
        torch_compile=True,
        torch_compile_backend=backend,
    )
    check_update(trainer)
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert "a compiled model needs fixed shapes" in caplog.text


# Not supported


def test_a_hyperparameter_search_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(NotImplementedError, match=r"takes no `model_init`\. Build a new OPOTrainer for every trial"):
        scripted_trainer(tmp_path).hyperparameter_search(lambda trial: {})


def test_finding_a_batch_size_is_refused_by_trl(tmp_path):
    with pytest.raises(ValueError, match="auto_find_batch_size is not supported by GRPO"):
        tiny_config(tmp_path, auto_find_batch_size=True)
