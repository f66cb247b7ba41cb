"""The OPO trainer. Each private name of TRL that it touches is pinned by `tests/test_contract.py`."""

import functools
import inspect
import logging
import textwrap
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, gather_object, is_compiled_module
from torch import nn
from transformers import ProcessorMixin
from transformers.trainer_utils import has_length
from trl import GRPOTrainer

from .algorithm.baselines import opo_advantages, token_uncertainty
from .algorithm.metrics import rollout_metrics
from .config import OPOConfig
from .evaluation.pass_at_k import mean_pass_at_k
from .on_policy.determinism import disable_dropout
from .on_policy.preflight import (
    check_continuous_batching,
    check_data_parallel,
    check_datasets,
    check_model_directory,
    check_reward_parameters,
    check_rollout_correction,
    check_tokenizer,
    check_trainable,
    load_processor,
    pass_at_k_reward,
)
from .on_policy.rollout_position import EpochEnd, check_position
from .on_policy.sampler_correction import correct_sampler
from .on_policy.sampling_settings import check_law
from .rollouts.learning_signal import NoSignalWarning
from .runs.guarded_functions import FunctionGuard
from .runs.model_card import complete_model_card, is_hub_name
from .runs.pushing import PushingTrainer
from .runs.tracking import versions
from .update.microbatches import MEMORY_SHARE, cut_rows, deal_rows, plan_microbatches
from .update.step_statistics import StepStatistics

logger = logging.getLogger(__name__)

# What a rollout batch of text consists of: one row per completion, or one number for the whole batch.
_ROW_TENSORS = (
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "advantages",
    "tool_mask",
    "sampling_per_token_logps",
)
_SCALARS = ("num_items_in_batch", "loss_normalizer")


