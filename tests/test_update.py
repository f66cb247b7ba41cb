"""The update is TRL's gradient in fewer tokens: what is left out, what is regrouped, and the correction it carries."""

import math
import re
import weakref

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from opo_trl import OPOTrainer
from opo_trl.update.planner import UpdatePlanner
from opo_trl.update.step_plan import StepPlan
from test_trainer import WHOLE_SCRIPT, expected_advantages, reinforce_update, scripted_groups
from tiny import (
    GROUP_SIZE,
    SCRIPT,
    relative_error,
    rollout_with_empty_completions,
    scripted_rollout,
    scripted_trainer,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    update_of,
)


def record_forwards(model):
    """Shapes (rows, tokens) of every forward at the top module."""
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def prompts(*names):
    return Dataset.from_dict({"prompt": list(names)})


@pytest.mark.parametrize("skip_uninformative", [True, False])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(24, 1), (6, 4), (2, 12), (1, 24)])
@pytest.mark.parametrize("multiple", [None, 8])
def test_regrouping_and_leaving_out_change_nothing(tmp_path, skip_uninformative, batch_size, accumulation, multiple):
    trainer = scripted_trainer(
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        skip_uninformative=skip_uninformative,
        pad_to_multiple_of=multiple,
    )
    shapes = record_forwards(trainer.model)
    assert relative_error(update_of(trainer), reinforce_update(tiny_model(), scripted_groups())) < 1e-5
    assert len(shapes) == accumulation
    informative = sum(advantage != 0 for advantage in expected_advantages().values())
    rows = sum(rows for rows, _ in shapes)
    fillers = sum(shape == (1, 2) for shape in shapes)
    assert rows - fillers == (informative if skip_uninformative else 24)
    rows_of_script = [(len(prompt), len(ids)) for group in scripted_groups() for prompt, ids, _, _ in group]
    longest = max(p for p, _ in rows_of_script), max(c for _, c in rows_of_script)
    trls = 24 * sum(-(-length // (multiple or 1)) * (multiple or 1) for length in longest)
    assert sum(rows * tokens for rows, tokens in shapes) <= trls


def test_more_micro_batches_than_rows_that_learn(tmp_path):
    """Four rows are informative and twelve micro-batches must run: eight are fillers of two tokens without gradient."""
    names = ("fifteen", "one", "seven!")
    trainer = scripted_trainer(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=12, train_dataset=prompts(*names)
    )
    shapes = record_forwards(trainer.model)
    update = update_of(trainer)
    expected = reinforce_update(tiny_model(), scripted_groups({name: SCRIPT[name] for name in names}))
    assert relative_error(update, expected) < 1e-5
    assert len(shapes) == 12
    assert shapes.count((1, 2)) == 8
    one = tiny_tokenizer()("one")["input_ids"]
    assert trainer.state.log_history[0]["entropy"] > 0, "fillers must not be counted"
    assert sorted(t for _, t in shapes)[8:] == sorted(len(one) + len(text) + 1 for text, _ in SCRIPT["one"])


def test_a_batch_without_anything_to_learn_runs_fillers_only(tmp_path):
    trainer = scripted_trainer(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        train_dataset=prompts("fifteen", "seven!"),
    )
    shapes = record_forwards(trainer.model)
    assert all((value == 0).all() for value in update_of(trainer).values())
    assert shapes == [(1, 2)] * 4
    assert trainer.state.log_history[0]["entropy"] is None, "the entropy of no token is undefined"


def test_several_steps_each_get_their_own_plan(tmp_path):
    trainer = scripted_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=3)
    shapes = record_forwards(trainer.model)
    trainer.train()
    assert len(shapes) == 12
    straight = scripted_trainer(tmp_path, per_device_train_batch_size=8, max_steps=3)
    complete = update_of(straight)
    start = tiny_model().state_dict()
    moved = {name: p.detach() - start[name] for name, p in trainer.model.named_parameters()}
    assert relative_error(moved, complete) < 1e-4


@pytest.mark.parametrize(
    ("extra", "setting", "reason"),
    [
        ({"pixel_values": torch.zeros(1)}, {}, r"\['pixel_values'\], which cannot be cut row by row"),
        ({}, {"torch_compile": True}, "a compiled model needs fixed shapes"),
        ({"something_new": torch.zeros(8)}, {}, r"\['something_new'\]"),
    ],
)
def test_what_is_not_understood_keeps_the_parents_plan(tmp_path, extra, setting, reason):
    trainer = scripted_trainer(tmp_path)
    batch = {name: torch.zeros(8, 3) for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    assert trainer._obstacle(batch) is None
    for name, value in setting.items():
        setattr(trainer.args, name, value)
    assert re.search(reason, trainer._obstacle({**batch, **extra}))


def test_a_router_keeps_the_parents_plan_and_the_reason_is_logged_once(tmp_path, caplog):
    trainer = scripted_trainer(tmp_path, max_steps=3)
    trainer._obstacle = lambda batch: "a router"
    shapes = record_forwards(trainer.model)
    trainer.train()
    assert all(rows == 8 for rows, _ in shapes), "no row is left out"
    assert caplog.text.count("The update keeps TRL's micro-batches, which is slower and has the same gradient") == 1
    router = scripted_trainer(tmp_path)
    router.aux_loss_enabled = True
    assert "auxiliary loss" in router._obstacle({"advantages": torch.zeros(8)})


def references(batches):
    """To the rows of some batches, without keeping them."""
    return [weakref.ref(value) for batch in batches for value in batch.values() if value.ndim]


def alive(batches):
    return sum(reference() is not None for reference in batches)


def test_no_batch_outlives_its_use(tmp_path, monkeypatch):
    """TRL's copy is freed before rows are assigned, a micro-batch once it has run, an evaluation batch likewise."""
    parents, ours, evaluated, found = [], [], [], []
    prepare, generate, plan_step = (
        GRPOTrainer._prepare_inputs,
        OPOTrainer._generate_and_score_completions,
        UpdatePlanner.plan_step,
    )
    make = StepPlan.micro_batches

    def prepare_inputs(self, batch):
        inputs = prepare(self, batch)
        if self.model.training and self._step % 4 == 0:
            parents.extend(references(self._buffered_inputs))
        return inputs

    def plan(*args, **kwargs):
        found.append(alive(parents))
        step = plan_step(*args, **kwargs)
        ours.extend(references([step.source, step.rows.columns]))
        return step

    def micro_batches(self):
        made = make(self)
        ours.extend(references(made))
        return made

    def generate_and_score(self, inputs):
        found.append(alive(evaluated) + alive(ours))
        output = generate(self, inputs)
        if not self.model.training:
            evaluated.extend(references([output]))
        return output

    monkeypatch.setattr(GRPOTrainer, "_prepare_inputs", prepare_inputs)
    monkeypatch.setattr(UpdatePlanner, "plan_step", plan)
    monkeypatch.setattr(StepPlan, "micro_batches", micro_batches)
    monkeypatch.setattr(OPOTrainer, "_generate_and_score_completions", generate_and_score)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    trainer = scripted_trainer(
        tmp_path,
        eval_dataset=prompts("one", "six", "three"),
        per_device_eval_batch_size=4,
        eval_on_start=True,
        **settings,
    )
    trainer.train()
    trainer.evaluate()
    found.append(alive(evaluated) + alive(ours))
    assert parents
    assert ours
    assert evaluated
    assert set(found) == {0}


# The correction of a sampler whose numerics differ from the trained model's.


def sampler_logprobs(ids):
    """Log-probabilities as a sampler with other numerics would report them: off by up to about 1.5, one missing."""
    return [None if i == 1 else -4.0 + 1.5 * math.sin(7 * token + i) for i, token in enumerate(ids)]


def rollout_with_logprobs(prompts, trainer):
    output = scripted_rollout(prompts, trainer)
    return {**output, "logprobs": [sampler_logprobs(ids) for ids in output["completion_ids"]]}


class StubEngine:
    """Stands in for TRL's vLLM engine: plays the script, with the sampler's log-probabilities."""

    def __init__(self, **kwargs):
        self.synced = 0

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        tokenizer = tiny_tokenizer()
        texts = [SCRIPT[tokenizer.decode(ids)][i % GROUP_SIZE][0] for i, ids in enumerate(prompts)]
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        return prompts, ids, [[[value] for value in sampler_logprobs(c)] for c in ids], None


def script_reward(prompts, completions, **kwargs):
    scores = {(prompt, text): score for prompt, rows in SCRIPT.items() for text, score in rows}
    return [scores[prompt, text] for prompt, text in zip(prompts, completions, strict=True)]


def vllm_trainer(tmp_path, monkeypatch, **settings):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", StubEngine)
    settings = {"vllm_logp_tolerance": None, **settings}  # the stub plays a script: it is not the policy
    return scripted_trainer(tmp_path, rollout=None, reward_funcs=script_reward, use_vllm=True, **settings)


def corrected_update(mode="token_truncate", low=None, high=3.0):
    """The oracle with each token's term weighed by the bounded ratio pi / sampler, a constant."""
    model, groups = tiny_model(), scripted_groups()
    advantages, tokenizer = expected_advantages(), tiny_tokenizer()
    tokens = sum(len(completion) for group in groups for _, completion, _, _ in group)
    weights = []
    for prompt, completion, _, _ in (row for group in groups for row in group):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(dim=-1)[torch.arange(len(completion)), completion]
        for i, sampled in enumerate(sampler_logprobs(completion)):
            ratio = 1.0 if sampled is None else math.exp(logps[i].item() - sampled)
            outside = (low is not None and ratio < low) or (high is not None and ratio > high)
            if outside:
                ratio = 0.0 if mode == "token_mask" else high if high is not None and ratio > high else low
            advantage = advantages[tokenizer.decode(completion[:-1])]
            (ratio * advantage * logps[i] / tokens).backward(retain_graph=True)
            if advantage != 0:
                weights.append(ratio)
    return {name: p.grad.clone() for name, p in model.named_parameters()}, weights


@pytest.mark.parametrize(
    "bounds",
    [
        {},
        {"vllm_importance_sampling_clip_max": 1.5, "vllm_importance_sampling_clip_min": 0.5},
        {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 2.0},
    ],
)
def test_vllm_is_corrected_in_the_losss_own_forward(tmp_path, monkeypatch, bounds):
    trainer = vllm_trainer(tmp_path, monkeypatch, **WHOLE_SCRIPT, **bounds)
    shapes = record_forwards(trainer.model)
    update = update_of(trainer)
    expected, weights = corrected_update(
        bounds.get("vllm_importance_sampling_mode", "token_truncate"),
        bounds.get("vllm_importance_sampling_clip_min"),
        bounds.get("vllm_importance_sampling_clip_max", 3.0),
    )
    assert relative_error(update, expected) < 1e-5
    assert len(shapes) == 1, "one forward per row and step: TRL needs two"
    assert relative_error(update, reinforce_update(tiny_model(), scripted_groups())) > 1e-2
    log = trainer.state.log_history[0]
    assert log["sampling/importance_sampling_ratio/min"] == pytest.approx(min(weights), rel=1e-4)
    assert log["sampling/importance_sampling_ratio/max"] == pytest.approx(max(weights), rel=1e-4)
    assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-4)
    assert 0 < log["sampling/importance_sampling_ratio/bounded_fraction"] < 1
    assert log["sampling/kl"] > 0
    assert log["sampling/sampling_logp_difference/max"] > log["sampling/sampling_logp_difference/mean"] > 0


def test_trl_needs_two_forwards_where_opo_needs_one(tmp_path, monkeypatch):
    """The fact behind the saving, on TRL's own trainer with the same engine."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", StubEngine)
    config = tiny_config(tmp_path, use_vllm=True)
    config.epsilon = 0.2
    trainer = GRPOTrainer(
        tiny_model(), script_reward, config, prompts("one", "three"), processing_class=tiny_tokenizer()
    )
    shapes = record_forwards(trainer.model)
    trainer.train()
    assert sum(rows for rows, _ in shapes) == 16


def test_the_correction_can_be_switched_off(tmp_path, monkeypatch):
    trainer = vllm_trainer(tmp_path, monkeypatch, vllm_importance_sampling_correction=False, **WHOLE_SCRIPT)
    update = update_of(trainer)
    assert relative_error(update, reinforce_update(tiny_model(), scripted_groups())) < 1e-5
    assert not any(name.startswith("sampling/") for name in trainer.state.log_history[0])


def test_weights_follow_the_policy(tmp_path, monkeypatch):
    trainer = vllm_trainer(tmp_path, monkeypatch, max_steps=2)
    trainer.train()
    assert trainer.vllm_generation.synced == 2


@pytest.mark.parametrize("use_vllm", [True, False])
def test_a_rollout_functions_logprobs_count_only_when_asked_for(tmp_path, monkeypatch, use_vllm):
    """TRL demands the key, and zeros are common: they must not change the gradient."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", StubEngine)
    plain = reinforce_update(tiny_model(), scripted_groups())
    for rollout in (scripted_rollout, rollout_with_logprobs):
        trainer = scripted_trainer(tmp_path, rollout=rollout, use_vllm=use_vllm, **WHOLE_SCRIPT)
        assert relative_error(update_of(trainer), plain) < 1e-5
    asked = scripted_trainer(
        tmp_path,
        rollout=rollout_with_logprobs,
        use_vllm=use_vllm,
        rollout_importance_sampling_correction=True,
        **WHOLE_SCRIPT,
    )
    assert relative_error(update_of(asked), corrected_update()[0]) < 1e-5


