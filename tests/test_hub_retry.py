"""An endpoint that is busy is asked again, politely, not for ever; no write is made twice."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest
from bundles import make_bundle, make_host
from huggingface_hub import HfApi, close_session, get_session
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
from proxies import Proxy

from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import Conflict, HubaotiError, HubUnreachable, RepoNotFound
from hubaoti.hub import bounds, retry
from hubaoti.hub.client import HubClient
from hubaoti.hub.errors import AnswerLost
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import pull_artifact
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.hub.retry import ATTEMPTS, LONGEST_WAIT, _heed, read_retry_after
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

BUSY = (503, {})
ASKS = {
    "resolve": lambda client, repo: client.resolve(repo),
    "files": lambda client, repo: client.files(repo, client.resolve(repo)),
    "create": lambda client, repo: client.create(repo, private=False),
    "tags": lambda client, repo: client.tags(repo),
    "branches": lambda client, repo: client.branches(repo),
    "tag": lambda client, repo: client.tag(repo, "v1", client.resolve(repo)),
    "branch": lambda client, repo: client.make_branch(repo, "beside"),
    "commit": lambda client, repo: commit(client, repo),
    "model": lambda client, repo: client.model_folder(repo, None, ("*.txt",)),
}


def commit(client: HubClient, repo: str) -> object:
    """A commit of one small file on the head."""
    return client.commit(repo, {"a.txt": b"mine"}, (), "Add a.txt", client.resolve(repo))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def client(settings: Settings, said: list[str], repo: str, endpoint: Endpoint) -> HubClient:
    HfApi(endpoint.url, token=endpoint.token).create_repo(repo)
    return HubClient(settings, said.append)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of milliseconds, where the endpoint does not ask for one."""
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def posts(proxy: Proxy, part: str) -> int:
    return sum(method == "POST" and part in path for method, path in proxy.requests)


@pytest.mark.parametrize(("ask", "status"), [*itertools.product(ASKS, (429, 503))])
def test_a_busy_endpoint_is_asked_again(
    client: HubClient,
    repo: str,
    proxy: Proxy,
    said: list[str],
    ask: str,
    status: int,
) -> None:
    proxy.answers = [(status, {"Retry-After": "0"})]
    ASKS[ask](client, repo)
    assert proxy.answers == []
    assert said == [f"the endpoint is busy ({status})"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "1"},
        {"Retry-After": formatdate(time.time() + 2, usegmt=True)},
        {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=5;w=300'},
    ],
    ids=["seconds", "date", "limit"],
)
def test_as_long_as_the_endpoint_asks_for_is_waited(
    client: HubClient, repo: str, proxy: Proxy, headers: dict[str, str]
) -> None:
    if "GMT" in headers.get("Retry-After", ""):
        headers = {"Retry-After": formatdate(time.time() + 2, usegmt=True)}
    proxy.answers = [(429, headers)]
    started = time.monotonic()
    client.resolve(repo)
    assert 0.9 < time.monotonic() - started < 5


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_an_endpoint_that_stays_busy_is_given_up(
    client: HubClient, repo: str, proxy: Proxy, status: int
) -> None:
    proxy.answers = [(status, {})] * 100
    with pytest.raises(HubUnreachable, match=str(status)) as caught:
        client.resolve(repo)
    assert len(proxy.requests) == ATTEMPTS
    assert "try again in some minutes" in caught.value.hint


def test_backing_off_takes_seconds_and_not_minutes(
    client: HubClient, repo: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.5)
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    proxy.answers = [BUSY] * 100
    with pytest.raises(HubUnreachable):
        client.resolve(repo)
    assert 10 < sum(waits) < 20
    assert waits == sorted(waits)


@pytest.mark.parametrize("ask", ASKS)
def test_nobody_waits_for_longer_than_is_sensible(
    client: HubClient, repo: str, proxy: Proxy, ask: str
) -> None:
    proxy.answers = [(429, {"Retry-After": "86400"})]
    with pytest.raises(HubUnreachable, match="429 Too Many Requests") as caught:
        ASKS[ask](client, repo)
    assert "in 86400 s" in caught.value.hint
    assert proxy.answers == []


