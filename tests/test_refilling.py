"""A step that is refilled: its update, its metrics, what resumes bitwise, and what is refused."""

import itertools

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, MixtralConfig

from opo_trl import OPOConfig, OPOTrainer
from test_resume import REFILLED, sampling_trainer, without_times
from test_rollout import LeaveOneOut, TokenBaseline
from test_trainer import MAX_LENGTH, reinforce_update, scripted_groups
from test_update import prompts, record_forwards, vllm_trainer
from tiny import (
    GROUP_SIZE,
    SCRIPT,
    VOCABULARY,
    relative_error,
    rollout_with_empty_completions,
    scripted_reward,
    scripted_rollout,
    scripted_trainer,
    tiny_model,
    update_of,
)
from tool_turns import LONG, add, call, rows_of, tool_tokenizer, turns_trainer

UNINFORMATIVE = ["fifteen", "seven!"]
INFORMATIVE = [prompt for prompt in SCRIPT if prompt not in UNINFORMATIVE]


def refilling_trainer(output_dir, names, rollout=scripted_rollout, trainer_class=OPOTrainer, **settings):
    """A trainer of two prompts a step, and the prompts of each round that it samples."""
    seen = []

    def recording(prompts, trainer):
        seen.append(list(dict.fromkeys(prompts)))
        return rollout(prompts, trainer)

    settings = {"max_refill_rounds": 2, "max_completion_length": MAX_LENGTH, **settings}
    trainer = scripted_trainer(output_dir, rollout=recording, train_dataset=prompts(*names), **settings)
    trainer.__class__ = trainer_class
    return trainer, seen


def logged(trainer):
    return next(entry for entry in trainer.state.log_history if "reward" in entry)


# ---- The update


@pytest.mark.parametrize(
    ("first", "loss_type", "batch_size", "accumulation"),
    [
        (UNINFORMATIVE, "dapo", 8, 1),
        (UNINFORMATIVE, "dr_grpo", 1, 8),
        (["one", "fifteen"], "dapo", 2, 4),
        (["one", "fifteen"], "dr_grpo", 8, 1),
        (["one", "six"], "dr_grpo", 2, 4),
    ],
)
def test_the_update_is_the_mean_over_the_informative_groups(tmp_path, loss_type, batch_size, accumulation, first):
    trainer, rounds = refilling_trainer(
        tmp_path,
        [*first, *(prompt for prompt in SCRIPT if prompt not in first)],
        loss_type=loss_type,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    shapes = record_forwards(trainer.model)
    update = update_of(trainer)
    sampled = list(itertools.chain(*rounds))
    assert rounds[0] == first
    assert len(sampled) == len(set(sampled)), "a prompt that the step has already is not sampled again"
    assert (len(rounds) > 1) == (first != ["one", "six"])
    groups = scripted_groups({prompt: SCRIPT[prompt] for prompt in sampled if prompt in INFORMATIVE})
    assert len(groups) >= 2
    assert relative_error(update, reinforce_update(tiny_model(), groups, loss_type)) < 1e-5
    assert len(shapes) == accumulation
    log = logged(trainer)
    assert log["rollouts/rounds"] == len(rounds) - 1
    assert log["rollouts/sampled_per_trained"] == len(sampled) / len(groups)
    assert log["rollouts/groups_dropped"] == len(sampled) - len(groups)


def scores_some_prompts(prompts, completions, **kwargs):
    return [None if prompt in ("one", "seven!") else 0.5 for prompt in prompts]


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [
        (OPOTrainer, {"baseline_weight": "uncertainty", "gradient_accumulation_steps": 4}),
        (OPOTrainer, {"skip_uninformative": False}),
        (OPOTrainer, {"pad_to_multiple_of": 8, "gradient_accumulation_steps": 4}),
        (OPOTrainer, {"reward_funcs": [scripted_reward, scores_some_prompts], "reward_weights": [1.0, 2.0]}),
        (OPOTrainer, {"rollout": rollout_with_empty_completions}),
        (LeaveOneOut, {}),
        (TokenBaseline, {"gradient_accumulation_steps": 4}),
    ],
)
def test_a_refilled_step_equals_one_whose_prompts_are_all_informative(tmp_path, trainer_class, settings):
    """The same groups as one rollout batch, without refilling."""
    steps = settings.get("gradient_accumulation_steps", 1)
    names = [*UNINFORMATIVE, *INFORMATIVE]
    refilled, rounds = refilling_trainer(
        tmp_path, names, trainer_class=trainer_class, **settings, per_device_train_batch_size=8 // steps
    )
    update = update_of(refilled)
    assert rounds[0] == UNINFORMATIVE
    trained = [prompt for prompt in itertools.chain(*rounds) if prompt in INFORMATIVE]
    assert len(trained) >= 2
    rows = len(trained) * GROUP_SIZE
    plain, _ = refilling_trainer(
        tmp_path,
        trained,
        trainer_class=trainer_class,
        **settings,
        max_refill_rounds=0,
        per_device_train_batch_size=rows // steps,
    )
    assert relative_error(update, update_of(plain)) < 1e-5


