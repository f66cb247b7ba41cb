"""Streaming: a step's finished groups are scored and trained while the others are generated."""

import copy
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
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
        refilling ([`~opo_trl.rollouts.refilling.Refilling`], *optional*):
            Reads the prompts of refill rounds. A round has the same prompts as in a step that is not streamed; each is
            submitted as soon as it is certain to be needed, even if all groups that are not scored yet are informative.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        engine: ServerGeneration,
        schedule: WaveSchedule,
        *,
        group_size: int,
        seed: int,
        reward_names: Sequence[str],
        skip_uninformative: bool,
        metrics: MutableMapping[str, list[float]],
        tokenize: Callable[[Rows], list[list[int]]],
        sample: Callable[[Rows], Round],
        obstacle: Callable[[dict[str, Any]], str | None],
        plan: Callable[[dict[str, Any], int], MicroBatches],
        finish: Callable[[Round, float], None],
        waiting: Callable[[], AbstractContextManager[None]],
        refilling: Refilling | None = None,
    ) -> None:
        self.accelerator, self.engine, self.schedule = accelerator, engine, schedule
        self.group_size, self.seed, self.reward_names = group_size, seed, reward_names
        self.skip_uninformative, self.metrics = skip_uninformative, metrics
        self.tokenize, self.sample, self.plan, self.waiting = tokenize, sample, plan, waiting
        self.obstacle, self.finish, self.refilling = obstacle, finish, refilling
        self.drop()

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
        self._step, self._normalizer, self._dataset, self._order = step, normalizer, dataset, order
        self._columns = list(rows[0])
        self._round_metrics = RoundMetrics(self.metrics)
        self._submit(rows)
        self._round_end = len(self._prompts)
        self._keys = {row_key(row) for row in self._prompts} if self.refilling is not None else set()

    def next_micro_batch(self) -> dict[str, torch.Tensor]:
        """
        Return this rank's next micro-batch; wait for complete groups if no micro-batch is left.

        Raises:
            ServerError: On all ranks.
        """
        try:
            while not self._ready:
                self._take_wave()
        except BaseException:
            self.drop()
            raise
        return self._ready.popleft()

    def drop(self) -> None:
        """Drop the state of a step, on this rank alone, such as one that has failed."""
        self._step = 0
        self._prompts: Rows = []  # one row for each group, of all ranks, by its number
        self._taken: list[int] = []  # numbers of the groups of all waves, in their order
        self._scored: list[Round] = []  # the waves, without their batches
        self._untrained: list[Round] = []  # waves that wait for the next one's micro-batches
        self._ready: deque[dict[str, torch.Tensor]] = deque()
        self._used = 0  # micro-batches
        self._informative: set[int] = set()  # numbers of the groups in waves that are
        self._round = 0  # the refill round whose groups are being scored; 0 for the prompts of the data loader
        self._round_end = 0  # groups of all rounds up to this one; those after are of the next one
        self._exhausted = False  # the step has all prompts of the dataset
        self.engine.drop_stream()

    def _submit(self, rows: Rows) -> None:
        """Submit groups, of which this rank has these rows."""
        first, size = self.accelerator.process_index * len(rows), self.group_size
        begun = {(first + i) // size: row for i, row in reversed(list(enumerate(rows)))}  # group -> its first row here
        tokens = dict(zip(begun, self.tokenize(list(begun.values())), strict=True))
        complete = [row for i, row in enumerate(rows) if (first + i) % size == 0]
        self._prompts += send_to_device(gather_object(complete), self.accelerator.device)
        self.engine.submit([tokens[(first + i) // size] for i in range(len(rows))], size)

    def _wave_size(self, complete: int, generating: int) -> int:
        return self.schedule.wave_size(len(self._taken), complete, generating)

    def _take_wave(self) -> None:
        with self.waiting():
            numbers = self.engine.next_wave(self._wave_size)
        wave = self.sample(self._rows_of_rank(numbers))
        obstacles = [each for each in gather_object([self.obstacle(wave.batch)]) if each is not None]
        refuse_obstacle(obstacles[0] if obstacles else None)
        self._round_metrics.take(wave.rollout.rewards.numel())
        self._taken += numbers
        self._scored.append(Round({}, wave.rollout, wave.rewards_per_func))
        self._untrained.append(wave)
        informative = wave.rollout.informative_groups.tolist()
        self._informative |= {number for number, each in zip(numbers, informative, strict=True) if each}
        if self.refilling is not None:
            self._refill(self.refilling)
        last = len(self._taken) == len(self._prompts)
        share = self._share(last)
        if last:
            self._finish()
        if share:
            waiting, self._untrained = self._untrained, []
            self._used += share
            batch = merge_rounds(waiting).batch
            batch["loss_normalizer"] = self._normalizer
            self._ready.extend(self.plan(batch, share))

    def _share(self, last: bool) -> int:
        """Micro-batches in which the waves that wait are trained."""
        taken, rows = len(self._taken), self._rows_to_train()
        if self.refilling is None:
            return self.schedule.share(taken, self._used, rows, last)
        groups = len(self._informative)  # in the end about as many as the step has prompts
        waiting = sum(int(wave.rollout.informative_groups.sum()) for wave in self._untrained)
        expected = self.schedule.expected(groups, taken, len(self._prompts))
        return self.schedule.share(groups, self._used, rows, last, waiting, expected)

    def _refill(self, refilling: Refilling) -> None:
        """Submit the prompts of the next round that are known to be needed: all of them once this round is scored."""
        schedule = self.schedule
        while self._round < refilling.max_rounds:
            scored = [number for number in self._taken if number < self._round_end]
            unscored = self._round_end - len(scored)
            at_most = len(self._informative.intersection(scored)) + unscored
            needed = prompts_needed(at_most, self._round_end, schedule.prompts, schedule.multiple)
            missing = needed - (len(self._prompts) - self._round_end)
            if missing > 0 and not self._exhausted:
                self._submit_refill(refilling, missing)
            if unscored or len(self._prompts) == self._round_end:
                return
            self._round, self._round_end = self._round + 1, len(self._prompts)

    def _submit_refill(self, refilling: Refilling, count: int) -> None:
        before, order = len(self._prompts), self._order
        drawn = draw_order(len(self._dataset), self.seed, self._step, self._round + 1) if order is None else order
        rows = refilling.read_rows(self._dataset, drawn, self._columns, self._keys, count, self.group_size)
        if rows:  # on all ranks alike
            self._submit(rows)
        self._exhausted = len(self._prompts) - before < count

    def _rows_of_rank(self, numbers: Sequence[int]) -> Rows:
        """This rank's rows of a wave, each an object of its own, since TRL adds columns to some."""
        count = len(numbers) * self.group_size // self.accelerator.num_processes
        first = self.accelerator.process_index * count
        groups = [numbers[position // self.group_size] for position in range(first, first + count)]
        return [copy.deepcopy(self._prompts[group]) for group in groups]

    def _rows_to_train(self) -> int:
        """Rows that wait for a micro-batch, of the rank that gets the most of them."""
        rollouts = [wave.rollout for wave in self._untrained]
        rows = sum(
            int(each.informative.sum()) if self.skip_uninformative else each.rewards.numel() for each in rollouts
        )
        return -(-rows // self.accelerator.num_processes)

    def _finish(self) -> None:
        seconds = self.engine.end_stream()
        step = in_order(self._scored, self._taken)
        exact = reward_metrics(step.rewards_per_func, step.rollout.rewards, self.reward_names)
        exact |= {"streaming/waves": float(len(self._scored)), "streaming/generation_seconds": seconds}
        if self.refilling is not None:
            exact |= self.refilling.counts(step, self._step, self._round)
        self._round_metrics.put(exact)
        self.finish(step, seconds)


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
