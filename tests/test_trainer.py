"""One step of OPO is the gradient of the paper, whatever surrounds it: the update against a hand-written oracle."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    XGLMConfig,
)
from trl import GRPOConfig, GRPOTrainer

from opo_trl import OPOConfig, OPOTrainer
from opo_trl.on_policy.preflight import check_continuous_batching, check_data_parallel
from opo_trl.rewards import boxed_format_reward
from test_baselines import oracle_baseline
from tiny import (
    CHAT_TEMPLATE,
    EMPTY,
    GROUP_SIZE,
    SCRIPT,
    VOCABULARY,
    relative_error,
    rollout_with_empty_completions,
    scripted_dataset,
    scripted_reward,
    scripted_rollout,
    scripted_trainer,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    update_of,
)
from tool_turns import LONG, add, call, rows_of, tool_tokenizer, turns_trainer

WHOLE_SCRIPT = {"per_device_train_batch_size": len(SCRIPT) * GROUP_SIZE}
MAX_LENGTH = 32


def reinforce_update(model, groups, loss_type="dapo", exponent=1.0, temperature=1.0, weigh=None):
    """
    Eq. 11 with b* of Eq. 12, written out: one unpadded forward per completion, a full softmax, loops over groups.

    `groups` is a list of groups of (prompt ids, completion ids, trained positions, reward); `weigh` makes a
    completion's weight in b* of its tokens' log-probabilities and trained positions, in place of its length.
    """

    def token_logps(prompt, completion):
        logits = model(torch.tensor([prompt + completion], device=model.device)).logits[0, len(prompt) - 1 : -1]
        return (logits / temperature).log_softmax(dim=-1)[torch.arange(len(completion)), completion]

    rows = [row for group in groups for row in group]
    normalizer = sum(sum(trained) for _, _, trained, _ in rows) if loss_type == "dapo" else len(rows) * MAX_LENGTH
    model.eval()
    model.zero_grad()
    for group in groups:
        rewards = [math.nan if reward is None else reward for *_, reward in group]
        weights = [sum(trained) for _, _, trained, _ in group]
        if weigh is not None:
            with torch.no_grad():
                weights = [weigh(token_logps(*row[:2]), row[2]) for row in group]
        baseline = oracle_baseline(rewards, weights, exponent)
        for prompt, completion, trained, reward in group:
            if reward is None or math.isnan(reward):
                continue
            logps = token_logps(prompt, completion)
            objective = (reward - baseline) * (logps * torch.tensor(trained, device=model.device)).sum() / normalizer
            objective.backward()
    update = {
        name: p.grad.clone() if p.grad is not None else torch.zeros_like(p)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return update


def scripted_groups(script=SCRIPT, trained=lambda ids: [1] * len(ids), end=True, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    groups = []
    for prompt, completions in script.items():
        ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * end for text, _ in completions]
        groups.append(
            [(tokenizer(prompt)["input_ids"], c, trained(c), r) for c, (_, r) in zip(ids, completions, strict=True)]
        )
    return groups


# Groups hold 4 completions, so micro-batches of 6 and 3 cut through groups.
@pytest.mark.parametrize(("batch_size", "accumulation"), [(24, 1), (12, 2), (6, 4), (3, 8)])
@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
def test_a_step_is_reinforce_with_the_optimal_baseline(tmp_path, loss_type, batch_size, accumulation):
    trainer = scripted_trainer(
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
    )
    update = update_of(trainer)
    assert relative_error(update, reinforce_update(tiny_model(), scripted_groups(), loss_type)) < 1e-5
    assert trainer.state.global_step == 1
    assert trainer.ref_model is None


@pytest.mark.parametrize("exponent", [0.0, 1.6])
@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_length_exponent_and_temperature_reach_the_gradient(tmp_path, exponent, temperature):
    update = update_of(scripted_trainer(tmp_path, length_exponent=exponent, temperature=temperature, **WHOLE_SCRIPT))
    expected = reinforce_update(tiny_model(), scripted_groups(), exponent=exponent, temperature=temperature)
    assert relative_error(update, expected) < 1e-5
    other = reinforce_update(tiny_model(), scripted_groups(), exponent=1.0, temperature=temperature)
    assert relative_error(update, other) > 1e-2, "the exponent must matter for this test to mean anything"


def test_gradient_checkpointing_changes_nothing(tmp_path):
    update = update_of(scripted_trainer(tmp_path, gradient_checkpointing=True, **WHOLE_SCRIPT))
    assert relative_error(update, reinforce_update(tiny_model(), scripted_groups())) < 1e-5


def test_several_steps_use_fresh_samples_each(tmp_path):
    """Two steps of two prompts each are two separate REINFORCE steps, the second from the moved weights."""
    trainer = scripted_trainer(tmp_path, max_steps=2)
    update = update_of(trainer)
    groups, model = scripted_groups(), tiny_model()
    first = reinforce_update(model, groups[:2])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += first[name]
    second = reinforce_update(model, groups[2:4])
    assert relative_error(update, {name: first[name] + second[name] for name in first}) < 1e-5


def test_equal_lengths_reduce_to_grpo_without_scaling(tmp_path):
    """TRL's own trainer as the oracle: with equal lengths b* is the group mean."""

    def rollout(prompts, trainer):
        output = scripted_rollout(prompts, trainer)
        output["completion_ids"] = [[*(ids[:-1] * 9)[:8], 1] for ids in output["completion_ids"]]
        output["logprobs"] = [[0.0] * 9] * len(prompts)
        return output

    opo = update_of(scripted_trainer(tmp_path, rollout=rollout, **WHOLE_SCRIPT))
    fields = {**tiny_config(tmp_path, **WHOLE_SCRIPT).to_dict(), "epsilon": 0.2}
    for name in ("length_exponent", "steps_per_generation", "generation_batch_size"):
        del fields[name]
    grpo = GRPOTrainer(
        tiny_model(),
        scripted_reward,
        GRPOConfig(**{k: v for k, v in fields.items() if k in GRPOConfig.__dataclass_fields__ and v is not None}),
        scripted_dataset(),
        processing_class=tiny_tokenizer(),
        rollout_func=rollout,
    )
    assert relative_error(opo, update_of(grpo)) < 1e-5