@pytest.mark.parametrize("part", ["/tree/", "/resolve/", "/preupload/"])
def test_what_huggingface_hub_repeats_by_itself_does_not_wait_for_ever_either(
    client: HubClient, repo: str, proxy: Proxy, part: str
) -> None:
    made = commit(client, repo)
    proxy.matching, proxy.answers = part, [(429, {"Retry-After": "86400"})] * 3
    ask = {
        "/tree/": lambda: client.files(repo, made.commit),  # type: ignore[attr-defined]
        "/resolve/": lambda: client.download(repo, made.commit, "a.txt"),  # type: ignore[attr-defined]
        "/preupload/": lambda: client.commit(repo, {"b": b"b"}, (), "b", made.commit),  # type: ignore[attr-defined]
    }[part]
    with pytest.raises(HubUnreachable, match="429 Too Many Requests"):
        ask()


def test_waits_of_huggingface_hub_are_bounded_together(
    client: HubClient, repo: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    head = client.resolve(repo)
    monkeypatch.setattr("time.sleep", waits.append)
    proxy.matching, proxy.answers = "/tree/", [(429, {"Retry-After": "140"})] * 100
    with pytest.raises(HubUnreachable, match="429"):
        client.files(repo, head)
    assert sum(waits) < LONGEST_WAIT and len(proxy.answers) == 97


def test_a_thread_of_huggingface_hub_s_own_waits_no_longer_than_we_do(
    client: HubClient, repo: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[int, float]] = []
    made = commit(client, repo)
    monkeypatch.setattr("time.sleep", lambda wait: waits.append((threading.get_ident(), wait)))
    proxy.matching, proxy.answers = "/resolve/", [(429, {"Retry-After": "140"})] * 100
    with pytest.raises(HubUnreachable, match="429"):
        client.model_folder(repo, None, ("a.txt",))
    threads = {thread for thread, wait in waits if wait > 100}
    assert threads and threading.get_ident() not in threads
    assert sum(wait for _, wait in waits) < LONGEST_WAIT
    assert client.resolve(repo) == made.commit  # type: ignore[attr-defined]


def test_too_many_requests_have_words_of_their_own(
    settings: Settings, repo: str, proxy: Proxy
) -> None:
    proxy.answers = [(429, {"Retry-After": "3600"})]
    with pytest.raises(HubUnreachable, match="asked too often") as caught:
        HubClient(settings).resolve(repo)
    assert caught.value.hint == "try again in 3600 s"


def test_without_a_token_one_is_proposed(proxy: Proxy, settings: Settings, repo: str) -> None:
    proxy.answers = [(429, {"Retry-After": "3600"})]
    with pytest.raises(HubUnreachable) as caught:
        HubClient(replace(settings, token=None)).resolve(repo)
    assert "HF_TOKEN" in caught.value.hint


@pytest.mark.parametrize("status", [400, 404, 500])
def test_what_does_not_pass_is_not_asked_again(
    client: HubClient, repo: str, proxy: Proxy, status: int
) -> None:
    proxy.answers = [(status, {})]
    with pytest.raises(Exception, match=repo):
        client.resolve(repo)
    assert len(proxy.requests) == 1


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    client: HubClient, repo: str, proxy: Proxy, said: list[str]
) -> None:
    before = client.resolve(repo)
    proxy.matching, proxy.lost = "/commit/", 1
    with pytest.raises(AnswerLost):
        commit(client, repo)
    assert posts(proxy, "/commit/") == 1
    assert client.resolve(repo) != before
    assert any("connection was dropped" in line for line in said)


def test_a_commit_that_never_arrived_is_sent_again(
    client: HubClient, repo: str, proxy: Proxy
) -> None:
    proxy.matching, proxy.answers = "/commit/", [BUSY, BUSY]
    made = commit(client, repo)
    assert posts(proxy, "/commit/") == 3
    assert client.resolve(repo) == made.commit  # type: ignore[attr-defined]
    assert len(HfApi(proxy.url, token=client._settings.token).list_repo_commits(repo)) == 2


