"""
Runs that push to the Hub, all in one process with an endpoint of its own; see test_hub.py.

    HF_ENDPOINT=... python tests/hub_run.py OUTPUT_DIR CASE... [-- ARGUMENT...]

Writes OUTPUT_DIR/results.RANK.json: for each case what it returned or raised, and what was logged at which step. Then
it runs `examples/train_math.py` with the arguments, if there are any, as a script, and ends as that does.
"""

import gc
import json
import logging
import os
import runpy
import sys
import time
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import TrainerCallback

from opo_trl import OPOConfig, OPOTrainer
from opo_trl.runs.checkpoints import incomplete_reason, latest_complete
from plain import plain_trainer
from test_preemption import AskedInTheMiddle
from test_resume import letters_reward, sampling_trainer
from tiny import scripted_dataset, tiny_config, tiny_model, tiny_tokenizer


class Watched(logging.Handler):
    """Collects what the package logs, with the step of the trainer that was made last."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.trainer, self.lines = None, []

    def emit(self, record):
        step = self.trainer.state.global_step if self.trainer else None
        self.lines.append((record.levelname, step, record.getMessage()))


WATCHED = Watched()


class PushDoneAfter(TrainerCallback):
    """Training waits for the Hub after some steps, so that it is known what has arrived by then; and stops at one."""

    def __init__(self, steps, stop_at=None):
        self.steps, self.stop_at = steps, stop_at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps and state.is_world_process_zero:
            WATCHED.trainer.push_in_progress.wait_until_done()
        if state.global_step == self.stop_at:
            raise InterruptedError("the machine is gone")


def pushing_trainer(output_dir, repository, model=None, **settings):
    defaults = {"push_to_hub": True, "hub_token": "hf_writer", "save_steps": 4, "hub_strategy": "checkpoint"}
    settings = {**defaults, "hub_model_id": repository, **settings}
    WATCHED.trainer = sampling_trainer(output_dir, tiny_model() if model is None else model, **settings)
    return WATCHED.trainer


def outcome(trainer):
    return {"step": trainer.state.global_step, "failures": trainer.push_failures}


def every_save(output_dir):
    trainer = pushing_trainer(output_dir, "alice/every-save", hub_strategy="every_save", hub_private_repo=True)
    trainer.train()
    return outcome(trainer)


def plain(output_dir):
    """TRL's own trainer and configuration, with the mixin."""
    settings = {"push_to_hub": True, "hub_token": "hf_writer", "save_steps": 4, "hub_strategy": "every_save"}
    WATCHED.trainer = plain_trainer(output_dir, hub_model_id="alice/plain", **settings)
    WATCHED.trainer.train()
    return outcome(WATCHED.trainer)


def checkpoint(output_dir):
    """Without a namespace: the repository is called as the folder is."""
    trainer = pushing_trainer(output_dir, None)
    trainer.train()
    return outcome(trainer)


def every_checkpoint(output_dir):
    settings = {"hub_strategy": "all_checkpoints", "hub_always_push": True, "save_total_limit": 1, "save_steps": 2}
    trainer = pushing_trainer(output_dir, "alice/every-checkpoint", **settings)
    trainer.train()
    return outcome(trainer)


def end(output_dir):
    """Nothing is sent before the script asks for it."""
    trainer = pushing_trainer(output_dir, "alice/end", hub_strategy="end")
    trainer.train()
    info = trainer.push_to_hub(commit_message="That was it")
    return {**outcome(trainer), "url": info.commit_url}


def slow(output_dir):
    """Eight saves fall into one upload, with room for a single checkpoint."""
    trainer = pushing_trainer(output_dir, "alice/slow", save_steps=1, save_total_limit=1)
    trainer.train()
    return outcome(trainer)


def quota(output_dir):
    trainer = pushing_trainer(output_dir, "alice/quota", save_steps=2, callbacks=[PushDoneAfter([3, 5])])
    trainer.train()
    trained = outcome(trainer)
    raised = []
    for call in (partial(trainer.push_to_hub, dataset_name="openai/gsm8k"), trainer.save_model, trainer.end):
        try:
            call()
        except Exception as error:
            raised.append((type(error).__name__, str(error)))
    return {**trained, "raised": raised, "final": latest_complete(output_dir)[0].name}


