"""What OPO adds to TRL's completions table, compared with what the test computes itself."""

import math
from collections import deque

import pandas as pd
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset

from opo_trl import OPOConfig
from opo_trl.algorithm.rollout import estimate_advantages
from opo_trl.baselines import optimal_baseline
from opo_trl.report.completion_columns import completion_columns
from opo_trl.report.token_logps import LOGPS, TOKENS, TokenLogps
from tiny import GROUP_SIZE, SCRIPT, TokenBaseline, scripted_dataset, scripted_trainer, tiny_config, tiny_model
from tiny import tiny_tokenizer as make_tokenizer

TABLE = {"log_completions": True, "num_completions_to_print": 0}
SIX_PROMPTS = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}
CUT = "abcd"  # the tiny tokenizer has a token for each character


def table(folder, step=1):
    return pd.read_parquet(folder / "completions" / f"completions_{step:05d}.parquet")


def test_reward_length_and_baseline_of_each_completion(tmp_path):
    scripted_trainer(tmp_path, **TABLE, **SIX_PROMPTS).train()
    rows = table(tmp_path)
    assert list(rows["opo/group"]) == [group for group in range(len(SCRIPT)) for _ in range(GROUP_SIZE)]
    assert set(rows["opo/split"]) == {"train"}
    assert not rows["opo/truncated"].any()
    assert rows["opo/solution"].isna().all(), "the dataset has none"
    for prompt, group in rows.groupby("prompt"):
        script = dict(SCRIPT[prompt])
        lengths = [len(text) + 1 for text in group["completion"]]  # a token per character, and the end of sequence
        assert list(group["opo/length"]) == lengths
        rewards = [script[text] for text in group["completion"]]
        pairs = [(length, r) for length, r in zip(lengths, rewards, strict=True) if r is not None]
        baseline = sum(length * r for length, r in pairs) / sum(length for length, _ in pairs)
        for row, reward in zip(group.to_dict("records"), rewards, strict=True):
            if reward is None:
                assert math.isnan(row["opo/reward"])
                assert math.isnan(row["opo/baseline"])
                assert row["advantage"] == 0
            else:
                assert row["opo/reward"] == pytest.approx(reward)
                assert row["opo/baseline"] == pytest.approx(baseline, abs=1e-6)
                assert row["advantage"] == pytest.approx(reward - baseline, abs=1e-6)


def test_the_reward_is_the_weighted_sum_and_truncated_completions_are_marked(tmp_path):
    def rollout(prompts, trainer):
        tokenizer = trainer.processing_class
        ids = [tokenizer(CUT)["input_ids"] + ([] if i % 2 else [tokenizer.eos_token_id]) for i in range(len(prompts))]
        return {"prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts], "completion_ids": ids,
                "logprobs": [[0.0] * len(row) for row in ids]}  # fmt: skip

    def first(completions, **kwargs):
        return [float(i % 4) for i in range(len(completions))]

    def length(completions, **kwargs):  # a name of OPO's columns without their prefix
        return [None if i % 4 == 0 else 0.5 for i in range(len(completions))]

    scripted_trainer(
        tmp_path, rollout=rollout, reward_funcs=[first, length], reward_weights=[2.0, 1.0], **TABLE
    ).train()
    rows = table(tmp_path)
    assert list(rows["opo/truncated"]) == [False, True] * 4
    assert list(rows["opo/length"]) == [5, 4] * 4
    assert list(rows["opo/reward"]) == [0.0, 2.5, 4.5, 6.5] * 2
    assert rows["length"].isna().sum() == 2, "the column of the reward function is left alone"


def test_an_evaluation_is_told_apart(tmp_path):
    scripted_trainer(
        tmp_path,
        eval_dataset=scripted_dataset(),
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        per_device_eval_batch_size=6,
        log_token_logps=True,
        **TABLE,
    ).train()
    rows = table(tmp_path)  # TRL writes the table of a step again after its evaluation
    assert len(rows) == 8
    assert set(rows["opo/split"]) == {"eval"}
    assert rows["opo/tokens"].isna().all()


@pytest.mark.parametrize("split", ["train", "eval"])
def test_solutions_are_those_of_their_prompts_where_one_dataset_has_them(tmp_path, split):
    """The table has the last rows of training, and the fewer ones of the evaluation."""

    def problems(has_solutions, count):
        prompts = list(SCRIPT)[:count]
        solutions = {"solution": [f"solution of {prompt}" for prompt in prompts]} if has_solutions else {}
        return Dataset.from_dict({"prompt": prompts, "answer": ["answer"] * count, **solutions})

    scripted_trainer(
        tmp_path,
        train_dataset=problems(split == "train", 6),
        eval_dataset=problems(split == "eval", 2),
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        **TABLE,
    ).train()
    rows = table(tmp_path)
    assert list(rows["opo/split"]) == ["train"] * 4 + ["eval"] * 4
    for row in rows.to_dict("records"):
        if row["opo/split"] == split:
            assert row["opo/solution"] == f"solution of {row['prompt']}"
        else:
            assert pd.isna(row["opo/solution"])