@pytest.mark.parametrize("ask", ["create", "tag", "branch"])
def test_what_is_made_already_when_it_is_asked_for_again_is_done(
    client: HubClient, repo: str, proxy: Proxy, ask: str
) -> None:
    part = {"create": "/create", "tag": "/tag/", "branch": "/branch/"}[ask]
    proxy.matching, proxy.lost = part, 1
    ASKS[ask](client, repo)
    assert posts(proxy, part) == 2


def test_a_tag_that_somebody_else_made_in_the_meantime_is_a_conflict(
    client: HubClient, repo: str, proxy: Proxy
) -> None:
    first = client.resolve(repo)
    commit(client, repo)
    client.tag(repo, "v1", first)
    proxy.matching, proxy.answers = "/tag/", [BUSY]
    with pytest.raises(Conflict):
        client.tag(repo, "v1", client.resolve(repo))


def test_a_branch_that_is_gone_when_it_is_dropped_again_is_dropped(
    client: HubClient, repo: str, proxy: Proxy
) -> None:
    client.make_branch(repo, "beside")
    proxy.matching, proxy.lost = "/branch/", 1
    client.drop_branch(repo, "beside")
    assert "beside" not in client.branches(repo)


def test_an_endpoint_that_is_down_is_said_at_once(
    settings: Settings, said: list[str], repo: str
) -> None:
    down = HubClient(replace(settings, endpoint="http://127.0.0.1:9"), said.append)
    started = time.monotonic()
    with pytest.raises(HubUnreachable):
        down.resolve(repo)
    assert time.monotonic() - started < 2
    assert said == []


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 7 "}, 7),
        ({"retry-after": "-7"}, None),
        ({"retry-after": "1e9"}, None),
        ({"retry-after": "9" * 5000}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": '"api";r=10;t=55'}, None),
        ({"retry-after": "7", "ratelimit": '"api";r=0;t=55'}, 7),
    ],
)
def test_the_wait_that_is_asked_for_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert read_retry_after(headers) == seconds


def test_the_user_s_own_requests_are_not_told_of(
    client: HubClient, repo: str, proxy: Proxy, said: list[str]
) -> None:
    ask: Callable[[], object] = lambda: HfApi(proxy.url).repo_info(repo)  # noqa: E731
    client.resolve(repo)
    proxy.answers = [BUSY]
    with pytest.raises(Exception, match="503"):
        ask()
    assert said == []


def test_a_push_and_a_pull_survive_an_endpoint_that_is_busy_at_each_step(
    bundle: Bundle, settings: Settings, repo: str, proxy: Proxy
) -> None:
    proxy.first, said = (429, {"Retry-After": "0"}), list[str]()
    to = Destination(RepoRef(repo), tag="v1", layout=None)
    made = push_bundles([bundle], to, settings, said.append)
    assert made.created
    assert posts(proxy, "/commit/") == 2
    proxy.reset()
    proxy.first = BUSY
    pulled = pull_artifact(
        RepoRef(repo, "v1"), settings, make_host(), trust=True, progress=said.append
    )
    assert pulled.commit == made.commit
    assert pulled.artifact.digest == bundle.manifest.digest
    assert said.count("the endpoint is busy (429)") > 6
    assert said.count("the endpoint is busy (503)") > 2


def test_a_push_whose_answer_was_lost_is_one_commit_and_done(
    bundle: Bundle, settings: Settings, repo: str, proxy: Proxy
) -> None:
    said: list[str] = []
    proxy.matching, proxy.lost = "/commit/", 1
    made = push_bundles([bundle], Destination(RepoRef(repo), tag="v1"), settings, said.append)
    assert made.created
    assert posts(proxy, "/commit/") == 1
    api = HfApi(proxy.url, token=settings.token)
    assert [commit.commit_id for commit in api.list_repo_commits(repo)][:-1] == [made.commit]
    assert "no answer came, and the repo changed: reading the repo again" in said