@pytest.mark.parametrize("placeholders", [None, [[0.0]], [[]]])
def test_placeholders_for_log_probabilities_do_no_harm(tmp_path, placeholders):
    """TRL asks a rollout function for the key; without a correction nothing reads the values."""

    def rollout(prompts, trainer):
        values = None if placeholders is None else placeholders * len(prompts)
        return {**scripted_rollout(prompts, trainer), "logprobs": values}

    trainer = scripted_trainer(tmp_path, rollout=rollout, **WHOLE_SCRIPT)
    assert relative_error(update_of(trainer), reinforce_update(tiny_model(), scripted_groups())) < 1e-5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: None, "on rank 0, it is None"),
        (lambda rows: [[0.0]] * len(rows), "completion 0 has 2 tokens and 1 of them"),
        (lambda rows: [*rows[:-1], [*rows[-1], 0.0]], "completion 23 has 5 tokens and 6 of them"),
        (lambda rows: rows[1:], "24 completions have 23 rows of them"),
    ],
)
def test_a_correction_without_log_probabilities_is_refused(tmp_path, spoil, message):
    def rollout(prompts, trainer):
        output = scripted_rollout(prompts, trainer)
        return {**output, "logprobs": spoil(output["logprobs"])}

    trainer = scripted_trainer(tmp_path, rollout=rollout, rollout_importance_sampling_correction=True, **WHOLE_SCRIPT)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_an_empty_completion_needs_no_log_probability(tmp_path):
    settings = {"rollout_importance_sampling_correction": True, **WHOLE_SCRIPT}
    trainer = scripted_trainer(tmp_path, rollout=rollout_with_empty_completions, **settings)
    assert all(torch.isfinite(each).all() for each in update_of(trainer).values())


def test_the_sampler_is_the_policy_gives_weights_of_one(tmp_path):
    """Log-probabilities of the policy itself: the correction vanishes, and so does the estimated KL."""
    model = tiny_model()

    def rollout(prompts, trainer):
        output = scripted_rollout(prompts, trainer)
        logprobs = []
        with torch.no_grad():
            for prompt, ids in zip(output["prompt_ids"], output["completion_ids"], strict=True):
                logps = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
                logprobs.append(logps[torch.arange(len(ids)), ids].tolist())
        return {**output, "logprobs": logprobs}

    trainer = scripted_trainer(tmp_path, rollout=rollout, rollout_importance_sampling_correction=True, **WHOLE_SCRIPT)
    assert relative_error(update_of(trainer), reinforce_update(tiny_model(), scripted_groups())) < 1e-5
    log = trainer.state.log_history[0]
    assert log["sampling/kl"] == pytest.approx(0.0, abs=1e-6)
    assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert abs(log["loss"]) < 1e-5