def test_tools_are_called_in_every_round(tmp_path):
    """The first round's rewards are all equal; of the second round's completions, every other one has called a tool."""
    turns = [
        ["no tool" + "!" * i for i in range(4)],
        [call("add", a=1, b=2) if i % 2 else "none" + "!" * i for i in range(4)],
        ["it is 3" + "." * i for i in range(2)],
    ]
    second = [0.3, 1.0, -0.5, 0.0]
    rewards = iter([[0.5] * 4, second])
    trainer = turns_trainer(
        tmp_path,
        turns,
        settings={"per_device_train_batch_size": 4, "max_refill_rounds": 1},
        reward_funcs=lambda completions, **kwargs: next(rewards),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": f"add {n}"}]} for n in range(2)]),
        tools=[add],
    )
    update = update_of(trainer)
    group = rows_of(trainer.batch, [*[0.5] * 4, *second])[4:]
    assert "<tool_response>\n3\n</tool_response>" in tool_tokenizer().decode(group[1][1])
    assert relative_error(update, reinforce_update(tiny_model(**LONG), [group])) < 1e-5
    assert logged(trainer)["tools/call_frequency"] == 2 / 8


def test_vllm_gets_the_weights_once_a_step(tmp_path, monkeypatch):
    trainer = vllm_trainer(
        tmp_path, monkeypatch, train_dataset=prompts(*UNINFORMATIVE, *INFORMATIVE), max_refill_rounds=2, max_steps=2
    )
    trainer.train()
    assert sum(entry.get("rollouts/rounds", 0) for entry in trainer.state.log_history) > 0
    assert trainer.vllm_generation.synced == 2


# ---- What is logged


def cut_short(prompts, trainer):
    """The script, with some completions that end without an end token."""
    output = scripted_rollout(prompts, trainer)
    output["completion_ids"] = [ids[:-1] if len(ids) % 3 == 0 else ids for ids in output["completion_ids"]]
    output["logprobs"] = [[0.0] * len(ids) for ids in output["completion_ids"]]
    return output


def reward_with_metric(completions, score, log_metric, **kwargs):
    log_metric("letters", sum(map(len, completions)) / len(completions))
    log_metric("letters/no_answer", float(sum(len(each) < 3 for each in completions)))
    return score


def test_metrics_are_over_all_completions_that_were_sampled(tmp_path):
    """As one batch of the prompts of all rounds logs them."""
    names, settings = ["one", "fifteen", "six", "seven!", "three", "twenty two"], {"reward_funcs": reward_with_metric}
    refilled, rounds = refilling_trainer(tmp_path, names, cut_short, per_device_train_batch_size=12, **settings)
    refilled.train()
    sampled = list(itertools.chain(*rounds))
    assert [len(each) for each in rounds][:2] == [3, 2], "rounds of different sizes"
    complete, _ = refilling_trainer(
        tmp_path,
        sampled,
        cut_short,
        max_refill_rounds=0,
        per_device_train_batch_size=len(sampled) * GROUP_SIZE,
        **settings,
    )
    complete.train()
    expected, log = logged(complete), logged(refilled)
    of_the_update = {"loss", "grad_norm", "step_time", "epoch"}
    for name in expected.keys() - of_the_update:
        if not name.startswith(("time/", "tokens_per_second/")):
            assert log[name] == pytest.approx(expected[name], rel=1e-5), name
    assert {"letters", "letters/no_answer", "opo/informative_fraction", "num_tokens"} <= expected.keys()
    assert 0 < expected["completions/clipped_ratio"] < 1


