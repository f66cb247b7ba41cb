"""Completions that call tools, scripted turn by turn, for TRL's own tool loop."""

import inspect
from pathlib import Path

from trl import GRPOTrainer

from opo_trl import OPOTrainer
from tiny import tiny_config, tiny_model, tiny_tokenizer

LONG = {"max_position_embeddings": 4096}


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        Their sum.
    """
    return a + b


def tool_tokenizer():
    """With a real chat template, which TRL's tool loop needs."""
    template = Path(inspect.getfile(GRPOTrainer)).parents[1] / "chat_templates" / "qwen3.jinja"
    return tiny_tokenizer(chat_template=template.read_text())


def call(tool, **arguments):
    """A completion that calls a tool."""
    listed = ", ".join(f'"{key}": {value!r}'.replace("'", '"') for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "{tool}", "arguments": {{{listed}}}}}\n</tool_call>'


def turns_trainer(output_dir, turns, model=None, settings=None, **arguments):
    """The turns are scripted, one list of texts after the other; the batch is kept."""
    tokenizer, script = tool_tokenizer(), iter(turns)

    class Scripted(OPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            texts = next(script)
            assert len(texts) == len(prompt_ids)
            return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts], None

        def _generate_and_score_completions(self, inputs):
            self.batch = super()._generate_and_score_completions(inputs)
            return self.batch

    return Scripted(
        tiny_model(**LONG) if model is None else model,
        args=tiny_config(output_dir, max_completion_length=900, **(settings or {})),
        processing_class=tokenizer,
        **arguments,
    )


def rows_of(batch, rewards):
    """Rows as `reinforce_update` takes them, without padding."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
    return [
        (prompt[prompt_mask.bool()].tolist(), ids[mask.bool()].tolist(), trained[mask.bool()].tolist(), reward)
        for prompt, prompt_mask, ids, mask, trained, reward in zip(*map(batch.get, names), rewards, strict=True)
    ]
