"""An endpoint before another one: each file is fetched once, verified, kept, and its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import IncompleteRead
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from proxies import Proxy, proxying
from test_hub_pull import get, ship
from test_server_fleet import page
from test_server_limits import asked

from hubaoti.errors import BadRequest, HubUnreachable
from hubaoti.hub.client import HubClient
from hubaoti.hub.search import RepoFinder
from hubaoti.server import Endpoint, Service, Upstream, fetch, pull_through, serve_in_thread
from hubaoti.settings import Settings, read_upstream_token

BIG = os.urandom(3 << 20)
FILES = {"a/big.bin": BIG, "README.md": b"---\ntags: [fast]\n---\nhello", "empty": b""}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream is asked at every turn, unless a test says otherwise."""
    monkeypatch.setattr(pull_through, "FRESH", 0.0)
    monkeypatch.setattr(pull_through, "RETRY", 0.0)


@pytest.fixture
def source(endpoint: Endpoint) -> HfApi:
    """The upstream, with its token."""
    return HfApi(endpoint.url, token=endpoint.token)


@contextmanager
def before(upstream: str, root: Path, token: str | None = None) -> Iterator[Endpoint]:
    """Our endpoint, before another."""
    service = Service(upstream=Upstream(upstream, token))
    with serve_in_thread(root, "hf_of_ours", service=service) as found:
        yield found


@pytest.fixture
def ours(proxy: Proxy, endpoint: Endpoint, tmp_path: Path) -> Iterator[Endpoint]:
    """Our endpoint, before the upstream behind the proxy, whose token it has."""
    proxy.reset()
    with before(proxy.url, tmp_path / "root", endpoint.token) as found:
        yield found


@pytest.fixture
def published(source: HfApi, repo: str) -> str:
    """A repo upstream, of some files, with a tag."""
    publish(source, repo, FILES)
    source.create_tag(repo, tag="v1")
    return repo


def publish(api: HfApi, repo: str, files: dict[str, bytes], kind: str = "model") -> str:
    api.create_repo(repo, repo_type=kind, exist_ok=True)
    adds = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(repo, adds, commit_message="files", repo_type=kind).oid


def client(of: Endpoint, token: str | bool | None = False) -> HfApi:
    return HfApi(of.url, token=token)


def snapshot(api: HfApi, repo: str, cache: Path, **more: str) -> dict[str, bytes]:
    """All files of a repo, as a client has them."""
    folder = Path(api.snapshot_download(repo, cache_dir=cache, **more))
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {path: content for path, content in found.items() if path != ".gitattributes"}


def fetched(proxy: Proxy, path: str) -> int:
    """How often a file's bytes were asked for upstream."""
    return sum(verb == "GET" and url.endswith(path) for verb, url in proxy.requests)


@pytest.mark.parametrize("kind", ["model", "kernel"])
def test_what_is_not_here_comes_from_upstream_byte_for_byte(
    ours: Endpoint, source: HfApi, repo: str, tmp_path: Path, kind: str
) -> None:
    oid = publish(source, repo, FILES, kind)
    api = client(ours)
    assert api.repo_info(repo, repo_type=kind).sha == oid
    assert snapshot(api, repo, tmp_path / "cache", repo_type=kind) == FILES
    paths = {item.path for item in api.list_repo_tree(repo, recursive=True, repo_type=kind)}
    assert paths == {*FILES, "a", ".gitattributes"}


def test_refs_and_logs_are_upstreams(ours: Endpoint, source: HfApi, published: str) -> None:
    api = client(ours)
    publish(source, published, {"more": b"1"})
    source.create_branch(published, branch="side", revision="v1")
    theirs = source.list_repo_refs(published)
    assert api.list_repo_refs(published) == theirs
    log = source.list_repo_commits(published)
    assert api.list_repo_commits(published) == log
    assert api.list_repo_commits(published, revision=log[1].commit_id) == log[1:]
    assert api.model_info(published, revision="v1").sha == log[1].commit_id
    assert api.model_info(published, revision=log[-1].commit_id).sha == log[-1].commit_id
    with pytest.raises(RevisionNotFoundError):
        api.model_info(published, revision="no-such")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(published, revision="0" * 40)


def test_each_file_is_fetched_once_however_many_ask_at_once(
    ours: Endpoint, proxy: Proxy, published: str, tmp_path: Path
) -> None:
    proxy.pause = 0.0005
    with ThreadPoolExecutor(12) as pool:
        found = pool.map(
            lambda n: snapshot(client(ours), published, tmp_path / f"cache{n}"), range(12)
        )
        assert all(each == FILES for each in found)
    assert fetched(proxy, "big.bin") == fetched(proxy, "README.md") == 1


