"""`hubaoti.runtime.locks`: what a forked child may wait for."""

from __future__ import annotations

import os
import signal
import threading

from hubaoti.runtime.locks import ForkSafeLock


def fork_and_lock(lock: ForkSafeLock) -> int:
    """How a forked child ends that takes a lock; by a signal where it waits for ever."""
    child = os.fork()
    if not child:
        signal.alarm(5)
        with lock:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_child_waits_for_no_thread_that_it_does_not_have() -> None:
    lock, held, end = ForkSafeLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            end.wait()

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    try:
        assert fork_and_lock(lock) == 0
    finally:
        end.set()
        other.join()


def test_a_child_that_was_forked_within_the_block_leaves_it() -> None:
    lock = ForkSafeLock()
    with lock:
        child = os.fork()
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    if not child:
        os._exit(0)


def test_one_thread_has_it_at_a_time() -> None:
    lock, inside, most = ForkSafeLock(), [0], [0]

    def work() -> None:
        for _ in range(200):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
