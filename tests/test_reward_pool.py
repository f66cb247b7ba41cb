"""The worker processes: what kills one costs one task, and none of them outlives the process that asked."""

import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import TimeoutError

import loky.backend
import pebble
import psutil
import pytest

import pool_tasks
from opo_trl.rewards import math_verify_reward, worker
from opo_trl.rewards.worker_pool import CRASHED, KILLED, UNDONE, WorkerPool


@pytest.fixture(scope="module")
def pool():
    """One for all: a worker takes a second to start, and each test leaves the pool in order."""
    pool = WorkerPool(workers=2, time_limit=1.0, memory_limit=1024)
    yield pool
    pool.stop()


def soon():
    return time.monotonic() + 30


@pytest.mark.slow
def test_what_kills_a_worker_costs_one_task(pool):
    tasks = [
        (pool_tasks.echo, ("a",)),
        (pool_tasks.uninterruptible, ()),
        (pool_tasks.kill_itself, (signal.SIGSEGV,)),
        (pool_tasks.allocate, ()),
        (pool_tasks.kill_itself, (signal.SIGKILL,)),
        (pool_tasks.echo, ("b",)),
    ]
    assert pool.run(tasks, soon()) == ["a", KILLED, CRASHED, CRASHED, CRASHED, "b"]
    assert pool.run([(pool_tasks.echo, ("c",))], soon()) == ["c"]


@pytest.mark.slow
def test_idle_workers_may_die(pool):
    assert pool.run([(pool_tasks.echo, ("a",))] * 2, soon()) == ["a", "a"]
    for process in workers():
        process.kill()
    time.sleep(0.5)
    assert pool.run([(pool_tasks.echo, ("b",))], soon()) == ["b"]
    assert len(workers()) <= 2 + pool.workers


@pytest.mark.slow
def test_what_is_late_is_undone(pool):
    deadline = time.monotonic() + 1.5
    outcomes = pool.run([(pool_tasks.uninterruptible, ())] * 8, deadline)
    assert time.monotonic() < deadline + 2
    assert UNDONE in outcomes
    assert pool.run([(pool_tasks.echo, ("a",))], soon()) == ["a"]


def test_limits_are_on_the_worker_itself(pool):
    """They hold if nobody is left to kill it."""
    assert pool.run([(pool_tasks.limits, ())], soon()) == ["memory 1073741824"]
    assert worker.compare.__module__ == "opo_trl.rewards.worker"
    assert pool.run([(worker.compare, ("13", "(10^9)!", 0.2))], soon()) == ["too slow"]


def workers(process=None):
    """Worker processes that descend from this one."""
    children = (process or psutil.Process()).children(recursive=True)
    return [child for child in children if "pebble_pool_worker" in " ".join(child.cmdline())]


TRAINER = """
import os, signal, sys, threading, time
from opo_trl.rewards import math_verify_reward
assert math_verify_reward(["\\\\boxed{\\\\sqrt{4}}"], ["2"]) == [1.0]
import psutil
print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
"""


def run_trainer(then):
    run = subprocess.Popen(
        [sys.executable, "-c", TRAINER + then], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert len(pids) >= 2
    return run, pids


def still_there(pids, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        if not alive:
            return []
        time.sleep(0.1)
    return alive


@pytest.mark.slow
def test_no_worker_is_left_behind_at_exit():
    run, pids = run_trainer("")
    assert run.wait(timeout=20) == 0, run.stderr.read()
    assert run.stderr.read() == ""
    assert still_there(pids, 1.0) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_spins_on_when_the_trainer_is_killed(number):
    """Idle ones see their pipe close; a busy one, here within one call of C, runs into its limit of processor time."""
    spin = """
sys.path.insert(0, TESTS)
import pool_tasks
from opo_trl.rewards.worker_pool import WorkerPool
pool = WorkerPool(2, 1000.0, 1024)
tasks = [(pool_tasks.spin_within_limits, ())]
threading.Thread(target=pool.run, args=(tasks, time.monotonic() + 1000), daemon=True).start()
time.sleep(3)
print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
time.sleep(1000)
""".replace("TESTS", repr(os.path.dirname(__file__)))
    run, _ = run_trainer(spin)
    pids = [int(pid) for pid in run.stdout.readline().split()]
    give_up = time.monotonic() + 60  # on a busy machine the other worker may still be starting
    while sum(psutil.Process(pid).cpu_percent(interval=0.3) > 20 for pid in pids) != 1:
        assert time.monotonic() < give_up, "one worker must be busy, and one idle"
    run.send_signal(number)
    run.wait(timeout=20)
    assert still_there(pids, 12.0) == []


@pytest.mark.slow
def test_a_forked_child_starts_workers_of_its_own():
    assert math_verify_reward(["\\boxed{\\sqrt{16}}"], ["4"]) == [1.0]
    mine = {process.pid for process in workers()}
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=pool_tasks.grade_and_report, args=(sender,))
    child.start()
    rewards, pids = receiver.recv() if receiver.poll(30) else (None, None)
    child.join(timeout=20)
    assert rewards == [1.0, 0.0]
    assert set(pids).isdisjoint(mine)
    assert child.exitcode == 0
    assert mine == {process.pid for process in workers()}, "the child ended the parent's workers"
    assert math_verify_reward(["\\boxed{\\sqrt{25}}"], ["5"]) == [1.0]


def test_a_daemonic_process_grades_what_it_can_and_says_so():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=pool_tasks.grade_and_report, args=(sender,), daemon=True)
    child.start()
    rewards, pids = receiver.recv() if receiver.poll(30) else ("no answer", None)
    child.join(timeout=20)
    assert rewards == [None, None], "neither paid nor punished"
    assert pids == []


def test_what_we_rely_on_of_pebble_and_loky():
    """`schedule` kills one worker for one task; loky's context is an ordinary one with processes started afresh."""
    assert {"max_workers", "initializer", "initargs", "context"} <= set(
        inspect.signature(pebble.ProcessPool).parameters
    )
    assert list(inspect.signature(pebble.ProcessPool.schedule).parameters)[1:] == [
        "function",
        "args",
        "kwargs",
        "timeout",
    ]
    assert issubclass(pebble.ProcessExpired, OSError)
    assert callable(sys.modules["pebble.pool.process"].interpreter_shutdown), "unregistered in forked children"
    context = loky.backend.get_context("loky")
    assert context.Process._start_method == "loky"
    with pebble.ProcessPool(max_workers=1, context=context) as pool:
        assert pool.active
        future = pool.schedule(pool_tasks.process_name, timeout=30)
        assert future.result() == "pebble_pool_worker"
        with pytest.raises(TimeoutError):
            pool.schedule(pool_tasks.uninterruptible, timeout=0.3).result()
        with pytest.raises(pebble.ProcessExpired):
            pool.schedule(pool_tasks.kill_itself, args=(signal.SIGKILL,), timeout=30).result()
        assert pool.schedule(pool_tasks.echo, args=("a",), timeout=30).result() == "a"


@pytest.mark.slow
def test_only_those_that_break_lose_among_300():
    """Six uninterruptible tasks, an allocation bomb, a SIGSEGV and a SIGKILL, spread over ordinary comparisons."""
    pool = WorkerPool(workers=2, time_limit=2.0, memory_limit=1024)
    tasks, expected = pool_tasks.mixed_batch(300)
    outcomes = pool.run(tasks, time.monotonic() + 60)
    pool.stop()
    assert outcomes == expected
    assert (expected.count(KILLED), expected.count(CRASHED)) == (6, 3)
