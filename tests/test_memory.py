"""Memory: what a build took with all its processes, and what there is before it starts."""

from __future__ import annotations

import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hubaoti.errors import NotEnoughMemory
from hubaoti.host import memory
from hubaoti.host.memory import (
    Peak,
    list_descendants,
    measure_process_memory,
    read_available_memory,
    require_memory,
)

MB = 1 << 20
HOLDING = "import sys, time; held = b'x' * ({size} << 20); print('ready', flush=True); {then}"


@contextmanager
def holding(size: int, then: str = "time.sleep(60)") -> Iterator[subprocess.Popen[str]]:
    """A process that holds so many megabytes."""
    command = [sys.executable, "-c", HOLDING.format(size=size, then=then)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def wait_for(peak: Peak, least: int) -> None:
    """Wait until the watcher has seen so much; it looks a few times a second."""
    until = time.monotonic() + 20
    while peak.seen < least:
        assert time.monotonic() < until, f"{peak.seen >> 20} MB seen"
        time.sleep(0.02)


def own() -> int:
    """What this process holds now."""
    return measure_process_memory(str(os.getpid()))


def test_what_a_child_holds_counts_beside_what_we_hold() -> None:
    before = own()
    with Peak.watch() as peak, holding(300):
        wait_for(peak, before + 290 * MB)
    assert peak.bytes >= peak.seen
    assert peak.seen - before < 400 * MB


def test_what_a_child_of_a_child_holds_counts() -> None:
    nested = f"import subprocess; subprocess.run([sys.executable, '-c', {HOLDING!r}.format("
    nested += "size=300, then='time.sleep(60)')])"
    before = own()
    with Peak.watch() as peak, holding(1, nested) as outer:
        wait_for(peak, before + 290 * MB)
        for process in list_descendants(str(outer.pid))[1:]:
            os.kill(int(process), signal.SIGKILL)


def test_the_most_is_remembered_after_it_was_given_back() -> None:
    before = own()
    with Peak.watch() as peak:
        with holding(300):
            wait_for(peak, before + 290 * MB)
        most = peak.seen
        with holding(1):
            time.sleep(3 * memory.INTERVAL)
    assert peak.seen == most


def test_without_children_it_is_what_this_process_took_at_most() -> None:
    with Peak.watch() as peak:
        taken = b"x" * (64 * MB)
    assert peak.bytes >= own() > len(taken)


def test_nobody_watches_afterwards() -> None:
    with Peak.watch() as peak:
        pass
    with holding(1):
        time.sleep(3 * memory.INTERVAL)
    assert peak.seen == 0


def test_pages_that_processes_share_are_counted_once() -> None:
    with mmap.mmap(-1, 200 * MB, flags=mmap.MAP_PRIVATE) as pages:
        pages.write(b"x" * (200 * MB))
        alone = own()
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        try:
            together = own() + measure_process_memory(str(child))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert measure_process_memory(str(child)) == 0, "who is gone holds nothing"
    assert abs(together - alone) < 100 * MB, "each page is counted for both"


def test_all_that_a_process_started_is_found_and_no_other() -> None:
    with holding(1) as ours, holding(1) as other:
        found = list_descendants(str(ours.pid))
        assert found == [str(ours.pid)]
        assert {str(ours.pid), str(other.pid)} <= {*list_descendants(str(os.getpid()))}


def test_what_is_available_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUPS", ())
    said = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert said is not None
    assert read_available_memory() == pytest.approx(int(said[1]) << 10, rel=0.2)
    assert read_available_memory() % 1024 == 0


CONTAINERS = {
    "the limit": ("500", "400", "", 100),
    # What was read of files counts as used, and is given back when somebody asks for memory.
    "pages of files": ("500", "400", "active_file 50\ninactive_file 30\nfile 80\n", 130),
    "used up": ("500", "501", "", 0),
    "no limit": ("max", "400", "", None),
    "no number": ("500", "", "", None),
    "no limit to speak of": (str((1 << 63) - 4096), "400", "", None),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_what_is_available_is_no_more_than_the_container_allows(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder like a cgroup's: no test may limit the memory of the machine."""
    limit, used, stat, expected = CONTAINERS[case]
    names = ("memory.max", "memory.current", "memory.stat")
    for name, text in zip(names, (limit, used, stat), strict=True):
        (tmp_path / name).write_text(text)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  7 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", str(tmp_path / "meminfo"))
    group = (str(tmp_path), *names[:2], "inactive_file")
    monkeypatch.setattr(memory, "CGROUPS", ((str(tmp_path / "none"), *group[1:]), group))
    assert read_available_memory() == (7 << 10 if expected is None else expected)


def test_where_nothing_is_said_all_may_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MEMINFO", str(tmp_path / "none"))
    monkeypatch.setattr(memory, "CGROUPS", ())
    require_memory(1 << 60, "anything")


def test_too_little_memory_is_said_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "read_available_memory", lambda: 2_400_000_000)
    require_memory(2_400_000_000, "a block")
    with pytest.raises(NotEnoughMemory) as caught:
        require_memory(3_200_000_000, "layers of acme/large")
    for words in ("layers of acme/large", "3.2 GB", "2.4 GB"):
        assert words in str(caught.value)
    assert "--regions" in caught.value.hint