def test_the_baseline_of_completions_whose_tokens_have_their_own():
    def of_tokens(rewards, weights):  # (P, K), (P, K, T) -> (P, 1, T)
        return optimal_baseline(rewards, weights.sum(dim=2)).unsqueeze(2) * torch.tensor([1.0, 2.0, 3.0])

    rewards, lengths = torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 3]])
    weights = (torch.arange(3) < lengths.unsqueeze(2)).float()
    columns = completion_columns(estimate_advantages(rewards, lengths, weights, of_tokens), "train")
    assert columns["opo/baseline"] == pytest.approx([0.25, 0.5])  # b* is 1/4: 0.25, and the mean of 0.25, 0.5 and 0.75


def expected_logps(prompt, completion):
    tokenizer = make_tokenizer()
    ids, answer = tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = tiny_model()(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    return logits.log_softmax(dim=-1)[torch.arange(len(answer)), answer].tolist()


@pytest.mark.parametrize("cut", ["regrouped", "with uninformative rows", "as TRL cuts them"])
def test_token_log_probabilities_are_those_of_the_update(tmp_path, cut, monkeypatch):
    if cut == "as TRL cuts them":
        monkeypatch.setattr("opo_trl.update.planned_updates.is_compiled_module", lambda model: True)
    settings = {**TABLE, **SIX_PROMPTS, "skip_uninformative": cut != "with uninformative rows"}
    scripted_trainer(tmp_path, log_token_logps=True, **settings).train()
    for row in table(tmp_path).to_dict("records"):
        if row["advantage"] == 0 and cut == "regrouped":
            assert row["opo/tokens"] is None
            continue
        assert "".join(row["opo/tokens"]) == row["completion"] + "<eos>"
        assert row["opo/token_logps"] == pytest.approx(expected_logps(row["prompt"], row["completion"]), abs=1e-4)


def test_token_log_probabilities_of_refilled_steps_belong_to_their_completions(tmp_path):
    """The update trains rows of several rounds; the table has the last ones."""
    scripted_trainer(
        tmp_path, log_token_logps=True, max_refill_rounds=2, per_device_train_batch_size=12, **TABLE
    ).train()
    rows = table(tmp_path)
    known = rows[rows["opo/tokens"].notna()]
    assert len(known) >= 4
    for row in known.to_dict("records"):
        assert "".join(row["opo/tokens"]) == row["completion"] + "<eos>"
        assert row["opo/token_logps"] == pytest.approx(expected_logps(row["prompt"], row["completion"]), abs=1e-4)


def test_rows_that_another_rank_trains_are_logged_where_they_were_sampled(monkeypatch):
    """Two ranks with two rows each; each trains a row of the other, and one row is trained by none."""
    tokenizer, columns = make_tokenizer(), {TOKENS: deque(maxlen=4), LOGPS: deque(maxlen=4)}
    ranks = [TokenLogps(PartialState(), tokenizer) for _ in range(2)]
    for _ in range(2):  # the numbers of a second step follow those of the first
        batches = []
        for rank, logger in enumerate(ranks):
            ids = torch.tensor(tokenizer(["ab", "cd"] if rank == 0 else ["ef", "gh"])["input_ids"])
            batches.append({"completion_ids": ids, "completion_mask": torch.ones_like(ids)})
            logger.number(batches[-1], rank, 2, True, columns if rank == 0 else {TOKENS: [], LOGPS: []})
    swapped = {name: torch.cat([batches[1][name][:1], batches[0][name][:1]]) for name in batches[0]}
    trained = [swapped, {name: column[1:] for name, column in batches[0].items()}]
    for logger, batch in zip(ranks, trained, strict=True):
        logger.add(batch, -batch["completion_ids"].float(), batch["completion_mask"])
    everything = ranks[0]._trained + ranks[1]._trained
    monkeypatch.setattr("opo_trl.report.token_logps.gather_object", lambda own: everything)
    ranks[0].write(columns)
    assert list(columns[TOKENS]) == [["a", "b"], ["c", "d"], ["e", "f"], None]
    for tokens, logps in zip(columns[TOKENS], columns[LOGPS], strict=True):
        assert tokens is None or logps == [-float(token) for token in tokenizer("".join(tokens))["input_ids"]]


def test_recording_log_probabilities_does_not_change_the_update(tmp_path):
    updates = []
    for log in (False, True):
        trainer = scripted_trainer(tmp_path / str(log), log_token_logps=log, **TABLE, **SIX_PROMPTS)
        trainer.train()
        updates.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*updates, strict=True))


def test_token_baselines_have_the_columns_too(tmp_path):
    trainer = TokenBaseline(
        tiny_model(),
        lambda completions, **kwargs: [float(i) for i in range(len(completions))],
        tiny_config(tmp_path, max_completion_length=4, log_token_logps=True, **TABLE),
        scripted_dataset(),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    rows = table(tmp_path)
    assert (rows["opo/reward"] - rows["opo/baseline"]).tolist() == pytest.approx(rows["advantage"].tolist(), abs=1e-5)


def test_log_token_logps_needs_the_table():
    with pytest.raises(ValueError, match=r"`log_token_logps=True` .* `log_completions` must be True, got False\. Set"):
        OPOConfig("unused", use_cpu=True, bf16=False, log_token_logps=True)