def test_what_lies_here_is_served_while_upstream_is_gone(
    endpoint: Endpoint, source: HfApi, published: str, tmp_path: Path
) -> None:
    with proxying(endpoint.url) as proxy, before(proxy.url, tmp_path / "root") as found:
        api, later = client(found), f"{published}-later"
        assert snapshot(api, published, tmp_path / "cache") == FILES
        log = api.list_repo_commits(published)
        publish(source, later, {"new": b"1"})
        proxy.answers = [(0, {})] * 1000
        again = snapshot(api, published, tmp_path / "again", revision="v1")
        assert again == FILES
        assert api.list_repo_commits(published) == log
        with pytest.raises(HfHubHTTPError, match="upstream cannot be asked"):
            api.model_info(later)
        proxy.answers = []
        assert api.model_info(later).id == later
    with serve_in_thread(tmp_path / "root") as alone:  # with no upstream at all
        assert snapshot(client(alone), published, tmp_path / "alone") == FILES


def test_a_search_without_a_token_finds_what_lies_only_upstream_and_is_public_there(
    ours: Endpoint, source: HfApi, repo: str, tmp_path: Path
) -> None:
    for name in (repo, f"{repo}-secret"):
        publish(source, name, {"README.md": b"---\ntags: [hubaoti, torch-2.13]\n---\n"})
    source.update_repo_settings(f"{repo}-secret", private=True)
    finder = RepoFinder(Settings(home=tmp_path / "home", endpoint=ours.url))
    found = {each.ref.repo: each.tags for each in finder.find(words=[repo.partition("/")[2]])}
    assert found == {repo: ("torch-2.13",)}
    _, listed = asked(ours, f"/api/models?search={repo.partition('/')[2]}&expand=tags")
    assert [sorted(each) for each in listed] == [["_id", "id", "modelId", "tags"]]


def test_a_gone_upstream_is_said_at_once_and_not_asked_for_again(
    endpoint: Endpoint, source: HfApi, repo: str, tmp_path: Path
) -> None:
    publish(source, repo, FILES)
    said = list[str]()
    with proxying(endpoint.url) as proxy, before(proxy.url, tmp_path / "root") as found:
        asking = HubClient(Settings(home=tmp_path / "home", endpoint=found.url), said.append)
        commit = asking.resolve(repo)
        asking.files(repo, commit)
        proxy.answers = [(0, {})] * 1000
        start = time.monotonic()
        for ask in (
            lambda: asking.resolve(f"{repo}-unseen"),
            lambda: asking.tags(f"{repo}-unseen"),
            lambda: asking.download(repo, commit, "README.md"),
        ):
            with pytest.raises(HubUnreachable, match="cannot reach its upstream") as caught:
                ask()
            assert "its upstream is up" in caught.value.hint
        assert time.monotonic() - start < 3  # one retry of each would wait as long
    assert said == []


def test_other_bytes_than_upstream_lists_are_never_kept(
    ours: Endpoint, proxy: Proxy, published: str, tmp_path: Path
) -> None:
    client(ours).list_repo_files(published)
    for path in ("a/big.bin", "README.md"):
        proxy.flip, proxy.matching = True, path
        status, said = asked(ours, f"/{published}/resolve/main/{path}")
        assert (status, "other bytes" in said["error"]) == (502, True)
        proxy.flip = False
        assert (tmp_path / "root" / "tmp").is_dir() and not [*(tmp_path / "root/tmp").iterdir()]
    assert snapshot(client(ours), published, tmp_path / "cache") == FILES


def test_a_file_that_is_cut_off_is_taken_up_where_it_ended(
    ours: Endpoint, proxy: Proxy, published: str, tmp_path: Path
) -> None:
    client(ours).list_repo_files(published)
    proxy.matching, proxy.cut_after = "big.bin", 1 << 20
    assert snapshot(client(ours), published, tmp_path / "cache") == FILES
    ranges = [h["range"] for h in proxy.headers if "range" in h]
    assert ranges == [f"bytes={at << 20}-" for at in (1, 2)]


