"""Public name of [`opo_trl.algorithm.baselines`]."""

from .algorithm.baselines import opo_advantages, optimal_baseline, takes_part, token_uncertainty

__all__ = ["opo_advantages", "optimal_baseline", "takes_part", "token_uncertainty"]
