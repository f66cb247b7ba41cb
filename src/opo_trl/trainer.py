"""The OPO trainer. Each private name of TRL that it touches is pinned by `tests/test_contract.py`."""

from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import has_length
from trl import GRPOTrainer

from .algorithm.baselines import optimal_baseline, reward_range, takes_part, uncertainties
from .algorithm.loss import loss_normalizer, policy_gradient_loss
from .algorithm.metrics import rollout_metrics
from .algorithm.paper import METHOD, PAPER
from .algorithm.rollout import Rollout, combine_rewards, estimate_advantages, sum_over_tokens
from .config import OPOConfig
from .evaluation.pass_at_k import CorrectCompletions
from .on_policy.on_policy_checks import OnPolicyChecks
from .on_policy.preflight import check_arguments, pass_at_k_reward
from .on_policy.rollout_position import check_rollout_size
from .report.logged_completions import LoggedCompletions
from .rollouts.rounds import Round
from .rollouts.step_rollouts import StepRollouts
from .rollouts.streamed_steps import StreamedSteps
from .runs.measured_phases import MeasuredPhases
from .runs.reliable_runs import ReliableRuns
from .runs.tracking import versions
from .update.planned_updates import PlannedUpdates
from .update.rollout_batch import loss_mask


class OPOTrainer(
    OnPolicyChecks,
    StepRollouts,
    StreamedSteps,
    PlannedUpdates,
    LoggedCompletions,
    MeasuredPhases,
    ReliableRuns,
    GRPOTrainer,
):
    r"""
    Trainer for OPO, On-Policy RL with Optimal reward baseline ([arXiv
    2505.23585](https://huggingface.co/papers/2505.23585)).

    A drop-in for [`~trl.GRPOTrainer`]: the same constructor, datasets, rewards, tools and engines. The algorithm is in
    this class, and the rest in the mixins before [`~trl.GRPOTrainer`], one of each folder. What differs:

    1. The advantage is the reward minus the optimal baseline of its group, `b* = sum_i l_i r_i / sum_i l_i`
       ([`~opo_trl.baselines.opo_advantages`]), not divided by a standard deviation. Override [`baseline`] for another.
    2. Every rollout batch gives exactly one optimizer step and is thrown away, so there is no importance ratio, no
       clipping, no reference model, no KL term and no entropy bonus: the loss is `-sum_t A_i log pi(y_i,t)` under one
       normaliser for the rollout batch.
    3. What would make it off-policy by accident is refused before training starts: config fields that contradict OPO
       ([`OPOConfig`]), a plain `GRPOConfig`, and a sampler that is not the policy, down to what a model's own
       generation config sets. A vLLM engine gets the trainer's dtype, and its first completions are compared with
       the policy ([`~opo_trl.on_policy.self_test.SelfTest`]). Dropout of every kind is switched off.
    4. Runs resume bitwise, survive kills and failing rewards, and every checkpoint that should be pushed is
       ([`~opo_trl.runs.reliable_runs.ReliableRuns`]).

    With the defaults `sum_i l_i A_i = 0` in every group, so the logged loss is 0 by construction; with another
    `length_exponent`, `baseline_weight="uncertainty"` or an own baseline its value has no meaning. Watch `reward`,
    `grad_norm`, `entropy` and the `opo/` metrics ([`~opo_trl.algorithm.metrics.rollout_metrics`]).

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from opo_trl import OPOConfig, OPOTrainer
    >>> from opo_trl.rewards import math_verify_reward

    >>> trainer = OPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=math_verify_reward,
    ...     args=OPOConfig(output_dir="qwen-opo"),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model, reward_funcs, train_dataset, eval_dataset, processing_class, *args, **kwargs:
            As in [`~trl.GRPOTrainer`].
        args ([`OPOConfig`], *optional*):
            Configuration. `None` builds an [`OPOConfig`]; any other class is refused.

    Attributes:
        weigh_tokens (`bool`):
            Class attribute, `False`. A subclass that sets it gets the weights of single tokens in [`baseline`], and may
            return a baseline, and so an advantage, for each of them.

    Raises:
        ValueError: If `args` is not an [`OPOConfig`] or contradicts OPO; if a dataset is empty, lacks `prompt`, or
            holds fewer prompts than one rollout batch; if message prompts meet a tokenizer without a chat template; if
            the model has no trainable parameter, or its generation config makes the sampler another distribution than
            the policy; during training, on all ranks alike, if a reward is infinite, or, before the first step, if a
            vLLM engine does not sample from the policy.
        RewardError: During training, on all ranks alike, if a reward or rollout function raises on any of them.
    """

    weigh_tokens = False

    args: OPOConfig
    model: Any

    _tag_names = ["trl", "opo"]
    _name = "OPO"
    _paper = PAPER

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: OPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            model_id = model if isinstance(model, str) else model.config.name_or_path
            args = OPOConfig(f"{model_id.rstrip('/').split('/')[-1] or 'model'}-OPO")
        if not isinstance(args, OPOConfig):
            raise ValueError(
                f"OPOTrainer takes an OPOConfig as `args`, got {type(args).__name__}, which does not hold training to "
                "one optimizer step per rollout batch. Build an OPOConfig with the same fields."
            )
        args.check_contract()
        processing_class = check_arguments(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *rest, **kwargs
        )
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *rest, **kwargs)
        self._correct = CorrectCompletions(pass_at_k_reward(args.pass_at_k_reward, self.reward_func_names))
        self._rewards_per_func: torch.Tensor | None = None  # from TRL's scoring to the advantages

    def baseline(self, rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        r"""
        Return what is subtracted from the rewards: OPO's optimal baseline (arXiv 2505.23585, Eq. 10). To be overridden.

        A completion that takes no part, because it is unscorable or has no trainable token, has reward 0 and weight 0.
        With `max_refill_rounds` it gets the prompts of one round of the step alone, and with `stream_rollouts` those of
        one wave: what it returns for a prompt must not depend on the other prompts then.

        Args:
            rewards (`torch.Tensor` of shape `(P, K)`):
                Reward of each of the K completions of each of P prompts, of all ranks.
            weights (`torch.Tensor` of shape `(P, K)`, or `(P, K, T)` with `weigh_tokens`):
                Weight of each completion, or of each of its tokens, as `baseline_weight` says.

        Returns:
            `torch.Tensor` of shape `(P, 1)` or `(P, K)`; with `weigh_tokens` also `(P, 1, T)` or `(P, K, T)`.
        """
        return optimal_baseline(rewards, sum_over_tokens(weights), self.args.length_exponent)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as [`~transformers.Trainer.evaluation_loop`] does, and add pass@k of the same completions."""
        self.args.check_evaluation_batch()
        self._correct.clear()
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if has_length(dataloader.dataset):  # the shard of a streamed dataset has a `__len__` that raises
            # To fill the last batch of all ranks, accelerate repeats the first problems.
            for name, value in self._correct.pass_at_k(len(dataloader.dataset), self.num_generations_eval).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """
        Not supported: transformers makes a new model for every trial with a `model_init`, which neither trainer takes.

        Raises:
            NotImplementedError: Always, with what to do instead.
        """
        raise NotImplementedError(
            "`hyperparameter_search` needs a function that makes the model anew for every trial, and OPOTrainer, like "
            "GRPOTrainer, takes no `model_init`. Build a new OPOTrainer for every trial in the objective of a search "
            "and return a metric of `trainer.evaluate()`, such as 'eval_reward'."
        )

    def _describe(self) -> dict[str, Any]:
        return {"opo": {**self.args.contract(), "versions": versions("opo-trl", "trl", "transformers", "torch")}}

    def _describe_method(self) -> tuple[str, dict[str, Any]]:
        weight = f"{self.args.baseline_weight}, to the power of {self.args.length_exponent:g}"
        return METHOD, {"weight in the baseline": weight}

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards_per_func: torch.Tensor = super()._calculate_rewards(*args, **kwargs)  # (N, F), of all ranks
        if not self.model.training:
            self._correct.add(rewards_per_func, self.reward_func_names, self.num_generations_eval)
        self._rewards_per_func = rewards_per_func
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.model.training:
            self._check_rows(inputs)
        sampled = self._sample_step(inputs, self._sample_round)
        sampled.batch["loss_normalizer"] = self._loss_normalizer(sampled.rollout)
        self._log_step(sampled.rollout)
        self._plan_update(sampled.batch)
        return sampled.batch

    def _check_rows(self, rows: list[dict[str, Any]]) -> None:
        """Refuse a step that does not get the rows of a rollout batch."""
        expected = self.args.per_device_train_batch_size * self.args.steps_per_generation
        check_rollout_size(self.accelerator, len(rows), expected)

    def _loss_normalizer(self, rollout: Rollout) -> torch.Tensor:
        """What the loss of each micro-batch of a rollout batch is divided by."""
        refills = self.model.training and self.args.max_refill_rounds > 0
        return loss_normalizer(
            self.loss_type,
            rollout.informative_lengths if refills else rollout.lengths,
            self.max_completion_length,
            self.accelerator.num_processes,
        )

    def _log_step(self, rollout: Rollout) -> None:
        for name, value in rollout_metrics(rollout).items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        self._phases.count("trained", rollout.lengths[rollout.informative].sum().item())

    def _sample_round(self, inputs: list[dict[str, Any]]) -> Round:
        """Generate and score this rank's rows, and estimate their advantages: all of a step, or one of its rounds."""
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if not self._corrects_sampler:  # rollout functions often return placeholders, which need not fit the tokens
            batch.pop("sampling_per_token_logps", None)
        assert self._rewards_per_func is not None
        rewards_per_func, self._rewards_per_func = self._rewards_per_func, None
        rewards = combine_rewards(rewards_per_func, self.reward_weights, group_size)  # (P, K)
        lengths = self.accelerator.gather(loss_mask(batch).sum(dim=1)).view_as(rewards)  # (P, K)
        rollout = estimate_advantages(rewards, lengths, self._weights(batch, rewards, lengths), self.baseline)
        batch["advantages"] = rollout.advantages_of(self._rows_of_rank(batch), batch["completion_ids"].size(1))
        self._log_rollout(rollout)
        return Round(batch, rollout, rewards_per_func)

    def _rows_of_rank(self, batch: dict[str, Any]) -> slice:
        """Positions of this rank's completions among those of all ranks: a group may be split across ranks."""
        rows = len(batch["completion_ids"])
        return slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)

    def _weights(
        self, batch: dict[str, Any], rewards: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:  # (P, K), (P, K) -> (P, K) or (P, K, T)
        """What the baseline weighs by; the length where all rewards of a group are equal: any weight does there."""
        if self.args.baseline_weight == "length" and not self.weigh_tokens:
            return lengths
        scored = takes_part(rewards, lengths)  # (P, K)
        lowest, highest = reward_range(rewards, scored)  # (P, 1)
        differ = (lowest < highest).expand_as(rewards)  # (P, K)
        weights = mask = loss_mask(batch).float()  # (N, C), of this rank
        if self.args.baseline_weight == "uncertainty":
            chosen = (differ & scored).flatten()[self._rows_of_rank(batch)]  # (N,)
            weights = torch.where(chosen.unsqueeze(1), uncertainties(self._logps(batch, chosen), mask), mask)
        if not self.weigh_tokens:
            return torch.where(differ, self.accelerator.gather(weights.sum(dim=1)).view_as(rewards), lengths)
        weights = self.accelerator.gather(self.accelerator.pad_across_processes(weights, dim=1))
        return weights.view(*rewards.shape, -1)

    def _logps(self, batch: dict[str, Any], chosen: torch.Tensor) -> torch.Tensor:  # (N,) -> (N, C)
        """Log-probabilities of the chosen rows of this rank: the sampler's own if the loss corrects them."""
        if self._corrects_sampler and "sampling_per_token_logps" in batch:
            return batch["sampling_per_token_logps"].nan_to_num(0.0)
        return self._score_rows(batch, chosen)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        mode = "train" if self.model.training else "eval"
        mask = loss_mask(inputs)  # (B, C)
        logps, entropies, aux_loss = self._token_scores(
            model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )  # (B, C), (B, C), scalar
        correction = self._sampler_correction(logps, inputs, mask)
        token_weights = None if correction is None else correction.weights
        loss = policy_gradient_loss(logps, inputs["advantages"], mask, inputs["loss_normalizer"], token_weights)
        if self.aux_loss_enabled:  # a router's load balancing is a mean per micro-batch, as in the parent
            micro_batches = self.current_gradient_accumulation_steps if mode == "train" else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / micro_batches
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        for reduction, name, values, counted in [] if correction is None else correction.metrics(mask):
            self._statistics.add(reduction, name, values, counted)
        self._statistics.add("mean", "entropy", entropies.detach(), mask)
        self._log_logps(inputs, logps, mask)
        if mode == "eval" or self.accelerator.sync_gradients:  # the last micro-batch of the step
            for name, value in self._statistics.reduce(self.accelerator.gather).items():
                self._metrics[mode][name].append(value)
        return loss
