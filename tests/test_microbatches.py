"""The plan of the update: every informative row once, no micro-batch empty, never wider than TRL's, fewest tokens."""

import itertools
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from opo_trl.update import cheapest_cut
from opo_trl.update.cheapest_cut import EXACT_ROWS
from opo_trl.update.microbatches import EQUAL_LENGTH, MEMORY_SHARE, assign_rows, plan_microbatches

LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 500)), min_size=0, max_size=40)
EXACT_UP_TO = st.sampled_from([0, EXACT_ROWS])  # with 0, few rows are planned as many are


def columns(lengths):
    pairs = torch.tensor(lengths, dtype=torch.long).view(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def plan_exactly_up_to(exact_rows, *args):
    with patch.object(cheapest_cut, "EXACT_ROWS", exact_rows):
        return plan_microbatches(*args)


def total(plan):
    return sum(micro_batch.padded_tokens for micro_batch in plan if micro_batch.informative)


def round_up(value, multiple):
    return -(-value // multiple) * multiple


@given(LENGTHS, st.integers(1, 12), st.integers(1, 20_000), st.sampled_from([None, 1, 8, 128]), EXACT_UP_TO)
def test_every_row_once_none_empty_and_no_wider_than_its_longest_row(
    lengths, num_microbatches, largest, multiple, exact_rows
):
    prompts, completions = columns(lengths)
    plan = plan_exactly_up_to(exact_rows, prompts, completions, num_microbatches, largest, multiple)
    assert len(plan) == num_microbatches
    assert all(len(micro_batch.rows) >= 1 for micro_batch in plan)
    learning = [micro_batch for micro_batch in plan if micro_batch.informative]
    assert len(learning) == min(num_microbatches, len(lengths))
    assert sorted(itertools.chain(*(m.rows.tolist() for m in learning))) == list(range(len(lengths)))
    for micro_batch in learning:
        assert micro_batch.prompt_width == round_up(int(prompts[micro_batch.rows].max()), multiple or 1)
        assert micro_batch.completion_width == round_up(max(int(completions[micro_batch.rows].max()), 1), multiple or 1)
    for filler in plan[len(learning) :]:
        assert (filler.informative, filler.padded_tokens, filler.rows.tolist()) == (False, 2, [0])
    sizes = [micro_batch.padded_tokens for micro_batch in learning]
    assert sizes == sorted(sizes, reverse=True)


@given(LENGTHS.filter(len), st.integers(1, 8), st.integers(1, 6), EXACT_UP_TO)
def test_never_more_than_trls_plan(lengths, num_microbatches, rows_per_microbatch, exact_rows):
    """TRL runs the same number of rows in every micro-batch, each as wide as the rollout batch's longest row."""
    lengths = (lengths * num_microbatches * rows_per_microbatch)[: num_microbatches * rows_per_microbatch]
    prompts, completions = columns(lengths)
    trls = rows_per_microbatch * (int(prompts.max()) + max(int(completions.max()), 1))
    plan = plan_exactly_up_to(exact_rows, prompts, completions, num_microbatches, int(MEMORY_SHARE * trls))
    assert plan[0].padded_tokens <= trls
    assert total(plan) <= num_microbatches * trls


def all_cuts(size, parts):
    for inner in itertools.combinations(range(1, size), parts - 1):
        yield list(itertools.pairwise([0, *inner, size]))


@settings(max_examples=120)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 60)), min_size=1, max_size=9),
    st.integers(1, 4),
    EXACT_UP_TO,
    st.data(),
)
def test_fewest_tokens_within_the_limit_against_enumeration(lengths, num_microbatches, exact_rows, data):
    prompts, completions = columns(lengths)
    order = (prompts + completions).argsort(stable=True)
    prompts, completions = prompts[order], completions[order].clamp(min=1)

    def sizes(cut):
        return [(end - start) * int(prompts[start:end].max() + completions[start:end].max()) for start, end in cut]

    cuts = [sizes(cut) for cut in all_cuts(len(lengths), min(num_microbatches, len(lengths)))]
    largest_of_cheapest = max(min(cuts, key=lambda cut: (sum(cut), max(cut))))
    limit = data.draw(
        st.integers(1, max(map(max, cuts))) | st.just(largest_of_cheapest) | st.just(largest_of_cheapest - 1)
    )
    smallest_possible = min(map(max, cuts))
    expected = min(sum(cut) for cut in cuts if max(cut) <= max(limit, smallest_possible))
    plan = plan_exactly_up_to(exact_rows, *columns(lengths), num_microbatches, limit)
    assert total(plan) == expected  # also beyond EXACT_ROWS: every border may move to any of so few rows
    assert plan[0].padded_tokens <= max(limit, smallest_possible)


@pytest.mark.parametrize("exact_rows", [0, EXACT_ROWS])
@pytest.mark.parametrize(("largest", "tokens"), [(1, 32), (21, 32), (22, 28)])
def test_an_impossible_limit_is_raised_to_the_least_possible_one(largest, tokens, exact_rows):
    """Two parts of 21 and 11 tokens are the most even ones; those of 6 and 22 are cheaper."""
    prompts, completions = torch.tensor([1, 1, 1, 1]), torch.tensor([2, 2, 6, 10])
    assert total(plan_exactly_up_to(exact_rows, prompts, completions, 2, largest)) == tokens


