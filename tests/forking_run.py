"""
A training run whose reward forks processes and ends them with SIGTERM; see test_preemption.py.

    python tests/forking_run.py OUTPUT_DIR

The first step makes each check of `CHECKS` and prints its name once it has passed. The second one sends SIGTERM to this
process itself.
"""

import conftest  # noqa: F401  the environment of the tests, before anything else is imported

# isort: split
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress

from tiny import scripted_reward, scripted_trainer

FORK = multiprocessing.get_context("fork")


def busy_in_c():
    """No Python-level handler runs before this returns."""
    sum(range(10**12))


def end(process):
    process.terminate()
    process.join()
    assert process.exitcode == -signal.SIGTERM, process.exitcode


def a_sleeping_child_ends():
    process = FORK.Process(target=time.sleep, args=(3600,))
    process.start()
    time.sleep(0.2)
    end(process)


def a_child_that_is_busy_in_c_ends():
    process = FORK.Process(target=busy_in_c)
    process.start()
    time.sleep(0.2)
    end(process)


def a_child_that_is_ended_at_once_ends():
    """SIGTERM arrives while the child still has the handler that it inherited."""
    for _ in range(30):
        process = FORK.Process(target=time.sleep, args=(3600,))
        process.start()
        end(process)


def a_child_of_another_thread_ends():
    thread = threading.Thread(target=a_sleeping_child_ends)
    thread.start()
    thread.join()


def a_pool_is_left_after_a_timeout():
    with FORK.Pool(2) as pool, suppress(multiprocessing.TimeoutError):
        pool.apply_async(busy_in_c).get(timeout=0.2)


def no_signal_stays_blocked():
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        os.write(writer, repr((blocked, signal.getsignal(signal.SIGTERM))).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1000).decode() == repr((set(), signal.SIG_DFL))


CHECKS = (
    a_sleeping_child_ends,
    a_child_that_is_busy_in_c_ends,
    a_child_that_is_ended_at_once_ends,
    a_child_of_another_thread_ends,
    a_pool_is_left_after_a_timeout,
    no_signal_stays_blocked,
)


def forking_reward(completions, score, trainer_state, **kwargs):
    if trainer_state.global_step == 0:
        for check in CHECKS:
            check()
            print(check.__name__, flush=True)
    else:
        os.kill(os.getpid(), signal.SIGTERM)
    return scripted_reward(completions, score)


if __name__ == "__main__":
    scripted_trainer(sys.argv[1], reward_funcs=forking_reward, max_steps=5).train()
