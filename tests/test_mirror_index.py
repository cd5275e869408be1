"""The mirror's index: opened by several at once, and damaged."""

from __future__ import annotations

import json
import multiprocessing
import re
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from bundles import make_bundle
from click.testing import CliRunner

from hubaoti.cli.mirror import ls_command
from hubaoti.errors import HubaotiError
from hubaoti.mirror import Mirror, PullOrigin
from hubaoti.mirror.index import Index, Pin
from hubaoti.mirror.steps import STEPS


def test_a_new_index_that_another_process_makes_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("begin immediate")  # before it is a WAL, where SQLite itself would not wait
    end = threading.Timer(0.3, lambda: other.execute("rollback"))
    end.start()
    with closing(Index(path)) as index:
        assert index.rows() == []
        assert index._db.execute("pragma journal_mode").fetchone() == ("wal",)
    end.join()
    other.close()


def test_a_new_index_that_stays_taken_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hubaoti.mirror.index.PATIENCE", 0.1)
    with closing(sqlite3.connect(tmp_path / "index.sqlite3", isolation_level=None)) as other:
        other.execute("begin immediate")
        with pytest.raises(HubaotiError, match="busy"):
            Index(tmp_path / "index.sqlite3")


def open_at_once(start: Barrier, folder: Path) -> None:
    for at in range(60):
        start.wait()
        Mirror.open(folder / str(at)).close()


def test_processes_that_open_a_new_home_at_once_all_open_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2, timeout=60)
    both = [context.Process(target=open_at_once, args=(start, tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]


@pytest.fixture
def index_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The index of a home with two artifacts."""
    monkeypatch.setenv("HUBAOTI_HOME", str(tmp_path))
    with Mirror.open(tmp_path / "mirror") as mirror:
        for name in ("one", "two"):
            bundle = make_bundle(tmp_path / name, mode=name)
            files = {file.path: bundle.path / file.path for file in bundle.manifest.all_files()}
            origin = PullOrigin("https://hub", f"acme/{name}", "c" * 40, "float32-sdpa/x")
            artifact = mirror.put(bundle.manifest, files, origin)
            pin = Pin("https://hub", f"acme/{name}", "c" * 40, "", "host")
            mirror.index.record_pull(pin, artifact.digest, "float32-sdpa/x")
    return tmp_path / "mirror/index.sqlite3"


def listed() -> str | HubaotiError:
    """What `mirror ls` prints, or says that is wrong."""
    done = CliRunner().invoke(ls_command, ["--json"])
    if done.exception is None:
        return done.output
    assert isinstance(done.exception, HubaotiError), repr(done.exception)
    return done.exception


@pytest.mark.parametrize("flip", [0xFF, 0x80, 0x01])
def test_whatever_byte_of_an_index_is_flipped_the_list_is_right_or_words(
    index_file: Path, flip: int
) -> None:
    good, right = index_file.read_bytes(), listed()
    assert isinstance(right, str) and len(json.loads(right)) == 2
    written = [at for at, byte in enumerate(good) if byte]
    for at in (*written[flip % 17 :: 17], *range(0, len(good), 4099)):
        damaged = bytearray(good)
        damaged[at] ^= flip
        index_file.write_bytes(damaged)
        found = listed()
        if isinstance(found, HubaotiError):
            assert found.hint and str(found).isascii()
        else:
            assert found == right, at


@pytest.mark.parametrize(
    "ask",
    [
        Index.rows,
        lambda index: index.rows("0" * 64),
        lambda index: index.row(index.list_pulls("https://hub", "acme/one")[0]),
        lambda index: index.find_problem("0" * 64, "host"),
    ],
)
def test_text_that_is_none_is_a_damaged_index(
    index_file: Path, ask: Callable[[Index], object]
) -> None:
    with closing(sqlite3.connect(index_file)) as db:
        db.execute("insert into tested values (?, 'host', '', 0)", ("0" * 64,))
        db.execute("update tested set problem = cast(x'c328' as text)")
        db.execute("update artifacts set recipe = cast(x'c328' as text), key = ?", ("0" * 64,))
        db.commit()
    with closing(Index(index_file)) as index, pytest.raises(HubaotiError, match="damaged") as why:
        ask(index)
    assert "remove" in why.value.hint


def test_an_index_of_before_finds_a_changed_row_too(index_file: Path) -> None:
    with closing(sqlite3.connect(index_file)) as db:
        db.execute("drop index artifacts_whole")
        for table in re.findall(r"create table (?:if not exists )?(\w+)", "".join(STEPS[3:])):
            db.execute(f"drop table if exists {table}")
        db.execute("pragma user_version = 3")
        db.commit()
    right = listed()
    assert isinstance(right, str)
    content = index_file.read_bytes()
    index_file.write_bytes(content.replace(b"acme/one", b"acme/One", 1))
    assert isinstance(listed(), HubaotiError)
