"""Sampling of completions whose lengths vary widely, without carrying those that have ended to the end."""

from collections.abc import Sequence
from typing import Any

from opo_trl.evaluation.sampling import Completion, TransformersSampler, record_seed, tokenize_prompt


class StagedSampler:
    """
    Samples as [`TransformersSampler`] does, in stages: each stage continues only the completions that have not ended.

    transformers' `generate` computes every row of a batch until the last one has ended. Where the longest completion
    has five times the mean length, most of the work is for rows that are finished.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        limits (`Sequence[int]`):
            Longest completion at the end of each stage, in tokens, ascending; the last one is the limit.
    """

    def __init__(self, model: Any, tokenizer: Any, limits: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        steps = [limit - start for start, limit in zip((0, *limits), limits, strict=False)]
        self.stages = [TransformersSampler(model, tokenizer, max_new_tokens=step) for step in steps]

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        """Sample one completion for each prompt (token ids), with one seed for each."""
        token_ids: list[list[int]] = [[] for _ in prompts]
        unfinished = list(range(len(prompts)))
        for number, stage in enumerate(self.stages):
            if not unfinished:
                break
            found = stage.sample(
                [prompts[i] + token_ids[i] for i in unfinished], [record_seed(seeds[i], number) for i in unfinished]
            )
            for i, completion in zip(unfinished, found, strict=True):
                token_ids[i] += completion.token_ids
            unfinished = [i for i, completion in zip(unfinished, found, strict=True) if completion.truncated]
        return [
            Completion(self.tokenizer.decode(ids, skip_special_tokens=True), ids, truncated=i in unfinished)
            for i, ids in enumerate(token_ids)
        ]


class StagedRollouts:
    """A `rollout_func` of TRL's trainers that samples with a [`StagedSampler`], at temperature 1, on one process."""

    def __init__(self, limits: Sequence[int]) -> None:
        self.limits = limits

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        prompt_ids = [tokenize_prompt(trainer.processing_class, prompt) for prompt in prompts]
        start = trainer.args.seed, trainer.state.global_step  # no two rollout batches start at one step
        seeds = [record_seed(*start, row) for row in range(len(prompts))]
        completions = StagedSampler(trainer.model, trainer.processing_class, self.limits).sample(prompt_ids, seeds)
        # The policy itself samples: there is nothing to correct, so no log-probabilities.
        return {"prompt_ids": prompt_ids, "completion_ids": [each.token_ids for each in completions], "logprobs": None}


def rollouts_of(task: Any) -> StagedRollouts | None:
    """The `rollout_func` for a task that has stages, and `None`, for TRL's own sampling, otherwise."""
    return StagedRollouts((*task.sampling_stages, task.max_completion_length)) if task.sampling_stages else None