def test_a_file_that_takes_long_is_sent_while_it_comes(
    ours: Endpoint, proxy: Proxy, published: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hubaoti.server.views_files.HOLD", 0.0)
    client(ours).list_repo_files(published)
    proxy.pause, proxy.matching = 0.001, "big.bin"
    assert snapshot(client(ours), published, tmp_path / "cache") == FILES
    assert fetched(proxy, "big.bin") == 1


def test_of_a_long_file_that_turns_out_wrong_nobody_is_given_the_end(
    ours: Endpoint, proxy: Proxy, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hubaoti.server.views_files.HOLD", 0.0)
    client(ours).list_repo_files(published)
    proxy.flip, proxy.matching, proxy.pause = True, "big.bin", 0.0002
    with pytest.raises(IncompleteRead) as cut:
        asked(ours, f"/{published}/resolve/main/a/big.bin")
    assert 0 < len(cut.value.partial) <= len(BIG) - fetch._HELD


def test_a_head_of_a_file_fetches_nothing(ours: Endpoint, proxy: Proxy, published: str) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(published, "a/big.bin", endpoint=ours.url)
    found = get_hf_file_metadata(url, token=False)
    assert found.size == len(BIG) and fetched(proxy, "big.bin") == 0


def test_a_repo_of_ours_is_never_asked_for_upstream_and_hides_none(
    ours: Endpoint, proxy: Proxy, published: str, repo: str, tmp_path: Path
) -> None:
    api = client(ours, ours.token)
    with pytest.raises(HfHubHTTPError, match="exists at"):
        api.create_repo(published)
    api.create_repo(f"{repo}-own")
    publish(api, f"{repo}-own", {"x": b"1"})
    proxy.requests.clear()
    assert snapshot(client(ours), f"{repo}-own", tmp_path / "cache") == {"x": b"1"}
    assert proxy.requests == []
    with pytest.raises(HfHubHTTPError, match="exists at"):
        api.move_repo(f"{repo}-own", published)


def test_a_repo_that_hides_one_of_upstreams_is_told_of(
    endpoint: Endpoint, source: HfApi, repo: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve_in_thread(tmp_path / "root") as alone:
        publish(client(alone, alone.token), repo, {"x": b"here"})
    publish(source, repo, {"x": b"there"})
    with before(endpoint.url, tmp_path / "root") as found:
        assert snapshot(client(found), repo, tmp_path / "cache") == {"x": b"here"}
    assert f"model {repo} is served from here: it hides upstream's" in caplog.text


def test_a_copy_is_changed_nowhere_but_upstream(ours: Endpoint, published: str) -> None:
    api = client(ours, ours.token)
    api.model_info(published)
    for change in (
        lambda: api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id=published),
        lambda: api.create_tag(published, tag="v2"),
        lambda: api.create_branch(published, branch="b"),
        lambda: api.delete_tag(published, tag="v1"),
        lambda: api.super_squash_history(published),
        lambda: api.update_repo_settings(published, private=True),
        lambda: api.move_repo(published, f"{published}-moved"),
    ):
        with pytest.raises(HfHubHTTPError, match="change it there"):
            change()
    api.delete_repo(published)  # the copy, which comes back when it is asked for
    assert api.model_info(published).id == published


def test_hosts_pull_an_artifact_through_it_and_from_it(
    ours: Endpoint, endpoint: Endpoint, proxy: Proxy, repo: str, tmp_path: Path
) -> None:
    there = Settings(home=tmp_path / "there", endpoint=endpoint.url, token=endpoint.token)
    made = ship(tmp_path, repo, there)
    HfApi(endpoint.url, token=endpoint.token).create_tag(repo, tag="v1.0")
    for name in ("first", "second"):
        pulled = get(f"{repo}@v1", Settings(home=tmp_path / name, endpoint=ours.url))
        assert (pulled.artifact.digest, pulled.commit) == (made.digest, made.commit)
    assert fetched(proxy, "root.pt2") == 1
    said = page(ours, "/metrics")[1]
    counted = dict(
        line.split() for line in said.splitlines() if "{" not in line and "#" not in line
    )
    hits, misses = (int(counted[f"hubaoti_upstream_{name}_total"]) for name in ("hits", "misses"))
    assert 0 < misses <= hits
    assert int(counted["hubaoti_upstream_bytes_total"]) > 0
    proxy.answers = [(0, {})] * 1000
    pulled = get(f"{repo}@v1.0", Settings(home=tmp_path / "third", endpoint=ours.url))
    assert pulled.artifact.digest == made.digest


def test_no_token_goes_further_than_it_is_for(
    ours: Endpoint, proxy: Proxy, endpoint: Endpoint, published: str, tmp_path: Path
) -> None:
    snapshot(client(ours, "hf_of_a_client"), published, tmp_path / "cache")
    sent = {headers.get("authorization") for headers in proxy.headers}
    assert sent == {f"Bearer {endpoint.token}"}


def test_what_is_private_upstream_is_private_here(
    ours: Endpoint, source: HfApi, published: str
) -> None:
    source.update_repo_settings(published, private=True)
    for stranger in (client(ours), client(ours, "hf_wrong")):
        for _ in range(2):
            with pytest.raises(RepositoryNotFoundError):
                stranger.model_info(published)
    assert client(ours, ours.token).model_info(published).private


def test_a_search_finds_what_is_here_and_then_what_is_upstream(
    ours: Endpoint, source: HfApi, proxy: Proxy, published: str
) -> None:
    tag, name = f"program-{published.partition('/')[2]}", published
    card = f"---\ntags: [{tag}]\n---\n".encode()
    publish(source, name, {"README.md": card})
    publish(source, f"{name}-secret", {"README.md": card})
    source.update_repo_settings(f"{name}-secret", private=True)
    own = client(ours, ours.token)
    publish(own, f"{name}-own", {"README.md": card})
    assert [each.id for each in client(ours).list_models(filter=tag)] == [f"{name}-own", name]
    client(ours).model_info(name)  # from now on it is here, and still listed once
    found = sorted(each.id for each in client(ours).list_models(filter=tag))
    assert found == [name, f"{name}-own"]
    assert f"{name}-secret" in [each.id for each in own.list_models(filter=tag)]
    proxy.answers = [(0, {})] * 100
    found = sorted(each.id for each in client(ours).list_models(filter=tag))
    assert found == [name, f"{name}-own"]
    proxy.answers = []


def test_a_repo_that_moved_upstream_is_found_by_its_new_name(
    ours: Endpoint, source: HfApi, proxy: Proxy, published: str
) -> None:
    new = f"{published}-new"
    proxy.matching = f"/api/models/{published}"
    proxy.mutate = lambda said: {**said, "id": new} if "id" in said else said
    status, _ = asked(ours, f"/api/models/{published}/revision/main")
    assert status == 307
    proxy.reset()
    source.move_repo(published, new)
    assert client(ours).model_info(new).id == new


def test_a_repo_that_upstream_removed_is_served_by_full_commits_alone(
    ours: Endpoint, source: HfApi, published: str, tmp_path: Path
) -> None:
    api = client(ours)
    oid = api.model_info(published).sha
    snapshot(api, published, tmp_path / "cache")
    source.delete_repo(published)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(published)
    assert snapshot(api, published, tmp_path / "again", revision=str(oid)) == FILES


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a//b", "a/../../b", ".git/config", "a\0b", "x" * 2000]
)
def test_a_path_that_is_none_is_not_taken_from_upstream(
    ours: Endpoint, proxy: Proxy, published: str, path: str
) -> None:
    proxy.matching = "/tree/"
    proxy.mutate = lambda said: [{**each, "path": path} for each in said]
    status, said = asked(ours, f"/api/models/{published}/tree/main")
    assert (status, "Invalid path" in said["error"] or "a path" in said["error"]) == (504, True)


def test_a_next_page_at_another_host_is_not_asked_for(
    ours: Endpoint, proxy: Proxy, published: str
) -> None:
    upstream = Upstream("http://127.0.0.1:9/hub")
    with pytest.raises(Exception, match="another endpoint"):
        upstream._read_page("http://127.0.0.1:9.evil/hub/x")


def test_a_silent_upstream_keeps_nobody_from_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr("hubaoti.server.upstream.PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with before(f"http://127.0.0.1:{port}", tmp_path / "root") as found:
            api = client(found, found.token)
            waiting = threading.Thread(target=asked, args=(found, "/api/models/o/unknown"))
            waiting.start()
            assert asked(found, "/api/models") == (200, [])
            api.create_repo("o/own")  # which upstream cannot be asked about
            assert api.model_info("o/own").id == "o/own"
            waiting.join()


def test_the_upstreams_token_is_the_one_that_is_for_it(tmp_path: Path) -> None:
    hub, other = "https://huggingface.co", "http://10.0.0.5:8000"
    (tmp_path / "token").write_text("hf_file\n")
    home = {"HF_HOME": str(tmp_path)}
    assert read_upstream_token(hub, home) == "hf_file"
    assert read_upstream_token(hub, home | {"HF_TOKEN": "hf_env"}) == "hf_env"
    assert read_upstream_token(other, home | {"HF_TOKEN": "hf_env"}) is None
    local = home | {"HF_TOKEN": "hf_local", "HF_ENDPOINT": other}
    assert read_upstream_token(hub, local) is None
    assert read_upstream_token(other, local) == "hf_local"
    assert read_upstream_token(hub, local | {"HUBAOTI_UPSTREAM_TOKEN": "hf_up"}) == "hf_up"
    assert read_upstream_token(hub, {"HF_HOME": str(tmp_path / "none")}) is None


@pytest.mark.parametrize("url", ["huggingface.co", "ftp://x", "http://", "http://u:p@hub.example"])
def test_an_upstream_is_a_url_without_a_login(url: str) -> None:
    with pytest.raises(BadRequest, match="upstream"):
        Upstream(url)