class OPOTrainer(PushingTrainer):
    r"""
    Trainer for OPO, On-Policy RL with Optimal reward baseline ([arXiv
    2505.23585](https://huggingface.co/papers/2505.23585)).

    A drop-in for [`~trl.GRPOTrainer`]: the same constructor, datasets, rewards, tools and engines. What differs:

    1. The advantage is the reward over the optimal baseline of its group, `b* = sum_i l_i r_i / sum_i l_i`
       ([`~opo_trl.baselines.opo_advantages`]), not divided by a standard deviation.
    2. Every rollout batch gives exactly one optimizer step and is thrown away, so there is no importance ratio, no
       clipping, no reference model, no KL term and no entropy bonus: the loss is `-sum_t A_i log pi(y_i,t)` under one
       normaliser for the whole batch.
    3. What would make it off-policy by accident is refused before training starts: config fields that contradict OPO
       ([`OPOConfig`]), a plain `GRPOConfig`, and a sampler that is not the policy, down to what a model's own
       generation config slips in. Dropout of every kind is switched off.

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

    Raises:
        ValueError: If `args` is not an [`OPOConfig`] or contradicts OPO; if a dataset is empty, lacks `prompt`, or
            holds fewer prompts than one rollout batch; if message prompts meet a tokenizer without a chat template; if
            `model` is a path that does not exist; if a reward function requires an argument that it will not get; if
            the model has no trainable parameter, or its generation config makes the sampler another distribution than
            the policy; during training, on all ranks alike, if a reward is infinite.
        RewardError: During training, on all ranks alike, if a reward or rollout function raises on any of them.
    """

    args: OPOConfig
    model: Any
    reward_funcs: list[Any]
    rollout_func: Any
    _step: int
    _tr_loss: torch.Tensor
    _logs: dict[str, Any]
    vllm_importance_sampling_correction: bool

    _tag_names = ["trl", "opo"]
    _name = "OPO"
    _paper = {
        "title": "On-Policy RL with Optimal Reward Baseline",
        "id": "2505.23585",
        "citation": textwrap.dedent("""\
            @article{hao2025opo,
                title        = {{On-Policy RL with Optimal Reward Baseline}},
                author       = {Yaru Hao and Li Dong and Xun Wu and Shaohan Huang and Zewen Chi and Furu Wei},
                year         = 2025,
                eprint       = {arXiv:2505.23585},
            }"""),
    }

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
        elif not isinstance(args, OPOConfig):
            raise ValueError(
                f"OPOTrainer takes an OPOConfig as `args`, got {type(args).__name__}, which does not hold training to "
                "one optimizer step per rollout batch. Build an OPOConfig with the same fields."
            )
        args.check_contract()
        named = inspect.signature(GRPOTrainer).bind(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *rest, **kwargs
        )
        prompts_per_step = args.generation_batch_size // args.num_generations
        from_environment = named.arguments.get("environment_factory") is not None
        check_datasets(train_dataset, eval_dataset, prompts_per_step, prompt_optional=from_environment)
        check_rollout_correction(args, named.arguments.get("rollout_func"))
        check_continuous_batching(args, model)
        check_reward_parameters(reward_funcs, train_dataset, eval_dataset, args, named.arguments)
        check_model_directory(model)
        if processing_class is None:
            processing_class = load_processor(model, args)
        check_tokenizer(train_dataset, processing_class)
        self._correctness_reward = pass_at_k_reward(args.pass_at_k_reward, reward_funcs)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *rest, **kwargs)
        check_trainable(self.model)
        check_data_parallel(self.get_tp_size(), self.get_cp_size(), self.get_sp_size())
        check_continuous_batching(args, self.model)
        disable_dropout(self.model)
        self._check_sampler()
        # The parent would run a whole extra forward for the old policy to correct the sampler's mismatch. On-policy the
        # old policy is the one that the loss runs anyway, so the correction is made there and the parent's is off.
        self._corrects_sampler = (
            self.args.rollout_importance_sampling_correction
            if self.rollout_func is not None
            else self.use_vllm and self.vllm_importance_sampling_correction
        )
        self.vllm_importance_sampling_correction = False
        self._guard = FunctionGuard()
        self.reward_funcs = [
            self._guard.reward(function, name)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        if self.rollout_func is not None:
            self.rollout_func = self._fill_empty_rollouts(self._guard.rollout(self.rollout_func))
        self.add_callback(EpochEnd(self._end_epoch))
        self.add_callback(NoSignalWarning)
        self._rollout_batch: dict[str, Any] | None = None
        self._empty_rows: list[int] = []  # completions of zero tokens in the rollout batch
        self._reported: set[str] = set()  # why the parent's micro-batches were kept
        self._statistics = StepStatistics()
        self._correct: list[list[bool]] = []  # which completions of each problem evaluated so far are correct

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as [`~transformers.Trainer.evaluation_loop`] does, and add pass@k of the same completions."""
        self._correct = []
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        # The shard of a streamed dataset has a `__len__` that raises.
        if self._correct and has_length(dataloader.dataset):
            # To fill the last batch of all ranks, accelerate goes on with the first problems.
            correct = self._correct[: len(dataloader.dataset)]
            for name, value in mean_pass_at_k(correct, range(1, self.num_generations_eval + 1)).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as [`PushingTrainer`] does, after one more look at the on-policy contract."""
        self.args.check_contract()
        self._check_sampler()
        self._drop_unfinished_step()
        if self.use_vllm:
            self._last_loaded_step = -1  # an earlier run may have left the number of the step that this one starts at
        return super().train(*args, **kwargs)

    def _end_epoch(self, stops: bool) -> None:
        check_position(self.accelerator, self._step, self.args.steps_per_generation, "stop" if stops else "epoch")
        self._drop_unfinished_step()

    def _drop_unfinished_step(self) -> None:
        """
        Drop what an exception, an interrupt or an epoch that a callback has ended left of a step.

        Its second half would otherwise be trained in the next step, whose own second half would come after the
        optimizer step: off-policy from then on, silently.
        """
        unfinished = self._step % self.args.steps_per_generation
        if unfinished and self.is_deepspeed_enabled:
            raise ValueError(
                "Under DeepSpeed a step must not end before its last micro-batch, since its gradients stay in the "
                f"engine: it ended after {unfinished} of {self.args.steps_per_generation}. Build a new trainer, and "
                "let callbacks stop an epoch in `on_step_end`, not in `on_substep_end`."
            )
        if unfinished:
            self.model.zero_grad()
            if self._loss_of_step.isfinite():
                self._tr_loss -= self._loss_of_step.to(self._tr_loss)  # else it would be logged with the next step's
            self._loss_of_step = torch.zeros(())
        self._step -= unfinished
        self._buffered_inputs = None
        self._rollout_batch = None
        self._statistics = StepStatistics()
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()

    def _describe(self) -> dict[str, Any]:
        return {"opo": {**self.args.contract(), "versions": versions("opo-trl", "trl", "transformers", "torch")}}

    def create_model_card(self, model_name: Any = None, dataset_name: str | None = None, tags: Any = None) -> None:
        """Write the model card as TRL does, and complete it; a dataset that is not on the Hub is not linked."""
        if not self.is_world_process_zero() or self._pushes.running():
            return  # a card on its way to the Hub stays that of its step
        model_name = model_name or Path(self.hub_model_id or self.args.output_dir).absolute().name
        linked = dataset_name if dataset_name is not None and is_hub_name(dataset_name) else None
        super().create_model_card(model_name, linked, tags)
        complete_model_card(
            Path(self.args.output_dir, "README.md"),
            self.args,
            self.state,
            base_model=self.model.config.name_or_path,
            reward_names=self.reward_func_names,
            num_problems=len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None,
            dataset_name=dataset_name,
        )

    def _check_sampler(self) -> None:
        """Refuse a generation config that, merged as the backend merges it, samples from another law."""
        if self.rollout_func is not None or self.use_vllm:
            return  # a rollout function samples by itself; vLLM is handed every setting, and OPOConfig has judged them
        if self.use_transformers_continuous_batching:
            merged = self.generation_config  # used as it is: nothing of the model's own config comes in
        else:
            merged, _ = self.model._prepare_generation_config(self.generation_config)
        settings = merged.to_dict()
        image_token = getattr(self.model.config, "image_token_id", None)
        if isinstance(self.processing_class, ProcessorMixin) and settings["suppress_tokens"] == [image_token]:
            del settings["suppress_tokens"]  # set by TRL: an image token cannot be part of a completion
        check_law(settings, self.temperature)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards_per_func = super()._calculate_rewards(*args, **kwargs)  # (N, F), of all ranks; NaN for None
        self._guard.raise_on_all_ranks(self.accelerator)
        infinite = torch.isinf(rewards_per_func).nonzero().tolist()
        if infinite:  # every rank sees the same gathered rewards, so all of them stop here together
            row, func = infinite[0]
            raise ValueError(
                f"Rewards must be finite: '{self.reward_func_names[func]}' returned "
                f"{rewards_per_func[row, func].item()} for row {row} of the rollout batch ({len(infinite)} infinite "
                "rewards in all). Return None for a completion that cannot be scored."
            )
        self._rewards_per_func = rewards_per_func
        if not self.model.training and self._correctness_reward is not None:
            column = self.reward_func_names.index(self._correctness_reward)
            self._correct += (rewards_per_func[:, column] == 1).view(-1, self.num_generations_eval).tolist()
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._check_rollout_size(len(inputs))
        output = super()._generate_and_score_completions(inputs)
        output["completion_mask"][self._empty_rows] = 0  # a padding token stands in them
        group_size = self.num_generations if mode == "train" else self.num_generations_eval

        # A group may straddle ranks, so the baseline is taken over the rewards and lengths of all of them.
        lengths = gather(_loss_mask(output).sum(dim=1)).view(-1, group_size)  # (P, K)
        rewards = self._total_rewards().view(-1, group_size)  # (P, K)
        weights = lengths if self.args.baseline_weight == "length" else self._uncertainties(output, rewards, lengths)
        all_advantages = opo_advantages(rewards, weights, self.args.length_exponent).flatten()  # (N,)
        first = self.accelerator.process_index * len(inputs)
        output["advantages"] = all_advantages[first : first + len(inputs)]

        # One normaliser for the whole rollout batch, so that the gradient does not depend on how rows are grouped into
        # micro-batches. Data parallelism averages gradients over ranks, hence each rank's share of the total.
        if self.loss_type == "dapo":
            output["loss_normalizer"] = lengths.sum().clamp(min=1) / self.accelerator.num_processes
        else:
            output["loss_normalizer"] = torch.tensor(len(inputs) * self.max_completion_length, device=lengths.device)

        for name, value in rollout_metrics(rewards, lengths, self.args.length_exponent, weights).items():
            self._metrics[mode][name].append(value)
        logged = self._logs["advantages"]  # the parent has just filled it with GRPO's advantages
        for _ in range(min(len(logged), len(all_advantages))):
            logged.pop()
        logged.extend(all_advantages.tolist())
        self._rollout_batch = output
        return output

    def _uncertainties(
        self, batch: dict[str, Any], rewards: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:  # (P, K), (P, K) -> (P, K)
        """Each completion's uncertainty; the length in groups without anything to learn from, which need no forward."""
        local = torch.zeros(len(batch["completion_ids"]), device=rewards.device)  # (rows of this rank,)
        learns = (opo_advantages(rewards, lengths) != 0).any(dim=1, keepdim=True).expand_as(lengths)
        if self._corrects_sampler and "sampling_per_token_logps" in batch:
            local = token_uncertainty(batch["sampling_per_token_logps"].nan_to_num(0.0), _loss_mask(batch))
        else:
            # Every rank runs the same number of forwards, whatever its rows are: engines wait for each other.
            forwards = self.args.steps_per_generation if self.model.training else 1
            chunk: int | None = len(local) // forwards
            parts = [{**batch, "position": torch.arange(len(local), device=local.device)}]
            if self._why_not_regrouped(batch) is None:
                rows = {name: parts[0][name] for name in ("position", *_ROW_TENSORS) if name in parts[0]}
                first = self.accelerator.process_index * len(local)
                hand = learns.flatten()[first : first + len(local)].nonzero().flatten().cpu()
                parts, chunk = self._cut(rows, hand, forwards, len(local) // forwards), None
            with torch.no_grad():
                for part in parts:
                    logps, _, _ = self._token_scores(self.model, part, batch_size=chunk)
                    # Added, not set: a filler stands for a row that has its own place.
                    local.index_add_(0, part["position"], token_uncertainty(logps, _loss_mask(part)))
        return torch.where(learns, gather(local).view_as(lengths), lengths)

    def _check_rollout_size(self, rows: int) -> None:
        """Raise on all ranks unless every rank has the rows of a rollout batch that the configuration says."""
        expected = self.args.per_device_train_batch_size * self.args.steps_per_generation
        received = gather(torch.tensor([rows], device=self.accelerator.device)).tolist()
        if any(size != expected for size in received):
            raise ValueError(
                "Each rank must get per_device_train_batch_size * gradient_accumulation_steps = "
                f"{expected} prompts for a rollout batch, got {received} on the {len(received)} rank(s). Remove what "
                "changes the data loader's batch size, such as a custom sampler, data loader or accelerator_config."
            )

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        completion_ids, *rest = super()._generate_single_turn(*args, **kwargs)
        # With tools, a later turn may well be empty: its completion is not.
        return completion_ids if self.tools else self._fill_empty(completion_ids), *rest

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        tool_mask, completions, completion_ids, *rest = super()._tool_call_loop(*args, **kwargs)
        return tool_mask, completions, self._fill_empty(completion_ids), *rest

    def _fill_empty_rollouts(self, rollout_func: Any) -> Any:
        @functools.wraps(rollout_func)
        def filled(prompts: Any, trainer: Any) -> dict[str, Any]:
            output = rollout_func(prompts, trainer)
            return {**output, "completion_ids": self._fill_empty(output["completion_ids"])}

        return filled

    def _fill_empty(self, completion_ids: list[list[int]]) -> list[list[int]]:
        """
        Put a padding token into completions of zero tokens, which have weight 0 and advantage 0.

        TRL 1.16 reads the last token of every completion, and raises an IndexError on the rank that has an empty one
        (no issue is filed). Delete this when it does not.
        """
        self._empty_rows = [row for row, ids in enumerate(completion_ids) if len(ids) == 0]
        return [ids if len(ids) else [self._tokenizer.pad_token_id] for ids in completion_ids]

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.model.training:
            check_position(self.accelerator, self._step, self.args.steps_per_generation)
        self._rollout_batch = None
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._rollout_batch is None:
            return inputs  # evaluation, or a later micro-batch of the plan made at the step's first
        batch, self._rollout_batch = self._rollout_batch, None
        # Ranks must agree: one may hold an image batch, or tool output, where another holds plain text.
        ranks = gather_object([(self._why_not_regrouped(batch), sorted(batch))])
        reasons = [reason for reason, _ in ranks if reason is not None]
        if not reasons and any(layout != ranks[0][1] for _, layout in ranks):
            reasons.append("the ranks' rollout batches hold different columns")
        if reasons:
            self._report_once(reasons[0])
        else:
            self._buffered_inputs = self._make_micro_batches(batch)
        self._log_padding(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _why_not_regrouped(self, batch: dict[str, Any]) -> str | None:
        """Return why this batch must be cut as the parent cuts it; `None` if it need not."""
        if self.args.torch_compile or is_compiled_module(self.model):
            return "a compiled model needs fixed shapes"
        if self.accelerator.device.type in ("xla", "neuron", "hpu"):
            return f"the device {self.accelerator.device.type!r} needs fixed shapes"
        if self.aux_loss_enabled:
            return "the router's auxiliary loss is a mean per micro-batch"
        unknown = sorted(batch.keys() - {*_ROW_TENSORS, *_SCALARS})
        return f"the rollout batch holds {unknown}, which cannot be cut row by row" if unknown else None

    def _report_once(self, reason: str) -> None:
        if reason not in self._reported and self.accelerator.is_main_process:
            logger.warning(
                "The update keeps TRL's micro-batches, which is slower and has the same gradient: %s.", reason
            )
        self._reported.add(reason)

    def _make_micro_batches(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Deal the rollout batch's rows to the ranks and cut this rank's into the micro-batches of the step."""
        rows = {name: batch[name] for name in _ROW_TENSORS if name in batch}
        ranks, steps = self.accelerator.num_processes, self.args.steps_per_generation
        if ranks > 1:  # a rank may be dealt any row, so it needs to see them all
            for name in rows:
                if rows[name].ndim == 2:
                    left = name.startswith("prompt")
                    rows[name] = self.accelerator.pad_across_processes(rows[name], dim=1, pad_first=left)
                rows[name] = gather(rows[name])
        learns = torch.ones_like(rows["advantages"], dtype=torch.bool)
        if self.args.skip_uninformative:
            learns = (rows["advantages"] != 0) & _loss_mask(rows).any(dim=1)
        lengths = (rows["prompt_mask"].sum(dim=1) + rows["completion_mask"].sum(dim=1)).cpu()
        hand = deal_rows(lengths, learns.cpu(), ranks)[self.accelerator.process_index]
        scalars = {name: batch[name] for name in _SCALARS if name in batch}
        return [{**part, **scalars} for part in self._cut(rows, hand, steps, len(batch["advantages"]) // steps)]

    def _cut(
        self, rows: dict[str, torch.Tensor], hand: torch.Tensor, micro_batches: int, rows_per_micro_batch: int
    ) -> list[dict[str, torch.Tensor]]:
        """Cut the rows of a hand into micro-batches, none much larger than so many of the widest rows."""
        width = rows["prompt_ids"].size(1) + rows["completion_ids"].size(1)
        plan = plan_microbatches(
            rows["prompt_mask"].sum(dim=1).cpu()[hand],
            rows["completion_mask"].sum(dim=1).cpu()[hand],
            micro_batches,
            largest=int(MEMORY_SHARE * rows_per_micro_batch * width),
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        return [cut_rows(rows, hand, micro_batch) for micro_batch in plan]

    def _log_padding(self, micro_batches: list[dict[str, Any]]) -> None:
        """Log the share of padding among the tokens of the step's micro-batches, over all ranks and without fillers."""
        micro_batches = [part for part in micro_batches if part["completion_mask"].any()]
        padded = sum(part["prompt_mask"].numel() + part["completion_mask"].numel() for part in micro_batches)
        real = sum(part["prompt_mask"].sum() + part["completion_mask"].sum() for part in micro_batches)
        counts = torch.tensor([int(real), padded], device=self.accelerator.device)
        real, padded = self.accelerator.reduce(counts, reduction="sum").tolist()
        self._metrics["train"]["opo/padding_fraction"].append(1 - real / padded if padded else float("nan"))

    def _total_rewards(self) -> torch.Tensor:  # (N,)
        """Weighted sum of the reward functions that scored each completion; NaN where none did."""
        weighted = self._rewards_per_func * self.reward_weights.to(self._rewards_per_func.device)  # (N, F)
        return torch.where(torch.isnan(weighted).all(dim=1), torch.nan, weighted.nansum(dim=1))

    def _token_scores(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any, Any]:
        """Run a micro-batch: log-probabilities (B, C), and entropies (B, C) and the router's loss where asked for."""
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),  # (B, T)
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),  # (B, T)
            logits_to_keep=inputs["completion_ids"].size(1),
            **{name: inputs[name] for name in _forward_arguments() & inputs.keys()},
            **options,
        )

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        loss_mask = _loss_mask(inputs)  # (B, C)
        logps, entropies, aux_loss = self._token_scores(
            model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )  # (B, C), (B, C), scalar

        # REINFORCE, A * log pi, in the form whose value is A: exp(x - x.detach()) is 1 and its gradient is that of x.
        # So the logged loss is the sum of l_i A_i, 0 by construction, and any other value tells of a mistake.
        per_token_objective = inputs["advantages"].unsqueeze(1) * torch.exp(logps - logps.detach())  # (B, C)
        if self._corrects_sampler and "sampling_per_token_logps" in inputs:
            per_token_objective = per_token_objective * self._sampler_weights(logps.detach(), inputs, loss_mask)
        loss = -(per_token_objective * loss_mask).sum() / inputs["loss_normalizer"]

        mode = "train" if self.model.training else "eval"
        if self.aux_loss_enabled:  # a router's load balancing is a mean per micro-batch, as in the parent
            micro_batches = self.current_gradient_accumulation_steps if mode == "train" else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / micro_batches
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        self._statistics.add_mean("entropy", entropies.detach(), loss_mask)
        if mode == "eval" or self.accelerator.sync_gradients:  # the last micro-batch of the step
            for name, value in self._statistics.reduce(self.accelerator.gather).items():
                self._metrics[mode][name].append(value)
        return loss

    def _sampler_weights(
        self, logps: torch.Tensor, inputs: dict[str, Any], loss_mask: torch.Tensor
    ) -> torch.Tensor:  # (B, C) -> (B, C)
        """Weigh each token by the bounded ratio of policy to sampler, and log how far the two are apart."""
        correction = correct_sampler(
            logps,
            inputs["sampling_per_token_logps"],
            loss_mask,
            low=self.vllm_importance_sampling_clip_min,
            high=self.vllm_importance_sampling_clip_max,
            mask_outside=self.vllm_importance_sampling_mode == "token_mask",
        )
        correction.add_to(self._statistics, loss_mask)
        return correction.weights


def _loss_mask(batch: dict[str, Any]) -> torch.Tensor:  # (B, C)
    """1 for the tokens that the policy sampled and trains on: not padding, not tool output, not masked out."""
    mask: torch.Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def _forward_arguments() -> set[str]:
    """Names of what the parent's forward takes besides tokens, such as `pixel_values` of an image batch."""
    return set(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
