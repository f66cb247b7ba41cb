"""Deprecation warnings about names that TRL uses do not reach users; users' own warnings do."""

import warnings

import pytest

from opo_trl.runs.renamed_names import ignore_warnings_of_trls_calls
from tiny import scripted_trainer, tiny_config


@pytest.fixture
def shown():
    """Warnings as a user gets them, under the filters of the package alone."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        ignore_warnings_of_trls_calls()
        yield caught


def future(caught):
    return [str(warning.message) for warning in caught if warning.category is FutureWarning]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_run_shows_no_warning_of_renamed_names(tmp_path, shown, checkpointing):
    trainer = scripted_trainer(tmp_path, gradient_checkpointing=checkpointing)
    trainer.train()
    assert future(shown) == []
    assert trainer.model.is_activation_checkpointing == checkpointing


def test_the_newer_name_takes_precedence_over_trls_default(tmp_path, shown):
    names = ("gradient_checkpointing", "activation_checkpointing")
    config = tiny_config(tmp_path, gradient_checkpointing=True)
    if not hasattr(config, names[1]):
        pytest.skip("this transformers has the older name alone")
    assert [getattr(config, name) for name in names] == [True, True]
    config = tiny_config(tmp_path, gradient_checkpointing=True, activation_checkpointing=False)
    assert [getattr(config, name) for name in names] == [False, False]
    assert future(shown) == []


def test_warnings_of_users_are_shown(tmp_path, shown):
    def reward(completions, **kwargs):
        warnings.warn("`score` is deprecated and will be removed in v6", FutureWarning, stacklevel=1)
        return [float(len(text)) for text in completions]

    scripted_trainer(tmp_path, reward_funcs=reward).train()
    assert future(shown)[:1] == ["`score` is deprecated and will be removed in v6"]