def test_the_logged_loss_is_zero_by_construction(tmp_path):
    trainer = scripted_trainer(tmp_path, per_device_train_batch_size=6, gradient_accumulation_steps=4)
    trainer.train()
    log = trainer.state.log_history[0]
    assert abs(log["loss"]) < 1e-6
    assert log["grad_norm"] > 1e-3


def test_dropout_of_the_models_config_is_off(tmp_path):
    model = tiny_model(attention_dropout=0.5)
    update = update_of(scripted_trainer(tmp_path, model, **WHOLE_SCRIPT))
    assert relative_error(update, reinforce_update(tiny_model(), scripted_groups())) < 1e-5


@pytest.mark.parametrize(
    ("config_class", "rates"),
    [
        (FalconConfig, {"hidden_dropout": 0.5, "attention_dropout": 0.5}),  # read from the config at each forward
        (GPT2Config, {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),  # modules, named otherwise
        (
            MixtralConfig,
            {"router_jitter_noise": 0.5, "num_local_experts": 2, "num_key_value_heads": 2},
        ),  # noise on what the router sees
        (OPTConfig, {"layerdrop": 0.5, "dropout": 0.5, "word_embed_proj_dim": 32}),  # drops complete layers
    ],
)
def test_the_training_forward_of_any_architecture_is_deterministic(tmp_path, config_class, rates):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(VOCABULARY)}
    model = AutoModelForCausalLM.from_config(config_class(**sizes, max_position_embeddings=64, **rates))
    tokens = torch.arange(3, 19).view(2, 8)
    model.train()
    before = [model(tokens).logits for _ in range(4)]
    assert any(not torch.equal(before[0], logits) for logits in before[1:]), "the rates must matter for this test"
    trainer = scripted_trainer(tmp_path, model)
    trainer.model.train()
    after = [trainer.model(tokens).logits for _ in range(4)]
    assert all(torch.equal(after[0], logits) for logits in after[1:])


