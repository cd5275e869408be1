"""The official client, Xet on, against a running endpoint."""

import hashlib
import os
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    RepoFile,
    constants,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hubaoti.server import Endpoint

BIG = os.urandom(1 << 20) * 3
CARD = b"---\nlibrary_name: hubaoti\ntags: [fast, sm-90]\nlicense: mit\nbase_model: o/b\n---\nhello"


@pytest.fixture(scope="module")
def api(endpoint: Endpoint) -> HfApi:
    return HfApi(endpoint.url, token=endpoint.token)


@pytest.fixture(scope="module")
def anyone(endpoint: Endpoint) -> HfApi:
    return HfApi(endpoint.url, token=False)


@pytest.fixture
def repo(api: HfApi) -> Iterator[str]:
    name = f"org/r{os.urandom(5).hex()}"
    api.create_repo(name)
    yield name
    api.delete_repo(name, missing_ok=True)


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def commit(api: HfApi, repo: str, *changes: object, **more: str) -> str:
    return api.create_commit(repo, list(changes), commit_message="change", **more).oid  # type: ignore[arg-type]


def read(api: HfApi, repo: str, path: str, tmp: Path, **more: str) -> bytes:
    return Path(api.hf_hub_download(repo, path, cache_dir=tmp / "cache", **more)).read_bytes()


def test_these_tests_run_with_xet_on() -> None:
    assert not constants.HF_HUB_DISABLE_XET


@pytest.mark.parametrize("kind", ["model", "dataset", "space", "kernel"])
def test_every_kind_of_repo_is_created_filled_read_and_deleted(
    api: HfApi, kind: str, tmp_path: Path
) -> None:
    name, sdk = f"org/kind-{kind}", {"space_sdk": "gradio"} if kind == "space" else {}
    url = api.create_repo(name, repo_type=kind, **sdk)
    assert url.repo_id == name
    assert api.create_repo(name, repo_type=kind, exist_ok=True, **sdk) == url
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(name, repo_type=kind, **sdk)
    api.upload_file(path_or_fileobj=BIG, path_in_repo="a/b.bin", repo_id=name, repo_type=kind)
    assert read(api, name, "a/b.bin", tmp_path, repo_type=kind) == BIG
    assert api.repo_info(name, repo_type=kind).id == name
    api.delete_repo(name, repo_type=kind)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(name, repo_type=kind)


def test_a_name_without_an_owner_is_the_users_own(api: HfApi, tmp_path: Path) -> None:
    assert api.create_repo("plain").repo_id == "local/plain"
    api.upload_file(path_or_fileobj=b"1", path_in_repo="d/f", repo_id="plain", revision="main")
    assert api.model_info("plain").id == "local/plain"
    assert read(api, "plain", "d/f", tmp_path) == read(api, "local/plain", "d/f", tmp_path) == b"1"
    assert [entry.path for entry in api.list_repo_tree("plain", "d")] == ["d/f"]
    assert api.list_repo_refs("plain").branches[0].name == "main"
    api.delete_repo("plain")


def test_a_space_knows_its_sdk(api: HfApi) -> None:
    api.create_repo("org/space", repo_type="space", space_sdk="docker")
    assert api.space_info("org/space").sdk == "docker"
    api.delete_repo("org/space", repo_type="space")


