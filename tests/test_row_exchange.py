"""Rows reach the rank that trains them as they were sampled, and nothing else travels: every rank is a thread here."""

import threading

import pytest
import torch
from torch import distributed

from opo_trl.update.planner import UpdatePlanner, loss_mask
from opo_trl.update.row_exchange import RowExchange

PAD = 9


class Ranks:
    """Stands in for the process group and the accelerator of as many ranks, and counts what they send."""

    device = "cpu"

    def __init__(self, number, monkeypatch):
        self.number, self.sent_bytes, self.calls = number, [0] * number, 0
        self._barrier, self._mail, self._own = threading.Barrier(number), {}, threading.local()
        monkeypatch.setattr(distributed, "all_to_all_single", self._all_to_all)

    @property
    def process_index(self):
        return self._own.rank

    def run(self, function):
        """Call `function(rank)` on every rank at once and return what they return."""
        results, failures = [None] * self.number, []

        def call(rank):
            self._own.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as failure:
                failures.append(failure)
                self._barrier.abort()

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for failure in failures:
            if not isinstance(failure, threading.BrokenBarrierError):
                raise failure
        return results

    def gather(self, tensor):
        return torch.cat(self.exchange(tensor))

    def _all_to_all(self, output, sent, output_sizes, sent_sizes):
        assert sent_sizes[self.process_index] == 0, "a rank's own rows need no collective"
        parts = [mail[self.process_index] for mail in self.exchange(sent.split(sent_sizes))]
        assert [len(part) for part in parts] == output_sizes
        assert {part.dtype for part in parts} == {output.dtype}
        output.copy_(torch.cat(parts))
        self.sent_bytes[self.process_index] += sent.numel() * sent.element_size()
        self.calls += 1

    def exchange(self, message):
        self._mail[self.process_index] = message
        self._barrier.wait()
        messages = [self._mail[rank] for rank in range(self.number)]
        self._barrier.wait()
        return messages


def rollout_batches(ranks, rows, informative, token_advantages=True, constant=False):
    """Batches padded as TRL pads them, each rank's to its own longest row; a row is known by its tokens."""
    generator = torch.Generator().manual_seed(ranks)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    batches = []
    for rank in range(ranks):
        prompts, completions = draw(1, 9, rows), draw(0, 30, rows)
        if constant:
            prompts, completions = torch.full((rows,), 4), torch.full((rows,), 11)
        width, longest = int(prompts.max()) + 2, int(completions.max()) + 1
        prompt_mask = (torch.arange(width) >= width - prompts.unsqueeze(1)).long()
        completion_mask = (torch.arange(longest) < completions.unsqueeze(1)).long()
        first = (torch.arange(rows) + rank * rows + 1).unsqueeze(1) * 100_000  # more than 16 bits
        nonzero = informative[rank * rows : (rank + 1) * rows].unsqueeze(1)  # (rows, 1)
        advantages = torch.randn(rows, longest, generator=generator) * nonzero
        batches.append({
            "prompt_ids": torch.where(prompt_mask.bool(), first + torch.arange(width), PAD),
            "prompt_mask": prompt_mask,
            "completion_ids": torch.where(completion_mask.bool(), first + torch.arange(longest), PAD),
            "completion_mask": completion_mask,
            "advantages": advantages if token_advantages else advantages[:, 0],
            "tool_mask": draw(0, 2, rows, longest),
            "sampling_per_token_logps": -torch.rand(rows, longest, generator=generator),
        })  # fmt: skip
    return batches


def attended(batch, row):
    """What counts of a row, by column: padding has no meaning."""
    masks = {"prompt": batch["prompt_mask"][row].bool(), "completion": batch["completion_mask"][row].bool()}
    return {
        name: tensor[row][masks["prompt" if name.startswith("prompt") else "completion"]].tolist()
        if tensor.ndim == 2
        else tensor[row].item()
        for name, tensor in batch.items()
    }


def trainable(batches):
    """Rows with a non-zero advantage at a trainable token, as positions in the batch of all ranks."""
    found = []
    for batch in batches:
        advantages = batch["advantages"] if batch["advantages"].ndim == 2 else batch["advantages"].unsqueeze(1)
        found.append(((advantages != 0) & loss_mask(batch).bool()).any(dim=1))
    return torch.cat(found).nonzero().flatten().tolist()


def planned_steps(ranks, batches, micro_batches=4):
    planner = UpdatePlanner(micro_batches, num_ranks=ranks.number)
    return ranks.run(lambda rank: planner.plan_step(batches[rank], ranks))


def some_informative(kind, total):
    if kind == "all":
        return torch.ones(total, dtype=torch.bool)
    if kind == "one rank":  # the first rank's rows alone
        return torch.arange(total) < total // 2
    return torch.arange(total) == 3  # fewer than ranks: the others run fillers


