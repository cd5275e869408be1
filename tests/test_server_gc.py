"""What nothing reaches leaves the disk; what anything reaches stays, whoever pushes meanwhile."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disks import small
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from test_server_fleet import page

from hubaoti.errors import BadRequest, InUse
from hubaoti.server import Endpoint, Service, Upstream, gc, serve_in_thread
from hubaoti.server.gc import Collected, collect
from hubaoti.server.hub import open_root

DAY = 86400.0
FIRST, SECOND = os.urandom(1 << 20), os.urandom(1 << 20)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def api(root: Path) -> Iterator[HfApi]:
    with serve_in_thread(root) as found:
        api = HfApi(found.url, token=found.token)
        api.create_repo("o/r")
        yield api


def put(api: HfApi, path: str, content: bytes, repo: str = "o/r") -> str:
    add = CommitOperationAdd(path, content)
    return api.create_commit(repo, [add], commit_message="put").oid


def remove(api: HfApi, path: str) -> str:
    return api.create_commit("o/r", [CommitOperationDelete(path)], commit_message="remove").oid


def read(api: HfApi, path: str, cache: Path, revision: str = "main") -> bytes:
    found = api.hf_hub_download("o/r", path, revision=revision, cache_dir=cache)
    return Path(found).read_bytes()


def age(root: Path, days: float = 40) -> None:
    """All files, and all commits, are as many days old."""
    then = time.time() - days * DAY
    for file in (root / "objects").glob("*/*"):
        os.utime(file, (then, then))
    date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(then))
    with open_root(root) as database, database.writing() as db:
        db.execute("update revision set date = ?", (date,))


def stored(root: Path) -> int:
    return sum(file.stat().st_size for file in (root / "objects").glob("*/*"))


def test_a_removed_file_leaves_the_disk_and_its_old_commit(
    api: HfApi, root: Path, tmp_path: Path
) -> None:
    old = put(api, "a.bin", FIRST)
    put(api, "b.bin", SECOND)
    remove(api, "a.bin")
    age(root)
    before = stored(root)
    found = collect(root, 30 * DAY)
    assert (len(found.files), found.bytes) == (1, len(FIRST))
    assert stored(root) == before - len(FIRST)
    with pytest.raises(EntryNotFoundError, match="removed by gc"):
        read(api, "a.bin", tmp_path / "cache", old)
    assert read(api, "b.bin", tmp_path / "cache") == SECOND
    assert len(api.list_repo_commits("o/r")) == 4  # the log stays whole
    assert collect(root, 0) == Collected((), 0, ())


def test_what_a_tag_a_branch_or_another_repo_has_stays(
    api: HfApi, root: Path, tmp_path: Path
) -> None:
    put(api, "a.bin", FIRST)
    api.create_tag("o/r", tag="v1")
    api.create_branch("o/r", branch="side")
    api.create_repo("o/other")
    put(api, "same.bin", FIRST, "o/other")
    remove(api, "a.bin")
    for free in (
        lambda: api.delete_tag("o/r", tag="v1"),
        lambda: api.delete_branch("o/r", branch="side"),
        lambda: api.delete_repo("o/other"),
    ):
        age(root)
        assert collect(root, 0).bytes == 0
        free()
    assert collect(root, 0).bytes == len(FIRST)


def test_a_commit_stays_for_as_long_as_is_kept_since_it_was_followed(
    api: HfApi, root: Path, tmp_path: Path
) -> None:
    old = put(api, "a.bin", FIRST)
    age(root)
    remove(api, "a.bin")  # a moment ago, from a commit of long ago
    assert collect(root, 30 * DAY).files == ()
    assert read(api, "a.bin", tmp_path / "cache", old) == FIRST
    age(root, 29)
    assert collect(root, 30 * DAY).files == ()
    age(root, 31)
    assert collect(root, 30 * DAY).bytes == len(FIRST)


def test_a_deleted_repo_frees_its_files(api: HfApi, root: Path) -> None:
    put(api, "a.bin", FIRST)
    api.delete_repo("o/r")
    assert collect(root, 0).files == ()  # what came within the hour stays
    age(root)
    assert collect(root, 0, dry_run=True).bytes == collect(root, 0, dry_run=True).bytes > len(FIRST)
    assert collect(root, 0).bytes > len(FIRST)
    assert stored(root) == 0


def test_what_was_removed_can_be_sent_again_by_those_who_remember_that_they_sent_it(
    api: HfApi, root: Path, tmp_path: Path
) -> None:
    put(api, "a.bin", FIRST)  # by Xet, whose client sends no chunk twice
    remove(api, "a.bin")
    age(root)
    assert collect(root, 0).bytes == len(FIRST)
    put(api, "b.bin", FIRST + SECOND)
    put(api, "a.bin", FIRST)
    assert read(api, "a.bin", tmp_path / "cache") == FIRST
    assert read(api, "b.bin", tmp_path / "cache") == FIRST + SECOND


def test_pushes_lose_nothing_while_files_are_removed(
    api: HfApi, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "_GRACE", 0.1)  # hardly anybody is spared for being new
    ended = threading.Event()

    def clean() -> int:
        rounds = 0
        while not ended.is_set():
            collect(root, 0)
            rounds += 1
        return rounds

    def push(number: int) -> dict[str, bytes]:
        done = {}
        for turn in range(5):
            path, content = (
                f"{number}/{turn}",
                os.urandom(1000) if turn % 2 else os.urandom(500).hex().encode(),
            )
            try:
                put(api, path, content)
            except (HfHubHTTPError, ConnectionError) as error:
                assert re.search("400|removed by gc|not uploaded", str(error))  # and told so
            else:
                done[path] = content
        return done

    with ThreadPoolExecutor(6) as pool:
        cleaning = pool.submit(clean)
        try:
            pushed = {k: v for done in pool.map(push, range(4)) for k, v in done.items()}
        finally:
            ended.set()
        assert cleaning.result() > 5
    pushed |= push(4)
    assert len(pushed) >= 5
    collect(root, 0)
    assert {path: read(api, path, tmp_path / "cache") for path in pushed} == pushed


def test_a_full_disk_is_freed(tmp_path: Path) -> None:
    with small(tmp_path / "disk", "6m") as disk, serve_in_thread(disk / "root") as found:
        api, pushed = HfApi(found.url, token=found.token), []
        api.create_repo("o/r")
        with pytest.raises(HfHubHTTPError, match="507"):
            for number in range(20):
                put(api, f"{number}.txt", os.urandom(300_000).hex().encode())
                pushed.append(f"{number}.txt")
        for path in pushed[1:]:
            remove(api, path)
        age(disk / "root")
        assert collect(disk / "root", 0).bytes == 600_000 * len(pushed[1:]) > 2_000_000
        put(api, "again.txt", os.urandom(300_000).hex().encode())
        assert api.list_repo_files("o/r") == [".gitattributes", pushed[0], "again.txt"]


def test_copies_that_nobody_asks_for_are_forgotten(
    endpoint: Endpoint, repo: str, root: Path
) -> None:
    source = HfApi(endpoint.url, token=endpoint.token)
    source.create_repo(repo)
    put(source, "a.bin", FIRST, repo)
    with serve_in_thread(root, service=Service(upstream=Upstream(endpoint.url))) as found:
        for path in ("a.bin", ".gitattributes"):
            page(found, f"/{repo}/resolve/main/{path}")  # which brings it
        age(root)
        assert collect(root, 30 * DAY).bytes == 0
        with open_root(root) as database, database.writing() as db:
            db.execute("update copied set seen = seen - ?", (31 * DAY,))
        found_copies = collect(root, 30 * DAY)
        assert found_copies.copies == (f"model {repo}",)
        assert stored(root) == 0
        assert HfApi(found.url).model_info(repo).id == repo  # and come back


def test_one_looks_after_a_folder_at_a_time_and_of_repos_only(api: HfApi, root: Path) -> None:
    with open_root(root, alone=True), pytest.raises(InUse, match="at work"):
        collect(root, 0)
    with pytest.raises(BadRequest, match="holds no repos"):
        collect(root.parent / "none", 0)
