"""
Gradient variance and bias of every baseline, measured on a policy's own samples.

    python benchmarks/gradient_variance.py           # the tiny policy at three stages; 9 minutes of CPU time
    python benchmarks/gradient_variance.py --models NAME_OR_DIR --dataset openai/gsm8k:train:main --output FILE.json

For each of `--prompts` problems, `--samples` completions are sampled and scored, and the gradient g_i of the
log-probability of each (summed over its tokens) is computed. The rest is exact algebra on the inner products g_i . g_j:
the estimator from K completions, `(1/K) sum_i (r_i - b) g_i`, is computed for many random disjoint groups of K
completions, with every baseline on the same groups.

- **Variance** is the trace of the covariance of the estimator given the prompt: the unbiased one over disjoint groups,
  averaged over partitions and prompts. The variance between prompts is not included: no baseline changes it.
- **Scale and cosine** compare the mean of the estimator with the gradient, which is estimated without bias from half of
  all samples with the leave-one-out mean. Both are products of one half of the samples with the other half, so that
  noise does not count as signal.
- **Variance at equal scale** divides the variance by the squared scale: a baseline that contains the sample itself
  shrinks the gradient, and with it the variance; a larger learning rate compensates for that.
- Intervals are 95 % percentile bootstraps over prompts, also for ratios.

Weights of the baseline, in addition to powers of the length: "logit norm" is sum_t (1 - 2 pi(y_t) + sum_v pi(v)^2), the
squared norm of the score with respect to the logits (arXiv 2602.07078). "uncertainty" is sum_t (1 - pi(y_t))^2, between
one half of that and all of it. "1 - pi" is sum_t (1 - pi(y_t)), which has the same mean over y_t. The last two need
only the probabilities of the sampled tokens. "exact" is the true |g_i|^2 (Eq. 9) of the K completions themselves.
"optimum" is the best constant for the prompt, computed from all its samples.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # policies are measured in parallel, one per core

ROOT = Path(__file__).resolve().parents[1]
import numpy as np
import torch
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging

from measuring import RESULTS, provenance, sample_records
from opo_trl import OPOConfig, OPOTrainer
from opo_trl.algorithm.baselines import (
    group_mean,
    leave_one_out,
    logit_norm,
    no_baseline,
    optimal_baseline,
    surprise,
    token_uncertainty,
)
from opo_trl.evaluation.sampling import tokenize_prompt
from opo_trl.rewards import math_verify_reward
from opo_trl.scripts.policies import EMBEDDED_MODEL, model_path
from opo_trl.scripts.problems import fit_to_tokenizer, load_problems, parse_dataset
from variance_report import page_tables, plot, plot_norms

GROUP_SIZES = (2, 4, 8, 16)
PARTITIONS = 64  # random partitions into groups of K; each gives an unbiased variance, their mean varies less
LARGEST_GRADIENT = 2**20  # numbers kept of each gradient; a longer one is hashed to this size (count sketch)
TINY_POLICY = Path(model_path(EMBEDDED_MODEL))
STAGES = {"fresh": 0, "half-trained": 150, "trained": 300}  # optimizer steps, as in the quickstart


class Completions(NamedTuple):
    """The inputs of the baselines: for all completions of a prompt, (M,), or for groups of them, (G, K)."""

    rewards: torch.Tensor
    lengths: torch.Tensor  # tokens
    logit_norms: torch.Tensor  # sum_t (1 - 2 pi(y_t) + sum_v pi(v)^2)
    uncertainties: torch.Tensor  # sum_t (1 - pi(y_t))^2
    surprises: torch.Tensor  # sum_t (1 - pi(y_t))
    squared_norms: torch.Tensor  # of the gradients

    def take(self, groups: torch.Tensor) -> "Completions":
        return Completions(*(values[groups] for values in self))


class Prompt(NamedTuple):
    """The M completions of one prompt, and the inner products of their gradients."""

    completions: Completions
    inner_products: torch.Tensor  # (M, M)


# Called with the completions of groups and the best constant for the prompt; returns (G, K) or (G, 1).
BASELINES: dict[str, Callable[[Completions, float], torch.Tensor]] = {
    "none": lambda group, best: no_baseline(group.rewards, group.lengths).expand_as(group.rewards),
    "group mean": lambda group, best: group_mean(group.rewards, group.lengths),
    "leave-one-out": lambda group, best: leave_one_out(group.rewards, group.lengths),
    "OPO": lambda group, best: optimal_baseline(group.rewards, group.lengths),
    "length^0.5": lambda group, best: optimal_baseline(group.rewards, group.lengths, 0.5),
    "length^1.6": lambda group, best: optimal_baseline(group.rewards, group.lengths, 1.6),
    "length^2": lambda group, best: optimal_baseline(group.rewards, group.lengths, 2.0),
    "logit norm": lambda group, best: optimal_baseline(group.rewards, group.logit_norms),
    "uncertainty": lambda group, best: optimal_baseline(group.rewards, group.uncertainties),
    "1 - pi": lambda group, best: optimal_baseline(group.rewards, group.surprises),
    "exact": lambda group, best: optimal_baseline(group.rewards, group.squared_norms),
    "optimum": lambda group, best: torch.full_like(group.rewards, best),
}


def take_gradients(model: Any, prompt: list[int], completions: list[list[int]], rewards: list[float]) -> Prompt:
    """Gradient of each completion's summed log-probability with respect to all trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    # Count sketch (Charikar et al. 2002): each entry is added, with a random sign, at a random position. Inner products
    # stay unbiased, with an error of about |a||b| / sqrt(LARGEST_GRADIENT), a thousandth.
    places, signs = None, None
    if size > LARGEST_GRADIENT:
        hashes = torch.Generator().manual_seed(0)
        places = torch.randint(LARGEST_GRADIENT, (size,), generator=hashes).to(model.device)
        signs = (2 * torch.randint(2, (size,), generator=hashes, dtype=torch.int8) - 1).to(model.device)
    gradients, logit_norms, uncertainties, surprises, squared_norms = [], [], [], [], []
    for completion in completions:
        ids = torch.tensor([prompt + completion], device=model.device)
        log_probs = model(input_ids=ids[:, :-1]).logits[0, len(prompt) - 1 :].float().log_softmax(dim=-1)  # (C, V)
        logps = log_probs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)  # (C,)
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(logps.sum(), parameters)]).float()
        squared_norms.append(gradient.square().sum().item())
        if places is not None:
            gradient = torch.zeros(LARGEST_GRADIENT, device=model.device).index_add_(0, places, gradient * signs)
        gradients.append(gradient)
        own, every = logps.detach()[None], torch.ones_like(logps)[None]
        uncertainties.append(token_uncertainty(own, every).item())
        surprises.append(surprise(own, every).item())
        logit_norms.append(logit_norm(log_probs.detach(), ids[0, len(prompt) :]).item())
    stacked = torch.stack(gradients)  # (M, D)
    lengths = [len(completion) for completion in completions]
    columns = (rewards, lengths, logit_norms, uncertainties, surprises, squared_norms)
    facts = Completions(*(torch.tensor(column, dtype=torch.float64) for column in columns))
    return Prompt(facts, (stacked @ stacked.T).double().cpu())


