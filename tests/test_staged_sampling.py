"""Sampling in stages: the same distribution, fewer rows."""

import torch

from opo_trl.evaluation.sampling import TransformersSampler, record_seed
from staged_sampling import StagedRollouts, StagedSampler
from tiny import tiny_config, tiny_model, tiny_tokenizer

PROMPTS = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]]


def test_every_stage_continues_what_has_not_ended():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] += 0.3  # some completions end, some do not
    prompts, seeds = PROMPTS * 8, list(range(32))
    completions = StagedSampler(model, tokenizer, (4, 10)).sample(prompts, seeds)
    first = TransformersSampler(model, tokenizer, max_new_tokens=4)
    second = TransformersSampler(model, tokenizer, max_new_tokens=6)
    lengths = set()
    for prompt, seed, found in zip(prompts, seeds, completions, strict=True):
        (expected,) = first.sample([prompt], [record_seed(seed, 0)])
        token_ids = expected.token_ids
        if expected.truncated:
            (expected,) = second.sample([prompt + token_ids], [record_seed(seed, 1)])
            token_ids = token_ids + expected.token_ids
        assert found.token_ids == token_ids
        assert found.truncated == expected.truncated
        assert found.truncated == (tokenizer.eos_token_id not in found.token_ids)
        assert found.text == tokenizer.decode(token_ids, skip_special_tokens=True)
        lengths.add(len(token_ids))
    assert min(lengths) < 4 < max(lengths)


def test_later_stages_compute_fewer_rows():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] += 0.3
    rows = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].size(0)), with_kwargs=True
    )
    completions = StagedSampler(model, tokenizer, (4, 10)).sample(PROMPTS * 8, list(range(32)))
    hook.remove()
    unfinished = sum(len(each.token_ids) > 4 or each.truncated for each in completions)
    assert rows[:4] == [32] * 4
    assert set(rows[4:]) == {unfinished}
    assert 0 < unfinished < 32


def test_a_trainer_gets_new_completions_at_every_step(tmp_path):
    class Trainer:
        model, processing_class, args = tiny_model(), tiny_tokenizer(), tiny_config(tmp_path, seed=3)
        state = type("State", (), {"global_step": 0})()

    rollouts, prompts = StagedRollouts((3, 8)), ["a", "bb"] * 4
    first, again = rollouts(prompts, Trainer), rollouts(prompts, Trainer)
    assert first == again, "what is sampled depends on the seed and the step alone"
    Trainer.state.global_step = 1
    assert rollouts(prompts, Trainer)["completion_ids"] != first["completion_ids"]
    assert len({tuple(ids) for ids in first["completion_ids"]}) > 4, "rows of one prompt differ"
