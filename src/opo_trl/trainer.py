"""The OPO trainer: the only file that touches TRL's private names, each pinned by `tests/test_contract.py`."""

import inspect
import textwrap
from typing import Any

import torch
from accelerate.utils import gather
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoProcessor, PreTrainedConfig, ProcessorMixin
from trl import GRPOTrainer

from .baselines import opo_advantages
from .config import OPOConfig
from .metrics import rollout_metrics
from .preflight import check_prompts, check_tokenizer
from .sampler import law_changes


class OPOTrainer(GRPOTrainer):
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
    `entropy` and the `opo/` metrics ([`~opo_trl.metrics.rollout_metrics`]).

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
            the model's generation config makes the sampler another distribution than the policy; during training, on
            all ranks alike, if a reward is infinite.
    """

    args: OPOConfig
    model: Any
    _logs: dict[str, Any]

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
        if train_dataset is not None:
            prompts_per_step = args.generation_batch_size // args.num_generations
            check_prompts(train_dataset, "train_dataset", "environment_factory" in kwargs, prompts_per_step)
        for name, dataset in _by_name(eval_dataset).items():
            check_prompts(dataset, name, "environment_factory" in kwargs)
        if processing_class is None and isinstance(model, str):
            # The parent would load it after the model; loaded first, its faults show before anything expensive.
            processing_class = AutoProcessor.from_pretrained(
                model,
                revision=(args.model_init_kwargs or {}).get("revision"),
                truncation_side="left",
                padding_side="left",
                trust_remote_code=args.trust_remote_code,
            )
        check_tokenizer(train_dataset, processing_class)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *rest, **kwargs)
        _disable_dropout(self.model)
        self._check_sampler()
        self._entropy_stats = torch.zeros(2, device=self.accelerator.device)  # sum over tokens, number of tokens

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as [`~transformers.Trainer.train`] does, after one more look at the on-policy contract."""
        self.args.check_contract()
        self._check_sampler()
        return super().train(*args, **kwargs)

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
        changed = law_changes(settings)
        if settings["temperature"] != self.temperature:
            changed.append("temperature")
        if changed:
            listed = ", ".join(f"{name}={settings[name]!r}" for name in changed)
            raise ValueError(
                "OPO samples from exactly the distribution that it trains, but the merged generation config has "
                f"{listed}. TRL leaves such settings to the model's generation_config.json: clear them there, or on "
                f"the loaded model with `model.generation_config.{changed[0]} = None`."
            )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards_per_func = super()._calculate_rewards(*args, **kwargs)  # (N, F), of all ranks; NaN for None
        infinite = torch.isinf(rewards_per_func).nonzero().tolist()
        if infinite:  # every rank sees the same gathered rewards, so all of them stop here together
            row, func = infinite[0]
            raise ValueError(
                f"Rewards must be finite: '{self.reward_func_names[func]}' returned "
                f"{rewards_per_func[row, func].item()} for row {row} of the rollout batch ({len(infinite)} infinite "
                "rewards in all). Return None for a completion that cannot be scored."
            )
        self._rewards_per_func = rewards_per_func
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        group_size = self.num_generations if mode == "train" else self.num_generations_eval

        # A group may straddle ranks, so the baseline is taken over the rewards and lengths of all of them.
        lengths = gather(_loss_mask(output).sum(dim=1)).view(-1, group_size)  # (P, K)
        rewards = self._total_rewards().view(-1, group_size)  # (P, K)
        all_advantages = opo_advantages(rewards, lengths, self.args.length_exponent).flatten()  # (N,)
        first = self.accelerator.process_index * len(inputs)
        output["advantages"] = all_advantages[first : first + len(inputs)]

        # One normaliser for the whole rollout batch, so that the gradient does not depend on how rows are grouped into
        # micro-batches. Data parallelism averages gradients over ranks, hence each rank's share of the total.
        if self.loss_type == "dapo":
            output["loss_normalizer"] = lengths.sum().clamp(min=1) / self.accelerator.num_processes
        else:
            output["loss_normalizer"] = torch.tensor(len(inputs) * self.max_completion_length, device=lengths.device)

        for name, value in rollout_metrics(rewards, lengths, self.args.length_exponent).items():
            self._metrics[mode][name].append(value)
        logged = self._logs["advantages"]  # the parent has just filled it with GRPO's advantages
        for _ in range(min(len(logged), len(all_advantages))):
            logged.pop()
        logged.extend(all_advantages.tolist())
        return output

    def _total_rewards(self) -> torch.Tensor:  # (N,)
        """Weighted sum of the reward functions that scored each completion; NaN where none did."""
        weighted = self._rewards_per_func * self.reward_weights.to(self._rewards_per_func.device)  # (N, F)
        return torch.where(torch.isnan(weighted).all(dim=1), torch.nan, weighted.nansum(dim=1))

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)  # (B, T)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)  # (B, T)
        loss_mask = _loss_mask(inputs)  # (B, C)
        logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            input_ids,
            attention_mask,
            logits_to_keep=loss_mask.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs[name] for name in _forward_arguments() & inputs.keys()},
        )  # (B, C), (B, C), scalar

        # REINFORCE, A * log pi, in the form whose value is A: exp(x - x.detach()) is 1 and its gradient is that of x.
        # So the logged loss is the sum of l_i A_i, 0 by construction, and any other value tells of a mistake.
        per_token_objective = inputs["advantages"].unsqueeze(1) * torch.exp(logps - logps.detach())  # (B, C)
        if "importance_sampling_ratio" in inputs:  # vLLM's mismatch with the trained model, a constant weight
            per_token_objective = per_token_objective * inputs["importance_sampling_ratio"]
        loss = -(per_token_objective * loss_mask).sum() / inputs["loss_normalizer"]

        mode = "train" if self.model.training else "eval"
        if self.aux_loss_enabled:  # a router's load balancing is a mean per micro-batch, as in the parent
            micro_batches = self.current_gradient_accumulation_steps if mode == "train" else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / micro_batches
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        self._log_entropy(mode, entropies.detach(), loss_mask)
        return loss

    def _log_entropy(self, mode: str, entropies: torch.Tensor, loss_mask: torch.Tensor) -> None:
        """Log the mean entropy of the step's trainable tokens, in nats: one sum and one count over micro-batches."""
        self._entropy_stats += torch.stack([(entropies * loss_mask).sum(), loss_mask.sum()])
        if mode == "eval" or self.accelerator.sync_gradients:  # the last micro-batch of the step
            total, tokens = self.accelerator.reduce(self._entropy_stats, reduction="sum").tolist()
            self._metrics[mode]["entropy"].append(total / max(tokens, 1.0))
            self._entropy_stats = torch.zeros_like(self._entropy_stats)


def _loss_mask(batch: dict[str, Any]) -> torch.Tensor:  # (B, C)
    """1 for the tokens that the policy sampled and trains on: not padding, not tool output, not masked out."""
    mask: torch.Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def _forward_arguments() -> set[str]:
    """Names of what the parent's forward takes besides tokens, such as `pixel_values` of an image batch."""
    return set(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)


def _by_name(eval_dataset: Any) -> dict[str, Dataset | IterableDataset]:
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}


def _disable_dropout(model: nn.Module) -> None:
    """
    Switch off all randomness of the training forward: dropout modules, and the rates that attention layers, layer drop
    and routers keep as plain numbers in themselves or in the model's config. These configs are saved with rate 0.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        config = getattr(module, "config", None)
        for owner in (module, config) if isinstance(config, PreTrainedConfig) else (module,):
            rates = [name for name in vars(owner) if "drop" in name or "jitter" in name]
            for name in rates:
                if isinstance(getattr(owner, name), float):
                    setattr(owner, name, 0.0)