@pytest.mark.parametrize("adapter", [None, "lora", "prefix"])
@pytest.mark.parametrize(
    "config_class", [GPT2Config, GPTBigCodeConfig, GPTNeoConfig, XGLMConfig, OPTConfig, GPTJConfig, LlamaConfig]
)
def test_prompts_of_other_lengths_do_not_shift_positions(tmp_path, config_class, adapter):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": len(VOCABULARY), "initializer_range": 0.2}
    special = {
        GPTNeoConfig: {"num_layers": 2, "attention_types": [[["global"], 2]]},
        GPTJConfig: {"rotary_dim": 8},
        OPTConfig: {"word_embed_proj_dim": 32, "ffn_dim": 48, "init_std": 0.2},
        XGLMConfig: {"init_std": 0.2},
        LlamaConfig: {"intermediate_size": 48},
    }
    config = config_class(**{"num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
                          | sizes | special.get(config_class, {}), max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if adapter == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if adapter == "prefix":
        shape = {"num_layers": 2, "num_attention_heads": 2, "token_dim": 32}
        model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **shape))
    expected = reinforce_update(copy.deepcopy(model), scripted_groups())
    update = update_of(scripted_trainer(tmp_path, model, **WHOLE_SCRIPT))
    rounding = 1e-3 if adapter == "prefix" else 1e-5  # the update of a prefix is small beside its weights
    assert relative_error(update, expected) < rounding


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_a_routers_auxiliary_loss_is_added_as_in_the_parent(tmp_path, coefficient):
    """A mixture of experts trains by OPO plus its load balancing, a mean over the step's micro-batches."""

    def mixtral():
        torch.manual_seed(0)
        config = MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            num_local_experts=4, vocab_size=len(VOCABULARY), max_position_embeddings=128, initializer_range=0.2,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config)

    trainer = scripted_trainer(
        tmp_path,
        mixtral(),
        per_device_train_batch_size=12,
        gradient_accumulation_steps=2,
        router_aux_loss_coef=coefficient,
    )
    error = relative_error(update_of(trainer), reinforce_update(mixtral(), scripted_groups()))
    log = trainer.state.log_history[0]
    if coefficient:
        assert error > 1e-2
        assert log["loss"] == pytest.approx(coefficient * log["aux_loss"], rel=1e-4)
    else:
        assert error < 1e-5
        assert "aux_loss" not in log


def test_masked_tokens_are_attended_but_neither_trained_nor_counted(tmp_path):
    """Tool output: the first half of each completion is fed to the model, and only the rest is the policy's."""

    def trained(ids):
        return [0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2)

    def rollout(prompts, trainer):
        output = scripted_rollout(prompts, trainer)
        return {**output, "env_mask": [trained(ids) for ids in output["completion_ids"]]}

    update = update_of(scripted_trainer(tmp_path, rollout=rollout, **WHOLE_SCRIPT))
    assert relative_error(update, reinforce_update(tiny_model(), scripted_groups(trained=trained))) < 1e-5
    complete = reinforce_update(tiny_model(), scripted_groups())
    assert relative_error(update, complete) > 1e-2


def test_tools_are_called_and_their_output_is_not_trained(tmp_path):
    """TRL's own tool loop with a real chat template; what the tool said counts neither in b* nor in the gradient."""
    turns = [
        [call("add", a=1, b=2) if i % 2 else "without a tool" + "!" * i for i in range(8)],
        ["it is 3" + "." * i for i in range(4)],
    ]
    rewards = [0.3, 1.0, -0.5, 0.0, 2.0, 0.25, 0.5, 1.5]
    trainer = turns_trainer(
        tmp_path,
        turns,
        reward_funcs=lambda completions, **kwargs: rewards,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": f"add {n}"}]} for n in range(2)]),
        tools=[add],
    )
    update, rows = update_of(trainer), rows_of(trainer.batch, rewards)
    assert trainer.state.log_history[0]["tools/call_frequency"] == 0.5
    assert "<tool_response>\n3\n</tool_response>" in tool_tokenizer().decode(rows[1][1])
    assert 0 < sum(rows[1][2]) < len(rows[1][2])
    expected = reinforce_update(tiny_model(**LONG), [rows[:4], rows[4:]])
    assert relative_error(update, expected) < 1e-5


