"""A plain GRPOTrainer with `ReliableRuns` resumes, survives and raises. It pushes: test_hub.py."""

from types import SimpleNamespace

import pandas
import pytest
import torch
from huggingface_hub import ModelCard

from opo_trl.runs.aborted_requests import abort_on_error
from opo_trl.runs.evaluated_first import prepare_anew
from opo_trl.runs.guarded_functions import RewardError
from opo_trl.runs.preemption import EXIT_CODE
from plain import plain_trainer
from test_preemption import AskedInTheMiddle
from test_resume import STEPS
from tiny import scripted_dataset, scripted_trainer


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    trainer = plain_trainer(directory)
    trainer.train()
    return directory, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def ends_alike(trainer, undisturbed):
    assert trainer.state.global_step == STEPS
    return all(torch.equal(value, undisturbed[1][name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_plain_run_resumes_bitwise_in_any_epoch(tmp_path, undisturbed, step):
    trainer = plain_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(undisturbed[0] / f"checkpoint-{step}"))
    assert ends_alike(trainer, undisturbed)


def test_a_finished_run_that_is_resumed_trains_nothing(tmp_path, undisturbed, capsys):
    """Its last step is in the middle of an epoch, where transformers would take another one."""
    trainer = plain_trainer(tmp_path, lr_scheduler_type="constant")
    trainer.train(resume_from_checkpoint=str(undisturbed[0] / f"checkpoint-{STEPS}"))
    assert ends_alike(trainer, undisturbed)
    assert f"is of step {STEPS} of {STEPS}" in capsys.readouterr().out
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_finished_run_that_is_resumed_keeps_its_tables_of_completions(tmp_path):
    settings = {"num_steps": 2, "log_completions": True, "num_completions_to_print": 1}
    tables = []
    for _ in range(2):
        plain_trainer(tmp_path, **settings).train(resume_from_checkpoint="auto")
        tables.append([pandas.read_parquet(path) for path in sorted(tmp_path.glob("completions/*.parquet"))])
    assert [len(table) for table in tables[0]] == [8, 8]
    assert all(before.equals(after) for before, after in zip(*tables, strict=True))


def test_a_plain_run_survives_sigterm_in_the_middle_of_a_step(tmp_path, undisturbed):
    asked = plain_trainer(tmp_path, save_strategy="no", callbacks=[AskedInTheMiddle(step=5)])
    with pytest.raises(SystemExit) as ended:
        asked.train(resume_from_checkpoint="auto")
    assert ended.value.code == EXIT_CODE
    again = plain_trainer(tmp_path, save_strategy="no")
    again.train(resume_from_checkpoint="auto")
    assert ends_alike(again, undisturbed)


def test_a_plain_run_raises_a_failing_reward_and_starts_again(tmp_path):
    fails = iter([True])

    def reward(completions, **kwargs):
        if next(fails, False):
            raise OverflowError("once")
        return [float(len(text)) for text in completions]

    trainer = plain_trainer(tmp_path, num_steps=1)
    trainer.reward_funcs = [trainer._guard.reward(reward, "reward")]
    with pytest.raises(RewardError, match="'reward' failed on rank 0: OverflowError: once"):
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_card_of_a_plain_run_has_its_configuration_and_no_method_of_ours(tmp_path, undisturbed):
    trainer = plain_trainer(tmp_path, num_steps=1)
    trainer.train()
    trainer.create_model_card()
    text = ModelCard((tmp_path / "README.md").read_text()).text
    assert "| steps | 1 of 1 |" in text
    assert "mean training reward, step 1" in text
    assert "OPO, On-Policy" not in text
    assert "weight in the baseline" not in text


def test_training_after_an_evaluation_in_mixed_precision_has_trls_forward(tmp_path, monkeypatch):
    """accelerate, asked to take its own casts away, would take TRL's fused LM head with them."""
    trainer = scripted_trainer(tmp_path, bf16=True, eval_dataset=scripted_dataset(), per_device_eval_batch_size=12)
    forward = trainer.model.forward
    trainer.evaluate()
    assert trainer.model.forward != forward
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.accelerator), "num_processes", 2)
        prepare_anew(trainer)
    assert trainer.model.forward == forward
    trainer.train()


def test_an_engine_forgets_the_requests_of_an_interrupted_generation():
    aborted = []
    engine = SimpleNamespace(
        output_processor=SimpleNamespace(request_states={"3-a": None, "4-b": None}),
        abort_request=lambda ids, internal: aborted.append((ids, internal)),
    )

    def interrupted(prompts):
        raise KeyboardInterrupt

    generation = SimpleNamespace(llm=SimpleNamespace(llm_engine=engine), generate=interrupted)
    with pytest.raises(KeyboardInterrupt):
        abort_on_error(generation)(["1+1"])
    assert aborted == [(["3-a", "4-b"], True)]
    generation.generate = len
    assert abort_on_error(generation)(["1+1"]) == 1
    assert len(aborted) == 1