def test_a_folder_comes_back_byte_for_byte(api: HfApi, repo: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    files = {"a.txt": b"a", "empty": b"", "sub/b.bin": BIG, "sub/same.bin": BIG}
    files["sub/é ü #%20.txt"] = b"1"
    for path, content in files.items():
        (folder / path).write_bytes(content)
    first = api.upload_folder(repo_id=repo, folder_path=folder)
    snapshot = Path(api.snapshot_download(repo, cache_dir=tmp_path / "cache"))
    assert {path: (snapshot / path).read_bytes() for path in files} == files
    assert api.upload_folder(repo_id=repo, folder_path=folder).oid == first.oid
    api.verify_repo_checksums(repo, cache_dir=tmp_path / "cache")
    api.upload_folder(repo_id=repo, folder_path=folder / "sub", delete_patterns="*.txt")
    assert "a.txt" not in api.list_repo_files(repo)


def test_a_large_file_is_one_object_and_leaves_no_xorb_behind(tmp_path: Path) -> None:
    from hubaoti.server import serve_in_thread

    with serve_in_thread(tmp_path / "root") as endpoint:
        api = HfApi(endpoint.url, token=endpoint.token)
        api.create_repo("o/r")
        api.upload_file(path_or_fileobj=BIG, path_in_repo="b.bin", repo_id="o/r")
        # Told from memory: the client does not send again what it sent before.
        api.upload_file(path_or_fileobj=BIG + b"more", path_in_repo="c.bin", repo_id="o/r")
        assert read(api, "o/r", "c.bin", tmp_path) == BIG + b"more"
    assert (tmp_path / "root/objects" / object_path(BIG)).read_bytes() == BIG
    assert not [*(tmp_path / "root/xorbs").iterdir(), *(tmp_path / "root/tmp").iterdir()]


@pytest.mark.parametrize(
    "content",
    [
        os.urandom(1),
        *(os.urandom(chunks << 16) for chunks in (1, 2, 3, 9, 40)),
        bytes(9_000_000),
        BIG[: 1 << 20] * 20,
        b"".join(b"line %d\n" % number for number in range(500_000)),
        b"".join(struct.pack("<f", number / 3) for number in range(500_000)),
        os.urandom(70_000_000),
    ],
    ids=lambda content: f"{len(content)} bytes",
)
def test_whatever_the_client_packs_is_named_as_we_name_it(
    api: HfApi, repo: str, content: bytes, tmp_path: Path
) -> None:
    """A xorb's hash, made again: of a chunk, of many, of equal ones, packed in each scheme."""
    api.upload_file(path_or_fileobj=content, path_in_repo="a.bin", repo_id=repo)
    assert read(api, repo, "a.bin", tmp_path) == content


def object_path(content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    return f"{digest[:2]}/{digest}"


def test_files_are_copied_and_deleted(api: HfApi, repo: str, tmp_path: Path) -> None:
    commit(api, repo, add("a/big.bin", BIG), add("a/small.txt", b"small"), add("b/c/d", b"d"))
    commit(
        api,
        repo,
        CommitOperationCopy("a/big.bin", "copy.bin"),
        CommitOperationCopy("a/small.txt", "copy.txt"),
        CommitOperationDelete("a/small.txt"),
        CommitOperationDelete("b/"),
    )
    assert api.list_repo_files(repo) == [".gitattributes", "a/big.bin", "copy.bin", "copy.txt"]
    assert read(api, repo, "copy.bin", tmp_path) == BIG
    assert read(api, repo, "copy.txt", tmp_path) == b"small"
    with pytest.raises(EntryNotFoundError):
        api.delete_file("nope", repo)
    with pytest.raises(EntryNotFoundError):
        api.delete_folder("nope", repo)


def test_a_stale_parent_is_refused(api: HfApi, repo: str) -> None:
    head = api.model_info(repo).sha
    assert head
    commit(api, repo, add("a", b"1"), parent_commit=head)
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, repo, add("a", b"2"), parent_commit=head)


def test_of_many_commits_on_one_parent_one_wins_and_none_is_lost(api: HfApi, repo: str) -> None:
    head = api.model_info(repo).sha
    start = threading.Barrier(6)

    def racer(number: int) -> bool:
        start.wait()
        commit(api, repo, add(f"free/{number}", b"x"))
        try:
            commit(api, repo, add(f"bound/{number}", b"x"), parent_commit=head or "")
        except HfHubHTTPError as error:
            assert error.response.status_code == 412
            return False
        return True

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(racer, range(6))) <= 1
    assert {f"free/{n}" for n in range(6)} <= set(api.list_repo_files(repo))
    assert len(api.list_repo_commits(repo)) == 1 + len(api.list_repo_files(repo)) - 1


