"""Reward functions for mathematics, usable in any TRL trainer."""

from .boxed_format import boxed_format_reward
from .math_verify import math_verify_reward

__all__ = ["boxed_format_reward", "math_verify_reward"]
