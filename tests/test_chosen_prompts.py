"""Prompts that a trainer chooses: what reaches the policy, what a checkpoint keeps, and what is refused."""

import pytest
import torch
from datasets import Dataset

from opo_trl import OPOConfig
from opo_trl.rollouts.chosen_prompts import STATE, ChosenPrompts, read_rows
from opo_trl.rollouts.prompt_sampling import PromptSampling
from test_resume import PROMPTS, prompts_of_each_step, sampling_trainer
from tiny import SCRIPT, scripted_dataset, scripted_trainer, tiny_model

CHOSEN = {"prompt_sampling": "informative"}
NEVER = {"fifteen", "seven!"}  # all rewards are equal, and only one completion is scored


def drawn_prompts(output_dir, **settings):
    """Prompts of each step of a scripted run, and its trainer."""
    trainer = scripted_trainer(output_dir, max_steps=12, learning_rate=1e-3, shuffle_dataset=True, **CHOSEN, **settings)
    prompts = prompts_of_each_step(trainer)
    trainer.train()
    return list(prompts), trainer


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    return drawn_prompts(tmp_path_factory.mktemp("run"))


def test_prompts_are_those_that_were_drawn_and_the_uninformative_one_comes_less_often(scripted):
    prompts, trainer = scripted
    assert all(len(set(step)) == 2 for step in prompts)
    chances = dict(zip(SCRIPT, trainer._chosen.sampling.outcomes.chances().tolist(), strict=True))
    assert set(sorted(chances, key=chances.get)[:2]) == NEVER
    # Unlike an epoch's order: with two of six prompts a step, three steps would have all six.
    assert any({prompt for step in prompts[at : at + 3] for prompt in step} != set(SCRIPT) for at in range(0, 12, 3))


def test_logs_hold_the_prediction_beside_what_came_of_it(scripted):
    logs = [entry for entry in scripted[1].state.log_history if "reward" in entry]
    names = ("effective_prompts", "moved_probability", "informative_if_uniform", "informative_predicted")
    assert all(0 <= entry[f"rollouts/{name}"] <= 1 for entry in logs for name in (*names, "informative_groups"))
    for entry, step in zip(logs, scripted[0], strict=True):
        assert entry["rollouts/informative_groups"] == pytest.approx(sum(prompt not in NEVER for prompt in step) / 2)
    assert logs[-1]["rollouts/effective_prompts"] < 1 == pytest.approx(logs[0]["rollouts/effective_prompts"])


def test_what_the_data_loader_fetches_ahead_does_not_matter(scripted, tmp_path):
    prompts, _ = drawn_prompts(tmp_path, dataloader_num_workers=1, dataloader_prefetch_factor=4)
    assert prompts == scripted[0]


def test_refill_rounds_take_the_prompts_that_the_draw_puts_next(tmp_path, monkeypatch):
    trainer = scripted_trainer(
        tmp_path, max_steps=12, learning_rate=1e-3, shuffle_dataset=True, max_refill_rounds=2, **CHOSEN
    )
    draw, sample, drawn, sampled = PromptSampling.draw, trainer._sample_round, [], []

    def recorded_draw(sampling, step):
        found = draw(sampling, step)
        positions = torch.cat([found[0].prompts, found[0].spare]).tolist()
        drawn.append(list(dict.fromkeys(trainer.train_dataset[position]["prompt"] for position in positions)))
        sampled.append([])
        return found

    def recorded_sample(rows):
        sampled[-1] += dict.fromkeys(row["prompt"] for row in rows)
        return sample(rows)

    monkeypatch.setattr(PromptSampling, "draw", recorded_draw)
    trainer._sample_round = recorded_sample
    trainer.train()
    assert len(drawn) == 12
    assert all(prompts == order[: len(prompts)] for prompts, order in zip(sampled, drawn, strict=True))
    assert any(len(prompts) > 2 for prompts in sampled), "some step was refilled"
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    for entry, prompts in zip(logs, sampled, strict=True):
        expected = sum(prompt not in NEVER for prompt in prompts[:2]) / 2
        assert entry["rollouts/informative_groups"] == pytest.approx(expected), "of the prompts drawn for the step"