def test_branches_and_tags_name_commits(api: HfApi, repo: str, tmp_path: Path) -> None:
    first = commit(api, repo, add("f", b"1"))
    api.create_branch(repo, branch="feat/x")
    api.create_tag(repo, tag="v1.0", tag_message="the first")
    second = commit(api, repo, add("f", b"2"), revision="refs/heads/feat/x")
    contents = {"main": b"1", "feat/x": b"2", "refs/heads/feat/x": b"2", "v1.0": b"1"}
    contents |= {"refs/tags/v1.0": b"1", first: b"1", second[:7]: b"2"}
    for revision, content in contents.items():
        assert read(api, repo, "f", tmp_path, revision=revision) == content
        assert api.model_info(repo, revision=revision).sha == (first if content == b"1" else second)
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    assert heads == {"main": first, "feat/x": second}
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1.0", first)]


def test_refs_exist_once_and_are_deleted(api: HfApi, repo: str) -> None:
    for _ in range(2):
        api.create_branch(repo, branch="b", exist_ok=True)
        api.create_tag(repo, tag="t", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(repo, branch="b")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(repo, tag="t")
    api.delete_branch(repo, branch="b")
    api.delete_tag(repo, tag="t")
    with pytest.raises(RevisionNotFoundError):
        api.delete_branch(repo, branch="b")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(repo, tag="t")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_branch(repo, branch="main")


def test_pull_requests_are_refused_in_words(api: HfApi, repo: str) -> None:
    with pytest.raises(BadRequestError, match="Pull requests are not supported"):
        api.upload_file(path_or_fileobj=b"", path_in_repo="f", repo_id=repo, create_pr=True)
    with pytest.raises(BadRequestError, match="no PRs"):
        api.create_branch(repo, branch="refs/pr/5")
    with pytest.raises(RevisionNotFoundError, match="no PRs"):
        api.model_info(repo, revision="refs/pr/5")


def test_what_does_not_exist_says_so(api: HfApi, repo: str, tmp_path: Path) -> None:
    assert api.repo_exists(repo) and not api.repo_exists("org/none")
    assert api.revision_exists(repo, "main") and not api.revision_exists(repo, "none")
    assert api.file_exists(repo, ".gitattributes") and not api.file_exists(repo, "none")
    with pytest.raises(RevisionNotFoundError):
        commit(api, repo, add("f", b""), revision="none")
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(repo, tag="t", revision="none")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "none"))
    with pytest.raises(EntryNotFoundError):
        read(api, repo, "none", tmp_path)


def test_the_log_and_its_squash(api: HfApi, repo: str, tmp_path: Path) -> None:
    for number in range(3):
        commit(api, repo, add("f", str(number).encode()))
    titles = [entry.title for entry in api.list_repo_commits(repo, formatted=True)]
    assert titles == ["change"] * 3 + ["initial commit"]
    api.super_squash_history(repo, commit_message="one")
    assert [entry.title for entry in api.list_repo_commits(repo)] == ["one"]
    assert read(api, repo, "f", tmp_path) == b"2"
    (last,) = api.get_paths_info(repo, "f", expand=True)
    assert isinstance(last, RepoFile) and last.last_commit and last.last_commit.title == "one"


def test_a_log_longer_than_a_page_is_whole(api: HfApi, repo: str) -> None:
    from hubaoti.server import views_repos

    for number in range(4):
        commit(api, repo, add("f", str(number).encode()))
    page, views_repos._LOG_PAGE = views_repos._LOG_PAGE, 2
    try:
        assert len(api.list_repo_commits(repo)) == 5
    finally:
        views_repos._LOG_PAGE = page


