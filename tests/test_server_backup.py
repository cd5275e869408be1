"""What a backup must not be written over, and what is no backup."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from disks import small
from huggingface_hub import CommitOperationAdd, HfApi

from hubaoti import errors
from hubaoti.cli import dispatch
from hubaoti.server import serve_in_thread
from hubaoti.server.backup import back_up, restore
from hubaoti.server.gc import collect
from hubaoti.server.hub import open_hub, open_root

CONTENT = os.urandom(200_000)
LONG = "x" * 300


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "place/root"


@pytest.fixture
def api(root: Path) -> Iterator[HfApi]:
    with serve_in_thread(root) as found:
        api = HfApi(found.url, token=found.token)
        put(api, "acme/one", CONTENT)
        yield api


def put(api: HfApi, repo: str, content: bytes) -> None:
    api.create_repo(repo)
    api.create_commit(repo, [CommitOperationAdd("x.bin", content)], commit_message="put")


def names(root: Path) -> list[str]:
    """The repos that an endpoint would serve from a folder."""
    with serve_in_thread(root) as found:
        return sorted(model.id for model in HfApi(found.url, token=found.token).list_models())


def held(folder: Path) -> dict[str, int]:
    """The files and folders below a folder, but for what the database in use keeps beside it."""
    found = {path.relative_to(folder): path for path in folder.rglob("*")}
    return {str(name): path.stat().st_ino for name, path in found.items() if "-" not in path.name}


def by_link(root: Path) -> Path:
    link = root.parent.parent / "link"
    link.symlink_to(root.parent)
    return link / "root"


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "itself": (lambda root: root, "is the same folder as"),
    "itself, by another spelling": (lambda root: root / "../root", "is the same folder as"),
    "itself, by a link": (by_link, "is the same folder as"),
    "a new folder in it": (lambda root: root / "new/backup", "lies in"),
    "a new folder in it, by a link": (lambda root: by_link(root) / "new", "lies in"),
    "the folder around it": (lambda root: root.parent, "holds"),
    "a folder further out": (lambda root: root.parent.parent, "holds"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_backup_leaves_the_folder_alone_that_it_is_of(
    api: HfApi, root: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose, relation = PLACES[place]
    to = choose(root)
    before = held(root.parent)
    with pytest.raises(errors.BadRequest, match=relation) as caught:
        back_up(root, to)
    assert str(to) in str(caught.value) and "neither in" in caught.value.hint
    monkeypatch.chdir(root.parent)
    with pytest.raises(errors.BadRequest, match=relation):
        back_up(Path("root"), to)
    assert held(root.parent) == before
    put(api, "acme/two", b"2")
    assert {model.id for model in api.list_models()} == {"acme/one", "acme/two"}


def test_a_backup_has_files_of_its_own(api: HfApi, root: Path, tmp_path: Path) -> None:
    to = tmp_path / "backup"
    back_up(root, to)
    shutil.rmtree(to / "objects")
    (to / "objects").symlink_to(root / "objects")
    with pytest.raises(errors.BadRequest, match="is the same folder as"):
        back_up(root, to)


@pytest.mark.parametrize("served", [True, False], ids=["while it is served", "stopped"])
def test_a_backup_never_replaces_the_repos_of_another_endpoint(
    api: HfApi, root: Path, tmp_path: Path, served: bool
) -> None:
    other = tmp_path / "other"
    with serve_in_thread(other) as found:
        put(HfApi(found.url, token=found.token), "theirs/x", b"1")
        if served:
            before = held(other)
            with pytest.raises(errors.BadBackup, match="an endpoint is served from it"):
                back_up(root, other)
            assert held(other) == before
    before = held(other)
    with pytest.raises(errors.BadBackup, match="would lose its repos") as caught:
        back_up(root, other)
    assert str(other) in str(caught.value) and "new folder" in caught.value.hint
    assert held(other) == before and names(other) == ["theirs/x"]


def test_an_endpoint_s_folder_without_its_index_is_no_backup(
    api: HfApi, root: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    open_hub(other).close()
    (other / "hub.sqlite3").unlink()
    with pytest.raises(errors.BadBackup, match="no backup"):
        back_up(root, other)


def test_what_was_restored_is_an_endpoint_s_folder(api: HfApi, root: Path, tmp_path: Path) -> None:
    backup, restored = tmp_path / "backup", tmp_path / "restored"
    back_up(root, backup)
    restore(backup, restored)
    for _ in range(2):  # before it was ever served, and after
        with pytest.raises(errors.BadBackup, match="no backup"):
            back_up(root, restored)
        with pytest.raises(errors.BadBackup, match="no backup") as caught:
            restore(restored, tmp_path / "again")
        assert "serve it as it is" in caught.value.hint
        assert names(restored) == ["acme/one"]
    assert not (tmp_path / "again").exists()
    back_up(restored, tmp_path / "another")
    restore(tmp_path / "another", tmp_path / "again")
    assert names(tmp_path / "again") == ["acme/one"]


def test_a_backup_from_which_was_served_is_not_renewed(
    api: HfApi, root: Path, tmp_path: Path
) -> None:
    backup = tmp_path / "backup"
    back_up(root, backup)
    with serve_in_thread(backup) as found:
        with pytest.raises(errors.InUse, match="another process serves"):
            restore(backup, tmp_path / "restored")
        put(HfApi(found.url, token=found.token), "acme/late", b"1")
    with pytest.raises(errors.BadBackup, match="would lose its repos"):
        back_up(root, backup)
    with pytest.raises(errors.BadBackup, match="an endpoint is served from it, or was"):
        restore(backup, tmp_path / "restored")
    assert names(backup) == ["acme/late", "acme/one"]


def test_an_older_backup_is_renewed_also_one_that_somebody_looked_into(
    api: HfApi, root: Path, tmp_path: Path
) -> None:
    backup = tmp_path / "backup"
    assert back_up(root, backup).new == 2
    with open_root(backup) as database, database.writing() as db:
        db.execute("insert into meta values ('looked', 'in')")
    (backup / "hub.sqlite3-wal").write_bytes(b"of a process that was killed")
    put(api, "acme/two", b"2")
    assert back_up(root, backup).new == 1
    assert not [*backup.glob("hub.sqlite3-*")]
    restore(backup, tmp_path / "restored")
    assert names(tmp_path / "restored") == ["acme/one", "acme/two"]


def test_a_backup_that_was_interrupted_goes_on(
    api: HfApi, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            back_up(root, tmp_path / "backup")
    assert back_up(root, tmp_path / "backup").files == 2


def test_two_backups_do_not_meet_in_one_folder(api: HfApi, root: Path, tmp_path: Path) -> None:
    backup, other = tmp_path / "backup", tmp_path / "other"
    open_hub(other).close()
    back_up(root, backup)
    with closing(open_hub(backup)):
        (backup / "tmp").rmdir()  # now its lock alone tells that somebody is at work there
        with pytest.raises(errors.InUse, match="works on a backup there"):
            back_up(other, backup)


def test_an_index_that_nobody_can_read_is_not_replaced(
    api: HfApi, root: Path, tmp_path: Path
) -> None:
    backup = tmp_path / "backup"
    back_up(root, backup)
    (backup / "hub.sqlite3").write_bytes(b"no database, and long enough" * 99)
    with pytest.raises(errors.HubaotiError, match="cannot be read") as caught:
        back_up(root, backup)
    assert caught.value.hint


@pytest.mark.parametrize("place", ["in it", "around it", "it"])
def test_nothing_is_restored_into_the_backup_itself(
    api: HfApi, root: Path, tmp_path: Path, place: str
) -> None:
    backup = tmp_path / "kept/backup"
    back_up(root, backup)
    before = held(backup)
    to = {"in it": backup / "x", "around it": backup.parent, "it": backup}[place]
    with pytest.raises(errors.BadRequest, match="lies in|holds|same folder"):
        restore(backup, to)
    assert held(backup) == before


def test_gc_takes_nothing_of_a_backup(api: HfApi, root: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    back_up(root, backup)
    with pytest.raises(errors.BadRequest, match="is a backup") as caught:
        collect(backup, 0)
    assert "--root" in caught.value.hint
    with closing(sqlite3.connect(backup / "hub.sqlite3")) as index:
        assert index.execute("pragma journal_mode").fetchone() == ("delete",)


def test_a_full_disk_of_a_backup_is_named(api: HfApi, root: Path, tmp_path: Path) -> None:
    put(api, "acme/big", os.urandom(3_000_000))
    with small(tmp_path / "disk", "2m") as disk:
        with pytest.raises(errors.DiskFull, match=str(disk / "backup")) as caught:
            back_up(root, disk / "backup")
        assert "another folder" in caught.value.hint


def test_a_file_that_the_disk_does_not_give_is_named(
    api: HfApi, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Path.open

    def fake(self: Path, mode: str = "r") -> object:
        if self.parent.parent == root / "objects":
            raise OSError(errno.EIO, "fake")
        return usual(self, mode)

    monkeypatch.setattr(Path, "open", fake)
    with pytest.raises(errors.BadBackup, match=f"{root}/objects.* cannot be read: fake"):
        back_up(root, tmp_path / "backup")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"backup {LONG} --root root", "cannot be used: File name too long"),
        (f"backup {LONG}/x --root root", "cannot be used: File name too long"),
        (f"backup new --root {LONG}", "cannot be used: File name too long"),
        ("backup file --root root", "file cannot be used: it is no folder"),
        ("backup file/x --root root", "file/x cannot be used: Not a directory"),
        ("backup new --root file", "file holds no repos"),
        ("backup new --root absent", "absent holds no repos"),
        ("backup absent --root absent", "absent holds no repos"),
        (f"restore {LONG} --root new", "cannot be read: File name too long"),
        (f"restore saved --root {LONG}", "cannot be used: File name too long"),
        ("restore saved --root file", "file cannot be used: it is no folder"),
        ("restore file --root new", "file is no backup"),
        ("restore absent --root absent", "absent is no backup"),
        (f"gc --root {LONG}", "cannot be used: File name too long"),
        (f"token ls --root {LONG}", "cannot be used: File name too long"),
        ("gc --root file", "file holds no repos"),
        ("gc --root saved", "saved is a backup"),
        *(
            (f"gc --root root --keep {keep}", "say from 0 to 36500 days")
            for keep in ("nan", "inf", "1e400", "1e10", "36501")
        ),
        ("gc --root root --keep -1", "'--keep'"),
    ],
)
def test_what_cannot_be_done_is_said_in_words(
    words: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    open_hub(Path("root")).close()
    back_up(Path("root"), Path("saved"))
    Path("file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    assert dispatch(["serve", *words.split()]) in {2, 22, 59}
    printed = capsys.readouterr().err
    assert said in printed and "unexpected" not in printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("keep", ["0", "0.5", "36500"])
def test_files_are_kept_for_up_to_a_hundred_years(tmp_path: Path, keep: str) -> None:
    open_hub(tmp_path / "root").close()
    assert dispatch(["serve", "gc", "--root", str(tmp_path / "root"), "--keep", keep]) == 0