def test_512_rows_are_planned_exactly():
    """The expected plan is the one from before larger batches were planned in another way."""
    row = torch.arange(EXACT_ROWS)
    prompts, completions = row * row % 3001 + 20, row * row * 37 % 3001
    sizes = "122 55 32 23 20 42 22 17 18 19 20 15 10 9 25 9 10 6 5 5 5 4 16 3"
    expected = [int(size) for size in sizes.split()]
    plan = plan_microbatches(prompts, completions, len(expected), 10**9)
    assert [len(micro_batch.rows) for micro_batch in plan] == expected
    assert total(plan) == 2_353_960
    close = plan_exactly_up_to(EXACT_ROWS - 1, prompts, completions, len(expected), 10**9)
    assert [len(micro_batch.rows) for micro_batch in close] != expected


@given(LENGTHS.filter(len), st.integers(1, 40), st.integers(-1, 20_000), st.sampled_from([1, 8, 128]))
def test_beyond_exact_rows_the_limit_is_that_of_the_exact_plan(lengths, num_microbatches, largest, multiple):
    arguments = *columns(lengths), num_microbatches, largest, multiple
    smallest_possible = plan_microbatches(*columns(lengths), num_microbatches, 0, multiple)[0].padded_tokens
    exact, close = plan_microbatches(*arguments), plan_exactly_up_to(0, *arguments)
    assert close[0].padded_tokens <= max(largest, smallest_possible)
    assert total(close) >= total(exact)


def draw(distribution, rows):
    """Lengths of prompts and completions."""
    generator = torch.Generator().manual_seed(0)
    normal, other = torch.randn(2, rows, generator=generator)
    uniform, prompts = torch.rand(rows, generator=generator), torch.full((rows,), 64.0)
    if distribution == "log-normal":
        completions = torch.exp(7 + normal)
    elif distribution == "heavy-tailed":
        completions = 200 / uniform
    elif distribution == "two lengths":
        completions = torch.where(uniform < 0.5, 400 + 60 * normal, 5000 + 800 * normal)
    elif distribution == "few long prompts":
        prompts, completions = torch.where(uniform < 0.02, 4000.0, 64.0), torch.exp(7 + 0.5 * normal)
    elif distribution == "any prompts":
        prompts, completions = 16 + 2000 * uniform, torch.exp(7 + normal)
    else:
        prompts, completions = torch.exp(6 + normal), torch.exp(6.5 + 0.8 * normal + 0.6 * other)
    return prompts.clamp(16, 4096).long(), completions.clamp(1, 8192).long()


@pytest.mark.parametrize("share", [0.1, 0.75, 3.0])  # of TRL's largest micro-batch; 0.1 is less than any cut can have
@pytest.mark.parametrize(
    "distribution", ["log-normal", "heavy-tailed", "two lengths", "few long prompts", "any prompts", "correlated"]
)
def test_close_to_the_exact_plan(distribution, share):
    rows, num_microbatches = 640, 40
    prompts, completions = draw(distribution, rows)
    largest = int(share * rows // num_microbatches * (prompts.max() + completions.max()))
    exact = plan_exactly_up_to(rows, prompts, completions, num_microbatches, largest)
    plan = plan_microbatches(prompts, completions, num_microbatches, largest)
    assert total(exact) <= total(plan) <= 1.005 * total(exact)
    smallest_possible = plan_exactly_up_to(rows, prompts, completions, num_microbatches, 0)[0].padded_tokens
    assert plan[0].padded_tokens <= max(largest, smallest_possible)


def test_close_to_the_exact_plan_with_two_kinds_of_prompts():
    """The exact plan takes minutes here; its total was computed with it."""
    row = torch.arange(4096)
    x, y, long_prompt = row * 7919 % 10_007, row * row * 31 % 9_973, row % 3 == 0
    prompts = torch.where(long_prompt, 16 + y**2 * 8192 // 9_973**2, 16)
    completions = torch.where(long_prompt, 300, 1 + x**4 // 10_007**3 * 8192 // 10_007)
    plan = plan_microbatches(prompts, completions, 256, largest=196_644)
    assert plan[0].padded_tokens <= 196_644
    assert 13_525_917 <= total(plan) <= 1.005 * 13_525_917


class Bounded(TorchDispatchMode):
    """Fails at a tensor with more elements than `largest`, or when all have had more than `work` together."""

    def __init__(self, largest, work):
        super().__init__()
        self.largest, self.work = largest, work

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                assert tensor.numel() <= self.largest, function
                self.work -= tensor.numel()
        assert self.work >= 0
        return result


@pytest.mark.parametrize("distribution", ["log-normal", "any prompts"])
def test_16384_rows_in_256_micro_batches(distribution):
    """A table of all parts, as the exact plan needs it, would have 2**28 elements, and 256 times as many steps."""
    rows, num_microbatches = 16_384, 256
    prompts, completions = draw(distribution, rows)
    largest = int(MEMORY_SHARE * rows // num_microbatches * (prompts.max() + completions.max()))
    with Bounded(largest=2**20, work=2**28):
        plan = plan_microbatches(prompts, completions, num_microbatches, largest)
    assert len(plan) == num_microbatches
    assert plan[0].padded_tokens <= largest
    assert torch.cat([micro_batch.rows for micro_batch in plan]).sort().values.equal(torch.arange(rows))
    efficiency = float((prompts + completions).sum()) / total(plan)
    assert efficiency > {"log-normal": 0.99, "any prompts": 0.63}[distribution]


@given(LENGTHS, st.integers(1, 9), st.data())
def test_rows_that_learn_are_dealt_once_and_evenly(lengths, num_ranks, data):
    prompts, completions = columns(lengths)
    informative = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))).bool()
    rank_rows = assign_rows(prompts + completions, informative, num_ranks)
    assert len(rank_rows) == num_ranks
    assert sorted(itertools.chain(*(rows.tolist() for rows in rank_rows))) == informative.nonzero().flatten().tolist()
    sizes = [len(rows) for rows in rank_rows]
    assert max(sizes) - min(sizes) <= 1


@given(LENGTHS, st.integers(1, 9), st.data())
def test_each_rank_gets_the_lengths_of_back_and_forth(lengths, num_ranks, data):
    """Up to half a percent, from the longest to the shortest, whichever rows stay where they were sampled."""
    tokens = torch.tensor([sum(pair) for pair in lengths], dtype=torch.long)
    learns = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))).bool()
    ranked = tokens[learns].sort(descending=True).values
    place = torch.arange(len(ranked)) % (2 * num_ranks)
    expected = [ranked[(place == rank) | (place == 2 * num_ranks - 1 - rank)] for rank in range(num_ranks)]
    hands = assign_rows(tokens, learns, num_ranks)
    for hand, lengths_of_rank in zip(hands, expected, strict=True):
        assert (tokens[hand] - lengths_of_rank).abs().le(EQUAL_LENGTH * lengths_of_rank).all()