def test_evaluation_is_left_as_it_is(scripted):
    _, trainer = scripted
    counts = trainer._chosen.sampling.outcomes.counts.clone()
    seen = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (
        seen.extend(r["prompt"] for r in inputs) or generate(inputs)
    )
    trainer.evaluate(scripted_dataset(4))
    assert sorted(seen[: 4 * trainer.num_generations_eval]) == sorted(list(SCRIPT)[:4] * trainer.num_generations_eval)
    assert torch.equal(trainer._chosen.sampling.outcomes.counts, counts)


def test_a_second_run_starts_without_what_the_first_has_learned(scripted):
    prompts, trainer = scripted
    del trainer._generate_and_score_completions
    again = prompts_of_each_step(trainer)
    trainer.train()
    assert again == prompts


STEPS = 5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed")
    trainer = sampling_trainer(output_dir, tiny_model(), STEPS, **CHOSEN)
    prompts = prompts_of_each_step(trainer)
    trainer.train()
    return output_dir, trainer, prompts


def test_a_resumed_run_ends_in_the_same_bits(undisturbed, tmp_path):
    step, (output_dir, complete, prompts) = 4, undisturbed  # in the second epoch
    trainer = sampling_trainer(tmp_path, tiny_model(), STEPS, **CHOSEN)
    resumed = prompts_of_each_step(trainer)
    torch.manual_seed(step)
    trainer.train(resume_from_checkpoint=str(output_dir / f"checkpoint-{step}"))
    assert resumed == prompts[step:]
    expected = complete.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())
    ours, theirs = (each._chosen.sampling.state_dict() for each in (trainer, complete))
    assert torch.equal(ours["counts"], theirs["counts"])
    assert torch.equal(ours["totals"], theirs["totals"])


def test_a_checkpoint_without_the_state_is_refused(undisturbed, tmp_path):
    sampling_trainer(tmp_path, tiny_model(), 1).train()
    trainer = sampling_trainer(tmp_path, tiny_model(), 2, **CHOSEN)
    with pytest.raises(ValueError, match=rf"must resume from a checkpoint with {STATE}, got .*checkpoint-1.*'uniform'"):
        trainer.train(resume_from_checkpoint=True)


def test_the_state_of_another_training_set_is_refused(undisturbed, tmp_path):
    dataset = Dataset.from_dict({"prompt": PROMPTS[:-1]})
    chosen = ChosenPrompts(undisturbed[1].accelerator, dataset, 2, 4, seed=0)
    with pytest.raises(ValueError, match=r"that it has counted, which has 7 prompts, got 6\. Resume with that"):
        chosen.resume(str(undisturbed[0] / "checkpoint-2"))
    chosen.resume(None)
    assert chosen.sampling.outcomes.counts.count_nonzero() == 0


def test_rows_are_objects_of_their_own():
    """TRL adds a rollout function's columns to some of them."""
    for dataset in (scripted_dataset(), [{"prompt": text} for text in SCRIPT]):
        rows = read_rows(dataset, [2, 2, 0])
        assert [row["prompt"] for row in rows] == ["fifteen", "fifteen", "one"]
        rows[0]["score"] = 1.0
        assert "score" not in rows[1]


def test_what_cannot_be_chosen_from_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset` must have a length and be indexable, got IterableDataset"):
        scripted_trainer(
            tmp_path, train_dataset=scripted_dataset().to_iterable_dataset(), shuffle_dataset=True, **CHOSEN
        )
    with pytest.raises(ValueError, match=r"draws prompts at random, got `shuffle_dataset=False`"):
        OPOConfig(str(tmp_path), use_cpu=True, bf16=False, shuffle_dataset=False, **CHOSEN)
    with pytest.raises(ValueError, match=r"`prompt_sampling` must be 'uniform' or 'informative', got 'hard'"):
        OPOConfig(str(tmp_path), use_cpu=True, bf16=False, prompt_sampling="hard")
