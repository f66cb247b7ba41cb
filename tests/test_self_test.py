"""The engine's self-test in a run: before the first step, without a trace in the run, and on all ranks alike."""

import logging
import math

import pytest
import torch

from opo_trl import OPOConfig
from opo_trl.on_policy.sampler_drift import FIRST, FLOOR, GROWTH, LAST
from opo_trl.on_policy.sampler_evidence import FALSE_ALARM, TEMPERATURES, WRONG, WRONG_SHARE
from opo_trl.on_policy.self_test import ROWS, ROWS_AT_ONCE, TOKENS, SelfTest, check_tolerance
from pages import page
from policy_engine import PolicyEngine
from tiny import scripted_trainer, update_of

BATCH = {"per_device_train_batch_size": 16, "max_completion_length": 24, "learning_rate": 1e-2, "temperature": 0.8}


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    """A trainer whose completions come from a `PolicyEngine`."""

    def make(**settings):
        monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", PolicyEngine)
        lengths = lambda completions, **_: [float(len(text) % 7) for text in completions]  # noqa: E731
        return scripted_trainer(tmp_path, rollout=None, reward_funcs=lengths, use_vllm=True, **{**BATCH, **settings})

    return make


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def refusal(trainer, match):
    """Train, and expect the refusal before any weight has changed."""
    before = weights(trainer)
    with pytest.raises(ValueError, match=match) as refused:
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in weights(trainer).items())
    assert trainer.state.global_step == 0
    return str(refused.value)


def test_an_exact_engine_passes_and_the_run_is_bitwise_the_same_as_without_the_test(make_trainer, caplog):
    updates, states, draws = [], [], []
    with caplog.at_level(logging.INFO, "opo_trl"):
        for tolerance in (0.1, None):
            trainer = make_trainer(vllm_logp_tolerance=tolerance, max_steps=2)
            updates.append(update_of(trainer))
            states.append(torch.get_rng_state())
            draws.append(trainer.vllm_generation.generator.get_state())
            assert trainer.vllm_generation.synced == 2, "the test needs no weights of its own"
    assert caplog.text.count("Self-test of the vLLM engine passed") == 1
    assert all(torch.equal(updates[0][name], updates[1][name]) for name in updates[0])
    assert any(update.abs().max() > 0 for update in updates[0].values())
    assert torch.equal(states[0], states[1])
    assert torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("factor", [0.4, 2.0])
def test_a_wrong_temperature_is_refused_though_the_log_probabilities_are_the_policys(make_trainer, factor):
    trainer = make_trainer()
    trainer.vllm_generation.draws_at, trainer.vllm_generation.raw = factor, True
    message = refusal(trainer, "its draws fit a temperature of .* better than the configured 0.8")
    assert "nats in the mean (accepted" not in message


def test_a_stale_output_layer_is_refused(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.vllm_generation.network.lm_head.weight.add_(torch.randn(trainer.model.lm_head.weight.shape) * 0.3)
    message = refusal(trainer, r"The vLLM engine must sample from the policy\. In its first .* tokens, ")
    assert "its log-probabilities differ from the policy's by" in message
    assert "`sync_weights` reaches every layer of the engine" in message
    assert "raise `vllm_logp_tolerance`, 0.1 now" in message


def test_nan_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.vllm_generation.nan_every = 10
    refusal(trainer, r"(9|10)\.\d% of its log-probabilities are NaN \(accepted: 1%\)")


def test_every_run_is_tested_and_later_steps_are_not(make_trainer):
    """An engine may be lost between two runs of one trainer, as between a run and its resumption."""
    trainer = make_trainer(max_steps=2)
    engine, generate = trainer.vllm_generation, trainer.vllm_generation.generate

    def generate_and_get_worse(*args, **kwargs):
        completions = generate(*args, **kwargs)
        engine.nan_every = 10
        return completions

    engine.generate = generate_and_get_worse
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match="are NaN"):
        trainer.train()