def test_tools_are_checked_with_the_processes_and_the_engine_of_the_run(tmp_path, monkeypatch):
    checked, problems = [], Dataset.from_list([{"prompt": [{"role": "user", "content": f"add {n}"}]} for n in range(2)])
    monkeypatch.setattr("opo_trl.on_policy.on_policy_checks.check_tools_without_vllm", lambda *run: checked.append(run))
    monkeypatch.setattr("opo_trl.on_policy.on_policy_checks.is_deepspeed_zero3_enabled", lambda: True)
    settings = {"reward_funcs": lambda completions, **kwargs: [0.0] * 8, "train_dataset": problems}
    turns_trainer(tmp_path, [], **settings)
    assert not checked, "without tools"
    turns_trainer(tmp_path, [], tools=[add], **settings)
    assert checked == [(1, True)]


def test_truncated_completions_have_no_weight_when_masked(tmp_path):
    """Without an end token a completion counts as truncated: it leaves the loss, its group's baseline and the count."""

    def is_cut(ids):
        return len(ids) % 3 == 0

    def rollout(prompts, trainer):
        output = scripted_rollout(prompts, trainer)
        ids = [c[:-1] if is_cut(c) else c for c in output["completion_ids"]]
        return {**output, "completion_ids": ids, "logprobs": [[0.0] * len(c) for c in ids]}

    update = update_of(scripted_trainer(tmp_path, rollout=rollout, mask_truncated_completions=True, **WHOLE_SCRIPT))
    groups = scripted_groups(trained=lambda ids: [0 if is_cut(ids) else 1] * len(ids))
    assert relative_error(update, reinforce_update(tiny_model(), groups)) < 1e-5
    assert any(is_cut(ids) for group in groups for _, ids, _, _ in group)


def test_nothing_trainable_changes_nothing(tmp_path):
    def rollout(prompts, trainer):
        output = scripted_rollout(prompts, trainer)
        return {**output, "env_mask": [[0] * len(ids) for ids in output["completion_ids"]]}

    trainer = scripted_trainer(tmp_path, rollout=rollout, **WHOLE_SCRIPT)
    assert all((value == 0).all() for value in update_of(trainer).values())
    log = trainer.state.log_history[0]
    assert log["loss"] == 0.0
    assert log["grad_norm"] == 0.0
    assert log["opo/informative_fraction"] == 0.0


def groups_with_empty_completions():
    """The script's groups, with one padding token, not trained, in each completion that is empty."""
    script = {p: [("" if t in EMPTY else t, r) for t, r in rows] for p, rows in SCRIPT.items()}
    groups = scripted_groups(script)
    return [[(p, c, [0], r) if len(c) == 1 else (p, c, t, r) for p, c, t, r in group] for group in groups]


def test_a_completion_of_zero_tokens_has_no_weight(tmp_path):
    """TRL 1.16 raises an IndexError on the rank that has it. On two ranks: test_distributed.py."""
    trainer = scripted_trainer(tmp_path, rollout=rollout_with_empty_completions, **WHOLE_SCRIPT)
    assert relative_error(update_of(trainer), reinforce_update(tiny_model(), groups_with_empty_completions())) < 1e-5


def test_a_generation_backend_may_return_a_completion_of_zero_tokens(tmp_path, monkeypatch):
    def backend(trainer, prompt_ids, images, multimodal_fields, num_generations):
        prompts = [trainer.processing_class.decode(ids) for ids in prompt_ids]
        return rollout_with_empty_completions(prompts, trainer)["completion_ids"], None

    def reward(prompts, completions, **kwargs):
        scores = {(p, t): r for p, rows in SCRIPT.items() for t, r in rows}
        return [scores.get((p, t), 0.0) for p, t in zip(prompts, completions, strict=True)]

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", backend)
    trainer = scripted_trainer(tmp_path, rollout=None, reward_funcs=reward, **WHOLE_SCRIPT)
    assert relative_error(update_of(trainer), reinforce_update(tiny_model(), groups_with_empty_completions())) < 1e-5


