"""The benchmark of streaming: its policy ends completions as stated, and its numbers follow from the steps' times."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streaming import (
    CASES,
    CLASSES,
    FEWEST,
    LONGEST,
    MOST,
    SHORTEST,
    gains_by_round,
    hidden_by_round,
    length_of,
    mean_length,
    prompts,
    save_policy,
    summarise,
    time_to_reward,
    tokens_of,
)


@pytest.mark.parametrize("name", CASES)
def test_each_word_of_a_prompt_is_its_token(tmp_path, name):
    """The word t12 is not the end of the text, t1, and another word."""
    save_policy(tmp_path, CASES[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in prompts(CASES[name])["prompt"]:
        assert tokenizer(text)["input_ids"] == [int(word.removeprefix("t")) for word in text.split()]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.counts])
def test_each_class_continues_with_its_own_tokens_and_ends_at_its_own_rate(tmp_path, name):
    save_policy(tmp_path, CASES[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (mean_length(0), mean_length(CLASSES - 1)) == pytest.approx((SHORTEST, LONGEST))
    for number in range(CLASSES):
        tokens = tokens_of(number)
        with torch.no_grad():
            probabilities = model(torch.tensor([tokens[:6]])).logits[0, -1].softmax(dim=0)
        assert probabilities[[1, *tokens]].sum() > 0.999
        assert probabilities[1] == pytest.approx(1 / mean_length(number), rel=0.25)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.counts])
def test_lengths_that_vary_between_prompts_are_equal_within_a_group(tmp_path, name):
    save_policy(tmp_path, CASES[name])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = prompts(CASES[name])["prompt"][:CLASSES]
    torch.manual_seed(0)
    for kind in (0, 7, CLASSES - 1):
        ids = tokenizer(texts[kind], return_tensors="pt")["input_ids"]
        completions = model.generate(ids, do_sample=True, num_return_sequences=4, max_length=300)[:, ids.size(1) :]
        assert completions.size(1) == length_of(kind)
        assert (completions[:, -1] == 1).all()
        assert (completions[:, :-1] != 1).all()
        even = (completions[:, :-1] % 2 == 0).float().mean(dim=1)
        assert len(even.unique()) > 1
        assert 0.1 < even.mean() < 0.9
    assert (length_of(0), length_of(CLASSES - 1)) == (FEWEST, MOST)


def test_time_to_a_reward_is_interpolated_between_steps():
    """Both gain 0.4 in two steps, so the target is 0.7; the streamed steps take half as long."""
    rewards = (0.5, 0.6, 0.9)
    steps = {
        name: [{"step": seconds, "reward": reward} for reward in rewards]
        for name, seconds in [("plain", 10.0), ("streamed", 5.0)]
    }
    found = time_to_reward(steps)
    assert found["target"] == pytest.approx(0.7)
    assert found["plain"] == pytest.approx(10 + 10 / 3)
    assert found["ratio"] == pytest.approx(2)


def test_a_round_compares_steps_of_the_same_time():
    """The machine is twice as slow in the second round; what a streamed step saves is half of its update in both."""
    case = {"update": 4.0, "steps": {"plain": [9.0, 10.0, 11.0, 20.0, 20.0, 30.0], "streamed": [8.0] * 3 + [18.0] * 3}}
    assert gains_by_round(case, rounds=2) == [10 / 8, 20 / 18]
    assert hidden_by_round(case, rounds=2) == [0.5, 0.5]


def test_what_is_hidden_and_idle_follows_from_the_times():
    plain = {"step": 10.0, "time/generate": 6.0, "time/score": 1.0, "time/update": 3.0, "completions/mean_length": 5.0}
    streamed = {"step": 7.0, "time/generate": 3.0, "streaming/waves": 4.0, "streaming/generation_seconds": 6.3}
    found = summarise({"plain": [{**plain, "reward": 0.5}], "streamed": [{**streamed, "reward": 0.5}]})
    assert found["speedup"] == pytest.approx(10 / 7)
    assert found["update_to_generation"] == pytest.approx(4 / 6)
    assert found["hidden"] == pytest.approx(3 / 4)
    assert found["plain_server_idle"] == pytest.approx(0.4)
    assert found["plain_trainer_idle"] == pytest.approx(0.6)
    assert found["streamed_server_idle"] == pytest.approx(0.1)
    assert found["streamed_trainer_idle"] == pytest.approx(3 / 7)
