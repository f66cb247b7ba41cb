"""The OPO trainer. Each private name of TRL that it touches is pinned by `tests/test_contract.py`."""

from functools import partial
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import nn
from transformers.trainer_utils import has_length
from trl import GRPOTrainer

from .algorithm.baselines import optimal_baseline, reward_range, takes_part, uncertainties
from .algorithm.loss import loss_normalizer, policy_gradient_loss
from .algorithm.metrics import rollout_metrics
from .algorithm.paper import METHOD, PAPER
from .algorithm.rollout import combine_rewards, estimate_advantages, sum_over_tokens
from .config import OPOConfig
from .evaluation.pass_at_k import CorrectCompletions
from .on_policy.determinism import disable_dropout
from .on_policy.engine_dtype import built_with_dtype, warn_of_other_dtype
from .on_policy.preflight import check_arguments, check_loaded_model, pass_at_k_reward
from .on_policy.rollout_position import check_position, check_rollout_size
from .on_policy.sampler_correction import correct_sampler
from .on_policy.sampler_drift import SamplerDriftWarning
from .on_policy.sampling_settings import check_generation_config
from .on_policy.self_test import SelfTest
from .rollouts.chosen_prompts import ChosenPrompts
from .rollouts.learning_signal import NoSignalWarning
from .rollouts.refilling import Refilling, check_refilling
from .rollouts.rounds import Round
from .rollouts.server_generation import check_weight_directory, server_generation
from .runs.phases import StepPhases
from .runs.reliable_runs import ReliableRuns
from .runs.tracking import versions
from .update.extra_forward import score_batch, score_planned_rows
from .update.planner import UpdatePlanner
from .update.regrouping import ObstacleAgreement, regrouping_obstacle
from .update.rollout_batch import FORWARD_ARGUMENTS, count_tokens, loss_mask
from .update.step_plan import StepPlan
from .update.step_statistics import StepStatistics