@pytest.mark.parametrize("unscorable", [None, math.nan])
def test_unscorable_completions_are_left_out_and_counted(tmp_path, unscorable):
    script = {p: [(text, None if i == 1 else r) for i, (text, r) in enumerate(c)] for p, c in SCRIPT.items()}

    def reward(completions, score, **kwargs):
        return [unscorable if i % GROUP_SIZE == 1 else s for i, s in enumerate(score)]

    trainer = scripted_trainer(tmp_path, reward_funcs=reward, **WHOLE_SCRIPT)
    update = update_of(trainer)
    assert relative_error(update, reinforce_update(tiny_model(), scripted_groups(script))) < 1e-5
    missing = sum(r is None for completions in script.values() for _, r in completions)
    assert trainer.state.log_history[0]["opo/unscorable_fraction"] == pytest.approx(missing / 24)


def test_an_infinite_reward_stops_the_run_and_names_the_function_and_the_row(tmp_path):
    def overflowing(completions, score, **kwargs):
        return [-math.inf if i == 5 else 1.0 for i in range(len(completions))]

    trainer = scripted_trainer(tmp_path, reward_funcs=[scripted_reward, overflowing])
    with pytest.raises(ValueError, match="'overflowing' returned -inf for row 5 of the rollout batch"):
        trainer.train()


def test_weighted_rewards_with_gaps_and_async_functions(tmp_path):
    """A function's None leaves that function out; only a completion that no function scored is unscorable."""

    def sometimes(completions, **kwargs):
        return [None if len(text) % 2 else len(text) / 10 for text in completions]

    async def later(completions, score, **kwargs):
        return [None if s is None else -s for s in score]

    def total(text, score):
        parts = [2.0 * score if score is not None else None, None if len(text) % 2 else 0.5 * len(text) / 10]
        parts.append(-3.0 * score if score is not None else None)
        known = [part for part in parts if part is not None]
        return sum(known) if known else None

    script = {p: [(text, total(text, r)) for text, r in completions] for p, completions in SCRIPT.items()}
    trainer = scripted_trainer(
        tmp_path,
        reward_funcs=[scripted_reward, sometimes, later],
        reward_weights=[2.0, 0.5, 3.0],
        **WHOLE_SCRIPT,
    )
    assert relative_error(update_of(trainer), reinforce_update(tiny_model(), scripted_groups(script))) < 1e-5


def expected_advantages():
    expected = {}
    for group in scripted_groups():
        rewards = [math.nan if r is None else r for *_, r in group]
        baseline = oracle_baseline(rewards, [len(ids) for _, ids, _, _ in group], 1.0)
        for (_, ids, _, _), reward in zip(group, rewards, strict=True):
            expected[tiny_tokenizer().decode(ids[:-1])] = 0.0 if math.isnan(reward) else reward - baseline
    return expected


def test_the_completions_table_shows_opos_advantages(tmp_path):
    trainer = scripted_trainer(tmp_path, log_completions=True, num_completions_to_print=1, **WHOLE_SCRIPT)
    trainer.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    expected = expected_advantages()
    assert len(table) == len(expected)
    for text, advantage in zip(table["completion"], table["advantage"], strict=True):
        assert advantage == pytest.approx(expected[text], abs=1e-6)


