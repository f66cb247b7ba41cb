"""
Gradient variance and bias of every baseline, measured on a policy's own samples.

    python benchmarks/gradient_variance.py           # the tiny policy at three stages; 9 minutes of CPU time
    python benchmarks/gradient_variance.py --task long_chains --prompts 32 --samples 64
    python benchmarks/gradient_variance.py --task smollm2 --prompts 18 --samples 32  # after make_smollm2.py
    python benchmarks/gradient_variance.py --models NAME_OR_DIR --dataset openai/gsm8k:train:main --output FILE.json

For each of `--prompts` problems, `--samples` completions are sampled and scored, and the gradient g_i of the
log-probability of each (summed over its tokens) is computed. The rest is exact algebra on the inner products g_i . g_j:
the estimator from K completions, `(1/K) sum_i (r_i - b) g_i`, is computed for many random disjoint groups of K
completions, with every baseline on the same groups.

- **Variance** is the trace of the covariance of the estimator given the prompt: the unbiased one over disjoint groups,
  averaged over partitions and prompts. The variance between prompts is not included: no baseline changes it.
- **Scale and cosine** compare the mean of the estimator with the gradient, which is estimated without bias from half of
  all samples with the leave-one-out mean. Both use products of one half of the samples with the other half, so that
  noise does not count as signal.
- **The scale** of a baseline that does not contain the sample itself is 1: only what the sample changes in its own
  baseline is measured. With share_i the weight of sample i in the baseline b, and b_i the baseline without it,
  r_i - b = (1 - share_i) (r_i - b_i), and (r_i - b_i) g_i has the mean of the gradient. So the scale is
  1 - c - E[(share_i - c) (r_i - b_i) g_i] . gradient / |gradient|^2 for any c. With c = 1/K, nothing has to be measured
  for the group mean, whose scale is (K - 1) / K, and little for the others.
- **Variance at equal scale** divides the variance by the squared scale: a baseline that contains the sample itself
  shrinks the gradient, and with it the variance; a larger learning rate compensates for that.
- Intervals are 95 % percentile bootstraps over prompts, also for ratios.
- **The sampler** is checked: each token is drawn once more, with the same random number, from the distribution that the
  gradient is taken of. Sampling is at temperature 1, with no other setting of `generate`.

Weights of the baseline, in addition to powers of the length: "logit norm" is sum_t (1 - 2 pi(y_t) + sum_v pi(v)^2), the
squared norm of the score with respect to the logits (arXiv 2602.07078). "uncertainty" is sum_t (1 - pi(y_t))^2, between
one half of that and all of it. "1 - pi" is sum_t (1 - pi(y_t)), which has the same mean over y_t. The last two need
only the probabilities of the sampled tokens. "exact" is the true |g_i|^2 (Eq. 9) of the K completions themselves.
"optimum" is the best constant for the prompt, computed from all its samples.

The inner products of each prompt are a file in `--raw_dir`, and so are the checkpoints between the stages: an
interrupted measurement resumes, and a later one with more prompts or stages reads those that are there. `--report`
computes the statistics of finished ones again, without a policy:

    python benchmarks/gradient_variance.py --task smollm2 --report    # from results/variance_runs; a minute
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # policies are measured in parallel, one per core

ROOT = Path(__file__).resolve().parents[1]
import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging

from length_statistics import WEIGHTS, by_length, describe_lengths, estimate, profile, within_groups
from measuring import RESULTS, keep_freed_memory, provenance, sample_records, sampling_seed
from opo_trl import OPOConfig, OPOTrainer
from opo_trl.algorithm.baselines import (
    leave_one_out,
    logit_norm,
    no_baseline,
    optimal_baseline,
    surprise,
    uncertainties,
)
from opo_trl.evaluation.sampling import record_seed, tokenize_prompt
from opo_trl.rewards import math_verify_reward
from opo_trl.scripts.problems import fit_to_tokenizer, load_problems, parse_dataset
from staged_sampling import rollouts_of
from tasks import TASKS, Task
from variance_report import page_tables, plot, plot_norms

GROUP_SIZES = (2, 4, 8, 16)
PARTITIONS = 64  # random partitions into groups of K; each gives an unbiased variance, their mean varies less
PROGRESS_PROMPTS = 4  # a line of progress after as many
LARGEST_GRADIENT = 2**20  # numbers kept of each gradient; a longer one is hashed to this size (count sketch)


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
    """The M completions of one prompt, the inner products of their gradients, and the uncertainty of each token."""

    completions: Completions
    inner_products: torch.Tensor  # (M, M)
    tokens: Sequence[torch.Tensor] = ()  # (C,) of each completion: (1 - pi(y_t))^2
    redrawn: int = 0  # tokens that the policy's distribution would have drawn differently


# The weights, (G, K), of the baselines that are a weighted mean of a group's own rewards.
OWN_WEIGHTS: dict[str, Callable[[Completions], torch.Tensor]] = {
    "group mean": lambda group: torch.ones_like(group.lengths),
    "OPO": lambda group: group.lengths,
    "length^0.5": lambda group: group.lengths**0.5,
    "length^1.6": lambda group: group.lengths**1.6,
    "length^2": lambda group: group.lengths**2,
    "logit norm": lambda group: group.logit_norms,
    "uncertainty": lambda group: group.uncertainties,
    "1 - pi": lambda group: group.surprises,
    "exact": lambda group: group.squared_norms,
}
Baseline = Callable[[Completions, float], torch.Tensor]


def weighted_mean(name: str) -> Baseline:
    """The baseline with the weights of this name in `OWN_WEIGHTS`."""
    return lambda group, best: optimal_baseline(group.rewards, OWN_WEIGHTS[name](group))


# Called with the completions of groups and the best constant for the prompt; returns (G, K) or (G, 1). In the order of
# the tables.
BASELINES: dict[str, Baseline] = {
    "none": lambda group, best: no_baseline(group.rewards, group.lengths).expand_as(group.rewards),
    "group mean": weighted_mean("group mean"),
    "leave-one-out": lambda group, best: leave_one_out(group.rewards, group.lengths),
    **{name: weighted_mean(name) for name in OWN_WEIGHTS if name != "group mean"},
    "optimum": lambda group, best: torch.full_like(group.rewards, best),
}


def take_gradients(
    model: Any,
    prompt: list[int],
    completions: list[list[int]],
    rewards: list[float],
    seeds: list[int] | None = None,
    limit: int = 0,
) -> Prompt:
    """
    Gradient of each completion's summed log-probability with respect to all trainable parameters.

    With the `seeds` that the completions were sampled with, and the length `limit`, every token is drawn once more.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    sketch = CountSketch(size, model.device) if size > LARGEST_GRADIENT else None
    gradients, logit_norms, tokens, surprises, squared_norms, redrawn = [], [], [], [], [], 0
    for i, completion in enumerate(completions):
        ids = torch.tensor([prompt + completion], device=model.device)
        log_probs = model(input_ids=ids[:, :-1]).logits[0, len(prompt) - 1 :].float().log_softmax(dim=-1)  # (C, V)
        logps = log_probs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)  # (C,)
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(logps.sum(), parameters)]).float()
        squared_norms.append(gradient.square().sum().item())
        gradients.append(gradient if sketch is None else sketch(gradient))
        own, every = logps.detach()[None], torch.ones_like(logps)[None]
        tokens.append(uncertainties(own, every)[0].cpu())
        surprises.append(surprise(own, every).item())
        logit_norms.append(logit_norm(log_probs.detach(), ids[0, len(prompt) :]).item())
        if seeds is not None:
            redrawn += count_redrawn(log_probs.detach(), ids[0, len(prompt) :], seeds[i], limit)
    stacked = torch.stack(gradients)  # (M, D)
    lengths = [len(completion) for completion in completions]
    columns = (rewards, lengths, logit_norms, [each.sum().item() for each in tokens], surprises, squared_norms)
    facts = Completions(*(torch.tensor(column, dtype=torch.float64) for column in columns))
    return Prompt(facts, (stacked @ stacked.T).double().cpu(), tokens, redrawn)


