"""Which prompts a step samples: more often those whose groups are likely to be informative, without replacement."""

import random
from typing import Any, NamedTuple

import torch

from .prompt_outcomes import PromptOutcomes

UNIFORM_SHARE = 0.1  # of the probability: every prompt keeps being seen
HALF_LIFE = 4  # passes over the prompts after which an observation counts half
LEAST_CHANCE = 1e-6  # keeps probabilities defined where no prompt has a chance


class Draw(NamedTuple):
    """The prompts of a step, in the order in which they were drawn."""

    prompts: torch.Tensor  # (P,): positions in the training set, all different
    spare: torch.Tensor  # (S,): those drawn next, for refill rounds
    probabilities: torch.Tensor  # (P,): of being drawn first
    chances: torch.Tensor  # (P,): predicted, of an informative group


def draw_without_replacement(
    probabilities: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:  # (N,) -> (count,)
    """
    Draw positions one after another, each in proportion to its probability among those that are left.

    The order of exponential clocks with these rates: one pass over the array instead of `count` draws.
    """
    clocks = torch.empty(len(probabilities), dtype=torch.float64).exponential_(generator=generator)
    return torch.topk(clocks.div_(probabilities), count, largest=False).indices


class PromptSampling:
    r"""
    Draws the prompts of each step, and keeps counts of their rewards.

    Prompt i is drawn first with the probability

        q_i = u / N + (1 - u) c_i / sum_j c_j,      u = UNIFORM_SHARE,

    where c_i is the chance of an informative group that [`~opo_trl.rollouts.prompt_outcomes.PromptOutcomes`] predicts,
    and the others follow without replacement. The draw is a function of the seed, the step and the rewards so far.

    Sources of facts: predicting from earlier rewards which prompts are uninformative (GRESO, arXiv 2506.02177);
    a Beta posterior of the informative fraction with forgetting (marin#8765); pools that prompts only leave run empty
    (prime-rl#2667), hence the uniform share.

    Args:
        num_prompts (`int`):
            Prompts in the training set, N.
        prompts_per_step (`int`):
            Prompts of a rollout batch, P.
        group_size (`int`):
            Completions per prompt, K.
        seed (`int`):
            Seed of the draws.
        spare (`int`, *optional*, defaults to `0`):
            Prompts to draw after those of the step, for refill rounds; fewer where the training set ends.
    """

    def __init__(self, num_prompts: int, prompts_per_step: int, group_size: int, seed: int, spare: int = 0) -> None:
        self.count, self.seed, self.spare = prompts_per_step, seed, min(spare, num_prompts - prompts_per_step)
        self.outcomes = PromptOutcomes(num_prompts, group_size, HALF_LIFE * num_prompts / prompts_per_step)

    def probabilities(self, chances: torch.Tensor) -> torch.Tensor:  # (N,) -> (N,)
        """Probability of each prompt to be drawn first."""
        chances = chances.clamp(min=LEAST_CHANCE)
        return UNIFORM_SHARE / len(chances) + (1 - UNIFORM_SHARE) * chances / chances.sum(dtype=torch.float64)

    def draw(self, step: int) -> tuple[Draw, dict[str, float]]:
        """
        Draw the prompts of a step.

        Args:
            step (`int`):
                Optimizer steps made so far.

        Returns:
            `tuple[Draw, dict[str, float]]`: The prompts, and metrics of the distribution that they come from.
        """
        chances = self.outcomes.chances()  # (N,)
        probabilities = self.probabilities(chances)
        # torch's generator takes 32 bits of a seed; a hash keeps runs with neighbouring seeds apart.
        generator = torch.Generator().manual_seed(random.Random(f"prompts {self.seed} {step}").getrandbits(32))
        drawn = draw_without_replacement(probabilities, self.count + self.spare, generator)
        prompts, spare = drawn[: self.count], drawn[self.count :]
        relative = probabilities * len(probabilities)  # (N,), 1 where uniform
        metrics = {
            "rollouts/effective_prompts": torch.exp(-torch.xlogy(relative, relative).mean(dtype=torch.float64)).item(),
            "rollouts/moved_probability": (relative - 1).abs().mean(dtype=torch.float64).item() / 2,
            "rollouts/informative_if_uniform": chances.mean(dtype=torch.float64).item(),
            "rollouts/informative_predicted": chances[prompts].mean().item(),
        }
        return Draw(prompts, spare, probabilities[prompts], chances[prompts]), metrics

    def observe(self, draw: Draw, rewards: torch.Tensor, scored: torch.Tensor) -> dict[str, float]:
        """
        Add the rewards of a step to the counts.

        Args:
            draw ([`Draw`]):
                Prompts of the step.
            rewards, scored (`torch.Tensor` of shape `(P, K)`):
                Reward of each completion, and whether it takes part.

        Returns:
            `dict[str, float]`: The share of informative groups, with which the prediction can be compared.
        """
        self.outcomes.forget()
        weights = 1 / (len(self.outcomes.counts[0]) * draw.probabilities)
        informative = self.outcomes.add(draw.prompts, rewards.cpu(), scored.cpu(), weights)
        return {"rollouts/informative_groups": informative.double().mean().item()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: two float32 for each prompt, and the prior."""
        return self.outcomes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a checkpoint's state."""
        self.outcomes.load_state_dict(state)
