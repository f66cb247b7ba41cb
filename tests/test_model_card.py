"""The model card: TRL's, with what was trained, how, and what came out."""

from pathlib import Path

from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hub_stand_in import errors_of_card
from opo_trl.runs.model_card import CHAT_QUESTION, is_hub_name, last_metrics
from test_resume import PROMPTS, lora_model, sampling_trainer
from tiny import scripted_trainer, tiny_model


def card_of(trainer, **arguments):
    trainer.create_model_card(**arguments)
    content = Path(trainer.args.output_dir, "README.md").read_text()
    assert not errors_of_card(content)
    return ModelCard(content)


def test_a_card_says_what_was_trained_how_and_what_came_out(tmp_path, chat_model_dir):
    model = AutoModelForCausalLM.from_pretrained(chat_model_dir)
    trainer = sampling_trainer(
        tmp_path / "my-run",
        model,
        num_steps=2,
        save_strategy="no",
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:2]}),
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    card = card_of(trainer, dataset_name="openai/gsm8k")
    assert card.data.to_dict() == {
        "datasets": "openai/gsm8k",
        "library_name": "transformers",
        "model_name": "my-run",
        "tags": ["generated_from_trainer", "opo", "reinforcement-learning", "trl"],
    }
    text = card.text
    assert f"fine-tuned version of the local model `{chat_model_dir.name}` on the [openai/gsm8k]" in text
    assert str(chat_model_dir) not in text
    assert "None" not in text
    assert "https://arxiv.org/abs/2505.23585" in text
    assert "hao2025opo" in text
    for row in (
        "| steps | 2 of 2 |",
        "| completions per step | 8, 4 for each of 2 prompts |",
        "| learning rate | 0.01, linear |",
        "| rewards | `letters_reward` |",
        "| training problems | 7 |",
        "| dataset | `openai/gsm8k` |",
    ):
        assert row in text
    (reward,) = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert f"| held-out reward, step 2 | {reward:.4g} |" in text
    assert "- OPO-TRL: " in text
    assert text.index("### Method") < text.index("### Results") < text.index("### Framework versions")


def test_the_example_of_a_card_passes_text_where_there_is_no_chat_template(tmp_path, chat_model_dir):
    trainer = scripted_trainer(tmp_path)
    trainer.processing_class.chat_template = None
    assert "output = generator(question, max_new_tokens" in card_of(trainer).text
    trainer.processing_class.chat_template = "{{ messages }}"
    assert f"output = generator({CHAT_QUESTION}, max_new_tokens" in card_of(trainer).text


def test_an_adapter_has_a_card_too(tmp_path):
    assert "| steps | 0 of 0 |" in card_of(scripted_trainer(tmp_path, lora_model())).text


def test_a_base_model_of_the_hub_is_linked(tmp_path):
    model = tiny_model()
    model.config._name_or_path = "Qwen/Qwen2.5-0.5B"
    card = card_of(scripted_trainer(tmp_path, model))
    assert card.data.base_model == "Qwen/Qwen2.5-0.5B"
    assert "[Qwen/Qwen2.5-0.5B](https://huggingface.co/Qwen/Qwen2.5-0.5B)" in card.text


def test_neither_a_local_file_nor_a_model_that_is_gone_is_linked(tmp_path):
    """TRL would link to huggingface.co//gone/model and put the file's path into the metadata."""
    problems, model = tmp_path / "problems.jsonl", tiny_model()
    problems.touch()
    model.config._name_or_path = "/gone/model"
    card = card_of(scripted_trainer(tmp_path / "run", model), dataset_name=str(problems))
    assert {"datasets", "base_model"}.isdisjoint(card.data.to_dict())
    assert "the local model `model`" in card.text
    assert "| dataset | `problems.jsonl` |" in card.text
    assert str(tmp_path) not in card.content
    assert "/gone" not in card.content


def test_the_same_run_writes_the_same_card(tmp_path):
    """TRL's tags come in the order of a set; a card that differs would be a commit of its own."""
    trainer = scripted_trainer(tmp_path)
    assert card_of(trainer, tags=["b", "a", "c"]).content == card_of(trainer, tags={"c", "a", "b"}).content


def test_names_of_the_hub():
    assert is_hub_name("openai/gsm8k")
    assert is_hub_name("gpt2")
    assert not any(is_hub_name(name) for name in ("", "/data/model", "generated arithmetic", "a/b/c", __file__))


def test_last_metrics_are_those_of_the_last_steps_that_have_some():
    history = [
        {"step": 1, "reward": 0.1, "entropy": 2.0},
        {"step": 2, "reward": 0.25, "entropy": 1.5, "completions/mean_length": 10},
        {"step": 2, "eval_reward": 0.5, "eval_pass@4": 0.75, "eval_loss": 0.0, "eval_runtime": 3.0},
        {"step": 2, "train_runtime": 9.0},
    ]
    assert last_metrics(history) == {
        "mean training reward, step 2": "0.25",
        "mean completion length (tokens), step 2": "10",
        "mean entropy per token (nats), step 2": "1.5",
        "held-out reward, step 2": "0.5",
        "held-out pass@4, step 2": "0.75",
    }
    assert last_metrics([]) == {}
    assert last_metrics([{"step": 1, "reward": None}]) == {}, "no completion could be scored"
    several = [{"step": 3, "eval_gsm8k_reward": 0.5, "eval_aime_pass@1": 0.25}]
    assert list(last_metrics(several)) == ["held-out gsm8k reward, step 3", "held-out aime pass@1, step 3"]