class CountSketch:
    """
    Hashes long vectors to `LARGEST_GRADIENT` numbers so that inner products stay unbiased (Charikar et al. 2002).

    The vector is cut into pieces of that length; each gets random signs and a random rotation, and all are added. The
    standard error of an inner product is at most about |a||b| / sqrt(LARGEST_GRADIENT), a thousandth.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        hashes = torch.Generator().manual_seed(0)
        self.signs = (2 * torch.randint(2, (size,), generator=hashes, dtype=torch.int8) - 1).to(device)
        pieces = -(-size // LARGEST_GRADIENT)
        self.shifts = torch.randint(LARGEST_GRADIENT, (pieces,), generator=hashes).tolist()

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:  # (size,) -> (LARGEST_GRADIENT,)
        total = vector.new_zeros(LARGEST_GRADIENT)
        pieces = zip(vector.split(LARGEST_GRADIENT), self.signs.split(LARGEST_GRADIENT), self.shifts, strict=True)
        for values, signs, shift in pieces:
            signed = values * signs
            end = min(LARGEST_GRADIENT - shift, len(signed))  # what lies beyond the end goes to the start
            total[shift : shift + end] += signed[:end]
            total[: len(signed) - end] += signed[end:]
        return total


def count_redrawn(log_probs: torch.Tensor, tokens: torch.Tensor, seed: int, limit: int) -> int:  # (C, V), (C,)
    """
    Number of a completion's tokens that its random numbers do not draw from the policy's own distribution.

    The sampler draws a token by the inverse of the cumulative distribution at a number that depends on the seed alone
    ([`TransformersSampler`]). The same is done here with the distribution that the gradient is taken of, from one
    forward pass and with none of the settings of `generate`. If the sampler is the policy, only rounding can differ.
    """
    uniforms = torch.rand(limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[: len(tokens)]
    cumulative = log_probs.exp().cumsum(dim=-1, dtype=torch.float64)
    target = uniforms.to(log_probs.device)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return int((drawn != tokens).sum())


def save_prompt(prompt: Prompt, path: Path) -> None:
    """Write a measured prompt; inner products as the upper triangle in single precision, uncertainties in half."""
    rows, columns = torch.triu_indices(*prompt.inner_products.shape)
    part = path.with_suffix(".part.npz")
    np.savez_compressed(
        part,
        **{name: values.numpy() for name, values in prompt.completions._asdict().items()},
        inner_products=prompt.inner_products[rows, columns].float().numpy(),
        tokens=torch.cat(list(prompt.tokens)).half().numpy(),
        redrawn=prompt.redrawn,
    )
    part.replace(path)


def read_prompt(path: Path) -> Prompt:
    """Read what [`save_prompt`] wrote."""
    with np.load(path) as stored:
        facts = Completions(*(torch.from_numpy(stored[name]) for name in Completions._fields))
        count = len(facts.rewards)
        rows, columns = torch.triu_indices(count, count)
        products = torch.zeros(count, count, dtype=torch.float64)
        products[rows, columns] = products[columns, rows] = torch.from_numpy(stored["inner_products"]).double()
        tokens = torch.from_numpy(stored["tokens"]).float().split(facts.lengths.long().tolist())
        redrawn = int(stored["redrawn"])
    return Prompt(facts, products, tokens, redrawn)


def own_shares(every: Completions, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weight of each sample in its own baseline, `(B, G, K)`, and the mean of that weight, `(B, 1, 1)`.

    It is 0 for no baseline and for leave-one-out. The optimum is a mean over all samples of the prompt.
    """
    group = every.take(groups)
    shares = torch.zeros(len(BASELINES), *groups.shape, dtype=torch.float64)
    means = torch.zeros(len(BASELINES), 1, 1, dtype=torch.float64)
    for i, name in enumerate(BASELINES):
        if name in OWN_WEIGHTS:
            weights = OWN_WEIGHTS[name](group)
            shares[i], means[i] = (weights / weights.sum(dim=1, keepdim=True)).nan_to_num(), 1 / groups.size(1)
        elif name == "optimum":
            shares[i], means[i] = group.squared_norms / every.squared_norms.sum(), 1 / len(every.rewards)
    return shares, means