def test_a_step_without_an_informative_group_has_no_gradient_and_is_logged(tmp_path, caplog):
    trainer, rounds = refilling_trainer(
        tmp_path, UNINFORMATIVE, max_refill_rounds=5, per_device_train_batch_size=GROUP_SIZE
    )
    assert all((value == 0).all() for value in update_of(trainer).values())
    assert rounds == [["fifteen"], ["seven!"]], "no prompt is left"
    assert "Step 1 has no gradient: none of its 2 groups is informative, after 1 refill round(s)." in caplog.text
    log = logged(trainer)
    assert (log["rollouts/rounds"], log["rollouts/groups_dropped"], log["grad_norm"]) == (1, 2, 0)
    assert log["rollouts/sampled_per_trained"] is None


def test_evaluation_is_not_refilled(tmp_path):
    trainer, rounds = refilling_trainer(
        tmp_path, UNINFORMATIVE, eval_dataset=prompts(*UNINFORMATIVE), per_device_eval_batch_size=8
    )
    metrics = trainer.evaluate()
    assert rounds == [UNINFORMATIVE]
    assert not any("rollouts/" in name for name in metrics)


# ---- Resuming


def test_a_resumed_run_takes_the_same_prompts_and_ends_in_the_same_bits(tmp_path):
    complete = sampling_trainer(tmp_path / "complete", tiny_model(), 4, **REFILLED)
    complete.train()
    rounds = [entry["rollouts/rounds"] for entry in complete.state.log_history if "rollouts/rounds" in entry]
    assert max(rounds[2:]) > 0, rounds
    step = 2
    resumed = sampling_trainer(tmp_path / "resumed", tiny_model(), 4, **REFILLED)
    torch.manual_seed(step)
    resumed.train(resume_from_checkpoint=str(tmp_path / "complete" / f"checkpoint-{step}"))
    expected = complete.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert without_times(resumed.state.log_history[:-1]) == without_times(complete.state.log_history[:-1])


# ---- Refusals


@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_the_number_of_rounds_is_checked(value):
    with pytest.raises(ValueError, match=rf"`max_refill_rounds` must be an integer of at least 0, got {value}\. Use 0"):
        OPOConfig("unused", use_cpu=True, bf16=False, max_refill_rounds=value)


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="`max_refill_rounds` must be 0 with it, got 3"):
        OPOConfig("unused", use_cpu=True, bf16=False, max_refill_rounds=3, torch_compile=True)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (prompts(*SCRIPT).to_iterable_dataset(), "got a IterableDataset with max_refill_rounds=2"),
        (prompts(*SCRIPT).add_column("image", [None] * len(SCRIPT)), r"the columns \['image'\] with"),
    ],
)
def test_a_dataset_that_cannot_be_refilled_from_is_refused_before_the_model_is_loaded(
    tmp_path, monkeypatch, dataset, message
):
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *_, **__: pytest.fail("model loaded"))
    with pytest.raises(ValueError, match=message):
        scripted_trainer(tmp_path, "some/model", train_dataset=dataset, max_refill_rounds=2)


def test_a_router_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=len(VOCABULARY))
    )
    with pytest.raises(ValueError, match="since the router's auxiliary loss is a mean per micro-batch"):
        scripted_trainer(tmp_path, model, router_aux_loss_coef=0.5, max_refill_rounds=2)


def test_a_batch_that_cannot_be_merged_stops_training(tmp_path):
    class WithAnImage(OPOTrainer):
        def _sample_round(self, inputs):
            sampled = super()._sample_round(inputs)
            sampled.batch["pixel_values"] = torch.zeros(1)
            return sampled

    trainer, _ = refilling_trainer(tmp_path, [*UNINFORMATIVE, *INFORMATIVE], trainer_class=WithAnImage)
    with pytest.raises(ValueError, match=r"since the rollout batch holds \['pixel_values'\], which cannot be cut"):
        trainer.train()


def test_a_row_that_cannot_be_read_stops_training(tmp_path):
    trainer, _ = refilling_trainer(tmp_path, [*UNINFORMATIVE, *INFORMATIVE])

    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            raise OSError("the disk is gone")

    get_loader = trainer.get_train_dataloader

    def then_broken():
        loader = get_loader()
        trainer.train_dataset = Broken()
        return loader

    trainer.get_train_dataloader = then_broken
    with pytest.raises(RuntimeError, match=r"refill round could not be read .* on rank 0: OSError: the disk is gone"):
        trainer.train()
