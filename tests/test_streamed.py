"""Streamed training and evaluation sets, and a run on them that is resumed in any pass over the stream."""

import pytest
import torch
from datasets import Dataset, IterableDataset

from test_resume import PROMPTS, STEPS, STEPS_PER_EPOCH, prompts_of_each_step, sampling_trainer
from tiny import tiny_model


def stream(shards=2):
    return Dataset.from_dict({"prompt": PROMPTS}).to_iterable_dataset(num_shards=shards)


def streaming_trainer(output_dir, num_steps=STEPS, **settings):
    """Three steps a pass, and an evaluation of a stream in the middle of the second one."""
    return sampling_trainer(
        output_dir,
        tiny_model(),
        num_steps,
        train_dataset=stream(),
        **{
            "eval_dataset": stream(1),
            "eval_strategy": "steps",
            "eval_steps": 4,
            "per_device_eval_batch_size": 4,
            **settings,
        },
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed")
    trainer = streaming_trainer(output_dir)
    prompts = prompts_of_each_step(trainer)
    trainer.train()
    return output_dir, trainer, [step for step in prompts if len(step) == 2]  # an evaluation batch has one prompt


def test_a_streamed_run_trains_and_evaluates(undisturbed):
    _, trainer, prompts = undisturbed
    assert isinstance(trainer.train_dataset, IterableDataset)
    assert len(prompts) == trainer.state.global_step == STEPS
    for start in (0, STEPS_PER_EPOCH):
        visited = [prompt for step in prompts[start : start + STEPS_PER_EPOCH] for prompt in step]
        assert len(set(visited)) == len(visited) == 6
    assert prompts[:STEPS_PER_EPOCH] != prompts[STEPS_PER_EPOCH : 2 * STEPS_PER_EPOCH], "each pass has its own order"
    evaluated = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert [entry["step"] for entry in evaluated] == [4, 8]
    assert not any("pass@" in name for entry in evaluated for name in entry)


@pytest.mark.parametrize("step", [1, 3, 7])  # in the first and the third pass, and where two of them meet
def test_a_resumed_streamed_run_is_bitwise_identical(undisturbed, tmp_path, step):
    output_dir, complete, prompts = undisturbed
    trainer = streaming_trainer(tmp_path)
    resumed = prompts_of_each_step(trainer)
    torch.manual_seed(step)
    trainer.train(resume_from_checkpoint=str(output_dir / f"checkpoint-{step}"))
    assert [each for each in resumed if len(each) == 2] == prompts[step:]
    expected = complete.model.state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert trainer.state.epoch == complete.state.epoch


def test_a_finished_streamed_run_is_continued_with_more_steps(undisturbed, tmp_path):
    """What it counted against was another `max_steps`, and all of it was one pass."""
    streaming_trainer(tmp_path, 2, eval_strategy="no").train()
    longer = streaming_trainer(tmp_path, 4, eval_strategy="no")
    resumed = prompts_of_each_step(longer)
    longer.train(resume_from_checkpoint=True)
    assert resumed == undisturbed[2][2:4]


def test_a_streamed_set_without_max_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        streaming_trainer(tmp_path, num_steps=-1)
