"""A process that kills itself at its n-th call of the file system or of SQLite, for every n.

    python kills.py OPERATION FOLDER BUNDLE BUNDLE

Below FOLDER a mirror is made anew for each n; what is wrong with one after a kill is printed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hubaoti.artifact.bundle import Bundle
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
KILLED = -signal.SIGKILL


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


def kill_at(last: int) -> Callable[[], None]:
    """Have this process killed before its call of a number; what counts one."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(event: str, _: object) -> None:
        if event in EVENTS:
            count()

    connect, fsync = sqlite3.connect, os.fsync

    def connect_traced(*words: object, **options: object) -> sqlite3.Connection:
        db = connect(*words, **options)  # type: ignore[call-overload]
        db.set_trace_callback(lambda _: count())
        return db  # type: ignore[no-any-return]

    def fsync_counted(handle: int) -> None:
        count()
        fsync(handle)

    sqlite3.connect, os.fsync = connect_traced, fsync_counted  # type: ignore[assignment]
    sys.addaudithook(hear)
    return count


def run_apart(work: Callable[[], object]) -> int:
    """The exit code of a fork that does some work; below zero the signal that ended it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(root: Path, again: Callable[[], object], is_damaged: bool) -> None:
    """After a kill: nothing is promised that is not there, nothing is left, and all goes on."""
    if is_damaged:
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


def main(operation: str, folder: Path, bundles: list[Bundle]) -> int:
    """The kills until the operation gets through; what is wrong after one is printed."""
    _, work = OPERATIONS[operation]
    before, bundle = folder / "before/mirror", bundles[0]
    before.parent.mkdir(mode=0o700)
    run_apart(lambda: prepare(before, operation, bundles))
    for last in range(1, 2000):
        root = folder / f"{last}/mirror"
        shutil.copytree(before.parent, root.parent)

        def die(root: Path = root, last: int = last) -> None:
            kill_at(last)
            work(root, bundle)

        code = run_apart(die)

        def look(root: Path = root) -> None:
            check(root, lambda: work(root, bundle), operation == "rebuild")

        problem = run_apart(look)
        if problem or code not in {0, KILLED}:
            sys.stdout.write(f"killed at call {last}\n")
        if code != KILLED:
            return last - 1
        shutil.rmtree(root.parent)
    raise RuntimeError(f"{operation} has no end")


if __name__ == "__main__":
    name, place, *paths = sys.argv[1:]
    found = main(name, Path(place), [Bundle.read(Path(each)) for each in paths])
    sys.stdout.write(f"kills: {found}\n")