def test_a_tree_longer_than_a_page_is_whole(api: HfApi, repo: str) -> None:
    commit(api, repo, *(add(f"many/{number:04}", b"") for number in range(1005)))
    listed = list(api.list_repo_tree(repo, "many"))
    assert [entry.path for entry in listed] == [f"many/{number:04}" for number in range(1005)]
    assert len(list(api.list_repo_tree(repo, recursive=True))) == 1007


def test_a_tree_names_what_last_changed_each_path(api: HfApi, repo: str) -> None:
    first = commit(api, repo, add("a/x", b"1"), add("b/y.bin", BIG))
    second = commit(api, repo, add("b/z", b"1"), add("a/x", b"1"))
    found = {
        entry.path: entry.last_commit.oid
        for entry in api.list_repo_tree(repo, recursive=True, expand=True)
        if entry.last_commit
    }
    assert (found["a"], found["a/x"], found["b/y.bin"]) == (first, first, first)
    assert (found["b"], found["b/z"]) == (second, second)


def test_ids_and_sizes_are_gits_own(api: HfApi, repo: str) -> None:
    commit(api, repo, add("small", b"hello\n"), add("big.bin", BIG))
    small, big, folder = api.get_paths_info(repo, ["small", "big.bin", "none", ""]) + [None]
    assert isinstance(small, RepoFile) and isinstance(big, RepoFile) and folder is None
    assert small.blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert big.lfs and big.lfs.sha256 == hashlib.sha256(BIG).hexdigest()
    siblings = api.model_info(repo, files_metadata=True).siblings or []
    sizes = {file.rfilename: file.size for file in siblings}
    assert (sizes["small"], sizes["big.bin"]) == (6, len(BIG))


def test_a_card_makes_tags_and_tags_find_the_repo(api: HfApi, repo: str) -> None:
    commit(api, repo, add("README.md", CARD))
    found = api.model_info(repo)
    wanted = ["hubaoti", "fast", "sm-90", "base_model:o/b", "license:mit"]
    assert found.tags == wanted and found.library_name == "hubaoti"
    assert found.card_data and found.card_data.license == "mit"
    # Other tests push to other owners of the same endpoint.
    ours = partial(api.list_models, author="org")
    assert [model.id for model in ours(filter=["sm-90", "hubaoti"])] == [repo]
    assert not list(ours(filter=["sm-90", "other"]))
    (full,) = ours(filter="sm-90", full=True, cardData=True)
    assert full.sha == found.sha and full.siblings and full.card_data
    (expanded,) = ours(filter="sm-90", expand=["author", "siblings"])
    assert expanded.author == "org" and expanded.siblings and not expanded.tags


def test_repos_are_listed_by_author_words_and_time_and_in_pages(api: HfApi) -> None:
    names = [f"lister/repo-{number}" for number in range(5)]
    for name in names:
        api.create_repo(name, repo_type="dataset")
    newest = api.list_datasets(author="lister", sort="created_at")
    assert [found.id for found in newest] == names[::-1]
    assert [found.id for found in api.list_datasets(search="LISTER repo-3")] == ["lister/repo-3"]
    assert len(list(api.list_datasets(author="lister", limit=2))) == 2
    assert not list(api.list_datasets(author="liste"))
    assert not list(api.list_datasets(author="lister", gated=True))
    assert not list(api.list_models(author="lister"))
    with pytest.raises(BadRequestError, match="cannot filter by apps"):
        list(api.list_models(apps="vllm"))
    stored = {found.id: found.storage_percent for found in api.list_user_repos(namespace="lister")}
    assert stored == dict.fromkeys(names, 20)
    for name in names:
        api.delete_repo(name, repo_type="dataset")


