"""A process whose n-th call of the file system or of SQLite is its last, or fails, for every n.

    python kills.py SIGKILL|ENOSPC|EIO|EROFS OPERATION FOLDER BUNDLE BUNDLE

Below FOLDER a mirror is made anew for each n; what is wrong with one afterwards is printed. SQLite
has errors of its own, so only the file system fails here.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import HubaotiError
from hubaoti.mirror import Mirror, PullOrigin
from hubaoti.mirror.artifact import has_sizes
from hubaoti.mirror.gc import collect
from hubaoti.mirror.quarantine import read_note
from hubaoti.mirror.rebuild import rebuild
from hubaoti.mirror.removal import remove
from hubaoti.mirror.retry import retry
from hubaoti.mirror.rows import Pin

ORIGIN = PullOrigin("https://hub", "acme/tiny", "c" * 40, "path")
PIN = Pin("https://hub", "acme/tiny", "c" * 40, "", "host")
# What the file system is asked by, as Python tells of it; links and times among them.
EVENTS = {"open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
EVENTS |= {"os.symlink", "os.truncate", "os.utime", "shutil.rmtree", "fcntl.flock"}
KILLED, FAILED = -signal.SIGKILL, 3  # how a child ends to which it was done
READING = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW


def put(root: Path, bundle: Bundle) -> None:
    with Mirror.open(root) as mirror:
        files = {file.path: bundle.path / file.path for file in bundle.manifest.all_files()}
        mirror.put(bundle.manifest, files, ORIGIN)


def record(root: Path, bundle: Bundle) -> None:
    """All that is noted of an artifact which is there."""
    digest = bundle.manifest.digest
    with Mirror.open(root) as mirror:
        mirror.index.record_pull(PIN, digest, "path")
        mirror.index.record_built(bundle.manifest)
        mirror.index.record_tested(bundle.manifest.graphs[0].sha256, "host", "")
        mirror.index.note({digest: b"note"})
        mirror.usage.record_open(digest)
        mirror.usage.pin(digest)
        mirror.usage.unpin(digest)
        mirror.trust.add_artifact(digest)


def evict(root: Path, _: Bundle) -> None:
    with Mirror.open(root) as mirror:
        assert collect(mirror, max_bytes=0).after == 0


def rm(root: Path, bundle: Bundle) -> None:
    with Mirror.open(root) as mirror:
        if mirror.index.row(bundle.manifest.digest):
            remove(mirror, bundle.manifest.digest)


def rebuild_damaged(root: Path, _: Bundle) -> None:
    rebuild(root)


def withdraw(root: Path, bundle: Bundle) -> None:
    """A graph that must not be opened is kept apart, with what is promised of it."""
    with Mirror.open(root) as mirror:
        mirror.quarantine(bundle.manifest.graphs[0])


def bring_back(root: Path, _: Bundle) -> None:
    """What was apart is back, as it was promised."""
    with Mirror.open(root) as mirror:
        retry(mirror)
        assert len(mirror.index.rows()) == 2
        assert mirror.index.find_pull(PIN)


# Each with how many of the two artifacts lie there before.
OPERATIONS: dict[str, tuple[int, Callable[[Path, Bundle], None]]] = {
    "put": (1, put),
    "put into a new mirror": (0, put),
    "record": (2, record),
    "evict": (2, evict),
    "rm": (2, rm),
    "rebuild": (2, rebuild_damaged),
    "withdraw": (2, withdraw),
    "retry": (2, bring_back),
}


def prepare(root: Path, operation: str, bundles: list[Bundle]) -> None:
    """The mirror before an operation."""
    count, _ = OPERATIONS[operation]
    for bundle in bundles[2 - count :]:
        put(root, bundle)
    if operation == "retry":
        record(root, bundles[0])
        withdraw(root, bundles[0])
    if operation == "rebuild":
        index = root / "index.sqlite3"
        content = index.read_bytes()
        index.write_bytes(content[:4096] + b"\xff" * 4096 + content[8192:])


def watch_calls(hear: Callable[[str, object], None]) -> None:
    """Have each call told by its event, and what it is given, before it is done."""
    connect, fsync = sqlite3.connect, os.fsync

    def connect_traced(*words: object, **options: object) -> sqlite3.Connection:
        db = connect(*words, **options)  # type: ignore[call-overload]
        db.set_trace_callback(lambda text: hear("sql", text))
        return db  # type: ignore[no-any-return]

    def fsync_told(handle: int) -> None:
        hear("fsync", handle)
        fsync(handle)

    sqlite3.connect, os.fsync = connect_traced, fsync_told  # type: ignore[assignment]
    sys.addaudithook(lambda event, given: hear(event, given) if event in EVENTS else None)


def kill_at(last: int) -> None:
    """Have this process killed before its call of a number."""
    calls = 0

    def hear(_: str, __: object) -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_calls(hear)


def fail_at(last: int, number: int) -> Callable[[], bool]:
    """Have a call fail by its number, of those that can with this error; whether one has."""
    calls = 0

    def hear(event: str, given: object) -> None:
        nonlocal calls
        if event in {"sql", "shutil.rmtree"} or (number != errno.EIO and not _writes(event, given)):
            return
        calls += 1
        if calls == last:
            raise OSError(number, os.strerror(number), str(given))

    watch_calls(hear)
    return lambda: calls >= last


def _writes(event: str, given: object) -> bool:
    """Whether a call takes room; deleting does not, and a full disk allows it."""
    if event == "open":
        assert isinstance(given, tuple)
        return bool(given[2] & ~READING)
    return event in {"os.mkdir", "os.link", "os.symlink", "os.rename", "fsync"}


def run_apart(work: Callable[[], int | None]) -> int:
    """The exit code of a fork that does some work; below zero the signal that ended it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            code = work() or 0
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(root: Path, again: Callable[[], object], operation: str) -> None:
    """After a kill: nothing is promised that is not there, nothing is left, and all goes on.

    What was kept apart can all come back.
    """
    if operation == "rebuild":
        again()
    with Mirror.open(root) as mirror:
        assert not any((root / "tmp").iterdir())
        for row in mirror.index.rows():
            artifact = mirror.read(row.digest)
            assert artifact is not None and has_sizes(artifact), "a row without its files"
            mirror.verify(artifact)
    again()
    with Mirror.open(root) as mirror:
        for row in mirror.ls():
            found = mirror.artifact(row.digest)
            assert found is not None
            mirror.verify(found)
        collect(mirror)
        assert collect(mirror).orphans == ()
        assert not any((root / "tmp").iterdir())
        folders = {each.name for each in (root / "artifacts").iterdir()}
        notes = [read_note(each) for each in (root / "quarantine").iterdir()]
        waiting = {promise.row.digest for note in notes for promise in note.promises}
        assert folders == waiting | {row.digest for row in mirror.index.rows()}
        if operation == "withdraw":
            retry(mirror)
            assert len(mirror.ls()) == 2


