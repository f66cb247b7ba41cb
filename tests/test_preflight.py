"""What is refused before, or as soon as, a run would fail because of its reward functions, model or datasets."""

import math
import re
from contextlib import nullcontext
from decimal import Decimal
from fractions import Fraction
from functools import partial, wraps
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from opo_trl import OPOTrainer
from opo_trl.on_policy.preflight import check_tools_with_vllm, check_tools_without_vllm
from opo_trl.on_policy.reward_parameters import (
    _PASSED_BY_TRL,
    check_reward_parameters,
    column_parameters,
    reward_names,
)
from opo_trl.on_policy.unknown_tokens import warn_of_unknown_tokens
from opo_trl.rewards import boxed_format_reward, math_verify_reward
from opo_trl.runs.reward_values import check_reward_values
from opo_trl.scripts.policies import model_path
from tiny import scripted_reward, scripted_rollout, tiny_config, tiny_model, tiny_tokenizer

PROBLEMS = Dataset.from_dict({"prompt": ["1+1", "2+2", "3+3", "4+4"], "solution": ["2", "4", "6", "8"]})


@pytest.fixture
def no_model(monkeypatch):
    """Fail where a model is loaded."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *_, **__: pytest.fail("model loaded"))


def trainer(output_dir, **arguments):
    defaults = {
        "model": tiny_model(),
        "reward_funcs": math_verify_reward,
        "args": tiny_config(output_dir),
        "train_dataset": PROBLEMS,
        "processing_class": tiny_tokenizer(),
    }
    return OPOTrainer(**defaults | arguments)


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5, None],
        (True, math.nan, -math.inf),
        [np.float32(1), np.int64(2), np.bool_(True)],
        [Fraction(1, 2), Decimal("0.5"), torch.tensor(1.0)],
        np.ones(3),
        torch.ones(3),
        torch.ones(3, 1),
        (number for number in (1.0, 2.0, 3.0)),
    ],
)
def test_numbers_and_none_are_rewards(values):
    """All of them are what TRL can store, and an iterator is not lost."""
    rewards = check_reward_values("score", values, 3)
    stored = torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float32)
    assert stored.shape == (3,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1.0", "0.0", "1.0"], r"got '1\.0' \(str\) for completion 0\. Convert it with float\(\)"),
        ([1.0, None, "unknown"], r"got 'unknown' \(str\) for completion 2"),
        ([1.0, [0.5], 0.0], r"got \[0\.5\] \(list\) for completion 1"),
        ([1.0, 1j, 0.0], r"got 1j \(complex\) for completion 1"),
        ([10**400, 1.0, 0.0], r"\.\.\. \(int\) for completion 0"),
        ([{"score": 1.0}] * 3, r"got \{'score': 1\.0\} \(dict\) for completion 0"),
        (torch.ones(4), "got 4 values"),
        (torch.ones(3, 2), r"got a Tensor of shape \(2,\) for completion 0"),
        (np.ones((3, 1)), r"got a ndarray of shape \(1,\) for completion 0"),
        ([1.0, 2.0], "got 2 values"),
        ([], "got 0 values"),
        (torch.tensor(1.0), r"got a Tensor of shape \(\)"),
        (1.0, r"got 1\.0 \(float\)"),
        (None, r"got None \(NoneType\).*lack a return statement"),
        ("yes", r"got 'yes' \(str\)"),
        ({0: 1.0, 1: 0.0, 2: 1.0}, r"\(dict\)"),
        ({1.0, 2.0, 3.0}, r"\(set\)"),
    ],
)
def test_a_reward_that_is_no_number_gets_a_sentence(values, message):
    expected = rf"'score' must return one number or None for each of the 3 completions, .*{message}"
    with pytest.raises(ValueError, match=expected):
        check_reward_values("score", values, 3)


def takes_columns(completions, solution, **kwargs):
    return [0.0] * len(completions)


def takes_another_column(completions, answer, **kwargs):
    return [0.0] * len(completions)


def takes_the_prompt_of_one_row(prompt, completions, **kwargs):
    return [0.0] * len(completions)


async def waits(completions, answer, **kwargs):
    return [0.0] * len(completions)


def takes_everything(
    prompts, completions, completion_ids, solution, trainer_state, log_extra, log_metric, answer=None
):  # no **kwargs, and none needed
    return [0.0] * len(completions)


def takes_only_completions(completions):
    return [0.0] * len(completions)


def takes_by_position(completions, solution, /, **kwargs):
    return [0.0] * len(completions)


def adds_an_argument(function):
    @wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, answer=1, **kwargs)

    return wrapper


class Judge:
    def __call__(self, completions, answer, **kwargs):
        return [0.0] * len(completions)


def check_parameters(reward_funcs, train_dataset=PROBLEMS, eval_dataset=None, **trainer_kwargs):
    args = tiny_config("unused", **trainer_kwargs.pop("config", {}))
    check_reward_parameters(reward_funcs, train_dataset, eval_dataset, args, trainer_kwargs)


@pytest.mark.parametrize(
    "accepted",
    [
        takes_columns,
        takes_everything,
        adds_an_argument(takes_another_column),
        partial(takes_another_column, answer=["2"]),
        [math_verify_reward, boxed_format_reward],
        ["org/reward-model", tiny_model()],
        min,
        None,
    ],
    ids=["columns", "everything", "decorated", "partial", "two", "name and model", "built-in", "none"],
)
def test_rewards_that_can_be_called_are_accepted(accepted):
    check_parameters(accepted)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (takes_another_column, r"'takes_another_column' requires \['answer'\], `train_dataset` has the columns "
                               r"\['prompt', 'solution'\]"),
        (waits, r"'waits' requires \['answer'\]"),
        (Judge(), r"'Judge' requires \['answer'\]"),
        (Judge().__call__, r"'__call__' requires \['answer'\]"),
        (partial(takes_another_column, solution=1), r"'takes_another_column' requires \['answer'\]"),
        (takes_the_prompt_of_one_row, r"requires \['prompt'\].*TRL passes \['prompts', .*every column but `prompt`"),
        ([takes_columns, takes_another_column], "'takes_another_column' requires"),
        (takes_only_completions, r"does not take \['prompts', 'completion_ids', .* 'solution'\]\. Add \*\*kwargs"),
        (takes_by_position, r"takes \['completions', 'solution'\] by position only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_reward_that_cannot_be_called_is_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        check_parameters(refused)


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"vllm_mode": "server", "world_size": 2}, "got 2 processes that share one vLLM server"),
        ({"vllm_mode": "colocate", "vllm_tensor_parallel_size": 4}, "got 4 processes that share one vLLM engine"),
        ({"vllm_mode": "server", "world_size": 1}, None),
        ({"vllm_mode": "colocate", "world_size": 2}, None),
        ({"use_vllm": False, "world_size": 2}, None),
    ],
)
def test_tools_need_an_engine_for_each_process(settings, refused):
    args = SimpleNamespace(**{"use_vllm": True, "world_size": 1, "vllm_tensor_parallel_size": 1} | settings)
    with nullcontext() if refused is None else pytest.raises(ValueError, match=refused):
        check_tools_with_vllm(args)


def test_the_columns_that_count_are_those_that_the_trainer_passes_on():
    answers = PROBLEMS.rename_column("solution", "answer")
    check_parameters(takes_another_column, answers, {"gsm8k": answers})
    with pytest.raises(ValueError, match=r"`eval_dataset\['gsm8k'\]` has the columns \['prompt', 'solution'\]"):
        check_parameters(takes_another_column, answers, {"math": answers, "gsm8k": PROBLEMS})
    left = r"the columns \['prompt', 'solution'\], of which `remove_unused_columns=True` leaves \['prompt'\]"
    with pytest.raises(ValueError, match=rf"requires \['solution'\], `train_dataset` has {left}.*unused_columns=False"):
        check_parameters(takes_columns, config={"remove_unused_columns": True})
    with pytest.raises(ValueError, match=r"requires \['answer'\]"):
        check_parameters(takes_another_column, PROBLEMS.to_iterable_dataset())
    unknown = IterableDataset.from_generator(lambda: iter(PROBLEMS))
    check_parameters(takes_another_column, unknown)
    check_parameters(takes_another_column, rollout_func=scripted_rollout)
    check_parameters(takes_another_column, environment_factory=Judge)
    with pytest.raises(ValueError, match=r"requires \['answer'\]"):
        check_parameters(takes_another_column, rollout_func=None, environment_factory=None)


def takes_only_the_prompt(prompts, completions, **kwargs):
    return [0.0] * len(prompts)


@pytest.mark.parametrize("name", ["prompts", "completions", "trainer_state", "log_extra", "log_metric"])
def test_a_column_with_the_name_of_an_argument_is_refused(name):
    rows = PROBLEMS.add_column(name, ["a"] * len(PROBLEMS))
    with pytest.raises(ValueError, match=rf"`train_dataset` has \['{name}'\]\. Rename or remove it"):
        check_parameters(takes_columns, rows)
    check_parameters(tiny_model(), rows)  # a reward model gets no columns
    check_parameters(takes_only_the_prompt, rows, config={"remove_unused_columns": True})


@pytest.mark.parametrize("name", ["completion", "completion_ids"])
def test_a_column_that_trl_leaves_out_is_no_argument(name):
    check_parameters(takes_columns, PROBLEMS.add_column(name, ["a"] * len(PROBLEMS)))


def test_the_arguments_are_those_that_trl_passes(tmp_path):
    """In one training step: what the check takes for granted is all that arrives."""
    seen = []

    def reward(**kwargs):
        seen.append(set(kwargs))
        return [0.0] * len(kwargs["completions"])

    trainer(tmp_path, reward_funcs=reward).train()
    assert seen[0] == {*_PASSED_BY_TRL, "solution"}


@pytest.mark.parametrize(
    ("num_processes", "sharded", "refused"), [(2, True, True), (1, True, False), (2, False, False), (1, False, False)]
)
def test_tools_need_complete_weights_in_each_process(num_processes, sharded, refused):
    with pytest.raises(ValueError, match="got FSDP or ZeRO-3 with 2") if refused else nullcontext():
        check_tools_without_vllm(num_processes, sharded)


class Correct:
    """A callable object, which TRL logs under the name of its class."""

    def __call__(self, completions, **kwargs):
        return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("given", "functions", "logged"),
    [
        ("Correct", Correct(), ["Correct"]),
        ("boxed_format_reward", [partial(boxed_format_reward)], ["boxed_format_reward"]),
        (None, [boxed_format_reward, partial(math_verify_reward)], ["boxed_format_reward", "math_verify_reward"]),
    ],
)
def test_the_reward_of_pass_at_k_is_named_as_trl_logs_it(tmp_path, given, functions, logged):
    args = tiny_config(tmp_path, pass_at_k_reward=given, num_generations_eval=2)
    evaluated = trainer(tmp_path, args=args, reward_funcs=functions, eval_dataset=PROBLEMS)
    assert evaluated.reward_func_names == logged == reward_names(functions)
    assert {"eval_pass@1", "eval_pass@2"} <= set(evaluated.evaluate())


def test_a_reward_that_is_not_there_is_refused_before_the_model_loads(tmp_path, no_model, chat_model_dir):
    args = tiny_config(tmp_path, pass_at_k_reward="Correct")
    with pytest.raises(ValueError, match=r"one of the reward functions \['boxed_format_reward'\], got 'Correct'"):
        trainer(tmp_path, model=str(chat_model_dir), args=args, reward_funcs=boxed_format_reward)


def test_a_reward_is_checked_before_the_model_loads(tmp_path, no_model, chat_model_dir):
    with pytest.raises(ValueError, match=r"'scripted_reward' requires \['score'\]"):
        trainer(tmp_path, model=str(chat_model_dir), reward_funcs=scripted_reward)


@pytest.mark.parametrize("missing", ["./no/such", "/no/such", "~/no-such", "outputs/run/checkpoint-9", "outputs/run/"])
def test_a_model_directory_that_does_not_exist_is_named(tmp_path, no_model, missing):
    with pytest.raises(ValueError, match=rf"got '{missing}': there is no such directory"):
        trainer(tmp_path, model=missing)


def test_a_tilde_that_nothing_expands_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "policy").mkdir()
    with pytest.raises(ValueError, match=rf"`~` is not expanded here; write '{tmp_path}/policy'"):
        trainer(tmp_path, model="~/policy")


def test_a_name_that_may_be_of_the_hub_is_said_to_be_no_directory_either(tmp_path):
    with pytest.raises(OSError, match=r"'outputs/no-such' is not a local directory, and could not be loaded"):
        trainer(tmp_path, model="outputs/no-such", processing_class=None)


# ---- Tokens


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("17+8-12=?", None),  # `?` is a token of its own, and the unknown one
        ([{"role": "user", "content": "17+8-12=?\n"}], None),
        ("Add 1 and 2?", r"50 % of the tokens .* '\?'.* reads 'Add 1 and 2\?' as '\?\?\? 1 \?\?\? 2\?'"),
        ([{"role": "user", "content": "What?"}], "80 % of the tokens"),
        ([{"role": "user", "content": [{"type": "text", "text": "What?"}]}], None),  # parts are not looked at
    ],
)
def test_prompts_that_the_tokenizer_cannot_read_are_warned_about(prompt, message, caplog):
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny_policy"))
    warn_of_unknown_tokens(Dataset.from_dict({"prompt": [prompt] * 100}), tokenizer)
    assert re.search(message, caplog.text) if message else not caplog.records
    assert len(caplog.records) == (message is not None)


def test_the_trainer_warns_before_it_trains(tmp_path, caplog):
    trainer(tmp_path)
    assert "unknown token" not in caplog.text
    trainer(tmp_path, train_dataset=PROBLEMS.map(lambda row: {"prompt": "é ñ ü"}))
    assert "unknown token '<unk>'" in caplog.text


def test_the_parameters_that_columns_are_passed_to():
    def needs(completions, solution, level=None, **kwargs):
        return []

    def may_use(prompts, completions, trainer_state, solution=None, *, score, **kwargs):
        return []

    assert column_parameters([needs]) == {"solution": True, "level": False}
    assert column_parameters([may_use, needs]) == {"solution": True, "score": True, "level": False}
    assert column_parameters([may_use]) == {"solution": False, "score": True}
    assert column_parameters([boxed_format_reward, tiny_model()]) == {}
