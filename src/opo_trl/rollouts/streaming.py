"""Streaming: a step's finished groups are scored and trained while the others are generated."""

import copy
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device

from ..algorithm.rollout import Rollout, concatenate
from .refill_prompts import draw_order, prompts_needed, row_key
from .refilling import Refilling
from .round_metrics import RoundMetrics, reward_metrics
from .rounds import Round, merge_rounds
from .server_generation import ServerGeneration
from .waves import WaveSchedule

Rows = list[dict[str, Any]]
MicroBatches = list[dict[str, torch.Tensor]]


def check_streaming(args: Any, given: Mapping[str, Any]) -> None:
    """
    Refuse to stream where a wave could not be generated or trained, before the model is loaded.

    Args:
        args ([`OPOConfig`]):
            The run's configuration.
        given (`Mapping[str, Any]`):
            Arguments of the trainer by name.

    Raises:
        ValueError: If a completion may need more than one request, or the dataset has images.
    """
    if not args.stream_rollouts:
        return
    for name in ("tools", "environment_factory", "rollout_func"):
        if given.get(name):
            raise ValueError(
                "`stream_rollouts=True` takes all completions of a prompt from one request to the server, and "
                f"`{name}` generates in other ways: it must be None, got {given[name]!r}. Leave `stream_rollouts` out."
            )
    images = sorted({"image", "images"} & set(getattr(given.get("train_dataset"), "column_names", None) or ()))
    if images:
        raise ValueError(
            "`stream_rollouts=True` cuts each wave row by row, which image batches do not allow: `train_dataset` must "
            f"not have the columns {images}. Leave `stream_rollouts` out."
        )


def refuse_obstacle(reason: str | None) -> None:
    """
    Refuse to stream where rows cannot be trained one by one.

    Raises:
        ValueError: If there is a reason.
    """
    if reason is not None:
        raise ValueError(
            "A streamed step trains its rows in waves, which must be cut row by row: `stream_rollouts` must be False, "
            f"since {reason}, got True. Leave `stream_rollouts` out."
        )


@dataclass(frozen=True)
class TrainerParts:
    """
    What a trainer does with the rows of a streamed step.

    Attributes:
        tokenize (`Callable`):
            Returns the prompt tokens of each row.
        sample (`Callable`):
            Makes a [`Round`] of this rank's rows of a wave, with the completions that the engine returns.
        obstacle (`Callable`):
            Returns why a batch could not be trained row by row; `None` if it can.
        plan (`Callable`):
            Cuts a batch into as many micro-batches as asked for, the same number on all ranks.
        finish (`Callable`):
            Called with all waves of a step together, without their batches, in the order of the prompts, and the
            seconds from the first request until the last answer, before the last wave is trained.
        waiting (`Callable`):
            Context in which this process waits for completions.
    """

    tokenize: Callable[[Rows], list[list[int]]]
    sample: Callable[[Rows], Round]
    obstacle: Callable[[dict[str, Any]], str | None]
    plan: Callable[[dict[str, Any], int], MicroBatches]
    finish: Callable[[Round, float], None]
    waiting: Callable[[], AbstractContextManager[None]]


@dataclass
class StreamedStep:
    """
    State of a streamed step. Groups are numbered in the order of their submission.

    Attributes:
        number (`int`):
            Optimizer steps made before it.
        normalizer (`torch.Tensor` of shape `()`):
            What the loss of each micro-batch is divided by.
        dataset, order:
            As in [`~opo_trl.rollouts.refilling.Refilling.sample_step`].
        columns (`list[str]`):
            Columns of the rows.
        metrics ([`~opo_trl.rollouts.round_metrics.RoundMetrics`]):
            Metrics of the waves so far.
        prompts (`list[dict[str, Any]]`):
            One row for each group, of all ranks.
        taken (`list[int]`):
            Numbers of the groups of all waves, in their order.
        informative (`set[int]`):
            Those of them that are informative.
        scored (`list[Round]`):
            The waves, without their batches.
        untrained (`list[Round]`):
            Waves that wait for the next one's micro-batches.
        ready (`deque[dict[str, torch.Tensor]]`):
            Micro-batches to train.
        used (`int`):
            Micro-batches of all waves that do not wait.
        round, round_end (`int`):
            The refill round whose groups are being scored, 0 for the prompts of the data loader, and the groups of all
            rounds up to it; those after are of the next one.
        keys (`set`):
            Prompts that refill rounds leave out, since the step has them.
        exhausted (`bool`):
            Whether the step has all prompts of the dataset.
    """

    number: int
    normalizer: torch.Tensor
    dataset: Any
    order: Sequence[int] | None
    columns: list[str]
    metrics: RoundMetrics
    prompts: Rows = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    informative: set[int] = field(default_factory=set)
    scored: list[Round] = field(default_factory=list)
    untrained: list[Round] = field(default_factory=list)
    ready: deque[dict[str, torch.Tensor]] = field(default_factory=deque)
    used: int = 0
    round: int = 0
    round_end: int = 0
    keys: set[Any] = field(default_factory=set)
    exhausted: bool = False


