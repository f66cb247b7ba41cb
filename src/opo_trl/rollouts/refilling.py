"""Refilling: further groups from the same weights, while a step has too few informative ones."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import datasets
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils import data

from .refill_prompts import draw_order, prompts_needed, row_key
from .round_metrics import RoundMetrics, reward_metrics
from .rounds import Round, merge_rounds

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def check_refilling(args: Any, train_dataset: Any) -> None:
    """
    Refuse refilling where a round could not be sampled or trained, before the model is loaded.

    Args:
        args ([`OPOConfig`]):
            The run's configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            As passed to the trainer.

    Raises:
        ValueError: If `max_refill_rounds` is above 0 and the dataset is streamed or has images.
    """
    if args.max_refill_rounds == 0:
        return
    if isinstance(train_dataset, datasets.IterableDataset | data.IterableDataset):
        raise ValueError(
            "Refilling takes prompts out of their order, so `train_dataset` must have rows that can be read by "
            f"position, got a {type(train_dataset).__name__} with max_refill_rounds={args.max_refill_rounds}. Load the "
            "dataset without streaming, or set `max_refill_rounds=0`."
        )
    images = sorted({"image", "images"} & set(getattr(train_dataset, "column_names", None) or ()))
    if images:
        raise ValueError(
            "Refilling merges batches row by row, which image batches do not allow: `train_dataset` must not have the "
            f"columns {images} with max_refill_rounds={args.max_refill_rounds}. Set `max_refill_rounds=0`."
        )


class Refilling:
    """
    Samples a step in up to `1 + max_rounds` rounds under the same weights.

    A further round is sampled while fewer groups are informative than the step has prompts. The rounds are merged in
    the order in which they were submitted. Completions with advantage 0 are left out of the update as always, and all
    informative groups are trained: none is dropped as surplus, and none is kept for the next step, which has other
    weights. All ranks see the same gathered rewards, so they sample the same number of rounds.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Gathers the rewards and the errors of all ranks.
        max_rounds (`int`):
            Rounds after the first, at most.
        seed (`int`):
            Seed of the run.
        reward_names (`Sequence[str]`):
            Names of the reward functions.
        obstacle (`Callable`):
            Returns why a batch could not be trained row by row; `None` if it can.
        metrics (`MutableMapping[str, list[float]]`):
            TRL's lists of the current logging period.

    Raises:
        ValueError: If no batch could be trained row by row.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        max_rounds: int,
        seed: int,
        reward_names: Sequence[str],
        obstacle: Callable[[dict[str, Any]], str | None],
        metrics: MutableMapping[str, list[float]],
    ) -> None:
        self.accelerator, self.max_rounds, self.seed = accelerator, max_rounds, seed
        self.reward_names, self.obstacle, self.metrics = reward_names, obstacle, metrics
        self._refuse(obstacle({}))

    def sample_step(
        self,
        rows: Rows,
        dataset: Any,
        step: int,
        sample: Callable[[Rows], Round],
        order: Sequence[int] | None = None,
    ) -> Round:
        """
        Sample a step: the prompts of the data loader, then those of each refill round.

        Args:
            rows (`list[dict[str, Any]]`):
                This rank's rows of the first round: each prompt repeated K times, a group perhaps split across ranks.
            dataset ([`~datasets.Dataset`]):
                What refill rounds draw prompts from, except those that the step has already.
            step (`int`):
                Optimizer steps made so far.
            sample (`Callable`):
                Generates and scores this rank's rows. All ranks call it together, with equally many.
            order (`Sequence[int]`, *optional*):
                Positions in the dataset in the order in which refill rounds take them. `None` draws uniformly.

        Returns:
            [`Round`]: All rounds together. Their metrics are in the lists.

        Raises:
            ValueError: On all ranks, if a batch cannot be trained row by row.
            RuntimeError: On all ranks, if one of them cannot read the rows of a round, or reads different ones.
        """
        metrics, columns = RoundMetrics(self.metrics), list(rows[0])
        keys = {row_key(row) for row in rows}  # before sampling: a rollout function adds to the rows
        rounds: list[Round] = []
        while rows:
            rounds.append(sample(rows))
            metrics.take(rounds[-1].rollout.rewards.numel())
            needed = self._prompts_needed(rounds)
            if needed and len(rounds) == 1:
                keys = set(gather_object(sorted(keys)))
            drawn = draw_order(len(dataset), self.seed, step, len(rounds)) if order is None else order
            group_size = rounds[0].rollout.rewards.size(1)
            rows = self.read_rows(dataset, drawn, columns, keys, needed, group_size) if needed else []
        merged = self._merge(rounds)
        exact = reward_metrics(merged.rewards_per_func, merged.rollout.rewards, self.reward_names)
        metrics.put(exact | self.counts(merged, step, len(rounds) - 1))
        return merged

    def counts(self, merged: Round, step: int, refill_rounds: int) -> dict[str, float]:
        """Return what refilling cost: rounds, completions, groups that are not trained. Warns if none is trained."""
        sampled, informative = len(merged.rollout.rewards), int(merged.rollout.informative_groups.sum())
        if not informative and self.accelerator.is_main_process:
            logger.warning(
                "Step %d has no gradient: none of its %d groups is informative, after %d refill round(s).",
                step + 1,
                sampled,
                refill_rounds,
            )
        return {
            "rollouts/rounds": float(refill_rounds),
            "rollouts/sampled_per_trained": sampled / informative if informative else math.nan,
            "rollouts/groups_dropped": float(sampled - informative),
        }

    def _multiple(self, group_size: int) -> int:
        """What the number of prompts must be a multiple of, so that all ranks get equally many rows."""
        return self.accelerator.num_processes // math.gcd(self.accelerator.num_processes, group_size)

    def _prompts_needed(self, rounds: Sequence[Round]) -> int:
        if len(rounds) > self.max_rounds:
            return 0
        informative = sum(int(each.rollout.informative_groups.sum()) for each in rounds)
        sampled = sum(len(each.rollout.rewards) for each in rounds)
        target, group_size = rounds[0].rollout.rewards.shape
        return prompts_needed(informative, sampled, target, self._multiple(group_size))

    def read_rows(
        self,
        dataset: Any,
        order: Iterable[int],
        columns: Sequence[str],
        keys: set[str],
        needed: int,
        group_size: int,
    ) -> Rows:
        """
        Read this rank's rows of the next round, and add its prompts to `keys`.

        Returns no rows if the step has all prompts of the dataset. Every rank reads all prompts of the round, which is
        cheap compared with sampling them, so that ranks that read different prompts are detected.
        """
        indices: list[int] = []
        rows: Rows = []
        failure: Exception | None = None

        def read(index: int) -> dict[str, Any]:
            row = dataset[index]
            return {name: row[name] for name in columns}  # as the data loader's, which may leave out columns

        try:
            for index in order:
                if len(indices) == needed:
                    break
                key = row_key(read(index))
                if key not in keys:
                    keys.add(key)
                    indices.append(index)
            multiple = self._multiple(group_size)
            del indices[len(indices) // multiple * multiple :]
            count = len(indices) * group_size // self.accelerator.num_processes
            first = self.accelerator.process_index * count
            # Each row is read by itself, as a data loader does: none shares an object with another.
            rows = [read(indices[position // group_size]) for position in range(first, first + count)]
        except Exception as error:
            failure = error
        self._agree(failure, sorted(keys))
        moved: Rows = send_to_device(rows, self.accelerator.device)
        return moved

    def _agree(self, failure: Exception | None, keys: Sequence[str]) -> None:
        """Raise on all ranks if one of them has failed, or if they have read different prompts."""
        description = None if failure is None else f"{type(failure).__name__}: {failure}"
        digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()
        ranks = gather_object([(description, digest)])
        failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(ranks) if text is not None]
        if failures:
            raise RuntimeError(
                f"The prompts of a refill round could not be read from `train_dataset` on {'; '.join(failures)}"
            ) from failure
        if len({read for _, read in ranks}) > 1:
            raise RuntimeError(
                "The ranks have read different prompts for a refill round: `train_dataset` must give every rank the "
                "same row for the same position. Remove random transforms, or set `max_refill_rounds=0`."
            )

    def _merge(self, rounds: Sequence[Round]) -> Round:
        if len(rounds) > 1:
            layouts = gather_object([(self.obstacle(each.batch), sorted(each.batch)) for each in rounds])
            reasons = [reason for reason, _ in layouts if reason is not None]
            if not reasons and any(layout != layouts[0][1] for _, layout in layouts):
                reasons.append("the batches of its rounds or ranks hold different columns")
            self._refuse(reasons[0] if reasons else None)
        return merge_rounds(rounds)

    def _refuse(self, reason: str | None) -> None:
        if reason is not None:
            raise ValueError(
                "Refilling trains the rows of several rounds in one step, which must be cut row by row: this is not "
                f"possible with max_refill_rounds={self.max_rounds}, since {reason}. Set `max_refill_rounds=0`."
            )
