"""Bundles beside processes that are killed, and on disks that are full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bundles import make_bundle, tree_of
from disks import small

from hubaoti import api
from hubaoti.artifact.bundle import Bundle, explain_store_errors, tidy, write_bundle
from hubaoti.artifact.manifest import FILENAME
from hubaoti.compiler.inductor import find_cause
from hubaoti.compiler.parallel import describe_error
from hubaoti.errors import DiskFull
from hubaoti.mirror import Mirror

WRITE = """
import sys, time
from pathlib import Path
from hubaoti.artifact.bundle import write_bundle
with write_bundle(Path(sys.argv[1])) as folder:
    (folder / "graphs").mkdir()
    (folder / "graphs/half.pt2").write_text("x")
    print("writing", flush=True)
    sys.stdin.readline()
"""
FORK = """
import os, signal, sys
from pathlib import Path
from hubaoti.artifact.bundle import write_bundle
with write_bundle(Path(sys.argv[1])) as folder:
    if child := os.fork():
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(1)
    signal.alarm(60)
    signal.pause()
"""
# The process ends itself in the middle of a replacement, before or after the new one is in place.
REPLACE = """
import os, signal, sys
from pathlib import Path
from hubaoti.artifact.bundle import write_bundle
calls, replace = [], Path.replace
def counted(*paths):
    calls.append(paths)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*paths)
