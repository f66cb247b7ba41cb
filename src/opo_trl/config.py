"""The on-policy contract: `GRPOConfig` with OPO's defaults, and every setting that contradicts OPO refused by name."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import GRPOConfig

from .on_policy.engine_dtype import check_vllm_dtype
from .on_policy.sampling_settings import NEUTRAL_UNLESS_NONE, NEUTRAL_VALUES, distribution_changes
from .on_policy.self_test import check_tolerance
from .runs.renamed_names import use_new_names


class _Rule(NamedTuple):
    field: str
    allowed: tuple[Any, ...]
    reason: str

    @property
    def choices(self) -> str:
        """The allowed values, in words."""
        return " or ".join(repr(choice) for choice in self.allowed)


_ONE_STEP = "takes exactly one optimizer step on each rollout batch"
_NO_RATIO = "trains on fresh samples only, so the importance ratio is 1 and there is nothing to clip or mask"
_NO_KL = "has no KL term and no reference model"
_NO_BONUS = "has no entropy bonus"
_NO_CAST = "keeps the weights that it trains, which an evaluation outside of training would cast to 16 bits"
_OWN_SAMPLER = "samples from exactly the distribution that it trains"

# Everything in GRPOConfig that can contradict the algorithm, with the values that do not.
CONTRACT = (
    _Rule("num_iterations", (1,), _ONE_STEP),
    _Rule("beta", (0.0,), _NO_KL),
    _Rule("sync_ref_model", (False,), _NO_KL),
    _Rule("entropy_coef", (0.0,), _NO_BONUS),
    _Rule("use_adaptive_entropy", (False,), _NO_BONUS),
    _Rule("epsilon", (None,), _NO_RATIO),
    _Rule("epsilon_high", (None,), _NO_RATIO),
    _Rule("delta", (None,), _NO_RATIO),
    _Rule("off_policy_mask_threshold", (None,), _NO_RATIO),
    _Rule("importance_sampling_level", ("token",), _NO_RATIO),
    _Rule("scale_rewards", ("none",), "does not divide the advantage by a standard deviation"),
    _Rule(
        "multi_objective_aggregation",
        ("sum_then_normalize",),
        "sums the weighted rewards and does not normalise them one by one",
    ),
    _Rule(
        "loss_type",
        ("dapo", "dr_grpo"),
        "sums token terms under one normaliser, for which the length is the right weight in the baseline; dividing "
        "each sequence by its own length would turn that weight upside down",
    ),
    _Rule("top_entropy_quantile", (1.0,), "trains every completion token"),
    _Rule(
        "vllm_importance_sampling_mode",
        ("token_truncate", "token_mask"),
        "corrects the engine's mismatch token by token; a ratio multiplied over a completion masks nearly all",
    ),
    _Rule("disable_dropout", (True,), "takes the gradient of the network that sampled, without dropout"),
    _Rule("neftune_noise_alpha", (None, 0.0), "takes the gradient of the network that sampled, without noise"),
    _Rule("bf16_full_eval", (False,), _NO_CAST),
    _Rule("fp16_full_eval", (False,), _NO_CAST),
    _Rule("vllm_structured_outputs_regex", (None,), _OWN_SAMPLER),
    *(
        _Rule(name, NEUTRAL_VALUES[name], _OWN_SAMPLER)
        for name in ("top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation")
    ),
)


@dataclass
class OPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`OPOTrainer`].

    Constructed with nothing but an `output_dir`, it *is* the algorithm: exactly one optimizer step per rollout batch,
    the optimal baseline, no clipping, no KL, no entropy bonus, no division by the standard deviation. It takes every
    field of [`~trl.GRPOConfig`]; those that would contradict OPO are refused with a `ValueError` that names the field,
    the offending value and how to fix it.

    Parameters:
        length_exponent (`float`, *optional*, defaults to `1.0`):
            Power of the completion length in the weights of the baseline, `b* = sum_i l_i^c r_i / sum_i l_i^c`. `1.0`
            is OPO; `0.0` is the group mean.
        baseline_weight (`str`, *optional*, defaults to `"length"`):
            What the baseline weighs completions by. `"length"` is the paper's. `"uncertainty"` is
            [`~opo_trl.baselines.token_uncertainty`], `sum_t (1 - pi(y_t))^2`, which follows a completion's squared
            gradient norm more closely where some tokens are sure and others are not. It costs a forward pass without
            gradient of the completions that are trained, and nothing where vLLM's log-probabilities are at hand.
        skip_uninformative (`bool`, *optional*, defaults to `True`):
            Leave completions whose advantage is exactly 0 out of the forward and backward passes. They add nothing to
            the gradient; `False` runs them all the same, so that `entropy` covers every completion.
        max_refill_rounds (`int`, *optional*, defaults to `0`):
            While fewer groups of a step are informative than it has prompts, sample further prompts under the same
            weights, in at most this many rounds, and train their informative groups in the same step. The loss is then
            a mean over informative groups alone, whose expected gradient has the same direction
            (`docs/refilling.md`). `0` trains the prompts of the data loader alone. Needs a dataset that is not
            streamed, and rows that can be cut one by one: no images, no `torch_compile`, no router loss.
        rollout_importance_sampling_correction (`bool`, *optional*, defaults to `False`):
            With a `rollout_func`: weigh each token by `exp(log pi - logprob)` with the `logprobs` that it returns. Off
            unless asked for, since TRL demands the key and many functions fill it with zeros. Generation by vLLM
            itself is corrected under `vllm_importance_sampling_correction`, as in [`~trl.GRPOConfig`].
        prompt_sampling (`str`, *optional*, defaults to `"uniform"`):
            Which prompts a step samples. `"uniform"` shuffles the training set anew in each epoch, as TRL does.
            `"informative"` draws prompts more often whose completions are likely to get different rewards, judged by
            their rewards so far; one draw in ten is uniform
            ([`~opo_trl.rollouts.prompt_sampling.PromptSampling`]). The gradient is then that of the expected reward of
            the prompts as they are drawn. Needs a training set that can be indexed; an epoch keeps its number of steps.
        vllm_dtype (`str`, *optional*):
            Dtype of the vLLM engine that the trainer starts: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"` for
            vLLM's own choice, which is bfloat16 for a float32 model. `None` takes the one that the trainer computes in:
            bfloat16 under `bf16`, float16 under `fp16`, else that of the weights. A server takes `--dtype`.
        vllm_logp_tolerance (`float`, *optional*, defaults to `0.1`):
            Largest mean absolute difference, in nats per token, between the log-probabilities of vLLM and of the policy
            that the self-test before the first step accepts. `None` skips the self-test.
        log_token_logps (`bool`, *optional*, defaults to `False`):
            With `log_completions=True`: add the text and the log-probability of each token to the completions table, as
            columns `opo/tokens` and `opo/token_logps`. They are those of the update and cost no forward pass, but the
            table grows about tenfold. A completion that the update leaves out because its advantage is 0 has none.
        pass_at_k_reward (`str`, *optional*):
            Name of the reward function whose value 1 means that a completion is correct. Evaluation then logs
            `eval_pass@1` to `eval_pass@K` of its `num_generations_eval` = K completions per problem. `None` takes
            `math_verify_reward` where it is among the reward functions. A streamed evaluation dataset has no pass@k.
        vllm_weight_transfer (`str`, *optional*, defaults to `"nccl"`):
            How a vLLM server gets the weights. `"nccl"` is TRL's own transfer, between CUDA devices. `"file"` writes a
            file that the server reads, on any device, and accepts no completions of other weights than the latest; the
            server runs with a worker extension ([commands](vllm.md#weights-through-a-file)).
        vllm_weight_dir (`str`, *optional*):
            With `vllm_weight_transfer="file"`, an existing directory that the main process and the server see under the
            same path, such as one of a shared file system, or of `/dev/shm` for a server on the same machine.
        stream_rollouts (`bool`, *optional*, defaults to `False`):
            With a vLLM server: send a request for each prompt at the start of a step, and score and train the groups
            that are complete while the server generates the others. The optimizer steps after the last group, so the
            gradient is that of a step that is not streamed ([streaming](streaming.md)). Needs several
            `gradient_accumulation_steps`; without refill rounds, a step has at most as many waves of groups.

        > Defaults that differ from [`~trl.GRPOConfig`]

        scale_rewards (`str`, *optional*, defaults to `"none"`):
            OPO's advantage is `r - b*`, not divided by anything.
        loss_type (`str`, *optional*, defaults to `"dapo"`):
            Normaliser of the summed token terms. `"dapo"` divides by the number of trainable tokens of the
            rollout batch (the scale of the authors' code), `"dr_grpo"` by completions times `max_completion_length`
            (Eq. 11 up to a constant).
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Dropout would take the gradient of another network than the one that sampled.
        epsilon (`None`):
            There is no ratio to clip: any value is refused.
        vllm_importance_sampling_mode (`str`, *optional*, defaults to `"token_truncate"`):
            How the mismatch between vLLM and the trained model is corrected, token by token.

    Raises:
        ValueError: If a field contradicts OPO, or the rollout batch is not one optimizer step.
    """

    length_exponent: float = field(
        default=1.0,
        metadata={"help": "Power of the length in the baseline's weights: 1 is OPO, 0 is the group mean."},
    )
    baseline_weight: str = field(
        default="length",
        metadata={"help": "Weight in the baseline: 'length' (OPO), or 'uncertainty', the sum of (1 - pi)^2."},
    )
    skip_uninformative: bool = field(
        default=True,
        metadata={"help": "Leave completions whose advantage is 0 out of the update: the same gradient in less time."},
    )
    max_refill_rounds: int = field(
        default=0,
        metadata={
            "help": "Rounds of further prompts that a step may sample while too few of its groups are informative."
        },
    )
    rollout_importance_sampling_correction: bool = field(
        default=False,
        metadata={"help": "With a rollout_func: correct for its sampler with the logprobs that it returns."},
    )
    prompt_sampling: str = field(
        default="uniform",
        metadata={"help": "Prompts of a step: 'uniform', or 'informative', those whose rewards are likely to differ."},
    )
    vllm_dtype: str | None = field(
        default=None,
        metadata={"help": "Dtype of the colocated vLLM engine, or 'auto' for vLLM's choice; None: the trainer's."},
    )
    vllm_logp_tolerance: float | None = field(
        default=0.1,
        metadata={"help": "Nats by which vLLM may differ from the policy before the first step; None: no self-test."},
    )
    log_token_logps: bool = field(
        default=False,
        metadata={"help": "Add tokens and their log-probabilities to the completions table (log_completions=True)."},
    )
    pass_at_k_reward: str | None = field(
        default=None,
        metadata={"help": "Reward whose value 1 counts as correct in eval_pass@k; None: math_verify_reward."},
    )
    vllm_weight_transfer: str = field(
        default="nccl",
        metadata={"help": "How a vLLM server gets the weights: 'nccl' (TRL's own transfer) or 'file'."},
    )
    vllm_weight_dir: str | None = field(
        default=None,
        metadata={"help": "With vllm_weight_transfer='file': directory that trainer and server both see."},
    )
    stream_rollouts: bool = field(
        default=False,
        metadata={"help": "With a vLLM server: train groups that are complete while it generates the others."},
    )
    scale_rewards: str = field(
        default="none",
        metadata={"help": "OPO does not scale rewards: only 'none' is accepted."},
    )
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "Normaliser of the summed token terms: 'dapo' (trainable tokens of the rollout batch) or 'dr_grpo' "
            "(completions times max_completion_length)."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Whether to disable dropout. OPO trains the network that sampled: only True is accepted."},
    )
    epsilon: float | None = field(
        default=None,
        metadata={"help": "OPO has no ratio to clip: any value is refused."},
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={"help": "Token-level correction of vLLM's mismatch: 'token_truncate' or 'token_mask'."},
    )

    def __post_init__(self) -> None:
        self._generation_batch_size_given = self.generation_batch_size is not None
        use_new_names(self)
        try:
            super().__post_init__()
        except ValueError as error:
            explanation = self._explain_batch_size() if "divisible" in str(error) else None
            if explanation is None:
                raise
            raise ValueError(f"{explanation} (TRL: {error})") from error
        self.check_contract()

    def check_contract(self) -> None:
        """
        Refuse every setting that contradicts OPO.

        Runs when the config is built and again in [`OPOTrainer`], since fields can change in between.

        Raises:
            ValueError: With the field, the offending value and how to fix it.
        """
        broken = [rule for rule in CONTRACT if getattr(self, rule.field) not in rule.allowed]
        if broken:
            reasons = [
                f"OPO {rule.reason}: `{rule.field}` must be {rule.choices}, got {getattr(self, rule.field)!r}."
                for rule in broken
            ]
            fields = " and ".join(f"`{rule.field}`" for rule in broken)
            raise ValueError(
                f"{' '.join(reasons)} Leave {fields} out, or use TRL's GRPOTrainer if you need "
                f"{'it' if len(broken) == 1 else 'them'}."
            )
        self._check_one_step_per_rollout_batch()
        self._check_optimizer()
        self._check_metric_for_best_model()
        self._check_generation_kwargs()
        if self.use_vllm:
            check_vllm_dtype(self.vllm_dtype, self.vllm_mode)
            check_tolerance(self.vllm_logp_tolerance)
            if self.vllm_mode == "server" and self.max_completion_length is None:
                raise ValueError(
                    "A vLLM server ends a completion without a limit after 16 tokens: `max_completion_length` must be "
                    "a number with `vllm_mode='server'`, got None. Set `max_completion_length`."
                )
        self._check_weight_transfer()
        if self.stream_rollouts:
            self._check_streaming()
        if not self.temperature > 0:
            raise ValueError(
                f"OPO {_OWN_SAMPLER}: `temperature` must be above 0 (0 is greedy), got {self.temperature!r}. Use 1.0."
            )
        if not (math.isfinite(self.length_exponent) and self.length_exponent >= 0):
            raise ValueError(
                f"`length_exponent` must be a finite number of at least 0, got {self.length_exponent!r}. Use 1.0 for "
                "OPO or 0.0 for the group mean."
            )
        if self.baseline_weight not in ("length", "uncertainty"):
            raise ValueError(
                f"`baseline_weight` must be 'length' or 'uncertainty', got {self.baseline_weight!r}. Use 'length' for "
                "OPO."
            )
        if self.baseline_weight != "length" and self.length_exponent != 1:
            raise ValueError(
                f"`length_exponent` is a power of the length, got {self.length_exponent!r} with "
                f"`baseline_weight={self.baseline_weight!r}`. Leave `length_exponent` out, or use "
                "`baseline_weight='length'`."
            )
        if self.log_token_logps and not self.log_completions:
            raise ValueError(
                "`log_token_logps=True` adds columns to the completions table: `log_completions` must be True, got "
                "False. Set `log_completions=True`, or leave `log_token_logps` out."
            )
        self._check_refilling()
        self._check_prompt_sampling()
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError(
                "`loss_type='dr_grpo'` divides by `max_completion_length`, got None. Set `max_completion_length`, or "
                "use `loss_type='dapo'`."
            )

    def contract(self) -> dict[str, Any]:
        """Return the on-policy contract as this run keeps it: the baseline, and every field fixed, with its value."""
        judged_apart = ("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size", "temperature")
        return {
            "exactly_on_policy": True,
            "baseline": "sum(w ** length_exponent * r) / sum(w ** length_exponent)",
            "baseline_weight": self.baseline_weight,
            "length_exponent": self.length_exponent,
            "contract": {name: getattr(self, name) for name in (*(rule.field for rule in CONTRACT), *judged_apart)},
        }

    def _check_prompt_sampling(self) -> None:
        if self.prompt_sampling not in ("uniform", "informative"):
            raise ValueError(
                f"`prompt_sampling` must be 'uniform' or 'informative', got {self.prompt_sampling!r}. Use "
                "'uniform' for every prompt once in each epoch."
            )
        if self.prompt_sampling == "informative" and not self.shuffle_dataset:
            raise ValueError(
                "`prompt_sampling='informative'` draws prompts at random, got `shuffle_dataset=False`, which asks for "
                "the order of the dataset. Leave `shuffle_dataset` out, or use `prompt_sampling='uniform'`."
            )

    def _check_optimizer(self) -> None:
        """Refuse optimizers that update the weights in the backward pass of every micro-batch."""
        name = OptimizerNames(self.optim).value
        if name in ("lomo", "adalomo") or name.endswith("_layerwise"):
            raise ValueError(
                f"OPO {_ONE_STEP}: `optim` must not update the weights during the backward pass, once per micro-batch, "
                f"got {name!r}. Use 'adamw_torch', or another optimizer that steps once."
            )

    def _check_refilling(self) -> None:
        rounds = self.max_refill_rounds
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
            raise ValueError(
                f"`max_refill_rounds` must be an integer of at least 0, got {rounds!r}. Use 0 to train the "
                "prompts of the data loader alone."
            )
        if rounds and self.torch_compile:
            raise ValueError(
                "`torch_compile=True` needs micro-batches of a fixed shape, and refilling changes the number of rows: "
                f"`max_refill_rounds` must be 0 with it, got {rounds}. Leave one of the two out."
            )

    def _check_metric_for_best_model(self) -> None:
        """Refuse a best model, and a schedule, that would follow the loss (0 by construction) or the falling reward."""
        metric = self.metric_for_best_model
        if metric is not None and metric.endswith("loss"):
            raise ValueError(
                f"OPO's loss is 0 by construction: `metric_for_best_model` must be another metric, got {metric!r}, "
                "transformers' default with `load_best_model_at_end=True` and with a learning rate schedule that "
                "follows a metric. Use 'reward', or 'pass@1' where there is one."
            )
        schedule = SchedulerType(self.lr_scheduler_type).value
        mode = (self.lr_scheduler_kwargs or {}).get("mode", "min")
        if schedule in ("reduce_lr_on_plateau", "greedy") and self.greater_is_better and mode != "max":
            raise ValueError(
                f"`lr_scheduler_type={schedule!r}` takes a rising {metric!r} for a worse one unless "
                f"`lr_scheduler_kwargs` has `mode='max'`, got mode={mode!r}: transformers does not pass on "
                "`greater_is_better`. Set `lr_scheduler_kwargs={'mode': 'max'}`."
            )

    def check_evaluation_batch(self) -> None:
        """
        Refuse to evaluate in batches that hold no complete groups; TRL checks this only with an `eval_strategy`.

        Raises:
            ValueError: With the values that would do.
        """
        explanation = self._explain_evaluation_batch()
        if explanation is not None:
            raise ValueError(explanation)

    def _explain_evaluation_batch(self) -> str | None:
        return _explain_division(
            "evaluates",
            {"per_device_eval_batch_size": self.per_device_eval_batch_size},
            self.world_size,
            self.num_generations_eval or self.num_generations,
            "num_generations_eval",
        )

    def _explain_batch_size(self) -> str | None:
        """Explain in the fields that users set which batch num_generations does not divide, and what to set instead."""
        if self.eval_strategy != "no":
            explanation = self._explain_evaluation_batch()
            if explanation is not None:
                return explanation
        if self._generation_batch_size_given or self.steps_per_generation != self.gradient_accumulation_steps:
            self._check_one_step_per_rollout_batch()
        return _explain_division(
            "trains",
            {
                "per_device_train_batch_size": self.per_device_train_batch_size,
                "gradient_accumulation_steps": self.gradient_accumulation_steps,
            },
            self.world_size,
            self.num_generations,
            "num_generations",
        )

    def _check_one_step_per_rollout_batch(self) -> None:
        if self.accelerator_config is not None and self.accelerator_config.split_batches:
            raise ValueError(
                "OPO needs every rank's `per_device_train_batch_size` prompts: `accelerator_config` must have "
                "`split_batches=False`, got True, which divides each rank's rows by the number of ranks. Remove "
                "`split_batches` from `accelerator_config`."
            )
        steps = self.gradient_accumulation_steps
        one_step = self.per_device_train_batch_size * self.world_size * steps
        if self._generation_batch_size_given and self.generation_batch_size != one_step:
            raise ValueError(
                f"OPO {_ONE_STEP}: `generation_batch_size` must be per_device_train_batch_size * number of processes * "
                f"gradient_accumulation_steps = {one_step}, got {self.generation_batch_size}. Leave "
                "`generation_batch_size` out; for a larger rollout batch raise `gradient_accumulation_steps`."
            )
        if self.steps_per_generation != steps or self.generation_batch_size != one_step:
            raise ValueError(
                f"OPO {_ONE_STEP}: `steps_per_generation` must equal gradient_accumulation_steps = {steps}, got "
                f"{self.steps_per_generation} (a rollout batch of {self.generation_batch_size} completions where one "
                f"step takes {one_step}). Leave `steps_per_generation` out; for a larger rollout batch raise "
                "`gradient_accumulation_steps`. Build a new OPOConfig rather than changing batch sizes in an old one."
            )

    def _check_weight_transfer(self) -> None:
        """Refuse a transfer of weights that does not exist, or that has no server or no directory."""
        if self.vllm_weight_transfer not in ("nccl", "file"):
            raise ValueError(
                f"`vllm_weight_transfer` must be 'nccl' or 'file', got {self.vllm_weight_transfer!r}. Leave "
                "`vllm_weight_transfer` out for TRL's own transfer, or use 'file'."
            )
        if self.vllm_weight_transfer == "nccl":
            if self.vllm_weight_dir is not None:
                raise ValueError(
                    "`vllm_weight_dir` must be None without `vllm_weight_transfer='file'`, got "
                    f"{self.vllm_weight_dir!r}. Set `vllm_weight_transfer='file'`, or leave `vllm_weight_dir` out."
                )
            return
        if not (self.use_vllm and self.vllm_mode == "server"):
            raise ValueError(
                "`vllm_weight_transfer='file'` sends weights to a vLLM server: `use_vllm` must be True and `vllm_mode` "
                f"'server', got `use_vllm={self.use_vllm!r}` and `vllm_mode={self.vllm_mode!r}`. Set both, or leave "
                "`vllm_weight_transfer` out."
            )
        if not self.vllm_weight_dir:
            raise ValueError(
                "`vllm_weight_dir` must name a directory that the main process and the server both see, where "
                f"`vllm_weight_transfer='file'`, got {self.vllm_weight_dir!r}. Set it to a directory of a shared file "
                "system, or of /dev/shm for a server on the same machine."
            )

    def _check_streaming(self) -> None:
        """Refuse to stream where there is no server that generates by itself, or no gradient that can be scaled."""
        if not (self.use_vllm and self.vllm_mode == "server"):
            raise ValueError(
                "`stream_rollouts=True` trains while a vLLM server generates: `use_vllm` must be True and `vllm_mode` "
                f"'server', got `use_vllm={self.use_vllm!r}` and `vllm_mode={self.vllm_mode!r}`, where generation and "
                "update take the same device in turn. Set both, or leave `stream_rollouts` out."
            )
        if self.gradient_accumulation_steps < 2:
            raise ValueError(
                "`stream_rollouts=True` trains a step's micro-batches one after another as their groups are complete: "
                f"`gradient_accumulation_steps` must be at least 2, got {self.gradient_accumulation_steps}. Raise it, "
                "and lower `per_device_train_batch_size` by the same factor."
            )
        if self.torch_compile:
            raise ValueError(
                "`torch_compile=True` needs micro-batches of a fixed shape, and the waves of a streamed step differ in "
                "size: `stream_rollouts` must be False with it, got True. Leave one of the two out."
            )
        if self.deepspeed_plugin is not None and self.loss_type == "dapo":
            raise ValueError(
                "`stream_rollouts=True` with `loss_type='dapo'` scales the gradients once all lengths are known, and "
                "DeepSpeed does not allow its gradients to be scaled: `loss_type` must be 'dr_grpo' under DeepSpeed, "
                "got 'dapo'. Set `loss_type='dr_grpo'`, or train with FSDP."
            )
        if self.deepspeed_plugin is not None and self.max_refill_rounds:
            raise ValueError(
                "`stream_rollouts=True` with refill rounds scales the gradients once all groups are known, and "
                "DeepSpeed does not allow its gradients to be scaled: `max_refill_rounds` must be 0 under DeepSpeed, "
                f"got {self.max_refill_rounds}. Set `max_refill_rounds=0`, or train with FSDP."
            )

    def _check_generation_kwargs(self) -> None:
        settings = self.generation_kwargs or {}
        for name in NEUTRAL_UNLESS_NONE if self.use_vllm else ():
            if getattr(self, name) is None:  # a server may take it from the model's generation config
                raise ValueError(
                    f"OPO {_OWN_SAMPLER}: with `use_vllm=True`, `{name}` must be {NEUTRAL_VALUES[name][1]!r}, got "
                    f"None, for which vLLM may use the model's own setting. Leave `{name}` out."
                )
        for name in sorted({"n", "logprobs"}.intersection(settings)):
            raise ValueError(
                f"`generation_kwargs` must not have `{name}`, which the trainer itself sets, got {settings[name]!r}. "
                f"Remove `{name}` from `generation_kwargs`."
            )
        for name in distribution_changes(settings):
            raise ValueError(
                f"OPO {_OWN_SAMPLER}: `generation_kwargs` must not set `{name}` to {settings[name]!r}, which samples "
                f"from another one. Remove `{name}` from `generation_kwargs`."
            )
        if settings.get("temperature", self.temperature) != self.temperature:
            raise ValueError(
                f"OPO {_OWN_SAMPLER}: `generation_kwargs` sets `temperature` to {settings['temperature']!r} while the "
                f"gradient is taken at `temperature`={self.temperature!r}. Set `temperature` itself instead."
            )


def _explain_division(
    verb: str, factors: dict[str, int], processes: int, group_size: int, group_field: str
) -> str | None:
    """Say that a batch cannot be divided into groups, with the values that would do; `None` if it can."""
    total = math.prod(factors.values()) * processes
    if total % group_size == 0:
        return None
    product = " * ".join([*(f"{name} ({value})" for name, value in factors.items()), f"{processes} process(es)"])
    options = {}
    for name, value in factors.items():
        step = group_size // math.gcd(group_size, total // value)
        options[name] = {value // step * step, (value // step + 1) * step}
    divisors = [size for size in range(2, total + 1) if total % size == 0]
    options[group_field] = {
        max((size for size in divisors if size < group_size), default=0),
        min((size for size in divisors if size > group_size), default=0),
    }
    choices = [
        f"`{name}` to {' or '.join(map(str, sorted(values - {0})))}" for name, values in options.items() if values - {0}
    ]
    return (
        f"OPO {verb} complete groups of completions: {product} = {total} must be a multiple of `{group_field}` = "
        f"{group_size}. Set {', or '.join(choices)}."
    )
