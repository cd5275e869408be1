"""One process fetches or builds what many want at once; the others wait, and get it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bundles import CPU, make_bundle, make_host
from planned import Building, end_builds
from proxies import Proxy
from test_hub_crash import PULL, start
from test_leases import running

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import NoMatch
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import pull_artifact
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.mirror import Mirror
from hubaoti.mirror.stats import format_prometheus, summarize
from hubaoti.settings import Settings


@pytest.fixture
def shipped(tmp_path: Path, repo: str, settings: Settings, proxy: Proxy) -> Bundle:
    bundle = make_bundle(tmp_path / "bundle", members={"model/root.so": bytes(range(256)) * 400})
    push_bundles([bundle], Destination(RepoRef(repo)), settings)
    proxy.reset()
    proxy.matching, proxy.pause = ".pt2", 0.05  # so that all of them come before one has it
    return bundle


def downloads(proxy: Proxy) -> int:
    """How often somebody asked for a package's bytes."""
    return sum(method == "GET" and ".pt2" in path for method, path in proxy.requests)


def wait_for(process: subprocess.Popen[str], step: str) -> None:
    assert process.stdout is not None
    assert any(line.startswith(step) for line in process.stdout)


def test_of_many_pulls_of_one_artifact_one_downloads_it(
    shipped: Bundle, repo: str, settings: Settings, proxy: Proxy
) -> None:
    pulls = [start(PULL, settings, repo) for _ in range(4)]
    said = [process.communicate(timeout=120) for process in pulls]
    assert [process.returncode for process in pulls] == [0] * 4, said
    assert sum("downloading" in out for out, _ in said) == 1
    assert downloads(proxy) == len({path for _, path in proxy.requests if ".pt2" in path})
    with Mirror.open(settings.mirror) as mirror:
        assert [row.digest for row in mirror.ls()] == [shipped.manifest.digest]
        found = mirror.artifact(shipped.manifest.digest)
        assert found is not None
        mirror.verify(found)
        tiers = mirror.answers.read().tiers
        assert tiers["hub"].calls == 1 and tiers["mirror"].calls == 3
        assert mirror.usage.read()[found.digest].seconds > 0


def test_where_the_one_that_downloads_is_killed_another_goes_on(
    shipped: Bundle, repo: str, settings: Settings, proxy: Proxy
) -> None:
    proxy.pause = 2.0  # so that it is at it as long as it lives
    first = start(PULL, settings, repo)
    wait_for(first, "downloading")
    second = start(PULL, settings, repo)
    wait_for(second, "waiting for another process")
    time.sleep(0.2)
    proxy.pause = 0.0
    first.send_signal(signal.SIGKILL)
    first.communicate()
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert "downloading" in out
    with Mirror.open(settings.mirror) as mirror:
        assert [row.digest for row in mirror.ls()] == [shipped.manifest.digest]
        assert not any((mirror.root / "tmp").iterdir())


def test_who_waits_can_be_interrupted(shipped: Bundle, repo: str, settings: Settings) -> None:
    code = f"work = mirror.leases.alone('{shipped.manifest.digest}')\nwork.__enter__()"
    with running(settings.mirror, code):
        process = start(PULL, settings, repo)
        wait_for(process, "waiting for another process")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
        assert process.returncode != 0


BUILD = """
bundle = Bundle.read(Path(sys.argv[2]))
with mirror.leases.alone(bundle.manifest.key):
    print("building", flush=True)
    sys.stdin.readline()
    mirror.index.record_built(bundle.manifest)
    mirror.put(bundle.manifest, {f.path: bundle.path / f.path for f in bundle.manifest.all_files()})
"""


@contextmanager
def building(bundle: Bundle, settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """A process that builds what a bundle holds, until it is told to go on."""
    code = "import sys; from pathlib import Path; from hubaoti.mirror import Mirror\n"
    code += "from hubaoti.artifact.bundle import Bundle\nmirror = Mirror.open(Path(sys.argv[1]))\n"
    command = [sys.executable, "-c", code + BUILD, str(settings.mirror), str(bundle.path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as builder:
        assert builder.stdout is not None and builder.stdout.readline() == "building\n"
        yield builder


def test_who_wants_what_another_process_builds_waits_and_gets_it(
    roberta_bundle: Bundle, tiny_roberta: Path, settings: Settings, tmp_path: Path
) -> None:
    steps: list[str] = []
    with building(roberta_bundle, settings) as builder:

        def watch(step: str) -> None:
            steps.append(step)
            if step.startswith("waiting for another process"):
                assert builder.stdin is not None
                builder.stdin.write("\n")
                builder.stdin.flush()

        bundle = hubaoti.compile(tiny_roberta, tmp_path / "out", settings=settings, progress=watch)
    assert bundle.manifest.digest == roberta_bundle.manifest.digest
    assert steps[-1].startswith(f"found {bundle.manifest.key[:12]} in the mirror")
    assert any(step.startswith("waiting for another process") for step in steps)


def test_where_the_one_that_builds_is_killed_who_waits_builds(
    roberta_bundle: Bundle, tiny_roberta: Path, settings: Settings, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    end_builds(monkeypatch)  # as it begins
    with building(roberta_bundle, settings) as builder:

        def watch(step: str) -> None:
            if step.startswith("waiting for another process"):
                builder.kill()

        with pytest.raises(Building):
            hubaoti.compile(tiny_roberta, tmp_path / "out", settings=settings, progress=watch)
    assert builder.returncode == -signal.SIGKILL
    with Mirror.open(settings.mirror) as mirror:
        assert mirror.ls() == [] and not any((mirror.root / "tmp").iterdir())


def test_a_miss_is_counted_with_the_kind_of_host(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    bundle = make_bundle(tmp_path / "other", {**CPU, "torch": "2.1.0+cpu"})
    push_bundles([bundle], Destination(RepoRef(repo)), settings)
    for _ in range(2):
        with pytest.raises(NoMatch):
            pull_artifact(RepoRef(repo), settings, make_host(), trust=True)
    with Mirror.open(settings.mirror) as mirror:
        (miss,) = mirror.answers.read().misses
        assert (miss.reason, miss.calls) == ("NoMatch", 2)
        assert miss.what == f"{repo} for torch 2.13.0+cpu x86_64_v3 linux"
        stats = summarize(mirror)
    assert stats.hit_rate == 0 and repo in stats.compile_next[0]
    assert 'misses_total{reason="NoMatch"} 2' in format_prometheus(stats)
