"""Names that transformers has renamed and TRL still uses: their deprecation warnings are not for users of a trainer."""

import dataclasses
import warnings
from typing import Any

_FIELDS = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# What TRL 1.16 calls around every generation (`trl.models.utils`), deprecated by transformers 5.23.
_METHODS = ("is_gradient_checkpointing", "gradient_checkpointing_enable", "gradient_checkpointing_disable")


def use_new_names(args: Any) -> None:
    """
    Give transformers' newer fields the values of the older ones, before a configuration's `__post_init__` warns.

    TRL 1.16 sets `gradient_checkpointing=True` by default, so that every configuration would warn. Delete this when TRL
    sets `activation_checkpointing`.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration whose fields are set. A newer field that has a value keeps it.
    """
    fields = {field.name for field in dataclasses.fields(args)}
    for old, new in _FIELDS.items():
        if new in fields and getattr(args, new) is None:  # transformers before 5.23 has the older ones alone
            setattr(args, new, getattr(args, old))


def ignore_warnings_of_trls_calls() -> None:
    """
    Ignore transformers' `FutureWarning` about each method that TRL calls by its older name, and no other warning.

    Delete this when TRL calls `activation_checkpointing_enable`; `tests/test_contract.py` fails then.
    """
    for name in _METHODS:
        message = rf"`{name}` is deprecated and will be removed in v6"
        warnings.filterwarnings("ignore", message, FutureWarning, r"transformers\.modeling_utils")
