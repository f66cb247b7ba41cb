"""Measuring a policy: pure functions over plain records, and sampling apart."""

from .pass_at_k import bootstrap_interval, pass_at_k

__all__ = ["bootstrap_interval", "pass_at_k"]
