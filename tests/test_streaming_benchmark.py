"""The benchmark of streaming: its policy ends completions as stated, and its numbers follow from the steps' times."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from streaming import CLASSES, LONGEST, POLICIES, SHORTEST, mean_length, save_policy, summarise, tokens_of


@pytest.mark.parametrize("name", POLICIES)
def test_each_class_goes_on_with_its_own_tokens_and_ends_at_its_own_rate(tmp_path, name):
    save_policy(tmp_path, *POLICIES[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (mean_length(0), mean_length(CLASSES - 1)) == pytest.approx((SHORTEST, LONGEST))
    for number in range(CLASSES):
        tokens = tokens_of(number)
        with torch.no_grad():
            probabilities = model(torch.tensor([tokens[:6]])).logits[0, -1].softmax(dim=0)
        assert probabilities[[1, *tokens]].sum() > 0.999
        assert probabilities[1] == pytest.approx(1 / mean_length(number), rel=0.25)


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