@pytest.mark.parametrize("token_advantages", [True, False])
@pytest.mark.parametrize(("number", "kind"), [(1, "all"), (2, "all"), (2, "one rank"), (8, "all"), (3, "one row")])
def test_rows_arrive_as_they_were_sampled(monkeypatch, number, kind, token_advantages):
    rows = 6
    batches = rollout_batches(number, rows, some_informative(kind, number * rows), token_advantages)
    expected = {row: attended(batches[row // rows], row % rows) for row in trainable(batches)}
    trained = {}
    for step in planned_steps(Ranks(number, monkeypatch), batches):
        parts = step.micro_batches()
        assert len(parts) == 4
        for part in parts:
            assert {name: tensor.dtype for name, tensor in part.items()} == {
                name: tensor.dtype for name, tensor in batches[0].items()
            }
            for row in range(len(part["prompt_ids"])):
                if part["completion_mask"].any():  # else a filler
                    number_of_row = int(part["prompt_ids"][row, -1]) // 100_000 - 1
                    assert number_of_row not in trained
                    trained[number_of_row] = attended(part, row)
            # no padding that no row needs, and no memory of a larger tensor
            if part["completion_mask"].any():
                assert all(part[f"{side}_mask"].any(dim=0).all() for side in ("prompt", "completion"))
            assert all(each.untyped_storage().nbytes() == each.nbytes for each in part.values())
    assert trained == expected


@pytest.mark.parametrize(("number", "kind"), [(2, "all"), (2, "one rank"), (8, "all"), (3, "one row")])
def test_only_rows_that_change_rank_travel_and_without_padding(monkeypatch, number, kind):
    rows = 6
    batches = rollout_batches(number, rows, some_informative(kind, number * rows))
    ranks = Ranks(number, monkeypatch)
    steps = planned_steps(ranks, batches)
    for source in range(number):
        expected = 0
        for target, step in enumerate(steps):
            for row in step.exchange.rank_rows[target].tolist():
                if row // rows == source != target:
                    prompt, completion = (batches[source][f"{side}_mask"][row % rows].sum() for side in PARTS)
                    # ids as int32, the tool mask as uint8, log-probabilities and advantages as float32
                    expected += 4 * (prompt + completion) + (1 + 4 + 4) * completion
        assert ranks.sent_bytes[source] == expected
    moved = sum(ranks.sent_bytes)
    assert moved > 0 or kind == "one row"
    padded = sum(tensor.nbytes for batch in batches for tensor in batch.values())
    assert moved < padded / 3


PARTS = ("prompt", "completion")


def test_nothing_is_sent_where_no_row_changes_rank(monkeypatch):
    """As many informative rows of the same length on every rank."""
    informative = torch.arange(24) % 6 != 2
    ranks = Ranks(4, monkeypatch)
    steps = planned_steps(ranks, rollout_batches(4, 6, informative, token_advantages=False, constant=True))
    assert (ranks.calls, ranks.sent_bytes) == (0, [0] * 4)
    assert [sorted(step.exchange.order.tolist()) for step in steps] == [
        [row for row in range(6 * rank, 6 * rank + 6) if informative[row]] for rank in range(4)
    ]


@pytest.mark.parametrize("rank_rows", [[[3, 0], [1, 5, 4]], [[0, 2], [4, 3]], [[], [5, 0, 1]]])
def test_numbers_of_tokens_return_to_where_their_rows_were_sampled(monkeypatch, rank_rows):
    """Where a row is trained by nobody, its numbers are 0."""
    batches = rollout_batches(2, 3, torch.ones(6, dtype=torch.bool))
    lengths = [torch.cat([batch[f"{side}_mask"].sum(dim=1) for batch in batches]) for side in PARTS]
    assigned = [torch.tensor(rows, dtype=torch.long) for rows in rank_rows]

    def there_and_back(rank):
        exchange = RowExchange(rank, assigned, *lengths)
        logps = batches[rank]["sampling_per_token_logps"]
        return exchange.return_tokens(exchange.move_column("sampling_per_token_logps", logps), logps.size(1))

    returned = Ranks(2, monkeypatch).run(there_and_back)
    trained = torch.zeros(6, 1).index_fill(0, torch.cat(assigned), 1)
    for rank, batch in enumerate(batches):
        mask = batch["completion_mask"] * trained[3 * rank : 3 * rank + 3]
        assert returned[rank].equal(batch["sampling_per_token_logps"] * mask)


def planned_before_advantages(ranks, batches, chosen):
    planner = UpdatePlanner(4, num_ranks=ranks.number)
    return ranks.run(lambda rank: planner.plan_before_advantages(batches[rank], chosen[rank], ranks))


@pytest.mark.parametrize("token_advantages", [True, False])
@pytest.mark.parametrize(
    ("change", "plans"),
    [("nothing", 2), ("fewer are informative", 2), ("more are informative", 4), ("a tensor is replaced", 4)],
)
def test_a_plan_made_before_the_advantages_serves_the_update(monkeypatch, change, plans, token_advantages):
    """On all ranks or on none, though only the second one's batch has changed."""
    counted = []
    plan = UpdatePlanner.plan
    monkeypatch.setattr(UpdatePlanner, "plan", lambda *args: counted.append(1) or plan(*args))
    batches = rollout_batches(2, 6, torch.arange(12) % 4 != 1, token_advantages)
    ranks, chosen = Ranks(2, monkeypatch), [batch["advantages"].view(6, -1)[:, 0] != 0 for batch in batches]
    earlier = planned_before_advantages(ranks, batches, chosen)
    if change == "fewer are informative":
        batches[1]["advantages"][0] = 0
    elif change == "more are informative":
        batches[1]["advantages"][:] = 1.0
    elif change == "a tensor is replaced":
        batches[1]["completion_ids"] = batches[1]["completion_ids"] + 1
    planner = UpdatePlanner(4, num_ranks=2)
    steps = ranks.run(lambda rank: planner.plan_step(batches[rank], ranks, earlier[rank]))
    assert len(counted) == plans
    afresh = planned_steps(Ranks(2, monkeypatch), batches)
    expected, found = (
        [
            attended(part, row)
            for step in each
            for part in step.micro_batches()
            for row in range(len(part["prompt_ids"]))
        ]
        for each in (afresh, steps)
    )
    found = [row for row in found if row["completion_mask"] and torch.tensor(row["advantages"]).any()]
    expected = [row for row in expected if row["completion_mask"] and torch.tensor(row["advantages"]).any()]
    assert sorted(str(sorted(row.items())) for row in found) == sorted(str(sorted(row.items())) for row in expected)
    assert not any(step.source for step in steps), "the batch can be freed"
