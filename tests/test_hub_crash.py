"""Push and pull when the process dies in the middle: real signals to real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bundles import make_bundle, make_host, tree_of
from commands import HUBAOTI, environment_of
from huggingface_hub import HfApi
from proxies import Proxy

from hubaoti.artifact.bundle import Bundle
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import pull_artifact
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.settings import Settings

PULL = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from bundles import make_host
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import pull_artifact
from hubaoti.settings import Settings
home, endpoint, token, repo = sys.argv[1:5]
settings = Settings(home=Path(home), endpoint=endpoint, token=token)
show = lambda step: print(step, flush=True)
pull_artifact(RepoRef(repo), settings, make_host(), trust=True, progress=show)
"""
PUSH = """
import sys
from pathlib import Path
from hubaoti.artifact.bundle import Bundle
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.settings import Settings
home, endpoint, token, repo, folder = sys.argv[1:6]
settings = Settings(home=Path(home), endpoint=endpoint, token=token)
say = lambda step: print(step, flush=True)
push_bundles([Bundle.read(Path(folder))], Destination(RepoRef(repo)), settings, say)
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", members={"model/root.so": bytes(range(256)) * 400})


def start(code: str, settings: Settings, repo: str, *more: Path) -> subprocess.Popen[str]:
    values = (str(settings.home), settings.endpoint, str(settings.token), repo, *map(str, more))
    command = [sys.executable, "-c", code, *values]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop_during(process: subprocess.Popen[str], step: str, number: signal.Signals) -> None:
    """Let a process come to a step, give it a moment in there, and send a signal."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(step):
            break
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(number)
    process.communicate()
    assert process.returncode != 0


def left_over(settings: Settings) -> list[str]:
    names = tree_of(settings.mirror)
    return [name for name in names if not name.startswith(("index.sqlite3", "hub/", "locks/"))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_pull_that_is_stopped_leaves_nothing_that_is_believed(
    bundle: Bundle, repo: str, settings: Settings, proxy: Proxy, number: signal.Signals
) -> None:
    push_bundles([bundle], Destination(RepoRef(repo)), settings)
    proxy.matching, proxy.pause = ".pt2", 0.1
    with start(PULL, settings, repo) as process:
        stop_during(process, "downloading", number)
    assert left_over(settings) == []
    if number is signal.SIGINT:
        assert not list(settings.mirror.rglob("*.incomplete"))
    for half in settings.mirror.rglob("*.incomplete"):
        os.utime(half, (0, 0))  # as if it were long ago
    proxy.reset()
    pulled = pull_artifact(RepoRef(repo), settings, make_host(), trust=True)
    assert pulled.artifact.digest == bundle.manifest.digest
    assert not list(settings.mirror.rglob("*.incomplete"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_reading_manifests_of_a_slow_endpoint_ends_at_once(
    bundle: Bundle, repo: str, settings: Settings, proxy: Proxy, number: signal.Signals
) -> None:
    push_bundles([bundle], Destination(RepoRef(repo)), settings)
    proxy.matching, proxy.pause = "hubaoti.json", 20
    command = [HUBAOTI, "pull", repo, "--trust"]
    env = environment_of(settings)
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 30
        while not any("hubaoti.json" in path for _, path in proxy.requests):
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(number)
        stopped = time.monotonic()
        _, said = process.communicate(timeout=10)
    assert time.monotonic() - stopped < 1
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in said and "error: unexpected" not in said
    assert left_over(settings) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_push_that_is_stopped_makes_no_commit(
    bundle: Bundle, repo: str, settings: Settings, proxy: Proxy, number: signal.Signals
) -> None:
    api = HfApi(settings.endpoint, token=settings.token)
    api.create_repo(repo)
    head = api.repo_info(repo).sha
    before = tree_of(bundle.path)
    proxy.matching, proxy.pause = "/commit/", 0.5
    with start(PUSH, settings, repo, bundle.path) as process:
        stop_during(process, "uploading", number)
    assert api.repo_info(repo).sha == head
    assert tree_of(bundle.path) == before
    assert left_over(settings) == []
    proxy.reset()
    assert push_bundles([bundle], Destination(RepoRef(repo)), settings).created


def test_after_a_kill_the_next_push_uses_the_repo_and_sends_only_what_it_lacks(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    bundle = make_bundle(tmp_path / "new", members={"model/root.so": os.urandom(100_000)})
    api = HfApi(settings.endpoint, token=settings.token)
    proxy.matching, proxy.pause = "/commit/", 1.0
    with start(PUSH, settings, repo, bundle.path) as process:
        until = time.monotonic() + 60
        while not any("/commit/" in path for _, path in proxy.requests):
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert any("/xorbs/" in path for _, path in proxy.requests), "the package was sent by then"
    assert api.repo_exists(repo)
    proxy.reset()
    assert push_bundles([bundle], Destination(RepoRef(repo)), settings).created
    assert not [path for _, path in proxy.requests if "/xorbs/" in path], "it is there already"
    assert len(api.list_repo_commits(repo)) == 2
