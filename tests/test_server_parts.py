"""The endpoint's parts by themselves: words, git's ids, trees, signatures, transactions."""

import shutil
import sqlite3
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hubaoti.server import auth, card, gitids, trees, validation
from hubaoti.server.auth import Guard
from hubaoti.server.database import Database
from hubaoti.server.errors import ServerError
from hubaoti.server.objects import Objects
from hubaoti.server.trees import Delete, Put, TreeEntry

SEGMENT = st.from_regex(r"[a-z.\-é ]{1,6}", fullmatch=True).filter(lambda s: s not in {".", ".."})
PATH = st.lists(SEGMENT, min_size=1, max_size=4).map("/".join)
OID = st.from_regex(r"[0-9a-f]{40}", fullmatch=True)
ENTRY = st.builds(
    TreeEntry,
    blob=OID,
    size=st.integers(0, 2**50),
    sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    lfs=st.booleans(),
    since=OID,
)


# A deadline would measure whoever shares the machine.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@unhurried
@given(st.text(max_size=30) | PATH)
def test_an_accepted_path_names_something_below_its_folder(path: str) -> None:
    try:
        found = validation.check_file_path(path)
    except ServerError:
        return
    base = Path("/base")
    assert found == path and not Path(path).is_absolute()
    assert (base / path).resolve().is_relative_to(base) and (base / path).resolve() != base


@unhurried
@given(SEGMENT, SEGMENT)
def test_plain_paths_are_accepted_as_they_are(folder: str, name: str) -> None:
    assert validation.check_file_path(f"{folder}/{name}") == f"{folder}/{name}"
    assert validation.check_folder_path(f"{folder}/") == folder


REPO_NAME = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_.]?[A-Za-z0-9_]){0,40}", fullmatch=True).filter(
    lambda name: (
        ".." not in name
        and not name.endswith(".git")
        and name not in {*validation.OPERATIONS, *validation.KINDS, "api"}
    )
)


@unhurried
@given(st.sampled_from(sorted(validation.KINDS.values())), REPO_NAME, REPO_NAME)
def test_a_repos_name_is_read_as_it_is_written(kind: str, owner: str, name: str) -> None:
    found = validation.parse_repo_id(kind, f"{owner}/{name}", "local")
    assert (found.kind, found.owner, found.name) == (kind, owner, name)
    assert validation.parse_repo_id(kind, found.full_name, "local") == found
    assert validation.parse_repo_id(kind, name, owner) == found


def test_a_ref_may_be_given_in_full() -> None:
    assert (
        validation.check_ref_name("refs/heads/feat/x", "heads")
        == "feat/x"
        == validation.check_ref_name("feat/x", "heads")
    )
    with pytest.raises(ServerError):
        validation.check_ref_name("refs/tags/v1", "heads")


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(PATH, ENTRY, max_size=6))
def test_a_tree_is_read_as_it_was_written(tree: dict[str, TreeEntry]) -> None:
    assert trees.load_tree(trees.dump_tree(tree, "commit")) == tree


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(PATH, ENTRY, max_size=4), st.lists(st.tuples(PATH, ENTRY), max_size=4))
def test_changes_leave_no_path_both_file_and_folder(
    tree: dict[str, TreeEntry], added: list[tuple[str, TreeEntry]]
) -> None:
    if trees.list_parent_folders(tree) & tree.keys():
        return
    try:
        after = trees.apply_changes(tree, [Put(path, entry) for path, entry in added], "commit")
    except ServerError:
        return
    assert not trees.list_parent_folders(after) & after.keys()
    assert after.keys() == tree.keys() | dict(added).keys()


def test_a_folder_is_deleted_with_all_in_it_and_nothing_beside_it() -> None:
    entry = trees.make_lfs_entry("0" * 64, 1)
    tree = dict.fromkeys(["a", "b/c", "b/d/e", "bc"], entry)
    assert trees.apply_changes(tree, [Delete("b", folder=True)], "").keys() == {"a", "bc"}
    with pytest.raises(ServerError, match="not found"):
        trees.apply_changes(tree, [Delete("b")], "")


def test_thousands_of_files_are_deleted_at_once() -> None:
    tree = {f"d/{number}": trees.make_lfs_entry("0" * 64, 1) for number in range(8000)}
    start = time.process_time()
    assert trees.apply_changes(tree, [Delete(path) for path in tree], "") == {}
    assert time.process_time() - start < 5  # a look at each file for each deletion takes 17


def test_a_file_put_again_unchanged_keeps_its_last_commit() -> None:
    old = replace(trees.make_lfs_entry("0" * 64, 1), since="old")
    tree = trees.apply_changes({"f": old}, [Put("f", replace(old, since=""))], "")
    assert tree["f"].since == "old"
    tree = trees.apply_changes({"f": old}, [Put("f", trees.make_lfs_entry("1" * 64, 1))], "")
    assert trees.load_tree(trees.dump_tree(tree, "new"))["f"].since == "new"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is the judge here")