Path.replace = counted
with write_bundle(Path(sys.argv[1])) as folder:
    (folder / "hubaoti.json").write_text("new")
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@contextmanager
def writer(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing a bundle."""
    command = [sys.executable, "-c", WRITE, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "writing\n"
        try:
            yield process
        finally:
            process.kill()


def killed_while_replacing(path: Path, step: int) -> None:
    done = subprocess.run([sys.executable, "-c", REPLACE, str(path), str(step)])
    assert done.returncode == -signal.SIGKILL


def write(path: Path) -> None:
    with write_bundle(path) as folder:
        (folder / FILENAME).write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.parametrize("name", ["bundle", "[a]*", "deep.name"])
def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path: Path, name: str) -> None:
    with writer(tmp_path / name) as process:
        process.kill()
        process.wait()
    assert len(names(tmp_path)) == 1
    write(tmp_path / name)
    assert names(tmp_path) == [name]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    with writer(tmp_path / "bundle") as process:
        write(tmp_path / "bundle")
        (left, _) = names(tmp_path)
        assert (tmp_path / left / "graphs/half.pt2").is_file()
        process.communicate("go on\n")
        assert process.returncode == 0
    assert names(tmp_path) == ["bundle"]
    assert tree_of(tmp_path / "bundle").keys() == {"graphs/half.pt2"}


def test_a_child_that_goes_on_after_its_parent_holds_the_folder_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORK, str(tmp_path / "bundle")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    tidy(tmp_path / "bundle")
    assert len(names(tmp_path)) == 1
    os.kill(int(done.stdout), signal.SIGKILL)
    end = time.monotonic() + 10
    while names(tmp_path) and time.monotonic() < end:
        tidy(tmp_path / "bundle")
    assert names(tmp_path) == []


@pytest.mark.parametrize("again", ["write", "tidy"])
def test_the_last_whole_bundle_is_put_back_after_a_kill(
    tmp_path: Path, bundle: Bundle, again: str
) -> None:
    before = tree_of(bundle.path)
    killed_while_replacing(bundle.path, 2)
    assert not bundle.path.exists()
    if again == "write":
        with pytest.raises(KeyboardInterrupt), write_bundle(bundle.path):
            raise KeyboardInterrupt
    else:
        tidy(bundle.path)
    assert tree_of(bundle.path) == before
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("step", [1, 3])
def test_a_kill_before_or_after_a_replacement_loses_neither(
    tmp_path: Path, bundle: Bundle, step: int
) -> None:
    before = tree_of(bundle.path)
    killed_while_replacing(bundle.path, step)
    tidy(bundle.path)
    if step == 1:
        assert tree_of(bundle.path) == before
        assert names(tmp_path) == ["bundle"]
    else:
        assert (bundle.path / FILENAME).read_text() == "new"
        (aside,) = tmp_path.glob(".bundle.*")
        assert tree_of(aside / "old") == before


def test_a_replacement_that_fails_puts_the_old_one_back(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, replace = tree_of(bundle.path), Path.replace
    calls: list[Path] = []

    def second_fails(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", second_fails)
    with pytest.raises(KeyboardInterrupt):
        write(bundle.path)
    assert tree_of(bundle.path) == before
    assert names(tmp_path) == ["bundle"]


def test_what_was_left_by_earlier_releases_goes_too(tmp_path: Path, bundle: Bundle) -> None:
    """As `mkdtemp` made their folders, with parts of a bundle in them."""
    by_hand = Path(tempfile.mkdtemp(prefix=".bundle.", dir=tmp_path))
    (by_hand / "graphs").mkdir()
    (by_hand / "tmp0123abcd").mkdir()
    (tmp_path / ".other.0123abcd").mkdir(mode=0o700)
    bundle.path.rename(tmp_path / ".other.0123abcd/old")
    write(tmp_path / "bundle")
    tidy(tmp_path / "other")
    assert names(tmp_path) == ["bundle", "other"]
    assert Bundle.read(tmp_path / "other").manifest == bundle.manifest


def test_what_is_not_ours_beside_a_bundle_stays(tmp_path: Path) -> None:
    (tmp_path / ".bundle.settings").mkdir()
    (tmp_path / ".bundle.settings/mine.toml").write_text("mine")
    (tmp_path / ".bundle.0000aaaa").write_text("a file")
    (tmp_path / ".bundle.0000bbbb").symlink_to(tmp_path / ".bundle.settings")
    (tmp_path / ".bundle.longer-than-ours").mkdir()
    (tmp_path / ".bundles.0000cccc").mkdir(mode=0o700)
    (tmp_path / ".bundle.20251231").mkdir(mode=0o700)  # as under umask 077
    (tmp_path / ".bundle.20251231/mine.txt").write_text("mine")
    write(tmp_path / ".bundle.original")
    (tmp_path / ".bundle.original").chmod(0o700)
    (tmp_path / ".bundle.archives").mkdir(mode=0o700)
    before = names(tmp_path)
    write(tmp_path / "bundle")
    assert names(tmp_path) == sorted([*before, "bundle"])
    assert (tmp_path / ".bundle.settings/mine.toml").read_text() == "mine"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of one MiB, on which temporary files are."""
    with small(tmp_path / "temporary") as disk:
        monkeypatch.setenv("TMPDIR", str(disk))
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield disk


def test_a_full_disk_of_temporary_files_is_not_taken_for_the_bundle_s(
    tmp_path: Path, temporary: Path
) -> None:
    with (
        pytest.raises(DiskFull, match=f"no room on the disk of {temporary}, where") as why,
        write_bundle(tmp_path / "bundle"),
        tempfile.TemporaryFile(buffering=0) as file,
    ):
        while file.write(bytes(1 << 16)):
            pass
    assert "TMPDIR" in why.value.hint


@pytest.mark.slow
def test_a_full_disk_under_the_compiler_is_named(tmp_path: Path, temporary: Path) -> None:
    source = tmp_path / "large.cpp"
    source.write_text("".join(f"int f{at}(int x) {{ return x * {at}; }}\n" for at in range(40_000)))
    command = ["g++", "-O0", "-c", str(source), "-o", str(tmp_path / "large.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "No space left" in done.stderr
    (tmp_path / "build").mkdir()
    why = find_cause(RuntimeError(f"C++ compile error\n{done.stderr}"), tmp_path / "build")
    assert isinstance(why, DiskFull)
    assert f"no room on the disk of {temporary}" in str(why) and "TMPDIR" in why.hint


def test_a_process_of_a_compile_says_which_disk_is_full(tmp_path: Path, temporary: Path) -> None:
    with pytest.raises(OSError) as why, (temporary / "x").open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    (temporary / "x").unlink()
    told = describe_error(why.value, None, tmp_path)  # type: ignore[arg-type]
    assert told.kind == "DiskFull"
    assert f"no room on the disk of {temporary}" in told.message


def test_a_full_home_does_not_hide_the_bundle(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "out", members={"model/root.so": os.urandom(2 << 20)})
    with (
        small(tmp_path / "home") as disk,
        Mirror.open(disk / "mirror") as mirror,
        pytest.raises(DiskFull, match=f"no room .*; the bundle .* whole in {bundle.path}") as why,
        explain_store_errors(bundle.path),
    ):
        api.put(bundle, mirror)
    assert "pushed" in why.value.hint
    Bundle.read(bundle.path).check()