def group_statistics(prompt: Prompt, group_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """
    Variance of the estimator with every baseline on one prompt, and its products with the gradient.

    Returns:
        `dict[str, torch.Tensor]`: baseline -> (4,): trace of the covariance; the product of the estimator's mean in one
        half of the samples with that in the other half; with the gradient in the other half; and of the two gradients.
    """
    facts, products = prompt.completions, prompt.inner_products
    count = len(facts.rewards)
    best = float(optimal_baseline(facts.rewards[None], facts.squared_norms[None]))
    totals = torch.zeros(len(BASELINES), 4, dtype=torch.float64)
    for _ in range(PARTITIONS):
        groups = torch.randperm(count, generator=generator)[: count // group_size * group_size].view(-1, group_size)
        half = len(groups) // 2
        halves = (groups[:half].flatten(), groups[half : 2 * half].flatten())
        # Estimates, means of estimates and the gradient, all as weights on the gradients of the completions.
        group = facts.take(groups)
        weights = torch.stack([group.rewards - baseline(group, best) for baseline in BASELINES.values()]) / group_size
        overall = torch.zeros(len(BASELINES), count, dtype=torch.float64)
        overall[:, groups.flatten()] = weights.flatten(1) / len(groups)
        means = torch.zeros(2, len(BASELINES), count, dtype=torch.float64)
        gradient = torch.zeros(2, count, dtype=torch.float64)
        for part, members in enumerate(halves):
            means[part][:, members] = overall[:, members] * len(groups) / half
            rewards = facts.rewards[members][None]
            gradient[part, members] = ((rewards - leave_one_out(rewards, torch.ones_like(rewards))) / members.numel())[
                0
            ]  # without bias
        blocks = products[groups[:, :, None], groups[:, None, :]]  # (G, K, K)
        by_group = weights.transpose(0, 1)  # (G, B, K)
        squares = ((by_group @ blocks) * by_group).sum(dim=2)  # (G, B)
        of_mean = ((overall @ products) * overall).sum(dim=1)
        true = gradient @ products
        totals += torch.stack(
            [
                (squares.mean(dim=0) - of_mean) * len(groups) / (len(groups) - 1),
                ((means[0] @ products) * means[1]).sum(dim=1),
                (means[1] @ true[0] + means[0] @ true[1]) / 2,
                (true[0] @ gradient[1]).expand(len(BASELINES)),
            ],
            dim=1,
        )
    return dict(zip(BASELINES, totals / PARTITIONS, strict=True))


def estimate(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, seed: int = 0) -> dict[str, float]:
    """A function of means over prompts with its bootstrap interval: `values` is (prompts, ...)."""
    rng = np.random.default_rng(seed)
    drawn = torch.from_numpy(rng.integers(len(values), size=(2_000, len(values))))
    counts = torch.stack([torch.bincount(row, minlength=len(values)) for row in drawn]).double()  # (2000, prompts)
    resampled = function((counts @ values.flatten(1)).view(-1, *values.shape[1:]) / len(values))
    low, high = np.nanquantile(resampled.numpy(), [0.025, 0.975])
    return {"value": float(function(values.mean(dim=0)[None])[0]), "low": float(low), "high": float(high)}


def summarize_group_size(per_prompt: list[dict[str, torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """For every baseline: its variance relative to that of other baselines, its scale and its cosine."""
    names = list(BASELINES)
    values = torch.stack([torch.stack([found[name] for name in names]) for found in per_prompt])  # (prompts, B, 4)

    def scale(mean: torch.Tensor, i: int) -> torch.Tensor:
        return mean[:, i, 2] / mean[:, i, 3]

    def cosine(mean: torch.Tensor, i: int) -> torch.Tensor:
        return mean[:, i, 2] / (mean[:, i, 1].clamp(min=0) * mean[:, i, 3].clamp(min=0)).sqrt()

    def ratio(mean: torch.Tensor, i: int, other: str) -> torch.Tensor:
        return mean[:, i, 0] / mean[:, names.index(other), 0]

    def ratio_at_equal_scale(mean: torch.Tensor, i: int, other: str) -> torch.Tensor:
        return ratio(mean, i, other) / (scale(mean, i) / scale(mean, names.index(other))).square()

    return {
        name: {
            "variance": estimate(lambda mean, i=i: mean[:, i, 0], values),
            **{
                f"over_{other.replace(' ', '_')}{suffix}": estimate(
                    lambda mean, i=i, other=other, function=function: function(mean, i, other), values
                )
                for other in ("group mean", "OPO", "exact", "optimum")
                for suffix, function in (("", ratio), ("_at_equal_scale", ratio_at_equal_scale))
            },
            "scale": estimate(lambda mean, i=i: scale(mean, i), values),
            "cosine": estimate(lambda mean, i=i: cosine(mean, i), values),
        }
        for i, name in enumerate(names)
    }


def describe_norms(prompts: list[Prompt]) -> dict[str, Any]:
    """Relation of the squared gradient norm to each weight: correlation and log-log slope."""

    def moments(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, y, x * x, y * y, x * y]).mean(dim=1)

    def correlation(mean: torch.Tensor) -> torch.Tensor:
        x, y, xx, yy, xy = mean.T
        return (xy - x * y) / ((xx - x * x) * (yy - y * y)).sqrt()

    def slope(mean: torch.Tensor) -> torch.Tensor:
        x, y, xx, _, xy = mean.T
        return (xy - x * y) / (xx - x * x)

    found: dict[str, Any] = {}
    for name in ("lengths", "logit_norms", "uncertainties", "surprises"):
        pairs = [(getattr(one.completions, name), one.completions.squared_norms) for one in prompts]
        plain = torch.stack([moments(x, y) for x, y in pairs])
        logs = torch.stack([moments(x.clamp(min=1e-12).log(), y.clamp(min=1e-12).log()) for x, y in pairs])
        found[name] = {
            "correlation": estimate(correlation, plain),
            "log_log_correlation": estimate(correlation, logs),
            "log_log_slope": estimate(slope, logs),
        }
    return found


def measure(policy: str, path: str, args: argparse.Namespace) -> tuple[dict[str, Any], Completions]:
    """All measurements of one policy, and its completions, concatenated over prompts."""
    start = time.perf_counter()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model = model.to("cuda") if torch.cuda.is_available() else model
    tokenizer = AutoTokenizer.from_pretrained(path)
    name, split, config = parse_dataset(args.dataset)
    problems = load_problems(name, split, config=config, num_arithmetic=args.prompts)
    problems = fit_to_tokenizer(problems.select(range(min(args.prompts, len(problems)))), tokenizer)
    records = sample_records(
        model, tokenizer, problems, num_samples=args.samples, max_new_tokens=args.max_new_tokens, seed=args.seed,
        batch_size=args.batch_size,
    )  # fmt: skip
    print(f"{policy}: {len(records)} completions sampled and scored, {time.perf_counter() - start:.0f} s", flush=True)
    prompts: list[Prompt] = []
    for i, row in enumerate(problems):
        own = records[i * args.samples : (i + 1) * args.samples]
        rewards = [record["reward"] or 0.0 for record in own]
        ids = tokenize_prompt(tokenizer, row["prompt"])
        prompts.append(take_gradients(model, ids, [record["token_ids"] for record in own], rewards))
        if (i + 1) % 16 == 0:
            print(
                f"{policy}: gradients of {i + 1}/{len(problems)} prompts, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    generator = torch.Generator().manual_seed(args.seed)
    sizes = [size for size in GROUP_SIZES if args.samples // size >= 4]
    groups = {
        str(size): summarize_group_size([group_statistics(one, size, generator) for one in prompts]) for size in sizes
    }
    every = Completions(*(torch.cat(column) for column in zip(*(one.completions for one in prompts), strict=True)))
    right = every.rewards == 1
    summary = {
        "pass@1": every.rewards.mean().item(),
        "mean_length": {"right": every.lengths[right].mean().item(), "wrong": every.lengths[~right].mean().item()},
        "mean_squared_norm": {
            "right": every.squared_norms[right].mean().item(),
            "wrong": every.squared_norms[~right].mean().item(),
        },
        "squared_norm_and": describe_norms(prompts),
        "group_sizes": groups,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return summary, every


def tiny_stages(directory: Path) -> dict[str, Path]:
    """The tiny policy before, halfway through and after training with OPO, as in `make train`."""
    problems = load_problems("arithmetic", "train", num_arithmetic=8_000)
    last = max(STAGES.values())
    config = OPOConfig(
        str(directory), seed=42, learning_rate=1e-4, max_steps=last, lr_scheduler_type="constant_with_warmup",
        warmup_steps=10, per_device_train_batch_size=64, gradient_accumulation_steps=4, max_completion_length=40,
        save_strategy="steps", save_steps=last // 2, save_only_model=True, report_to="none", logging_steps=50,
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = OPOTrainer(str(TINY_POLICY), math_verify_reward, config, problems)
    trainer.remove_callback(PrinterCallback)
    print(f"training the tiny policy for {last} steps, about a minute", flush=True)
    trainer.train()
    return {stage: directory / f"checkpoint-{step}" if step else TINY_POLICY for stage, step in STAGES.items()}


def compared(report: dict[str, Any], committed: dict[str, Any]) -> tuple[int, list[str]]:
    """Number of estimates that are in both reports, and the paths of those whose intervals do not overlap."""
    count, apart = 0, []

    def walk(one: Any, other: Any, path: str) -> None:
        nonlocal count
        if not (isinstance(one, dict) and isinstance(other, dict)):
            return
        if {"low", "high"} <= one.keys():
            count += 1
            if one["low"] > other["high"] or other["low"] > one["high"]:
                apart.append(path)
        for name in one.keys() & other.keys():
            walk(one[name], other[name], f"{path}/{name}")

    walk(report["policies"], committed["policies"], "")
    return count, apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="names or directories; default: the tiny policy at three stages")
    parser.add_argument("--dataset", default="arithmetic:test", help="NAME, NAME:SPLIT or NAME:SPLIT:CONFIG")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=256, help="completions per prompt")
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=512, help="completions sampled at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "gradient_variance.json")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with --output")
    args = parser.parse_args()
    disable_progress_bars()
    logging.disable_progress_bar()

    source = provenance()
    # On a GPU, one policy at a time; on a CPU, which a small model does not fully use, one policy per core.
    processes = 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 4)
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        paths = {one: one for one in args.models} if args.models else tiny_stages(Path(directory))
        found = {policy: pool.submit(measure, policy, str(path), args) for policy, path in paths.items()}
        policies = {policy: future.result()[0] for policy, future in found.items()}
        completions = {policy: future.result()[1] for policy, future in found.items()}
    print(*page_tables(policies).values(), sep="\n\n", flush=True)
    settings = {"dataset": args.dataset, "prompts": args.prompts, "samples": args.samples, "partitions": PARTITIONS}
    report = {**source, "settings": {**settings, "seed": args.seed}, "policies": policies}
    if args.check:
        count, apart = compared(report, json.loads(args.output.read_text()))
        print(f"{count - len(apart)} of {count} estimates agree with {args.output.name} within their intervals", *apart)
        raise SystemExit(len(apart) > 0.01 * count)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    plot(policies, args.output.with_suffix(".png"))
    plot_norms(policies, completions, args.output.with_name(f"{args.output.stem}_norms.png"))
    print(f"written to {args.output} and {args.output.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
