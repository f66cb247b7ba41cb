"""Waves and their micro-batches: what any order of arrival keeps, and cases that can be counted by hand."""

import pytest

from opo_trl.rollouts.refill_prompts import prompts_needed
from opo_trl.rollouts.waves import WaveSchedule


def test_a_wave_ends_where_a_micro_batch_does():
    schedule = WaveSchedule(prompts=8, micro_batches=4)
    assert schedule.wave_size(taken=0, complete=1, generating=7) == 0
    assert schedule.wave_size(taken=0, complete=3, generating=5) == 2
    assert schedule.wave_size(taken=2, complete=5, generating=1) == 4
    assert schedule.wave_size(taken=6, complete=2, generating=0) == 2


def test_a_wave_waits_for_a_quarter_of_the_groups_that_are_left_while_any_is_generated():
    """So the waves get smaller, and the last one, of the longest completions, is small if its groups end one by one."""
    schedule = WaveSchedule(prompts=64, micro_batches=32)
    assert schedule.wave_size(taken=0, complete=15, generating=49) == 0
    assert schedule.wave_size(taken=0, complete=17, generating=47) == 16
    assert schedule.wave_size(taken=56, complete=1, generating=7) == 0
    assert schedule.wave_size(taken=56, complete=5, generating=3) == 4
    assert schedule.wave_size(taken=56, complete=8, generating=0) == 8
    sizes, taken = [], 0
    for complete in range(1, 65):  # one group after the other
        if size := schedule.wave_size(taken, complete - taken, 64 - complete):
            sizes.append(size)
            taken += size
    assert sizes == [16, 12, 10, 6, 6, 4, 2, 2, 2, 2, 2]


def test_more_micro_batches_than_groups_take_each_group_as_it_comes():
    schedule = WaveSchedule(prompts=3, micro_batches=12)
    assert schedule.wave_size(taken=0, complete=1, generating=2) == 1
    assert schedule.share(groups=1, used=0, rows=8, last=False) == 4


@pytest.mark.parametrize(("prompts", "micro_batches", "multiple"), [(12, 5, 1), (12, 4, 3), (12, 1, 2), (6, 24, 2)])
@pytest.mark.parametrize("at_once", [1, 2, 5, 12])
def test_every_group_is_in_one_wave_and_every_micro_batch_is_used_once(prompts, micro_batches, multiple, at_once):
    schedule = WaveSchedule(prompts, micro_batches, multiple)
    taken = complete = used = waiting = 0
    largest = -(-prompts // micro_batches) + multiple - 1
    while taken < prompts:
        complete = min(complete + at_once, prompts - taken)
        size = schedule.wave_size(taken, complete, prompts - taken - complete)
        if not size:
            continue
        assert size % multiple == 0
        taken, complete, waiting = taken + size, complete - size, waiting + size
        share = schedule.share(taken, used, rows=4 * waiting, last=taken == prompts)
        if share:
            assert waiting / share <= largest
            waiting = 0
        used += share
    assert (taken, used, waiting) == (prompts, micro_batches, 0)


def test_what_a_wave_without_rows_does_not_use_goes_to_the_next_ones():
    schedule = WaveSchedule(prompts=8, micro_batches=4)
    assert schedule.share(groups=2, used=0, rows=0, last=False) == 0
    assert schedule.share(groups=4, used=0, rows=8, last=False) == 2
    assert schedule.share(groups=4, used=0, rows=1, last=False) == 1
    assert schedule.share(groups=8, used=2, rows=0, last=True) == 2


def test_one_micro_batch_is_kept_for_the_last_wave():
    """With refill rounds, the groups may be as many as the step has prompts before all rounds have come."""
    schedule = WaveSchedule(prompts=4, micro_batches=4)
    assert schedule.share(groups=9, used=0, rows=40, last=False) == 3
    assert schedule.share(groups=9, used=3, rows=40, last=False) == 0


def evenly(informative, groups):
    """Whether each of the groups is informative."""
    return [(i + 1) * informative // groups > i * informative // groups for i in range(groups)]


@pytest.mark.parametrize(
    ("schedule", "first", "second", "at_once"),
    [
        (WaveSchedule(prompts=64, micro_batches=64), evenly(32, 64), evenly(36, 64), 1),
        (WaveSchedule(prompts=64, micro_batches=64), evenly(32, 64), evenly(36, 64), 8),
        (WaveSchedule(prompts=64, micro_batches=64), evenly(32, 64), [False] * 20 + [True] * 44, 1),
        (WaveSchedule(prompts=64, micro_batches=64), evenly(32, 64), [True] * 64, 1),
        (WaveSchedule(prompts=64, micro_batches=64), [False] * 16 + [True] * 48, [True] * 22, 4),
        (WaveSchedule(prompts=64, micro_batches=3), evenly(32, 64), evenly(44, 64), 1),
        (WaveSchedule(prompts=8, micro_batches=32), evenly(7, 8), [True] * 2, 1),
        (WaveSchedule(prompts=16, micro_batches=16, multiple=4), evenly(15, 16), [True] * 4, 4),
    ],
)
def test_the_surplus_of_a_refill_round_is_spread(schedule, first, second, at_once):
    """No micro-batch has more than twice the groups of one of a step that is not refilled, whatever is scored when."""
    outcomes = [*first, *second]
    taken = informative = waiting = used = 0
    submitted = schedule.prompts
    while taken < submitted:
        wave = outcomes[taken : taken + at_once]
        taken, informative, waiting = taken + len(wave), informative + sum(wave), waiting + sum(wave)
        if taken <= schedule.prompts:  # as many prompts as are needed however the others of the first round turn out
            at_most = informative + schedule.prompts - taken
            needed = prompts_needed(at_most, schedule.prompts, schedule.prompts, schedule.multiple)
            submitted = schedule.prompts + needed
        expected = schedule.expected(informative, taken, submitted)
        last = taken == submitted
        share = schedule.share(informative, used, 4 * waiting, last, waiting, expected)
        used += share
        assert used < schedule.micro_batches or last
        if share:
            assert waiting * schedule.micro_batches <= 2 * share * schedule.prompts
            waiting = 0
    assert (taken, used, waiting) == (len(outcomes), schedule.micro_batches, 0)