def test_a_row_stays_on_its_rank_where_lengths_are_equal():
    every = torch.ones(32, dtype=torch.bool)
    equal = assign_rows(torch.full((32,), 7), every, 4)
    assert [sorted(hand.tolist()) for hand in equal] == torch.arange(32).view(4, 8).tolist()
    some = (torch.arange(32) // 8 + torch.arange(32)) % 2 == 0  # half of the rows of each rank, at other places
    assert all((hand // 8 == rank).all() for rank, hand in enumerate(assign_rows(torch.full((32,), 7), some, 4)))
    generator = torch.Generator().manual_seed(0)
    stay = {}
    for longest in (10_040, 20_000):
        lengths = torch.randint(10_000, longest, (512,), generator=generator)
        hands = assign_rows(lengths, torch.ones(512, dtype=torch.bool), 8)
        stay[longest] = sum(int((hand // 64 == rank).sum()) for rank, hand in enumerate(hands)) / 512
    assert stay[10_040] > 0.6, "all lengths count as equal"
    assert stay[20_000] > 0.25, "1 / 8 of them by chance"


def test_dealing_balances_tokens():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(5.0 + 0.7 * torch.randn(512, generator=generator)).clamp(16, 512).long()
    hands = assign_rows(lengths, torch.ones(512, dtype=torch.bool), 8)
    tokens = torch.tensor([int(lengths[hand].sum()) for hand in hands]).double()
    contiguous = lengths.view(8, 64).sum(dim=1).double()
    assert tokens.max() / tokens.mean() < 1.01 < contiguous.max() / contiguous.mean()


@pytest.mark.parametrize(("num_microbatches", "least"), [(8, 0.92), (16, 0.97)])
def test_token_efficiency_on_log_normal_lengths(num_microbatches, least):
    """Real over padded tokens, mean of 20 draws: TRL's plan has 0.39, cuts of equal rows 0.88 and 0.95."""
    generator = torch.Generator().manual_seed(0)
    efficiencies = []
    for _ in range(20):
        completions = torch.exp(5.0 + 0.7 * torch.randn(64, generator=generator)).clamp(16, 512).long()
        prompts = torch.full((64,), 32)
        trls = 64 // num_microbatches * (32 + int(completions.max()))
        plan = plan_microbatches(prompts, completions, num_microbatches, int(MEMORY_SHARE * trls))
        assert plan[0].padded_tokens <= 0.75 * trls
        efficiencies.append(float((prompts + completions).sum()) / total(plan))
    assert sum(efficiencies) / len(efficiencies) >= least


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"got \(2,\), \(3,\) and 1"):
        plan_microbatches(torch.ones(2), torch.ones(3), 1, 10)
    with pytest.raises(ValueError, match=r"at least 1, got .* and 0"):
        plan_microbatches(torch.ones(2), torch.ones(2), 0, 10)
