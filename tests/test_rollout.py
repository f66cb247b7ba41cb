"""The baseline hook: its contract, other baselines as updates, and advantages of single tokens."""

import math

import pytest
import torch
from hypothesis import given

from opo_trl import OPOTrainer
from opo_trl.algorithm.baselines import group_mean, leave_one_out, no_baseline
from opo_trl.algorithm.rollout import estimate_advantages
from opo_trl.baselines import opo_advantages, optimal_baseline
from test_baselines import batches
from test_trainer import MAX_LENGTH, WHOLE_SCRIPT, scripted_groups
from tiny import TokenBaseline, relative_error, scripted_trainer, tiny_model, update_of

NAN = math.nan


@given(batches())
def test_with_opos_baseline_it_is_opo(batch):
    rewards, lengths = batch
    rollout = estimate_advantages(rewards, lengths, lengths, optimal_baseline)
    assert torch.equal(rollout.advantages, opo_advantages(rewards, lengths))
    assert torch.equal(rollout.informative, rollout.advantages != 0)


@given(batches())
def test_leave_one_out_is_the_mean_of_the_others(batch):
    rewards, lengths = batch
    baseline = leave_one_out(rewards, lengths)
    for p, row in enumerate(rewards.tolist()):
        scored = [k for k, r in enumerate(row) if not math.isnan(r) and lengths[p, k] > 0]
        for k in scored:
            others = [row[j] for j in scored if j != k]
            expected = sum(others) / len(others) if others else row[k]
            assert baseline[p, k].item() == pytest.approx(expected, abs=1e-4)


@given(batches())
def test_leave_one_out_is_the_mean_baseline_scaled(batch):
    """K / (K - 1) times the advantages of the group mean, where all K completions take part."""
    rewards, lengths = batch[0].nan_to_num(0.5), batch[1] + 1
    size = rewards.size(1)
    if size > 1:
        ours = estimate_advantages(rewards, lengths, lengths, leave_one_out).advantages
        mean = estimate_advantages(rewards, lengths, lengths, group_mean).advantages
        assert torch.allclose(ours, mean * size / (size - 1), atol=1e-4)


def test_rounding_leaves_no_advantage_where_all_rewards_are_equal():
    rewards = torch.full((1, 7), 0.1)
    rewards[0, 2] = NAN
    lengths = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    off = estimate_advantages(rewards, lengths, lengths, lambda r, w: r.sum(dim=1, keepdim=True) * (1 / 6))
    assert (off.advantages == 0).all()
    plain = estimate_advantages(rewards, lengths, lengths, no_baseline).advantages
    assert plain[0, 0] == pytest.approx(0.1), "a baseline of 0 leaves the reward itself"
    assert plain[0, 2] == 0.0


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (lambda r, w: r.mean(dim=1), r"one of the shapes \(2, 1\), \(2, 3\).*got \(2,\)"),
        (lambda r, w: r.unsqueeze(2), r"got \(2, 3, 1\)"),
        (lambda r, w: 0.5, r"a tensor of one of the shapes .*got <class 'float'>"),
        (lambda r, w: r.median(dim=1, keepdim=True), r"return_types.median.*take `\.values`"),
        (lambda r, w: r.sum(dim=1, keepdim=True) / 0.0, "must be finite, got 2 of 2 numbers that are not"),
    ],
)
def test_a_baseline_that_cannot_be_subtracted_is_refused(baseline, message):
    with pytest.raises(ValueError, match=message):
        estimate_advantages(torch.rand(2, 3), torch.ones(2, 3), torch.ones(2, 3), baseline)