def interrupted_and_resumed(output_dir):
    """Gone at step 5 with everything on its disk; only what the Hub has is left."""
    whole = sampling_trainer(output_dir / "whole", tiny_model(), save_strategy="no")
    whole.train()
    first = pushing_trainer(output_dir / "first", "alice/resumed", callbacks=[PushDoneAfter([5], stop_at=5)])
    with suppress(InterruptedError):
        first.train()
    downloaded = Path(
        snapshot_download(
            "alice/resumed", token="hf_writer", allow_patterns="last-checkpoint/*", local_dir=output_dir / "hub"
        ),
        "last-checkpoint",
    )
    again = pushing_trainer(output_dir / "again", "alice/resumed", tiny_model(seed=3))
    again.train(resume_from_checkpoint=str(downloaded))
    expected, actual = whole.model.state_dict(), again.model.state_dict()
    return {
        **outcome(again),
        "missing": incomplete_reason(downloaded),
        "resumed at": json.loads((downloaded / "trainer_state.json").read_text())["global_step"],
        "same bits": all(torch.equal(actual[name], expected[name]) for name in expected),
    }


class StuckPush(TrainerCallback):
    """An upload that never ends, from the fifth step on."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            WATCHED.trainer._pushes.watch("a stuck upload", Future())


def preempted(output_dir):
    callbacks = [AskedInTheMiddle(step=5), PushDoneAfter([5]), StuckPush()]
    trainer = pushing_trainer(output_dir, "alice/preempted", hub_always_push=True, callbacks=callbacks)
    try:
        trainer.train()
    except SystemExit as ended:
        return {"code": ended.code, "whole": latest_complete(output_dir)[0].name}


REFUSED = {
    "no such token": {"hub_token": "hf_nobody"},
    "read-only token": {"hub_token": "hf_reader"},
    "read-only token, own repository": {"hub_token": "hf_reader", "hub_model_id": "alice/there"},
    "foreign namespace": {"hub_model_id": "bob/new"},
    "foreign repository": {"hub_model_id": "bob/public"},
    "public where private is wanted": {"hub_model_id": "alice/there", "hub_private_repo": True},
    "down": {"hub_model_id": "alice/down"},
    "no name": {"hub_model_id": "not a name"},
}


def refused(output_dir):
    """There is no such model: whoever looks for it fails otherwise."""
    messages = {}
    for name, settings in REFUSED.items():
        arguments = {"push_to_hub": True, "hub_token": "hf_writer", "hub_model_id": "alice/new", **settings}
        try:
            make_without_model(output_dir, **arguments)
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def not_asked(output_dir):
    make_without_model(output_dir, hub_token="hf_nobody")


def make_without_model(output_dir, **settings):
    args: OPOConfig = tiny_config(output_dir, **settings)
    directory = output_dir / "no-such-model"
    directory.mkdir(parents=True, exist_ok=True)  # empty: a missing one is refused before the Hub is asked
    OPOTrainer(
        model=str(directory),
        reward_funcs=letters_reward,
        args=args,
        train_dataset=scripted_dataset(),
        processing_class=tiny_tokenizer(),
    )


def main():
    output_dir, names, arguments = Path(sys.argv[1]), sys.argv[2:], []
    if "--" in names:
        names, arguments = names[: names.index("--")], names[names.index("--") + 1 :]
    logging.getLogger("opo_trl").addHandler(WATCHED)
    gc.freeze()  # every training run collects garbage: what was imported need not be looked at
    results = {}
    for name in names:
        WATCHED.trainer, WATCHED.lines = None, []
        start = time.perf_counter()
        try:
            result = globals()[name](output_dir / name)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        results[name] = {"result": result, "log": WATCHED.lines, "seconds": time.perf_counter() - start}
    (output_dir / f"results.{os.environ.get('RANK', 0)}.json").write_text(json.dumps(results, indent=1))
    if arguments:
        script = Path(__file__).parents[1] / "examples" / "train_math.py"
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