@pytest.mark.parametrize("skip_uninformative", [True, False])
def test_metrics_of_the_step_are_logged(tmp_path, skip_uninformative):
    trainer = scripted_trainer(
        tmp_path,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=4,
        skip_uninformative=skip_uninformative,
    )
    model, groups, advantages = tiny_model(), scripted_groups(), expected_advantages()
    entropies = []
    with torch.no_grad():
        for prompt, completion, _, _ in (row for group in groups for row in group):
            if skip_uninformative and advantages[tiny_tokenizer().decode(completion[:-1])] == 0:
                continue  # the logged entropy covers the rows that are trained
            logps = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
            entropies.append(-(logps.exp() * logps).sum(dim=-1))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)
    assert 0 < log["opo/padding_fraction"] < 0.5
    baselines = [
        oracle_baseline([math.nan if r is None else r for *_, r in g], [len(c) for _, c, _, _ in g], 1.0)
        for g in groups
    ]
    assert log["opo/baseline"] == pytest.approx(np.mean(baselines), rel=1e-5)
    informative = np.mean([a != 0 for a in expected_advantages().values()])
    assert log["opo/informative_fraction"] == pytest.approx(informative)
    for name in ("opo/baseline_minus_mean", "opo/length_reward_correlation", "opo/variance_proxy"):
        assert math.isfinite(log[name])


def test_evaluation_with_its_own_group_size(tmp_path):
    trainer = scripted_trainer(
        tmp_path,
        eval_dataset=scripted_dataset(),
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        per_device_eval_batch_size=6,
        log_completions=True,
        num_completions_to_print=1,
    )
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "eval_reward" in entry)
    scores = [r for completions in SCRIPT.values() for _, r in completions[:2] if r is not None]
    assert log["eval_reward"] == pytest.approx(np.mean(scores), abs=0.2)
    assert math.isfinite(log["eval_entropy"])
    assert abs(log["eval_loss"]) < 1e-6
    assert math.isfinite(log["eval_opo/baseline"])


def test_message_prompts_are_generated_for_and_scored(tmp_path, chat_model_dir):
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1"}], "solution": str(n + 1)} for n in range(4)]
    seen = []

    def reward(prompts, completions, solution, **kwargs):
        seen.extend(zip(prompts, completions, solution, strict=True))
        return [float(len(c[0]["content"])) for c in completions]

    trainer = OPOTrainer(
        str(chat_model_dir), reward, tiny_config(tmp_path, max_completion_length=6), Dataset.from_list(rows)
    )
    update = update_of(trainer)
    assert any(value.abs().max() > 0 for value in update.values())
    prompt, completion, solution = seen[0]
    assert completion[0]["role"] == "assistant"
    assert prompt[0]["content"] == f"{int(solution) - 1}+1"


def test_the_model_card_cites_the_paper(tmp_path):
    trainer = scripted_trainer(tmp_path)
    trainer.create_model_card("tiny")
    card = (tmp_path / "README.md").read_text()
    assert "2505.23585" in card
    assert "On-Policy RL with Optimal Reward Baseline" in card
    assert "opo" in card.split("---")[1]


def test_no_args_builds_an_opo_config(tmp_path, monkeypatch, chat_model_dir):
    monkeypatch.chdir(tmp_path)
    # OPOConfig, like GRPOConfig, trains in bf16 unless told otherwise, which needs a GPU.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    rows = [{"prompt": [{"role": "user", "content": "1+1"}]}] * 8
    trainer = OPOTrainer(str(chat_model_dir), boxed_format_reward, train_dataset=Dataset.from_list(rows))
    assert type(trainer.args) is OPOConfig
    assert trainer.args.output_dir == f"{chat_model_dir.name}-OPO"


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: get_peft_model(model, LoraConfig(r=2))])
def test_a_model_objects_tokenizer_is_loaded_from_where_the_model_was(tmp_path, chat_model_dir, wrap):
    model = wrap(AutoModelForCausalLM.from_pretrained(chat_model_dir))
    trainer = OPOTrainer(model, boxed_format_reward, tiny_config(tmp_path), scripted_dataset())
    assert trainer.processing_class.chat_template == CHAT_TEMPLATE
    assert trainer.processing_class.padding_side == "left"


def test_a_model_object_of_unknown_origin_needs_its_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"`processing_class` must be given .* got a LlamaForCausalLM"):
        OPOTrainer(tiny_model(), boxed_format_reward, tiny_config(tmp_path), scripted_dataset())


def test_correcting_a_rollout_function_that_is_not_there_is_refused(tmp_path):
    args = tiny_config(tmp_path, rollout_importance_sampling_correction=True)
    with pytest.raises(ValueError, match="got no `rollout_func`"):
        OPOTrainer("no such model", scripted_reward, args, scripted_dataset())