def token_oracle(groups, advantage):
    """Gradient with the advantage of each token: one unpadded forward per completion, summed over its tokens."""
    model = tiny_model()
    total = sum(len(completion) for group in groups for _, completion, _, _ in group)
    for g, group in enumerate(groups):
        for k, (prompt, completion, _, reward) in enumerate(group):
            if reward is None:
                continue
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(dim=-1)[torch.arange(len(completion)), completion]
            weights = torch.tensor([advantage(g, k, t) for t in range(len(completion))])
            ((weights * logps).sum() / total).backward()
    return {name: p.grad for name, p in model.named_parameters()}


class LeaveOneOut(OPOTrainer):
    def baseline(self, rewards, weights):
        return leave_one_out(rewards, weights)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(24, 1), (6, 4)])
def test_a_step_with_another_baseline(tmp_path, batch_size, accumulation):
    settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = scripted_trainer(tmp_path, max_completion_length=MAX_LENGTH, **settings)
    trainer.__class__ = LeaveOneOut
    groups = scripted_groups()

    def advantage(g, k, t):
        others = [r for j, (*_, r) in enumerate(groups[g]) if j != k and r is not None]
        return groups[g][k][3] - sum(others) / len(others) if others else 0.0

    assert relative_error(update_of(trainer), token_oracle(groups, advantage)) < 1e-5
    log = trainer.state.log_history[0]
    assert log["opo/informative_fraction"] < 1


@pytest.mark.parametrize(("batch_size", "accumulation"), [(24, 1), (6, 4), (1, 24)])
def test_a_step_with_a_baseline_for_each_token(tmp_path, batch_size, accumulation):
    settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = scripted_trainer(tmp_path, **settings)
    trainer.__class__ = TokenBaseline
    groups = scripted_groups()

    def advantage(g, k, t):
        energy = [0 if r is None else min(t + 1, len(c)) for _, c, _, r in groups[g]]
        return groups[g][k][3] - sum(e * (r or 0.0) for e, (*_, r) in zip(energy, groups[g], strict=True)) / sum(energy)

    assert relative_error(update_of(trainer), token_oracle(groups, advantage)) < 1e-5
    shown = list(trainer._logs["advantages"])
    assert len(shown) == 24
    first = groups[0][0]
    assert shown[0] == pytest.approx(sum(advantage(0, 0, t) for t in range(len(first[1]))) / len(first[1]), rel=1e-4)


def test_places_without_a_trained_token_are_not_informative():
    """Groups of other lengths, and a tool's output: there, a mean over tokens of the same place is empty."""
    trained = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 0, 1, 1], [1, 0, 1, 0]]]).float()
    rewards = torch.tensor([[1.0, 1.0], [1.0, 0.0]])

    def mean_of_place(rewards, weights):
        return (weights * rewards.unsqueeze(2)).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1)

    rollout = estimate_advantages(rewards, trained.sum(dim=2), trained, mean_of_place)
    assert rollout.informative.tolist() == [[False, False], [True, True]]
    assert rollout.advantages[1].tolist() == [[0.5, 0, 0.5, 0], [-0.5, 0, -0.5, 0]]
    assert rollout.completion_advantages.tolist() == [[0, 0], [pytest.approx(1 / 3), -0.5]]
    assert rollout.completion_baselines.tolist() == [[1, 1], [pytest.approx(2 / 3), 0.5]]


def test_tokens_of_uncertainty_sum_to_the_completions_weight(tmp_path):
    seen = {}

    class Recording(OPOTrainer):
        def baseline(self, rewards, weights):
            seen[self.weigh_tokens] = weights
            return super().baseline(rewards, weights)

    for tokens in (False, True):
        trainer = scripted_trainer(tmp_path, baseline_weight="uncertainty", **WHOLE_SCRIPT)
        trainer.__class__ = type("Tokens", (Recording,), {"weigh_tokens": tokens})
        update = update_of(trainer)
        seen[f"update {tokens}"] = update
    assert seen[True].ndim == 3
    assert torch.allclose(seen[True].sum(dim=2), seen[False], rtol=1e-4)
    assert relative_error(seen["update True"], seen["update False"]) < 1e-4