class OPOTrainer(ReliableRuns, GRPOTrainer):
    r"""
    Trainer for OPO, On-Policy RL with Optimal reward baseline ([arXiv
    2505.23585](https://huggingface.co/papers/2505.23585)).

    A drop-in for [`~trl.GRPOTrainer`]: the same constructor, datasets, rewards, tools and engines. What differs:

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

    Since `sum_i l_i A_i = 0` in every group, the logged loss is 0 by construction. Watch `reward`, `grad_norm`,
    `entropy` and the `opo/` metrics ([`~opo_trl.algorithm.metrics.rollout_metrics`]).

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
    _logs: dict[str, Any]
    _buffered_inputs: Any
    vllm_importance_sampling_correction: bool

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
        check_refilling(args, train_dataset)
        processing_class = check_arguments(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *rest, **kwargs
        )
        check_weight_directory(args)
        with server_generation(args), built_with_dtype(args, lambda: self.model):
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *rest, **kwargs)
        check_loaded_model(self.model, args, self.get_tp_size(), self.get_cp_size(), self.get_sp_size())
        disable_dropout(self.model)
        self._check_sampler()
        # To correct the sampler's mismatch, the parent would run an extra forward of all completions for the old
        # policy. On-policy the old policy is the one that the loss runs: the loss corrects, and the parent does not.
        self._correct_sampler = partial(
            correct_sampler,
            low=self.vllm_importance_sampling_clip_min,
            high=self.vllm_importance_sampling_clip_max,
            mask_outside=self.vllm_importance_sampling_mode == "token_mask",
        )
        self._corrects_sampler = (
            args.rollout_importance_sampling_correction
            if self.rollout_func is not None
            else self.use_vllm and self.vllm_importance_sampling_correction
        )
        self.vllm_importance_sampling_correction = False
        self.add_callback(NoSignalWarning)
        tolerance = args.vllm_logp_tolerance if self.use_vllm and self.rollout_func is None else None
        self.add_callback(SamplerDriftWarning(tolerance))
        self._self_test = SelfTest(
            self.accelerator,
            self.temperature,
            self._tokenizer.pad_token_id,
            tolerance,
            args.vllm_mode,
            lambda batch: self._token_scores(self.model, batch, compute_entropy=True)[:2],
        )
        if self.use_vllm and self.accelerator.is_main_process:
            warn_of_other_dtype(self.vllm_generation, args, self.model)
        self._rows_per_rank = args.per_device_train_batch_size * args.steps_per_generation
        self._planner = UpdatePlanner(
            micro_batches=args.steps_per_generation,
            num_ranks=self.accelerator.num_processes,
            skip_uninformative=args.skip_uninformative,
            pad_to_multiple_of=self.pad_to_multiple_of,
            rows_per_rank=self._rows_per_rank,
        )
        self._refilling = None
        if args.max_refill_rounds:
            self._refilling = Refilling(
                self.accelerator,
                max_rounds=args.max_refill_rounds,
                seed=args.seed,
                reward_names=self.reward_func_names,
                obstacle=self._obstacle,
                metrics=self._metrics["train"],
            )
        self._phases = StepPhases(self._metrics["train"])
        self.add_callback(self._phases)
        if self.use_vllm:
            synchronise = self.vllm_generation.sync_weights
            self.vllm_generation.sync_weights = self._phases.measured("sync_weights", synchronise)
        self._statistics = StepStatistics()
        self._agreement = ObstacleAgreement(self.accelerator)
        self._correct = CorrectCompletions(pass_at_k_reward(args.pass_at_k_reward, reward_funcs))
        self._chosen: ChosenPrompts | None = None
        if args.prompt_sampling == "informative":
            prompts_per_step = args.generation_batch_size // args.num_generations
            self._chosen = ChosenPrompts(
                self.accelerator,
                self.train_dataset,
                prompts_per_step,
                self.num_generations,
                args.seed,
                spare=prompts_per_step * args.max_refill_rounds,
            )
        # TRL calls the overrides below from one method of its own, which passes no values between them.
        self._rewards_per_func: torch.Tensor | None = None  # from scoring to the advantages
        self._rollout_batch: dict[str, Any] | None = None  # from the advantages to the micro-batches
        self._early_plan: StepPlan | None = None  # from the weights to the micro-batches

    def baseline(self, rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        r"""
        Return what is subtracted from the rewards: OPO's optimal baseline (arXiv 2505.23585, Eq. 10). To be overridden.

        A completion that takes no part, because it is unscorable or has no trainable token, has reward 0 and weight 0.

        Args:
            rewards (`torch.Tensor` of shape `(P, K)`):
                Reward of each of the K completions of each of the P prompts of all ranks.
            weights (`torch.Tensor` of shape `(P, K)`, or `(P, K, T)` with `weigh_tokens`):
                Weight of each completion, or of each of its tokens, as `baseline_weight` says.

        Returns:
            `torch.Tensor` of shape `(P, 1)` or `(P, K)`; with `weigh_tokens` also `(P, 1, T)` or `(P, K, T)`.
        """
        return optimal_baseline(rewards, sum_over_tokens(weights), self.args.length_exponent)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as [`~transformers.Trainer.evaluation_loop`] does, and add pass@k of the same completions."""
        self._correct.clear()
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if has_length(dataloader.dataset):  # the shard of a streamed dataset has a `__len__` that raises
            # To fill the last batch of all ranks, accelerate repeats the first problems.
            for name, value in self._correct.pass_at_k(len(dataloader.dataset), self.num_generations_eval).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as [`ReliableRuns`] does, after another check of the on-policy contract."""
        self.args.check_contract()
        self._check_sampler()
        self._self_test.start()
        return super().train(*args, **kwargs)

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        checkpoint = super()._find_checkpoint(resume_from_checkpoint)
        if self._chosen is not None:
            self._chosen.resume(checkpoint)
        return checkpoint

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._chosen is not None and self.args.should_save:
            self._chosen.save(output_dir)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        if self._chosen is not None and dataset is not None:
            self._chosen.dataset = dataset  # with the columns that the data loader keeps
        return super()._get_train_sampler(dataset)

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

    def _check_sampler(self) -> None:
        if self.rollout_func is None and not self.use_vllm:  # OPOConfig has judged every setting that vLLM is given
            check_generation_config(
                self.model,
                self.generation_config,
                self.temperature,
                self.processing_class,
                merged=not self.use_transformers_continuous_batching,
            )

    def _end_epoch(self, stops: bool) -> None:
        check_position(self.accelerator, self._step, self.args.steps_per_generation, "stop" if stops else "epoch")
        super()._end_epoch(stops)

    def _drop_unfinished_step(self) -> None:
        super()._drop_unfinished_step()
        self._rollout_batch = self._early_plan = None
        self._statistics = StepStatistics()

    def _describe(self) -> dict[str, Any]:
        return {"opo": {**self.args.contract(), "versions": versions("opo-trl", "trl", "transformers", "torch")}}

    def _describe_method(self) -> tuple[str, dict[str, Any]]:
        weight = f"{self.args.baseline_weight}, to the power of {self.args.length_exponent:g}"
        return METHOD, {"weight in the baseline": weight}

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        completion_ids, logprobs = super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        if self.model.training:
            self._self_test.check(self.model, prompt_ids, images, completion_ids, logprobs)
        return completion_ids, logprobs

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._phases.measure("score"):
            rewards_per_func: torch.Tensor = super()._calculate_rewards(*args, **kwargs)  # (N, F), of all ranks
        if not self.model.training:
            self._correct.add(rewards_per_func, self.reward_func_names, self.num_generations_eval)
        self._rewards_per_func = rewards_per_func
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        refilling = self._refilling if mode == "train" else None
        if mode == "train":
            check_rollout_size(self.accelerator, len(inputs), self._rows_per_rank)
        if refilling is None:
            sampled = self._sample_round(inputs)
        else:
            order = None if self._chosen is None else self._chosen.refill_order()
            sampled = refilling.sample_step(
                inputs, self.train_dataset, self.state.global_step, self._sample_round, order
            )
        output, rollout = sampled.batch, sampled.rollout
        lengths = rollout.lengths if refilling is None else rollout.informative_lengths
        output["loss_normalizer"] = loss_normalizer(
            self.loss_type, lengths, self.max_completion_length, self.accelerator.num_processes
        )
        metrics = rollout_metrics(rollout)
        if self._chosen is not None and self.model.training:
            metrics |= self._chosen.observe(rollout.rewards, takes_part(rollout.rewards, rollout.lengths))
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        self._phases.count("trained", rollout.lengths[rollout.informative].sum().item())
        self._rollout_batch = output
        return output

    def _sample_round(self, inputs: list[dict[str, Any]]) -> Round:
        """Generate and score this rank's rows, and estimate their advantages: all of a step, or one of its rounds."""
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        assert self._rewards_per_func is not None
        rewards_per_func, self._rewards_per_func = self._rewards_per_func, None
        rewards = combine_rewards(rewards_per_func, self.reward_weights, group_size)  # (P, K)
        lengths = self.accelerator.gather(loss_mask(batch).sum(dim=1)).view_as(rewards)  # (P, K)
        rollout = estimate_advantages(rewards, lengths, self._weights(batch, rewards, lengths), self.baseline)
        batch["advantages"] = rollout.advantages_of(self._rows_of_rank(batch), batch["completion_ids"].size(1))
        logged, shown = self._logs["advantages"], rollout.completion_advantages.flatten().tolist()
        for _ in range(min(len(logged), len(shown))):  # the parent has just logged GRPO's advantages
            logged.pop()
        logged.extend(shown)
        return Round(batch, rollout, rewards_per_func)

    def _generate(self, prompts: list[Any]) -> Any:
        mode = "train" if self.model.training else "eval"
        with self._phases.measure("generate"):
            output = super()._generate(prompts)
        mean_length = self._metrics[mode]["completions/mean_length"][-1]  # over the completions of all ranks
        self._phases.count("generated", mean_length * len(prompts) * self.accelerator.num_processes)
        return output

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
        score = lambda part, batch_size: self._token_scores(self.model, part, batch_size=batch_size)[0]  # noqa: E731
        planner, obstacle = UpdatePlanner(micro_batches=1), self._obstacle(batch)
        if self.model.training:
            planner, obstacle = self._planner, self._agreement.agree(obstacle, batch)
        if obstacle is not None:
            return score_batch(batch, planner.micro_batches, score)
        step = planner.plan_before_advantages(batch, chosen, self.accelerator)
        self._early_plan = step if self.model.training else None
        return score_planned_rows(step, batch["completion_ids"].size(1), score)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.model.training:
            check_position(self.accelerator, self._step, self.args.steps_per_generation)
            if self._chosen is not None and self._step % self.args.steps_per_generation == 0:
                generation_batch, metrics = self._chosen.draw_rows(self.state.global_step, len(generation_batch))
                for name, value in metrics.items():
                    self._metrics["train"][name].append(value)
        self._rollout_batch = self._early_plan = None
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        batch, self._rollout_batch = self._rollout_batch, None
        earlier, self._early_plan = self._early_plan, None
        if not self.model.training:
            return inputs
        if batch is not None:  # the first micro-batch of a step
            if self._agreement.agree(self._obstacle(batch), batch) is None:
                del inputs
                self._buffered_inputs = None  # frees TRL's copy before rows move, and the batch before they are padded
                step = self._planner.plan_step(batch, self.accelerator, earlier)
                del batch, earlier
                self._buffered_inputs = step.micro_batches()
            attended, padded = count_tokens(self._buffered_inputs)
            self._statistics.add_ratio("opo/padding_fraction", padded - attended, padded)
        position = self._step % self.args.steps_per_generation
        micro_batch, self._buffered_inputs[position] = self._buffered_inputs[position], None  # each runs once
        return micro_batch

    def _obstacle(self, batch: dict[str, Any]) -> str | None:
        return regrouping_obstacle(
            batch,
            compiled=self.args.torch_compile or is_compiled_module(self.model),
            device_type=self.accelerator.device.type,
            router_loss=self.aux_loss_enabled,
        )

    def _token_scores(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any, Any]:
        """Run a micro-batch: log-probabilities (B, C), and entropies (B, C) and the router's loss where asked for."""
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),  # (B, T)
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),  # (B, T)
            logits_to_keep=inputs["completion_ids"].size(1),
            **{name: inputs[name] for name in FORWARD_ARGUMENTS if name in inputs},
            **options,
        )

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        mode = "train" if self.model.training else "eval"
        mask = loss_mask(inputs)  # (B, C)
        logps, entropies, aux_loss = self._token_scores(
            model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )  # (B, C), (B, C), scalar
        token_weights = None
        if self._corrects_sampler and "sampling_per_token_logps" in inputs:
            correction = self._correct_sampler(logps.detach(), inputs["sampling_per_token_logps"], mask)
            token_weights = correction.weights
            for reduction, name, values, counted in correction.metrics(mask):
                self._statistics.add(reduction, name, values, counted)
        loss = policy_gradient_loss(logps, inputs["advantages"], mask, inputs["loss_normalizer"], token_weights)
        if self.aux_loss_enabled:  # a router's load balancing is a mean per micro-batch, as in the parent
            micro_batches = self.current_gradient_accumulation_steps if mode == "train" else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / micro_batches
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        self._statistics.add("mean", "entropy", entropies.detach(), mask)
        if mode == "eval" or self.accelerator.sync_gradients:  # the last micro-batch of the step
            for name, value in self._statistics.reduce(self.accelerator.gather).items():
                self._metrics[mode][name].append(value)
        return loss