def test_a_private_repo_is_hidden_from_all_without_the_token(
    api: HfApi, anyone: HfApi, endpoint: Endpoint, repo: str, tmp_path: Path
) -> None:
    commit(api, repo, add("f", b"secret"))
    assert read(anyone, repo, "f", tmp_path / "public") == b"secret"
    api.update_repo_settings(repo, private=True)
    for stranger in (anyone, HfApi(endpoint.url, token="hf_wrong")):
        assert not stranger.repo_exists(repo)
        for ask in (stranger.list_repo_files, stranger.list_repo_refs, stranger.auth_check):
            with pytest.raises(RepositoryNotFoundError):
                ask(repo)
        with pytest.raises(RepositoryNotFoundError):
            read(stranger, repo, "f", tmp_path / "stranger")
        assert repo not in [found.id for found in stranger.list_models()]
    assert read(api, repo, "f", tmp_path) == b"secret" and api.model_info(repo).private
    assert repo in [found.id for found in api.list_models()]
    api.update_repo_settings(repo, visibility="public")
    assert anyone.repo_exists(repo)
    with pytest.raises(BadRequestError, match="Gated"):
        api.update_repo_settings(repo, gated="auto")


def test_a_repo_can_be_born_private(api: HfApi, anyone: HfApi) -> None:
    api.create_repo("org/born", private=True)
    assert not anyone.repo_exists("org/born")
    api.delete_repo("org/born")


@pytest.mark.parametrize(("token", "words"), [(False, "needs a token"), ("wrong", "Invalid cred")])
def test_every_write_needs_the_token(
    endpoint: Endpoint, repo: str, token: str | bool, words: str
) -> None:
    api = HfApi(endpoint.url, token=token)
    writes = [
        lambda: api.create_repo("org/x"),
        lambda: api.delete_repo(repo),
        lambda: api.move_repo(repo, "org/x"),
        lambda: api.update_repo_settings(repo, private=True),
        lambda: api.create_branch(repo, branch="b"),
        lambda: api.delete_branch(repo, branch="main"),
        lambda: api.create_tag(repo, tag="t"),
        lambda: api.delete_tag(repo, tag="t"),
        lambda: api.super_squash_history(repo),
        lambda: commit(api, repo, add("f", b"")),
        lambda: commit(api, repo, add("f.bin", BIG)),
        lambda: commit(api, repo, CommitOperationDelete("f")),
        lambda: api.auth_check(repo, write=True),
    ]
    for write in writes:
        with pytest.raises(HfHubHTTPError, match=words) as caught:
            write()
        assert caught.value.response.status_code == 401


def test_the_token_says_who_i_am_and_what_i_may(api: HfApi, endpoint: Endpoint, repo: str) -> None:
    assert api.whoami()["name"] == "local"
    api.auth_check(repo)
    api.auth_check(repo, write=True)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint.url, token="wrong").whoami()


def test_a_moved_repo_keeps_everything_under_its_new_name(
    api: HfApi, repo: str, tmp_path: Path
) -> None:
    oid = commit(api, repo, add("f", b"1"))
    api.move_repo(repo, "org/moved")
    assert api.repo_info(repo).id == "org/moved"  # by a redirect, as the Hub's
    assert api.list_repo_commits("org/moved")[0].commit_id == oid
    api.create_repo(repo)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.move_repo("org/moved", repo)
    with pytest.raises(RepositoryNotFoundError):
        api.move_repo("org/none", "org/none2")
    api.delete_repo("org/moved")


def test_a_new_repo_of_an_old_name_is_empty(api: HfApi, repo: str) -> None:
    commit(api, repo, add("f", b"1"))
    api.delete_repo(repo)
    api.create_repo(repo)
    assert api.list_repo_files(repo) == [".gitattributes"]


def test_a_broken_card_is_refused_before_it_is_committed(api: HfApi, repo: str) -> None:
    with pytest.raises(ValueError, match="not valid YAML"):
        commit(api, repo, add("README.md", b"---\ntags: [\n---\n"))
    with pytest.raises(ValueError, match="not a YAML mapping"):
        commit(api, repo, add("README.md", b"---\n- a\n---\n"))