def test_continuous_batching_that_would_round_the_weights_is_refused_before_the_model_loads(tmp_path):
    """At a learning rate of 1e-6 the weights would move by exactly 0."""
    args = tiny_config(tmp_path, use_transformers_continuous_batching=True)
    args.bf16 = True
    with pytest.raises(ValueError, match=r"casts the trained weights to bf16 .*, got weights in float32"):
        OPOTrainer("no such model", boxed_format_reward, args, scripted_dataset())
    with pytest.raises(ValueError, match=r"casts the trained weights to bf16 .*, got weights in float32"):
        OPOTrainer(tiny_model(), boxed_format_reward, args, scripted_dataset(), processing_class=tiny_tokenizer())
    check_continuous_batching(args, tiny_model().to(torch.bfloat16))
    args.bf16 = False
    check_continuous_batching(args, tiny_model())


@pytest.mark.parametrize(("sizes", "kind"), [((2, 1, 1), "tensor"), ((1, 2, 1), "context"), ((1, 1, 2), "sequence")])
def test_parallelism_whose_ranks_share_rows_is_refused(sizes, kind):
    with pytest.raises(ValueError, match=f"{kind} parallelism, whose ranks share rows, must have size 1, got 2"):
        check_data_parallel(*sizes)
    check_data_parallel(1, 1, 1)


def test_a_model_sharded_by_tensor_parallelism_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(OPOTrainer, "get_tp_size", lambda trainer: 2)
    with pytest.raises(ValueError, match="tensor parallelism"):
        scripted_trainer(tmp_path)


def test_another_config_class_is_refused_before_a_model_loads(tmp_path):
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="takes an OPOConfig as `args`, got GRPOConfig"):
        OPOTrainer("no such model", scripted_reward, args, scripted_dataset())


def test_a_changed_config_is_refused_before_a_model_loads(tmp_path):
    args = tiny_config(tmp_path)
    args.beta = 0.1
    with pytest.raises(ValueError, match=r"`beta` must be 0\.0, got 0\.1"):
        OPOTrainer("no such model", scripted_reward, args, scripted_dataset())


def test_a_config_changed_between_construction_and_training_is_refused(tmp_path):
    trainer = scripted_trainer(tmp_path)
    trainer.args.num_iterations = 2
    with pytest.raises(ValueError, match="`num_iterations` must be 1, got 2"):
        trainer.train()


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"train_dataset": Dataset.from_dict({"question": ["a"]})}, r"`train_dataset`.*`prompt`.*\['question'\]"),
        ({"train_dataset": scripted_dataset(0)}, r"at least 2 row\(s\).*got 0"),
        ({"train_dataset": scripted_dataset(1)}, r"at least 2 row\(s\), the prompts of one rollout batch, got 1"),
        (
            {"train_dataset": scripted_dataset(), "eval_dataset": {"x": Dataset.from_dict({"q": ["a"]})}},
            r"`eval_dataset\['x'\]`.*`prompt`.*\['q'\]",
        ),
        ({"train_dataset": scripted_dataset(), "eval_dataset": scripted_dataset(0)}, "`eval_dataset`.*got 0"),
    ],
)
def test_unusable_datasets_are_refused_before_a_model_loads(tmp_path, datasets, message):
    with pytest.raises(ValueError, match=message):
        OPOTrainer("no such model", scripted_reward, tiny_config(tmp_path), **datasets)


def test_messages_without_a_chat_template_are_refused_before_the_model_loads(tmp_path, base_model_dir):
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "1+1"}]}] * 4)
    with pytest.raises(ValueError, match="must have a chat template"):
        OPOTrainer(str(base_model_dir), boxed_format_reward, tiny_config(tmp_path), dataset)
    OPOTrainer(
        str(base_model_dir),
        boxed_format_reward,
        tiny_config(tmp_path),
        dataset,
        processing_class=tiny_tokenizer(chat_template=CHAT_TEMPLATE),
    )


