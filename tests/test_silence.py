"""An endpoint that takes requests and says nothing is given up within a minute."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import MEMBERS, make_bundle, make_host, tree_of
from huggingface_hub import HfApi
from proxies import Proxy

from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import HubUnreachable
from hubaoti.hub import silence
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import pull_artifact
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.settings import Settings

COMMIT = "0" * 40
LARGE = {"model/weights.bin": os.urandom(3 << 20)}
ASKS: dict[str, Callable[[HubClient, str], object]] = {
    "resolve": lambda client, repo: client.resolve(repo),
    "files": lambda client, repo: client.files(repo, COMMIT),
    "tags": lambda client, repo: client.tags(repo),
    "history": lambda client, repo: client.history(repo, COMMIT),
    "download": lambda client, repo: client.download(repo, COMMIT, "a.txt"),
    "create": lambda client, repo: client.create(repo, private=False),
    "commit": lambda client, repo: client.commit(repo, {"a": b"a"}, (), "a", COMMIT),
    "drop": lambda client, repo: client.drop_repo(repo),
    "model": lambda client, repo: client.model_folder(repo, None, ("*.txt",)),
}


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Settings]:
    """An endpoint that accepts connections, and that is all."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield Settings(home=tmp_path / "home", endpoint=url, token="hf_of_nobody")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second instead of half a minute."""
    monkeypatch.setattr(silence, "SILENCE", 0.5)
    monkeypatch.setattr(silence, "WRITING", 0.6)
    monkeypatch.setattr(silence, "LONGEST_SILENCE", 1.0)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", members={**MEMBERS, **LARGE})


@pytest.fixture
def published(bundle: Bundle, settings: Settings, repo: str, proxy: Proxy) -> RepoRef:
    push_bundles([bundle], Destination(RepoRef(repo)), settings)
    proxy.reset()
    return RepoRef(repo)


@pytest.mark.parametrize("ask", ASKS)
def test_a_silent_endpoint_is_given_up(hurried: None, silent: Settings, ask: str) -> None:
    started = time.monotonic()
    with pytest.raises(HubUnreachable, match="is silent") as caught:
        ASKS[ask](HubClient(silent), "acme/tiny")
    assert time.monotonic() - started < 6
    assert "HF_ENDPOINT" in caught.value.hint


STEPS: dict[str, tuple[str, int | None]] = {
    "the commit": ("/revision/", None),
    "the list": ("/tree/", None),
    "half of the list": ("/tree/", 10),
    "the manifest": ("/hubaoti.json", None),
    "half of the manifest": ("/hubaoti.json", 100),
    "a package": (".pt2", None),
    "half of a package": (".pt2", 1 << 19),
}


def pull_stalled(step: str, ref: RepoRef, settings: Settings, proxy: Proxy) -> float:
    """The seconds of a pull that hears nothing of a step."""
    proxy.matching, after = STEPS[step]
    proxy.mute, proxy.stall_after = after is None, after
    if proxy.matching == "/revision/":
        ref = replace(ref, revision="main")
    started = time.monotonic()
    with pytest.raises(HubUnreachable, match="is silent"):
        pull_artifact(ref, settings, make_host(), trust=True)
    return time.monotonic() - started


@pytest.mark.parametrize("step", STEPS)
def test_a_pull_that_hears_nothing_more_ends_and_leaves_nothing_half_written(
    hurried: None, published: RepoRef, settings: Settings, proxy: Proxy, step: str
) -> None:
    assert pull_stalled(step, published, settings, proxy) < 12
    assert tree_of(settings.mirror / "artifacts") == {}
    proxy.reset()
    assert not pull_artifact(published, settings, make_host(), trust=True).from_mirror


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_pull_that_hears_nothing_more_ends_within_a_minute(
    published: RepoRef, settings: Settings, proxy: Proxy, step: str
) -> None:
    assert pull_stalled(step, published, settings, proxy) < 60


@pytest.mark.parametrize("part", ["/create", "/preupload/", "/commit/"])
def test_a_push_that_hears_nothing_more_ends(
    hurried: None, settings: Settings, bundle: Bundle, repo: str, proxy: Proxy, part: str
) -> None:
    proxy.matching, proxy.mute = part, True
    started = time.monotonic()
    with pytest.raises(HubUnreachable, match="is silent"):
        push_bundles([bundle], Destination(RepoRef(repo)), settings)
    assert time.monotonic() - started < 12


def test_a_download_that_goes_on_is_waited_for_however_long_it_takes(
    hurried: None, published: RepoRef, settings: Settings, proxy: Proxy
) -> None:
    """A few bytes at a time, for three times as long as an endpoint may be silent."""
    proxy.matching, proxy.pause = ".pt2", 3 / (len(LARGE["model/weights.bin"]) / 4096)
    started = time.monotonic()
    pull_artifact(published, settings, make_host(), trust=True)
    assert time.monotonic() - started > 3


def test_a_download_that_stalls_now_and_then_goes_on(
    hurried: None, published: RepoRef, settings: Settings, proxy: Proxy
) -> None:
    """Each time a MiB of it came: more than once as long together as an endpoint may be silent."""
    proxy.matching, proxy.stall_after = ".pt2", (1 << 20) + 1000
    pull_artifact(published, settings, make_host(), trust=True)
    assert sum(method == "GET" and ".pt2" in path for method, path in proxy.requests) == 4


def test_what_others_ask_of_the_hub_in_this_process_waits_as_they_say(
    hurried: None, settings: Settings, published: RepoRef, proxy: Proxy
) -> None:
    HubClient(settings).resolve(published.repo)
    proxy.mutate, proxy.pause = lambda found: found, 1.2
    assert HfApi(proxy.url, token=settings.token).repo_info(published.repo).sha
