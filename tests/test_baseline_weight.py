"""The baseline weighed by the tokens' uncertainty: the weight itself, the update, and what it costs."""

import pytest
import torch

from opo_trl import OPOTrainer
from opo_trl.algorithm.baselines import no_baseline
from opo_trl.baselines import token_uncertainty
from opo_trl.update import planner
from opo_trl.update.microbatches import plan_microbatches
from test_rollout import token_oracle
from test_trainer import WHOLE_SCRIPT, reinforce_update, scripted_groups
from test_update import record_forwards
from tiny import (
    SCRIPT,
    TokenBaseline,
    relative_error,
    scripted_dataset,
    scripted_rollout,
    scripted_trainer,
    tiny_config,
    tiny_model,
    update_of,
)

UNCERTAINTY = {"baseline_weight": "uncertainty"}


def uncertainty(logps, trained):
    return sum((1 - logp.exp().item()) ** 2 for logp, t in zip(logps, trained, strict=True) if t)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_it_is_the_squared_norm_of_the_score_up_to_a_factor_of_two(sharpness):
    """With respect to the logits; every token of a vocabulary, for nearly uniform to nearly certain distributions."""
    probs = (sharpness * torch.randn(50, 11, generator=torch.Generator().manual_seed(0))).double().softmax(dim=-1)
    norms = (torch.eye(11) - probs.unsqueeze(1)).square().sum(dim=2)  # (50, 11): of the score of each token
    weights = token_uncertainty(probs.log().view(-1, 1), torch.ones(550, 1)).view(50, 11)
    assert (weights <= norms * (1 + 1e-4)).all()
    assert (norms <= 2 * weights * (1 + 1e-4) + 1e-12).all()


def test_masked_tokens_do_not_count_and_sure_ones_hardly():
    logps = torch.tensor([[0.5, 0.9, 0.1], [1.0, 1 - 1e-5, 1.0]], dtype=torch.float64).log()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert token_uncertainty(logps, mask).tolist() == pytest.approx([0.26, 1e-10], rel=1e-2)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(24, 1), (6, 4), (1, 24)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_step_is_reinforce_with_the_weighted_baseline(tmp_path, batch_size, accumulation, temperature):
    settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    update = update_of(scripted_trainer(tmp_path, temperature=temperature, **settings, **UNCERTAINTY))
    groups = scripted_groups()
    expected = reinforce_update(tiny_model(), groups, temperature=temperature, weigh=uncertainty)
    assert relative_error(update, expected) < 1e-5
    assert relative_error(update, reinforce_update(tiny_model(), groups, temperature=temperature)) > 1e-2


def test_fixed_shapes_make_the_same_update(tmp_path, monkeypatch):
    """Where rows may not be regrouped, as with images, they run in the parent's chunks."""
    settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}
    trainer = scripted_trainer(tmp_path, **settings, **UNCERTAINTY)
    monkeypatch.setattr(trainer, "_obstacle", lambda batch: "fixed shapes")
    shapes = record_forwards(trainer.model)
    expected = reinforce_update(tiny_model(), scripted_groups(), weigh=uncertainty)
    assert relative_error(update_of(trainer), expected) < 1e-5
    assert [rows for rows, _ in shapes] == [6] * 8


def test_it_costs_a_forward_of_the_groups_that_teach_and_no_more(tmp_path):
    shapes = {}
    for weight in ("length", "uncertainty"):
        settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}
        trainer = scripted_trainer(tmp_path, baseline_weight=weight, **settings)
        shapes[weight] = record_forwards(trainer.model)
        trainer.train()
    extra, update = shapes["uncertainty"][:4], shapes["uncertainty"][4:]
    assert extra == update == shapes["length"], "as many on every rank, and the same micro-batches"
    teaching = [rows for rows in SCRIPT.values() if len({reward for _, reward in rows if reward is not None}) > 1]
    assert sum(rows for rows, _ in extra) == sum(reward is not None for rows in teaching for _, reward in rows)


class NoBaseline(OPOTrainer):
    """Also a group whose rewards are all equal is informative, which the plan before the advantages leaves out."""

    def baseline(self, rewards, weights):
        return no_baseline(rewards, weights)


@pytest.mark.parametrize(
    ("weight", "trainer_class", "plans"),
    [
        ("length", OPOTrainer, 1),
        ("uncertainty", OPOTrainer, 1),
        ("uncertainty", TokenBaseline, 1),
        ("uncertainty", NoBaseline, 2),
    ],
)
def test_a_step_is_planned_once(tmp_path, monkeypatch, weight, trainer_class, plans):
    counted = []
    monkeypatch.setattr(
        planner, "plan_microbatches", lambda *args, **kwargs: counted.append(1) or plan_microbatches(*args, **kwargs)
    )
    settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}
    trainer = scripted_trainer(tmp_path, baseline_weight=weight, **settings)
    trainer.__class__ = trainer_class
    update = update_of(trainer)
    assert len(counted) == plans
    if trainer_class is NoBaseline:
        groups = scripted_groups()
        assert relative_error(update, token_oracle(groups, lambda g, k, t: groups[g][k][3])) < 1e-5


def test_a_samplers_log_probabilities_make_it_free(tmp_path):
    """With the policy's own log-probabilities from the sampler: the same update without a forward of its own."""
    model = tiny_model()

    def rollout(prompts, trainer):
        output = scripted_rollout(prompts, trainer)
        for i, (prompt, ids) in enumerate(zip(output["prompt_ids"], output["completion_ids"], strict=True)):
            with torch.no_grad():
                log_probs = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
            output["logprobs"][i] = log_probs[torch.arange(len(ids)), ids].tolist()
        return output

    trainer = scripted_trainer(
        tmp_path, rollout=rollout, rollout_importance_sampling_correction=True, **WHOLE_SCRIPT, **UNCERTAINTY
    )
    shapes = record_forwards(trainer.model)
    expected = reinforce_update(tiny_model(), scripted_groups(), weigh=uncertainty)
    assert relative_error(update_of(trainer), expected) < 1e-4
    assert len(shapes) == 1


def test_evaluation_uses_it_too(tmp_path):
    trainer = scripted_trainer(
        tmp_path, eval_dataset=scripted_dataset(), per_device_eval_batch_size=12, **WHOLE_SCRIPT, **UNCERTAINTY
    )
    plain = scripted_trainer(tmp_path, eval_dataset=scripted_dataset(), per_device_eval_batch_size=12, **WHOLE_SCRIPT)
    ours, theirs = trainer.evaluate(), plain.evaluate()
    assert ours["eval_reward"] == theirs["eval_reward"]
    assert ours["eval_opo/baseline"] != theirs["eval_opo/baseline"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baseline_weight": "norm"}, "`baseline_weight` must be 'length' or 'uncertainty', got 'norm'"),
        (
            {"baseline_weight": "uncertainty", "length_exponent": 1.6},
            "`length_exponent` is a power of the length, got 1.6",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **settings)