def test_the_filesystem_of_the_client_works(api: HfApi, endpoint: Endpoint, repo: str) -> None:
    commit(api, repo, add("d/small", b"0123456789"), add("d/big.bin", BIG))
    files = HfFileSystem(endpoint=endpoint.url, token=endpoint.token, skip_instance_cache=True)
    assert files.ls(f"{repo}/d", detail=False) == [f"{repo}/d/big.bin", f"{repo}/d/small"]
    assert files.cat_file(f"{repo}/d/small", start=2, end=5) == b"234"
    assert files.cat_file(f"{repo}/d/big.bin") == BIG


def test_a_broken_download_resumes_where_it_stopped(
    api: HfApi, endpoint: Endpoint, repo: str, tmp_path: Path
) -> None:
    commit(api, repo, add("big.bin", BIG))
    half = tmp_path / "local/.cache/huggingface/download"
    got = api.hf_hub_download(repo, "big.bin", local_dir=tmp_path / "local")
    assert Path(got).read_bytes() == BIG and half.is_dir()
    connection = HTTPConnection(endpoint.url.removeprefix("http://"))
    url = f"/{repo}/resolve/main/big.bin"
    connection.request("GET", url, headers={"Range": f"bytes={len(BIG) - 10}-"})
    answer = connection.getresponse()
    assert answer.status == 206 and answer.read() == BIG[-10:]
    assert answer.headers["Content-Range"] == f"bytes {len(BIG) - 10}-{len(BIG) - 1}/{len(BIG)}"
    etag = answer.headers["ETag"]
    connection.request("GET", url, headers={"If-None-Match": f'W/"x", {etag}'})
    answer = connection.getresponse()
    assert answer.status == 304 and answer.read() == b""
    connection.request("HEAD", url)
    answer = connection.getresponse()
    assert answer.read() == b"" and answer.headers["Content-Length"] == str(len(BIG))
    assert answer.headers["X-Linked-Size"] == str(len(BIG))
    assert answer.headers["X-Linked-Etag"] == etag
    assert answer.headers["X-Repo-Commit"] == api.model_info(repo).sha
    connection.request("GET", url, headers={"Range": f"bytes={len(BIG)}-"})
    answer = connection.getresponse()
    assert answer.status == 416 and answer.headers["Content-Range"] == f"bytes */{len(BIG)}"
    connection.close()


def test_a_file_that_is_another_by_now_is_not_sent_to_who_asked_for_the_old_one(
    api: HfApi, endpoint: Endpoint, repo: str
) -> None:
    commit(api, repo, add("big.bin", BIG))
    url = f"/{repo}/resolve/main/big.bin"

    def ask(method: str, **fields: str) -> tuple[int, bytes]:
        headers = {name.replace("_", "-"): value for name, value in fields.items()}
        with closing(HTTPConnection(endpoint.url.removeprefix("http://"))) as connection:
            connection.request(method, url, headers=headers)
            answer = connection.getresponse()
            tags.append(answer.headers["ETag"])
            return answer.status, answer.read()

    tags: list[str] = []
    assert ask("HEAD") == (200, b"")
    tag = tags[0]
    for wanted in (tag, f'"x", {tag}', "*"):
        assert ask("GET", If_Match=wanted) == (200, BIG)
        assert ask("HEAD", If_Match=wanted) == (200, b"")
        assert ask("GET", If_Match=wanted, Range="bytes=0-9") == (206, BIG[:10])
        assert ask("GET", If_Match=wanted, If_None_Match=tag) == (304, b"")
    for wanted in ('"x"', f"W/{tag}", '"*"', ""):  # of which none is strong and this file's
        status, message = ask("GET", If_Match=wanted, If_None_Match=tag, Range="bytes=0-9")
        assert status == 412 and b"If-Match" in message
        assert ask("HEAD", If_Match=wanted) == (412, b"")