def group_statistics(prompt: Prompt, group_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """
    Variance of the estimator with every baseline on one prompt, and its products with the gradient.

    Returns:
        `dict[str, torch.Tensor]`: baseline -> (5,): trace of the covariance; the product of the estimator's mean in one
        half of the samples with that in the other half; with the gradient in the other half; of the two gradients; and
        the third again, from what the samples change in their own baselines.
    """
    facts, products = prompt.completions, prompt.inner_products
    count = len(facts.rewards)
    best = float(optimal_baseline(facts.rewards[None], facts.squared_norms[None]))
    totals = torch.zeros(len(BASELINES), 5, dtype=torch.float64)
    for _ in range(PARTITIONS):
        groups = torch.randperm(count, generator=generator)[: count // group_size * group_size].view(-1, group_size)
        half = len(groups) // 2
        halves = (groups[:half].flatten(), groups[half : 2 * half].flatten())
        # Estimates, means of estimates and the gradient, all as weights on the gradients of the completions.
        group = facts.take(groups)
        weights = torch.stack([group.rewards - baseline(group, best) for baseline in BASELINES.values()]) / group_size
        overall = torch.zeros(len(BASELINES), count, dtype=torch.float64)
        overall[:, groups.flatten()] = weights.flatten(1) / len(groups)
        shares, mean_shares = own_shares(facts, groups)  # (B, G, K), (B, 1, 1)
        own = (shares - mean_shares) / (1 - shares).clamp(min=1e-12) * weights  # of sample i: (share_i - c) (r_i - b_i)
        means = torch.zeros(2, len(BASELINES), count, dtype=torch.float64)
        changes = torch.zeros_like(means)
        gradient = torch.zeros(2, count, dtype=torch.float64)
        for part, members in enumerate(halves):
            means[part][:, members] = overall[:, members] * len(groups) / half
            changes[part][:, members] = own[:, part * half : (part + 1) * half].flatten(1) / half
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
                (1 - mean_shares.flatten()) * (true[0] @ gradient[1])
                - (changes[1] @ true[0] + changes[0] @ true[1]) / 2,
            ],
            dim=1,
        )
    return dict(zip(BASELINES, totals / PARTITIONS, strict=True))


