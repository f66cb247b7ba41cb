"""Sampling by vLLM, behind the interface of [`~opo_trl.evaluation.sampling.TransformersSampler`]. Imports vLLM late."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, GenerationConfig

from .sampling import Completion, end_tokens, to_completion

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of `max_lora_rank` in vLLM 0.31, apart from 1


def max_lora_rank(config: Any) -> int:
    """
    Return the smallest `max_lora_rank` of vLLM's engine that is enough for an adapter.

    Args:
        config ([`~peft.LoraConfig`]):
            Configuration of the adapter.

    Raises:
        ValueError: If vLLM cannot apply the adapter.
    """
    rank = max([config.r, *config.rank_pattern.values()])
    if config.use_dora or config.modules_to_save or rank > LORA_RANKS[-1]:
        raise ValueError(
            f"vLLM applies LoRA adapters of a rank up to {LORA_RANKS[-1]} without DoRA and `modules_to_save`, got rank "
            f"{rank}, use_dora={config.use_dora} and modules_to_save={config.modules_to_save}. Use the backend "
            "transformers."
        )
    return next(allowed for allowed in LORA_RANKS if allowed >= rank)


def declared_ends(model: str) -> int | list[int] | None:
    """End tokens that a model declares, as transformers reads them where it loads the model."""
    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:  # there is no generation_config.json
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))
    ends: int | list[int] | None = config.eos_token_id
    return ends


class VllmSampler:
    """
    Samples from the policy itself by vLLM, each row from a random stream of its own seed.

    vLLM puts rows together as they come, so that float noise may turn a token now and then.

    Args:
        model (`str`):
            Name or directory of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature, above 0.
        adapter (`str`, *optional*):
            Directory of a LoRA adapter on top of `model`.
        **engine:
            Further arguments of `vllm.LLM`, such as `dtype` or `max_model_len`.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        adapter: str | None = None,
        **engine: Any,
    ) -> None:
        from peft import PeftConfig
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        if temperature <= 0:
            raise ValueError(f"The sampling temperature must be above 0, got {temperature}.")
        self.tokenizer, self.max_new_tokens, self.temperature = tokenizer, max_new_tokens, temperature
        self._adapter = None
        if adapter is not None:
            engine |= {"enable_lora": True, "max_lora_rank": max_lora_rank(PeftConfig.from_pretrained(adapter))}
            self._adapter = LoRARequest("adapter", 1, adapter)
        self._ends = end_tokens(declared_ends(model), tokenizer)
        # "vllm" leaves the model's own generation config aside, which may cut tails.
        self.llm = LLM(model=model, generation_config="vllm", **engine)

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        """Sample one completion for each prompt, as [`TransformersSampler.sample`] does."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=self.temperature,
                max_tokens=self.max_new_tokens,
                stop_token_ids=self._ends,
                detokenize=False,
                seed=seed,
            )
            for seed in seeds
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            params,
            lora_request=self._adapter,
            use_tqdm=False,
        )
        return [to_completion(list(out.outputs[0].token_ids), self._ends, self.tokenizer) for out in outputs]