def test_our_ids_are_those_that_git_computes(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        config = ["-c", "user.name=local", "-c", "user.email=local@localhost"]
        env = {"GIT_AUTHOR_DATE": "1700000000 +0000", "GIT_COMMITTER_DATE": "1700000000 +0000"}
        run = ["git", "-C", str(tmp_path), *config, *command]
        said = subprocess.run(
            run,
            env={**env, "PATH": "/usr/bin:/bin:/usr/local/bin"},
            check=True,
            capture_output=True,
            text=True,
        )
        return said.stdout.strip()

    files = {"a": b"1", "a.b/c": b"", "a-b/é": b"\0", "z/y/x/w": b"deep", "a0": b"2"}
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "title", "-m", "message")
    ids = gitids.hash_trees({path: gitids.hash_blob(content) for path, content in files.items()})
    assert ids[""] == git("rev-parse", "HEAD^{tree}")
    assert ids["z/y/x"] == git("rev-parse", "HEAD:z/y/x")
    commit = gitids.hash_commit(ids[""], None, "local", 1700000000, "title", "message")
    assert commit == git("rev-parse", "HEAD")
    (tmp_path / "a").write_bytes(b"new")
    git("commit", "-q", "-a", "-m", "second")
    tree = git("rev-parse", "HEAD^{tree}")
    second = gitids.hash_commit(tree, commit, "local", 1700000000, "second", "")
    assert second == git("rev-parse", "HEAD")


def test_a_signature_serves_one_errand_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard("token", b"secret")
    signature = guard.sign("errand")
    assert guard.honours("errand", signature)
    assert not guard.honours("other", signature)
    assert not Guard("token", b"other").honours("errand", signature)
    later = time.time() + auth.LIFETIME + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert not guard.honours("errand", signature)


@unhurried
@given(st.text(max_size=40))
def test_no_made_up_signature_or_token_is_honoured(said: str) -> None:
    guard = Guard("token", b"secret")
    assert not guard.honours("errand", said)
    assert not guard.knows(said)
    assert "token" not in repr(guard) and "secret" not in repr(guard)


@unhurried
@given(st.text(max_size=200))
def test_any_readme_is_read_or_refused(text: str) -> None:
    try:
        found = card.parse_card(f"---\n{text}\n---\n")
    except card.BadCard:
        return
    card.derive_tags("model", found)
    card.derive_tags("dataset", found)


@pytest.mark.parametrize(
    "readme",
    [
        "---\n# ---\nlicense: mit\n---\n# Title\n---\n",
        "---\nlicense: mit # a---\n---",
        "\ufeff\n---  \r\nlicense: mit\r\n---\r\ntext",
    ],
    ids=ascii,
)
def test_front_matter_ends_at_a_line_of_dashes_only(readme: str) -> None:
    assert card.parse_card(readme) == {"license": "mit"}


def test_a_datasets_card_makes_the_tags_that_its_filters_ask_for() -> None:
    said = {"language": ["en"], "task_categories": ["qa"], "tags": ["x"], "license": "mit"}
    assert card.derive_tags("dataset", said) == [
        "x",
        "language:en",
        "license:mit",
        "task_categories:qa",
    ]
    said = {"base_model": "a/b", "base_model_relation": "quantized"}
    assert card.derive_tags("model", said) == ["base_model:a/b", "base_model:quantized:a/b"]


def test_a_transaction_happens_whole_or_not_at_all(tmp_path: Path) -> None:
    database = Database(tmp_path / "index")
    with pytest.raises(KeyError), database.writing() as db:
        db.execute("insert into meta values ('a', '1')")
        raise KeyError
    assert database.constant("a", "2") == "2" == database.constant("a", "3")
    database.close()


def test_a_reader_sees_one_moment_whatever_others_write(tmp_path: Path) -> None:
    database = Database(tmp_path / "index")
    with database.reading() as db:
        assert db.execute("select count(*) from meta").fetchone() == (0,)
        database.constant("a", "1")
        assert db.execute("select count(*) from meta").fetchone() == (0,)
    database.close()


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    database = Database(tmp_path / "index")
    database.constant("n", "0")

    def add() -> None:
        for _ in range(20):
            with database.writing() as db:
                (value,) = db.execute("select value from meta where key = 'n'").fetchone()
                db.execute("update meta set value = ? where key = 'n'", (str(int(value) + 1),))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert database.constant("n", "") == "80"
    database.close()


def test_a_connection_that_was_busy_at_the_end_is_closed_after_it(tmp_path: Path) -> None:
    database = Database(tmp_path / "index")
    with database.reading() as db:
        database.close()
        db.execute("select 1")
    with pytest.raises(sqlite3.ProgrammingError):
        db.execute("select 1")


def test_an_object_is_whole_and_read_only_or_absent(tmp_path: Path) -> None:
    objects = Objects(tmp_path)
    with pytest.raises(ServerError, match="mismatch"), objects.receive() as incoming:
        incoming.write(b"content")
        incoming.keep("0" * 64)
    assert not list((tmp_path / "tmp").iterdir()) and objects.size("0" * 64) is None
    sha256 = objects.put(b"content")
    assert objects.put(b"content") == sha256 and objects.size(sha256) == 7
    assert objects.path(sha256).stat().st_mode & 0o777 == 0o400
    (tmp_path / "tmp/leftover").write_bytes(b"x")
    Objects(tmp_path)
    assert not list((tmp_path / "tmp").iterdir())


def test_bytes_that_find_no_room_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def fake_open(path: Path, mode: str) -> object:
        path.touch()
        return opened(Path("/dev/full"), "wb")

    objects = Objects(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "open", fake_open)
        objects.put(b"too much")
    assert not list((tmp_path / "tmp").iterdir())