def summarize_group_size(per_prompt: list[dict[str, torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """For every baseline: its variance relative to that of other baselines, its scale and its cosine."""
    names = list(BASELINES)
    values = torch.stack([torch.stack([found[name] for name in names]) for found in per_prompt])  # (prompts, B, 5)

    def scale(mean: torch.Tensor, i: int) -> torch.Tensor:
        return mean[:, i, 4] / mean[:, i, 3]

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
    for name in WEIGHTS:
        pairs = [(getattr(one.completions, name), one.completions.squared_norms) for one in prompts]
        plain = torch.stack([moments(x, y) for x, y in pairs])
        logs = torch.stack([moments(x.clamp(min=1e-12).log(), y.clamp(min=1e-12).log()) for x, y in pairs])
        found[name] = {
            "correlation": estimate(correlation, plain),
            "log_log_correlation": estimate(correlation, logs),
            "log_log_slope": estimate(slope, logs),
        }
    return found


def fingerprint(model: Any) -> str:
    """A name for the weights of a model."""
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def take_prompt(model: Any, tokenizer: Any, problem: dict[str, Any], args: argparse.Namespace) -> Prompt:
    """Sample and score the completions of one problem, and take their gradients."""
    problems = Dataset.from_list([problem])
    records = sample_records(
        model, tokenizer, problems, num_samples=args.samples, max_new_tokens=args.max_new_tokens, seed=args.seed,
        batch_size=args.batch_size,
    )  # fmt: skip
    rewards = [record["reward"] or 0.0 for record in records]
    completions = [record["token_ids"] for record in records]
    seeds = [sampling_seed(args.seed, problem, sample) for sample in range(args.samples)]
    prompt = tokenize_prompt(tokenizer, problem["prompt"])
    return take_gradients(model, prompt, completions, rewards, seeds, args.max_new_tokens)


def measure(policy: str, path: str, args: argparse.Namespace) -> tuple[dict[str, Any], Completions]:
    """All measurements of one policy, and its completions, concatenated over prompts."""
    start, cpu = time.perf_counter(), time.process_time()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model = model.to("cuda") if torch.cuda.is_available() else model
    tokenizer = AutoTokenizer.from_pretrained(path)
    problems = fit_to_tokenizer(load_held_out(args), tokenizer)
    directory = args.raw_dir / policy.replace("/", "-")
    directory.mkdir(parents=True, exist_ok=True)
    weights, prompts, seconds = fingerprint(model), [], 0.0
    for i, problem in enumerate(problems):
        name = record_seed(weights, problem["id"], args.samples, args.max_new_tokens, args.seed)
        raw = directory / f"{name:014x}.npz"
        if not raw.exists():
            save_prompt(take_prompt(model, tokenizer, problem, args), raw)
        prompts.append(read_prompt(raw))
        if (i + 1) % PROGRESS_PROMPTS == 0:
            seconds = time.perf_counter() - start
            print(f"{policy}: gradients of {i + 1}/{len(problems)} prompts, {seconds:.0f} s", flush=True)
    summary, every = summarize(prompts, args)
    return {
        **summary,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }, every


def load_held_out(args: argparse.Namespace) -> Dataset:
    """The first `--prompts` problems of `--dataset`, or of the task's test split."""
    if args.dataset is None:
        return TASKS[args.task].load("test", args.prompts)
    name, split, config = parse_dataset(args.dataset)
    problems = load_problems(name, split, config=config, num_arithmetic=args.prompts)
    return problems.select(range(min(args.prompts, len(problems))))


def summarize(prompts: list[Prompt], args: argparse.Namespace) -> tuple[dict[str, Any], Completions]:
    """Every statistic of the measured prompts, and their completions, concatenated."""
    generator = torch.Generator().manual_seed(args.seed)
    sizes = [size for size in GROUP_SIZES if args.samples // size >= 4]
    groups = {
        str(size): summarize_group_size([group_statistics(one, size, generator) for one in prompts]) for size in sizes
    }
    every = Completions(*(torch.cat(column) for column in zip(*(one.completions for one in prompts), strict=True)))
    right = every.rewards == 1
    by_prompt = {name: [getattr(one.completions, name) for one in prompts] for name in Completions._fields}
    return {
        "pass@1": every.rewards.mean().item(),
        "sampler": {"tokens": int(every.lengths.sum()), "redrawn": sum(one.redrawn for one in prompts)},
        "mean_length": {"right": every.lengths[right].mean().item(), "wrong": every.lengths[~right].mean().item()},
        "mean_squared_norm": {
            "right": every.squared_norms[right].mean().item(),
            "wrong": every.squared_norms[~right].mean().item(),
        },
        "squared_norm_and": describe_norms(prompts),
        "within_groups": {name: within_groups(by_prompt[name], by_prompt["squared_norms"]) for name in WEIGHTS},
        "lengths": describe_lengths(by_prompt["lengths"]),
        "by_length": by_length(every.lengths, every.rewards, every.squared_norms),
        "uncertainty_by_position": profile([tokens for one in prompts for tokens in one.tokens]),
        "group_sizes": groups,
    }, every


def train_stages(task: Task, stages: Sequence[str], directory: Path) -> dict[str, str]:
    """The policy of a task before and during training with OPO; resumes from the checkpoints in `directory`."""
    steps = {stage: task.stages[stage] for stage in stages}
    last, save_steps = max(steps.values()), max(task.stages.values()) // 2
    if last and not (directory / f"checkpoint-{last}").is_dir():
        config = OPOConfig(
            str(directory), seed=42, max_steps=last, lr_scheduler_type="constant_with_warmup", warmup_steps=10,
            max_completion_length=task.max_completion_length, save_strategy="steps", save_steps=save_steps // 5,
            report_to="none", logging_steps=10, use_cpu=True, bf16=False, gradient_checkpointing=False,
            disable_tqdm=True, **task.training,
        )  # fmt: skip
        print(f"training the policy to step {last}", flush=True)
        problems, sampler = task.load("train", 8_000), rollouts_of(task)
        trainer = OPOTrainer(task.policy, math_verify_reward, config, problems, rollout_func=sampler)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint="auto")
    return {stage: str(directory / f"checkpoint-{step}") if step else task.policy for stage, step in steps.items()}


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


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="arithmetic", help="its policy and problems are the defaults")
    parser.add_argument("--stages", nargs="+", help="fresh, half-trained, trained; default: all")
    parser.add_argument("--models", nargs="+", help="names or directories, instead of the task's policy at its stages")
    parser.add_argument("--dataset", help="NAME, NAME:SPLIT or NAME:SPLIT:CONFIG, instead of the task's test problems")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=256, help="completions per prompt")
    parser.add_argument("--max_new_tokens", type=int, help="default: the task's longest completion")
    parser.add_argument("--batch_size", type=int, default=512, help="completions sampled at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw_dir", type=Path, help="inner products and checkpoints; default: outputs/variance/TASK")
    parser.add_argument("--output", type=Path, help="default: gradient_variance.json, for other tasks with their names")
    parser.add_argument("--report", action="store_true", help="only the statistics and figures of finished prompts")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with --output")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Arguments with the task's defaults."""
    args = parser.parse_args()
    task, suffix = TASKS[args.task], "" if args.task == "arithmetic" else f"-{args.task}"
    args.stages = args.stages or list(task.stages)
    if unknown := set(args.stages) - set(task.stages):
        parser.error(f"--stages must be among {list(task.stages)}, got {sorted(unknown)}.")
    if not (args.models or args.report or Path(task.policy).is_dir()):
        parser.error(f"There is no policy in {task.policy}. `make_smollm2.py` writes that of the task smollm2.")
    args.max_new_tokens = args.max_new_tokens or task.max_completion_length
    args.raw_dir = args.raw_dir or (RESULTS / "variance_runs" if args.report else ROOT / "outputs/variance") / args.task
    args.output = args.output or RESULTS / f"gradient_variance{suffix}.json"
    return args


def measure_policies(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Completions]]:
    """The report of measured policies, and their completions."""
    source, task = provenance(), TASKS[args.task]
    # On a GPU, one policy at a time; on a CPU, which a small model does not fully use, one policy per core.
    processes = 1 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), 4)
    paths = {one: one for one in args.models} if args.models else train_stages(task, args.stages, args.raw_dir)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        found = {policy: pool.submit(measure, policy, path, args) for policy, path in paths.items()}
        policies = {policy: future.result()[0] for policy, future in found.items()}
        completions = {policy: future.result()[1] for policy, future in found.items()}
    dataset = args.dataset or f"{args.task}:test"
    settings = {"dataset": dataset, "prompts": args.prompts, "samples": args.samples, "partitions": PARTITIONS}
    return {**source, "settings": {**settings, "seed": args.seed}, "policies": policies}, completions


def summarize_again(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Completions]]:
    """The report at `--output` with its statistics computed again from the prompts' files, and the completions."""
    report: dict[str, Any] = json.loads(args.output.read_text())
    completions: dict[str, Completions] = {}
    args.samples, args.seed = report["settings"]["samples"], report["settings"]["seed"]
    for policy, found in report["policies"].items():
        paths = sorted((args.raw_dir / policy.replace("/", "-")).glob("*.npz"))
        if len(paths) != report["settings"]["prompts"]:
            raise SystemExit(f"{args.output} has {report['settings']['prompts']} prompts, {args.raw_dir} {len(paths)}.")
        summary, completions[policy] = summarize([read_prompt(path) for path in paths], args)
        found |= summary
    return report, completions


def main() -> None:
    args = parse(make_parser())
    keep_freed_memory()
    disable_progress_bars()
    logging.disable_progress_bar()
    report, completions = summarize_again(args) if args.report else measure_policies(args)
    policies = report["policies"]
    print(*page_tables(policies).values(), sep="\n\n", flush=True)
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