def test_without_a_tolerance_nothing_is_tested(make_trainer):
    trainer = make_trainer(vllm_logp_tolerance=None)
    trainer.vllm_generation.nan_every = 2
    trainer.train()


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tolerance_that_decides_nothing_is_refused(tolerance):
    with pytest.raises(ValueError, match="`vllm_logp_tolerance` must be a finite number above 0, or None"):
        check_tolerance(tolerance)


def self_test_of(trainer):
    test = SelfTest(trainer.accelerator, 1.0, 0, 0.1, "server", trainer._self_test.score)
    test.start()
    return test


def test_prompts_with_images_are_not_tested_and_the_log_tells(make_trainer, caplog):
    trainer = make_trainer()
    self_test_of(trainer).check(trainer.model, [[5]], [["image"]], [[6, 1]], [[None, None]])
    assert "it takes no prompts with images" in caplog.text


def test_a_first_batch_without_a_token_leaves_the_test_to_the_next(make_trainer):
    trainer = make_trainer()
    test = self_test_of(trainer)
    test.check(trainer.model, [[5], [6]], None, [[0], [0]], [[], []])  # fillers of empty completions
    with pytest.raises(ValueError, match=r"must sample from the policy.*`--logprobs-mode processed_logprobs`"):
        test.check(trainer.model, [[5], [6]], None, [[7, 8], [1]], [[None, None], [None]])


def test_a_model_that_computes_all_logits_is_tested_alike(make_trainer, monkeypatch):
    """Not every forward has `logits_to_keep`."""
    trainer = make_trainer()
    ids = ([[5, 6, 7], [8]], None, [[9, 10], [11, 12, 13, 1]], [[-50.0] * 2, [-50.0] * 4])
    messages = []
    for _ in range(2):
        with pytest.raises(ValueError, match="nats in the mean") as refused:
            self_test_of(trainer).check(trainer.model, *ids)
        messages.append(str(refused.value))
        monkeypatch.setattr(
            "opo_trl.on_policy.self_test.inspect.signature", lambda f: type("S", (), {"parameters": ()})
        )
    assert messages[0] == messages[1]


def test_the_updates_own_forward_gives_the_same_numbers(make_trainer, monkeypatch):
    """It takes the place of the logits under ZeRO-3, where the draws are not judged."""
    trainer = make_trainer(temperature=1.0)
    rows = ([[5, 6, 7], [8]], None, [[9, 10], [11, 12, 13, 1]], [[-50.0, None], [-50.0] * 4])
    messages = []
    for zero3 in (False, True):
        monkeypatch.setattr("opo_trl.on_policy.self_test.is_deepspeed_zero3_enabled", lambda zero3=zero3: zero3)
        with pytest.raises(ValueError, match="nats in the mean") as refused:
            self_test_of(trainer).check(trainer.model, *rows)
        messages.append(str(refused.value).split("its draws")[0].split(". Check")[0].rstrip("; "))
    assert messages[0] == messages[1]
    self_test_of(trainer).check(trainer.model, [[5], [6]], None, [[0], [0]], [[], []])


def test_the_page_has_the_numbers_of_the_code():
    text = " ".join(page("vllm").split())
    tolerance = OPOConfig.__dataclass_fields__["vllm_logp_tolerance"].default
    temperatures = ", ".join(f"{factor:g}" for factor in TEMPERATURES[:-1]) + f" and {TEMPERATURES[-1]:g}"
    for sentence in (
        f"up to {ROWS} completions and {TOKENS} tokens of each",
        f"costs {ROWS // ROWS_AT_ONCE} forward passes without gradient of {ROWS_AT_ONCE} completions",
        f"| `vllm_logp_tolerance`, {tolerance} nats per token by default |",
        f"differ by more than {WRONG:g} nat | {100 * WRONG_SHARE:g} % |",
        f"for the sampled tokens | 10^{-math.log10(FALSE_ALARM):.0f} |",
        f"at {temperatures} times the configured temperature",
        f"in {LAST} consecutive logging periods: {GROWTH} times the smallest of the first {FIRST} periods of the run, "
        f"at least {FLOOR} and at most",
    ):
        assert sentence in text, sentence
