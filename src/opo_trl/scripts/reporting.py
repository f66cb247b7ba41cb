"""What a run prints and draws: a line per logging step, pass@1 before and after, the curves."""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from ..evaluation import bootstrap_interval, pass_rates
from ..evaluation.sampling import sample_completions
from .judging import judge

COLUMNS = {  # metric -> heading
    "reward": "reward",
    "completions/mean_length": "length",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "opo/baseline_minus_mean": "b*-mean",
    "opo/informative_fraction": "informative",
}
_END = "\n]\n"  # of log.json
PHASES = ("time/generate", "time/score", "time/sync_weights", "time/update")  # seconds of one step


class ConsoleProgress(TrainerCallback):
    """One line per logging step, in place of the dictionaries that Trainer prints."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start, self.first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            headings = "".join(f"{name:>12}" for name in COLUMNS.values())
            phases = "/".join(name.removeprefix("time/").removesuffix("_weights") for name in PHASES)
            print(f"{'step':>11}  {headings}{'left':>8}{phases:>29}{'tok/s':>10}", flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        if "reward" in logs:
            done = state.global_step - self.first_step
            left = (time.perf_counter() - self.start) / max(done, 1) * (state.max_steps - state.global_step)
            values = "".join(f"{_number(logs.get(name)):>12}" for name in COLUMNS)
            phases = "/".join(_number(logs.get(name), ".2g") for name in PHASES) + "s"
            rate = _number(logs.get("tokens_per_second/generated"), ".0f")
            print(
                f"{state.global_step:5d}/{state.max_steps:<5d}  {values}{left:7.0f}s{phases:>29}{rate:>10}", flush=True
            )
        elif "eval_reward" in logs:
            reward = _number(logs["eval_reward"], ".3f")
            print(f"{state.global_step:5d}/{state.max_steps:<5d}  held-out reward {reward}", flush=True)


class RunLog(TrainerCallback):
    """
    Writes every entry of the log to `log.json` of the output directory as soon as it is logged.

    So a run leaves its metrics on the disk without a tracker, without checkpoints, and when it is killed. The file is a
    list, valid after each entry. A resumed run continues from the entries that its checkpoint has.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path = Path(args.output_dir, "log.json")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in state.log_history) + _END)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and hasattr(self, "path"):  # not in an evaluation before training
            *earlier, entry = state.log_history
            with self.path.open("r+b") as file:
                file.seek(-len(_END), os.SEEK_END)
                file.write(((",\n" if earlier else "") + json.dumps(entry) + _END).encode())


def _number(value: Any, form: str = ".4g") -> str:
    """Format a metric. TRL logs None for one without a value, such as the reward where nothing could be scored."""
    return f"{value:{form}}" if isinstance(value, int | float) else "-"


def measure(
    model_path: str,
    problems: Dataset,
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device | str = "cpu",
    revision: str = "main",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """
    Load a policy and measure its pass@1 on `problems`, with a 95 % interval over problems.

    `revision` is that of a model on the Hub, also of the one under an adapter in a directory.
    """
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left", **source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto", **source)
    sampled = sample_completions(
        model.to(device),
        tokenizer,
        list(problems["prompt"]),
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    samples = [(problem, number) for problem in problems for number in range(num_samples)]
    records = judge(samples, [completion for completions in sampled for completion in completions])
    solved = list(pass_rates(records).values())
    return {
        "pass@1": sum(solved) / len(solved),
        "interval": bootstrap_interval(solved, bounds=(0.0, 1.0)),
        "mean_length": sum(len(record["token_ids"]) for record in records) / len(records),
    }


def describe(result: dict[str, Any]) -> str:
    """Describe in one line what `measure` found."""
    (low, high), length = result["interval"], result["mean_length"]
    return f"{result['pass@1']:.3f} (95 % interval {low:.3f} to {high:.3f}), mean length {length:.1f} tokens"


def write_summary(
    output_dir: str, before: dict[str, Any], after: dict[str, Any], history: Sequence[dict[str, Any]], **run: Any
) -> dict[str, Any]:
    """
    Write `summary.json`, and, with matplotlib, `curves.png`; `log.json` has every metric of every logging step.

    Returns the summary.
    """
    summary = {
        "pass@1_before": before["pass@1"],
        "pass@1_before_interval": list(before["interval"]),
        "pass@1_after": after["pass@1"],
        "pass@1_after_interval": list(after["interval"]),
        "mean_length_before": before["mean_length"],
        "mean_length_after": after["mean_length"],
        **run,
        "commit": commit(),
        "versions": {name: version(name) for name in ("opo-trl", "trl", "transformers", "torch")},
    }
    path = Path(output_dir)
    (path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    curves = path / "curves.png"
    curves.unlink(missing_ok=True)  # of an earlier run, if matplotlib is missing now
    plot_curves(curves, history, before, after)
    return summary


def plot_curves(path: Path, history: Sequence[dict[str, Any]], before: dict[str, Any], after: dict[str, Any]) -> None:
    """Draw reward, length, entropy and held-out pass@1 over steps."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path.name} not drawn: matplotlib is not installed (pip install matplotlib).")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    color, reference = "#1f6fb4", "#d05a10"
    figure, axes = plt.subplots(2, 2, figsize=(7.5, 5), sharex=True, layout="constrained")
    panels = [
        ("reward", "training reward"),
        ("completions/mean_length", "mean completion length (tokens)"),
        ("entropy", "entropy (nats per token)"),
        ("eval_reward", "held-out pass@1"),
    ]
    for axis, (name, title) in zip(axes.flat, panels, strict=True):
        points = [(entry["step"], entry[name]) for entry in history if entry.get(name) is not None]
        held_out = {"marker": "o", "ms": 3, "label": "during training"} if name == "eval_reward" else {}
        axis.plot(*zip(*points, strict=True), color=color, **held_out)
        axis.set_title(title, fontsize=10, loc="left")
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.3)
    last_step = max(entry["step"] for entry in history)
    steps, results = (0, last_step), (before, after)
    scores = [result["pass@1"] for result in results]
    error = [[abs(result["interval"][end] - result["pass@1"]) for result in results] for end in (0, 1)]
    label = "before and after, 95 % interval"
    axes[1, 1].errorbar(steps, scores, error, fmt="s", ms=5, capsize=3, color=reference, label=label, zorder=3)
    axes[1, 1].legend(fontsize=9, loc="lower center")
    for axis in axes[1]:
        axis.set_xlabel("optimizer step", fontsize=9)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def commit() -> str | None:
    """Commit of the working tree, or `None` outside a repository and without git."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return result.stdout.strip() or None
