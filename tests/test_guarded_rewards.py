"""A reward or rollout function that raises (issue 14, number 6). On two ranks: test_distributed.py."""

import functools

import pytest

from opo_trl.runs.guarded_functions import FunctionGuard, RewardError
from tiny import scripted_reward, scripted_rollout, scripted_trainer


def broken(completions, score, **kwargs):
    return [1.0 / (len(completions) - 8) for _ in score]


async def broken_later(completions, score, **kwargs):
    return broken(completions, score)


class Broken:
    def __call__(self, completions, score, **kwargs):
        return broken(completions, score)


@pytest.mark.parametrize(
    ("reward", "name"),
    [(broken, "broken"), (broken_later, "broken_later"), (Broken(), "Broken"), (functools.partial(broken), "broken")],
)
def test_a_failing_reward_is_raised_with_its_name_its_rank_and_its_traceback(tmp_path, reward, name):
    trainer = scripted_trainer(tmp_path, reward_funcs=[scripted_reward, reward])
    with pytest.raises(RewardError, match=f"The reward function '{name}' failed on rank 0: ZeroDivisionError") as error:
        trainer.train()
    assert "return [1.0 / (len(completions) - 8) for _ in score]" in str(error.value)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_inside_of_a_reward_is_passed_on(tmp_path, interrupt):
    def reward(completions, **kwargs):
        raise interrupt

    with pytest.raises(interrupt):
        scripted_trainer(tmp_path, reward_funcs=reward).train()


def test_functions_of_the_same_name_are_warned_about(tmp_path, caplog):
    scripted_trainer(tmp_path, reward_funcs=[scripted_reward, lambda completions, **kwargs: [0.0] * len(completions)])
    assert "different names" not in caplog.text
    scripted_trainer(tmp_path, reward_funcs=[scripted_reward, scripted_reward])
    assert "should have different names, got 'scripted_reward' more than once" in caplog.text


def test_values_that_are_no_rewards_are_named(tmp_path):
    trainer = scripted_trainer(tmp_path, reward_funcs=lambda completions, **kwargs: completions)
    with pytest.raises(RewardError, match="must return one number or None for each of the 8 completions, got 'a'"):
        trainer.train()


def test_a_failing_rollout_function_is_raised(tmp_path):
    def rollout(prompts, trainer):
        return {**scripted_rollout(prompts, trainer), "score": 1 / 0}

    with pytest.raises(RewardError, match="The rollout function failed on rank 0: ZeroDivisionError"):
        scripted_trainer(tmp_path, rollout=rollout).train()


def test_names_and_results_pass_through():
    guarded = FunctionGuard().reward(scripted_reward, "scripted_reward")
    assert guarded.__name__ == "scripted_reward"
    assert guarded(completions=["a", "b"], score=[1.0, None]) == [1.0, None]
