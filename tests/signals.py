"""Real signals, for processes that this one starts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubaoti.host.memory import list_descendants

FIRST_OPENS = "hubaoti.runtime.open_artifact"


@contextmanager
def struck(number: int) -> Iterator[None]:
    """Meanwhile the process that is started to try graphs gets a signal."""
    before = {*trying()}  # of another test, and about to end

    def strike() -> None:
        end = time.monotonic() + 60.0
        while not (found := [e for e in trying() if e not in before]) and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(found[0], number)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def trying() -> list[int]:
    """The processes that try graphs."""
    return [
        int(each) for each in list_descendants(str(os.getpid())) if FIRST_OPENS in command(each)
    ]


def command(process: str) -> str:
    """A process's command line; empty where it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""