def test_a_rollout_function_renders_messages_by_itself(tmp_path, base_model_dir):
    """TRL gives it the messages, so a tokenizer without a chat template will do."""
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": text}], "score": 0.0} for text in SCRIPT])
    seen = []

    def rollout(prompts, trainer):
        seen.append(prompts[0][0]["role"])
        return scripted_rollout([messages[0]["content"] for messages in prompts], trainer)

    trainer = scripted_trainer(tmp_path, rollout=rollout, train_dataset=dataset, reward_funcs=boxed_format_reward)
    assert trainer.processing_class.chat_template is None
    trainer.train()
    assert seen == ["user"]


def test_an_evaluation_in_batches_without_complete_groups_is_refused_before_it_generates(tmp_path):
    """TRL checks it only with an `eval_strategy`, and fails after the generation."""
    generated = []

    def rollout(prompts, trainer):
        generated.append(len(prompts))
        return scripted_rollout(prompts, trainer)

    trainer = scripted_trainer(tmp_path, rollout=rollout, eval_dataset=scripted_dataset(), per_device_eval_batch_size=6)
    with pytest.raises(
        ValueError, match=r"6\) \* 1 process\(es\) = 6 must be a multiple of `num_generations_eval` = 4"
    ):
        trainer.evaluate()
    assert not generated


def test_a_tokenizer_with_neither_pad_nor_eos_is_refused(tmp_path):
    tokenizer = tiny_tokenizer(pad_token=None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="pad or an eos token"):
        scripted_trainer(tmp_path, processing_class=tokenizer)


def test_a_batch_that_the_group_size_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"generation_batch_size \(6\) must be divisible by num_generations \(4\)"):
        tiny_config(tmp_path, per_device_train_batch_size=6)


def test_resuming_goes_on_where_the_run_stopped(tmp_path):
    straight = scripted_trainer(tmp_path / "a", max_steps=3, optim="adamw_torch", learning_rate=1e-3)
    uninterrupted = update_of(straight)
    first = scripted_trainer(
        tmp_path / "b", max_steps=2, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-3
    )
    first.train()
    second = scripted_trainer(tmp_path / "b", max_steps=3, optim="adamw_torch", learning_rate=1e-3)
    second.train(resume_from_checkpoint=True)
    before = dict(tiny_model().named_parameters())
    resumed = {name: p.detach() - before[name].detach() for name, p in second.model.named_parameters()}
    assert relative_error(resumed, uninterrupted) < 1e-6


def test_evaluation_logs_pass_at_k_of_each_dataset_by_its_name(tmp_path):
    """One problem each: "one" has one correct completion of four, "twenty two" has two."""
    datasets = {name: Dataset.from_dict({"prompt": [name]}) for name in ("one", "twenty two")}
    trainer = scripted_trainer(
        tmp_path, eval_dataset=datasets, pass_at_k_reward="scripted_reward", eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items() if "pass@" in name}
    assert logged == {
        "eval_one_pass@1": 1 / 4,
        "eval_one_pass@2": 1 / 2,
        "eval_one_pass@3": 3 / 4,
        "eval_one_pass@4": 1.0,
        "eval_twenty two_pass@1": 1 / 2,
        "eval_twenty two_pass@2": pytest.approx(5 / 6),
        "eval_twenty two_pass@3": 1.0,
        "eval_twenty two_pass@4": 1.0,
    }


def test_pass_at_k_takes_the_reward_for_right_answers_by_default(tmp_path):
    def math_verify_reward(completions, **kwargs):
        return [1.0 for _ in completions]

    settings = {"eval_dataset": scripted_dataset(2), "per_device_eval_batch_size": 4}
    with_it = scripted_trainer(tmp_path, reward_funcs=[scripted_reward, math_verify_reward], **settings).evaluate()
    assert with_it["eval_pass@1"] == 1.0
    without = scripted_trainer(tmp_path, **settings).evaluate()
    assert not any("pass@" in name for name in without)
    with pytest.raises(ValueError, match=r"must name one of the reward functions \['scripted_reward'\], got 'other'"):
        scripted_trainer(tmp_path, pass_at_k_reward="other")