def main(fault: str, operation: str, folder: Path, bundles: list[Bundle]) -> int:
    """The faults until the operation gets through; what is wrong after one is printed."""
    _, work = OPERATIONS[operation]
    before, bundle = folder / "before/mirror", bundles[0]
    before.parent.mkdir(mode=0o700)
    prepare(before, operation, bundles)
    once = folder / "once/mirror"
    shutil.copytree(before.parent, once.parent)
    check(once, lambda: work(once, bundle), operation)  # which imports all that it takes
    for last in range(1, 2000):
        root = folder / f"{last}/mirror"
        shutil.copytree(before.parent, root.parent)

        def suffer(root: Path = root, last: int = last) -> int:
            if fault == "SIGKILL":
                kill_at(last)
                work(root, bundle)
                return 0
            has_failed = fail_at(last, getattr(errno, fault))
            with suppress(HubaotiError, AssertionError):  # in our words, or not all of it was done
                work(root, bundle)
            return FAILED if has_failed() else 0

        def look(root: Path = root) -> None:
            check(root, lambda: work(root, bundle), operation)

        code = run_apart(suffer)
        problem = run_apart(look)
        if problem or code not in {0, KILLED, FAILED}:
            sys.stdout.write(f"{fault} at call {last}\n")
        if not code:
            return last - 1
        shutil.rmtree(root.parent)
    raise RuntimeError(f"{operation} has no end")


if __name__ == "__main__":
    kind, name, place, *paths = sys.argv[1:]
    found = main(kind, name, Path(place), [Bundle.read(Path(each)) for each in paths])
    sys.stdout.write(f"faults: {found}\n")
