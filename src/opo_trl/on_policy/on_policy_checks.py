"""The checks of a run: the sampler is the policy, and each rollout batch gives one optimizer step."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .determinism import disable_dropout
from .engine_dtype import built_with_dtype, warn_of_other_dtype
from .positions import count_positions_from_the_first_token
from .preflight import check_loaded_model, check_tools_without_vllm
from .rollout_log_probabilities import with_log_probabilities
from .rollout_position import check_position
from .sampler_correction import SamplerCorrection, correct_sampler
from .sampler_drift import SamplerDriftWarning
from .sampling_settings import check_end_tokens, check_generation_config
from .self_test import SelfTest

if TYPE_CHECKING:
    from trl import GRPOTrainer
else:
    GRPOTrainer = object  # a mixin: the trainer comes after it in the bases


class OnPolicyChecks(GRPOTrainer):
    """
    Mixin for [`OPOTrainer`]: refuses to train off-policy, and corrects what a vLLM engine's numerics leave.

    1. The generation config of the model must not change the sampling distribution, and dropout is off.
    2. A vLLM engine gets the trainer's dtype, its first completions are compared with the policy
       ([`~opo_trl.on_policy.self_test.SelfTest`]), and a difference that grows is warned about.
    3. All ranks are at the same micro-batch, and the optimizer steps after the last one of a rollout batch.

    It comes before [`~opo_trl.runs.reliable_runs.ReliableRuns`] in the bases.
    """

    args: Any
    model: Any
    rollout_func: Any
    vllm_importance_sampling_correction: bool

    def __init__(self, model: Any, reward_funcs: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        with built_with_dtype(args, lambda: self.model):
            super().__init__(model, reward_funcs, args, *rest, **kwargs)
        check_loaded_model(self.model, args, self.get_tp_size(), self.get_cp_size(), self.get_sp_size())
        if self.tools and not self.use_vllm:
            sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
            check_tools_without_vllm(self.accelerator.num_processes, sharded)
        disable_dropout(self.model)
        count_positions_from_the_first_token(self.model)
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
        if self._corrects_sampler and self.rollout_func is not None:
            self.rollout_func = with_log_probabilities(self.rollout_func)
        tolerance = args.vllm_logp_tolerance if self.use_vllm and self.rollout_func is None else None
        self.add_callback(SamplerDriftWarning(tolerance))
        self._self_test = SelfTest(
            self.accelerator,
            self.temperature,
            self._tokenizer.pad_token_id,
            tolerance,
            args.vllm_mode,
            lambda ids, mask, length: self._get_per_token_logps_and_entropies(
                self.model, ids, mask, length, compute_entropy=True
            )[:2],
        )
        if self.use_vllm and self.accelerator.is_main_process:
            warn_of_other_dtype(self.vllm_generation, args, self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the next class does, after another check of the on-policy contract."""
        self.args.check_contract()
        self._check_sampler()
        self._self_test.start()
        return super().train(*args, **kwargs)

    def _check_sampler(self) -> None:
        if self.rollout_func is None and not self.use_vllm:  # OPOConfig has judged every setting that vLLM is given
            check_generation_config(
                self.model,
                self.generation_config,
                self.temperature,
                self.processing_class,
                merged=not self.use_transformers_continuous_batching,
            )
            if not self.use_transformers_continuous_batching:  # which pads nothing
                check_end_tokens(self.generation_config.eos_token_id, self.eos_token_ids)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.model.training:
            check_position(self.accelerator, self._step, self.args.steps_per_generation)
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        return inputs

    def _end_epoch(self, stops: bool) -> None:
        check_position(self.accelerator, self._step, self.args.steps_per_generation, "stop" if stops else "epoch")
        super()._end_epoch(stops)

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        training = self.model.training
        completion_ids, logprobs = super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        # With continuous batching, TRL 1.16 leaves the model in training mode, also in an evaluation. No issue is
        # known; delete this when it restores the mode.
        if self.model.training != training:
            self.model.train(training)
        if training:
            self._self_test.check(self.model, prompt_ids, images, completion_ids, logprobs)
        return completion_ids, logprobs

    def _sampler_correction(
        self, logps: torch.Tensor, inputs: dict[str, Any], mask: torch.Tensor
    ) -> SamplerCorrection | None:  # (B, C), (B, C)
        """Return the weights that correct the sampler of a micro-batch; `None` where nothing is to be corrected."""
        if not self._corrects_sampler or "sampling_per_token_logps" not in inputs:
            return None
        return self._correct_sampler(logps.detach(), inputs["sampling_per_token_logps"], mask)