def test_a_push_that_is_refused_for_ever_says_so_and_leaves_nothing(
    bundle: Bundle, settings: Settings, repo: str, proxy: Proxy
) -> None:
    proxy.matching, proxy.answers = "/commit/", [(429, {})] * 100
    with pytest.raises(HubUnreachable, match="asked too often"):
        push_bundles([bundle], Destination(RepoRef(repo)), settings)
    assert posts(proxy, "/commit/") == ATTEMPTS
    with pytest.raises(RepoNotFound):  # it was made for this push
        HubClient(settings).resolve(repo)


# Answers without an end


@pytest.mark.parametrize("ask", ASKS)
def test_an_answer_that_does_not_end_is_no_hub_s(
    client: HubClient, repo: str, proxy: Proxy, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MOST_ANSWERED", 1 << 20)
    proxy.endless = True
    with pytest.raises(HubUnreachable, match="sends more than 1048576 bytes"):
        ASKS[ask](client, repo)
    assert proxy.sent < 64 << 20  # what the system's buffers took


def test_an_answer_that_comes_a_byte_a_minute_is_not_waited_for(
    client: HubClient, repo: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "LONGEST_ANSWER", 0.5)
    proxy.mutate, proxy.pause = lambda said: {**said, "tags": ["x" * 64_000]}, 0.1
    started = time.monotonic()
    with pytest.raises(HubUnreachable, match="of bytes to /api/models/"):
        client.resolve(repo)
    assert time.monotonic() - started < 5


def test_an_answer_that_unfolds_is_taken_while_it_is_small(
    client: HubClient, repo: str, proxy: Proxy
) -> None:
    proxy.packed = 1 << 10
    assert len(client.resolve(repo)) == 40
    proxy.packed = 256 << 20
    with pytest.raises(HubUnreachable, match="sends more than 65536 bytes"):
        client.resolve(repo)


def test_an_answer_that_is_packed_twice_is_not_unfolded(
    client: HubClient, repo: str, proxy: Proxy
) -> None:
    proxy.packed, proxy.folds = 1 << 10, 2
    with pytest.raises(HubUnreachable, match="packed as 'gzip, gzip'"):
        client.resolve(repo)


@pytest.mark.parametrize("status", [302, 404, 500])
def test_a_download_that_is_refused_without_end_is_given_up(
    client: HubClient, repo: str, proxy: Proxy, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MOST_ANSWERED", 1 << 20)
    head = client.resolve(repo)
    proxy.matching, proxy.endless, proxy.status = "/resolve/", True, status
    with pytest.raises(HubaotiError):
        client.download(repo, head, ".gitattributes")
    assert proxy.sent < 64 << 20


def test_a_session_that_is_made_anew_within_a_call_heeds_answers_too(
    client: HubClient, repo: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub makes one when a connection fails."""
    monkeypatch.setattr(bounds, "MOST_ANSWERED", 1 << 20)
    client.resolve(repo)
    close_session()
    assert _heed in get_session().event_hooks["response"]
    assert get_session().timeout.read == LONGEST_WAIT


def test_pages_without_end_are_not_turned_for_ever(
    client: HubClient, repo: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "MOST_ANSWERS", 20)
    head = client.resolve(repo)
    proxy.matching, proxy.mutate, proxy.next_page = "/tree/", lambda _: [], True
    with pytest.raises(HubUnreachable, match="more than 20 answers"):
        client.files(repo, head)


def test_what_comes_of_a_file_is_counted_and_not_what_its_storage_sends() -> None:
    """Xet tells of both; bytes of the network may be more than the file has."""
    progress = XetDownloadProgressReporter(
        reconstruction_desc="", total=100, log_level=0, tqdm_class=bounds.make_limit_bar(100)
    )
    report = SimpleNamespace(
        total_bytes=100,
        total_bytes_completed=100,
        total_bytes_completion_rate=1.0,
        total_transfer_bytes_completed=130,
        total_transfer_bytes_completion_rate=1.0,
    )
    progress.update_progress(report)
    report.total_bytes_completed = 101
    with pytest.raises(bounds.TooLong):
        progress.update_progress(report)
    progress.close()