class Streaming:
    """
    Samples a step in waves of complete groups, all under the weights that the step starts with.

    All prompts are submitted at the start, each in a request of its own. The main process takes groups that are
    complete, as many as fill complete micro-batches, and all ranks score and train them while the server generates the
    rest. The optimizer steps after the last group, so the gradient is the one of a step that is not streamed: a sum
    over the same rows, in another order. A wave without a row to train has no micro-batch, and its share goes to the
    next ones.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Gathers what the ranks have to agree on.
        engine ([`~opo_trl.rollouts.server_generation.ServerGeneration`]):
            Client of the server.
        schedule ([`~opo_trl.rollouts.waves.WaveSchedule`]):
            Sizes of the waves.
        trainer ([`TrainerParts`]):
            Samples, plans and logs.
        group_size (`int`):
            Completions of each prompt.
        seed (`int`):
            Seed of the run, from which refill rounds are drawn.
        reward_names (`Sequence[str]`):
            Names of the reward functions.
        skip_uninformative (`bool`):
            Whether completions with an advantage of 0 are left out of the update.
        metrics (`MutableMapping[str, list[float]]`):
            TRL's lists of the current logging period.
        refilling ([`~opo_trl.rollouts.refilling.Refilling`], *optional*):
            Reads the prompts of refill rounds. A round has the same prompts as in a step that is not streamed; each is
            submitted as soon as it is certain to be needed, even if all groups that are not scored yet are informative.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        engine: ServerGeneration,
        schedule: WaveSchedule,
        trainer: TrainerParts,
        *,
        group_size: int,
        seed: int,
        reward_names: Sequence[str],
        skip_uninformative: bool,
        metrics: MutableMapping[str, list[float]],
        refilling: Refilling | None = None,
    ) -> None:
        self.accelerator, self.engine, self.schedule, self.trainer = accelerator, engine, schedule, trainer
        self.group_size, self.seed, self.reward_names = group_size, seed, reward_names
        self.skip_uninformative, self.metrics, self.refilling = skip_uninformative, metrics, refilling
        self._step: StreamedStep | None = None

    def start(
        self,
        rows: Rows,
        step: int,
        normalizer: torch.Tensor,
        dataset: Any = None,
        order: Sequence[int] | None = None,
    ) -> None:  # ()
        """
        Submit a step's prompts.

        Args:
            rows (`list[dict[str, Any]]`):
                This rank's rows: each prompt repeated K times, a group perhaps split across ranks.
            step (`int`):
                Optimizer steps made so far.
            normalizer (`torch.Tensor` of shape `()`):
                What the loss of each micro-batch is divided by.
            dataset, order:
                As in [`~opo_trl.rollouts.refilling.Refilling.sample_step`].
        """
        self.drop()
        begun = StreamedStep(step, normalizer, dataset, order, list(rows[0]), RoundMetrics(self.metrics))
        self._submit(begun, rows)
        begun.round_end = len(begun.prompts)
        if self.refilling is not None:
            begun.keys = {row_key(row) for row in begun.prompts}
        self._step = begun

    def next_micro_batch(self) -> dict[str, torch.Tensor]:
        """
        Return this rank's next micro-batch; wait for complete groups if no micro-batch is left.

        Raises:
            ServerError: On all ranks.
        """
        assert self._step is not None
        try:
            while not self._step.ready:
                self._take_wave(self._step)
        except BaseException:
            self.drop()
            raise
        return self._step.ready.popleft()

    def drop(self) -> None:
        """Drop a step, on this rank alone, such as one that has failed."""
        self._step = None
        self.engine.drop_stream()

    def _submit(self, step: StreamedStep, rows: Rows) -> None:
        """Submit groups, of which this rank has these rows."""
        first, size = self.accelerator.process_index * len(rows), self.group_size
        begun = {(first + i) // size: row for i, row in reversed(list(enumerate(rows)))}  # group -> its first row here
        tokens = dict(zip(begun, self.trainer.tokenize(list(begun.values())), strict=True))
        complete = [row for i, row in enumerate(rows) if (first + i) % size == 0]
        step.prompts += send_to_device(gather_object(complete), self.accelerator.device)
        self.engine.submit([tokens[(first + i) // size] for i in range(len(rows))], size)

    def _take_wave(self, step: StreamedStep) -> None:
        with self.trainer.waiting():
            numbers = self.engine.next_wave(lambda *counts: self.schedule.wave_size(len(step.taken), *counts))
        wave = self.trainer.sample(self._rows_of_rank(step, numbers))
        obstacles = [each for each in gather_object([self.trainer.obstacle(wave.batch)]) if each is not None]
        refuse_obstacle(obstacles[0] if obstacles else None)
        step.metrics.take(wave.rollout.rewards.numel())
        step.taken += numbers
        step.scored.append(Round({}, wave.rollout, wave.rewards_per_func))
        step.untrained.append(wave)
        informative = wave.rollout.informative_groups.tolist()
        step.informative |= {number for number, each in zip(numbers, informative, strict=True) if each}
        if self.refilling is not None:
            self._refill(step, self.refilling)
        last = len(step.taken) == len(step.prompts)
        share = self._share(step, last)
        if last:
            self._finish(step)
        if share:
            waiting, step.untrained = step.untrained, []
            step.used += share
            batch = merge_rounds(waiting).batch
            batch["loss_normalizer"] = step.normalizer
            step.ready.extend(self.trainer.plan(batch, share))

    def _share(self, step: StreamedStep, last: bool) -> int:
        """Micro-batches in which the waves that wait are trained."""
        taken, rows = len(step.taken), self._rows_to_train(step)
        if self.refilling is None:
            return self.schedule.share(taken, step.used, rows, last)
        groups = len(step.informative)  # in the end about as many as the step has prompts
        waiting = sum(int(wave.rollout.informative_groups.sum()) for wave in step.untrained)
        expected = self.schedule.expected(groups, taken, len(step.prompts))
        return self.schedule.share(groups, step.used, rows, last, waiting, expected)

    def _refill(self, step: StreamedStep, refilling: Refilling) -> None:
        """Submit the prompts of the next round that are known to be needed: all of them once this round is scored."""
        schedule = self.schedule
        while step.round < refilling.max_rounds:
            scored = [number for number in step.taken if number < step.round_end]
            unscored = step.round_end - len(scored)
            at_most = len(step.informative.intersection(scored)) + unscored
            needed = prompts_needed(at_most, step.round_end, schedule.prompts, schedule.multiple)
            missing = needed - (len(step.prompts) - step.round_end)
            if missing > 0 and not step.exhausted:
                self._submit_refill(step, refilling, missing)
            if unscored or len(step.prompts) == step.round_end:
                return
            step.round, step.round_end = step.round + 1, len(step.prompts)

    def _submit_refill(self, step: StreamedStep, refilling: Refilling, count: int) -> None:
        before, order = len(step.prompts), step.order
        drawn = draw_order(len(step.dataset), self.seed, step.number, step.round + 1) if order is None else order
        rows = refilling.read_rows(step.dataset, drawn, step.columns, step.keys, count, self.group_size)
        if rows:  # on all ranks alike
            self._submit(step, rows)
        step.exhausted = len(step.prompts) - before < count

    def _rows_of_rank(self, step: StreamedStep, numbers: Sequence[int]) -> Rows:
        """This rank's rows of a wave, each an object of its own, since TRL adds columns to some."""
        count = len(numbers) * self.group_size // self.accelerator.num_processes
        first = self.accelerator.process_index * count
        groups = [numbers[position // self.group_size] for position in range(first, first + count)]
        return [copy.deepcopy(step.prompts[group]) for group in groups]

    def _rows_to_train(self, step: StreamedStep) -> int:
        """Rows that wait for a micro-batch, of the rank that gets the most of them."""
        rollouts = [wave.rollout for wave in step.untrained]
        rows = sum(
            int(each.informative.sum()) if self.skip_uninformative else each.rewards.numel() for each in rollouts
        )
        return -(-rows // self.accelerator.num_processes)

    def _finish(self, step: StreamedStep) -> None:
        seconds = self.engine.end_stream()
        joined = in_order(step.scored, step.taken)
        exact = reward_metrics(joined.rewards_per_func, joined.rollout.rewards, self.reward_names)
        exact |= {"streaming/waves": float(len(step.scored)), "streaming/generation_seconds": seconds}
        if self.refilling is not None:
            exact |= self.refilling.counts(joined, step.number, step.round)
        step.metrics.put(exact)
        self.trainer.finish(joined, seconds)


def in_order(waves: Sequence[Round], numbers: Sequence[int]) -> Round:
    """
    Join waves, without their batches, and put their groups in the order of their numbers.

    Args:
        waves (`Sequence[Round]`):
            Waves in any order.
        numbers (`Sequence[int]`):
            Number of each of their groups, 0 to P - 1 in some order.
    """
    joined = concatenate([wave.rollout for wave in waves])
    order = torch.tensor(numbers, device=joined.rewards.device).argsort()  # (P,)
    rollout = Rollout(**{field.name: getattr(joined, field.name)[order] for field in fields(Rollout)})
    per_group = torch.cat([wave.rewards_per_func for wave in waves]).unflatten(0, joined.rewards.shape)  # (P, K, F)
    return Round({}, rollout, per_group[order].flatten(0, 1))
