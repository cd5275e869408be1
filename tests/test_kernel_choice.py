"""Of two recipes of one program, the one whose kernel can be had here; and a line says why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from bundles import CUDA, make_bundle, make_gpu_host, rewrite
from commands import inside
from huggingface_hub import HfApi
from kernel_repos import SCHEMAS, compile_library, push_kernel, write_build
from proxies import Proxy

from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.kernel_pin import KernelPin
from hubaoti.artifact.kernel_variant import KernelHost
from hubaoti.artifact.manifest import find_oldest_schema
from hubaoti.artifact.variant import Recipe
from hubaoti.engines.resolve import Wanted, find_in_mirror
from hubaoti.errors import (
    HubUnreachable,
    KernelDigestMismatch,
    KernelMissing,
    RepoMoved,
    Untrusted,
)
from hubaoti.host.match import MatchResult
from hubaoti.host.probe import Gpu
from hubaoti.hub.choice import Considered, Pulled
from hubaoti.hub.client import HubClient
from hubaoti.hub.kernels import pin_kernel
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import Puller, pull_artifact
from hubaoti.hub.pull_all import find_pulled, pull_fleet, read_revision_catalog
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.hub.survey import survey
from hubaoti.mirror import Mirror
from hubaoti.mirror.trust import Trust
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

HOST = make_gpu_host()
THERE = KernelHost("2.13.0+cu130", "13.0", "x86_64_v3", "linux")
VARIANT = "torch213-cxx11-cu130-x86_64-linux"
FA3, SDPA = Recipe.parse("bfloat16-fa3"), Recipe.parse("bfloat16-sdpa")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of all builds, its texts left open."""
    return compile_library(tmp_path_factory.mktemp("library"))


Publish = Callable[[str], KernelPin]


@pytest.fixture
def publish(
    library: Path, endpoint: Endpoint, settings: Settings, proxy: Proxy, tmp_path: Path
) -> Publish:
    """Push a build of a kernel to a repo of the endpoint, and pin it."""

    def push(name: str) -> KernelPin:
        folder = tmp_path / name.replace("/", "~")
        if not folder.exists():
            write_build(
                library,
                folder,
                "_attention_cuda_1c",
                SCHEMAS["flash-attn3"],
                variant=VARIANT,
                archs=("9.0a",),
            )
        push_kernel(endpoint, name, folder)
        pinned = pin_kernel(HubClient(settings), name, THERE)
        shutil.rmtree(settings.home)  # as where nobody pinned it
        proxy.requests.clear()
        return pinned

    return push


def make(folder: Path, attention: str, *pins: KernelPin) -> Bundle:
    """A bundle for an H100, and by its PTX for newer ones, whose graphs call these kernels."""
    bundle = make_bundle(folder, target=CUDA, dtype="bfloat16", attention=attention)
    manifest = bundle.manifest
    return rewrite(
        folder,
        msgspec.structs.replace(
            manifest,
            requires=replace(manifest.requires, kernels=pins, ptx=90),
            schema=find_oldest_schema(manifest.build, manifest.graphs, pins),
        ),
    )


@pytest.fixture
def push(tmp_path: Path, repo: str, settings: Settings, proxy: Proxy) -> Callable[..., str]:
    """Push fa3, of a kernel, and sdpa beside it; their commit. Whose they are is trusted."""

    def send(pinned: KernelPin, *attentions: str) -> str:
        bundles = [
            make(tmp_path / each, each, *([pinned] if each == "fa3" else []))
            for each in attentions or ("fa3", "sdpa")
        ]
        commit = push_bundles(bundles, Destination(RepoRef(repo)), settings)
        Trust(settings.trust).add(settings.endpoint, "acme")
        proxy.requests.clear()
        return commit.commit

    return send


def pull(repo: str, settings: Settings, recipe: Recipe | None = None, **how: object) -> Pulled:
    ref = RepoRef.parse(repo)
    return pull_artifact(ref, settings, HOST, recipe=recipe, **how)  # type: ignore[arg-type]


def drop_kernel(endpoint: Endpoint, name: str) -> None:
    HfApi(endpoint.url, token=endpoint.token).delete_repo(name, repo_type="kernel")


def test_what_calls_a_kernel_that_is_there_is_taken_and_nothing_is_said(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str
) -> None:
    push(publish(f"{repo}-kernel"))
    pulled = pull(repo, settings)
    assert (pulled.place.recipe, pulled.notes) == (FA3, ())
    assert pull(repo, settings).from_mirror


def test_where_the_kernel_is_gone_the_next_best_is_taken_until_it_is_back(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str, proxy: Proxy
) -> None:
    pinned = publish(f"{repo}-kernel")
    push(pinned)
    proxy.matching, proxy.status = "/api/kernels/", 404
    for _ in range(2):
        pulled = pull(repo, settings)
        assert pulled.place.recipe == SDPA
        (note,) = pulled.notes
        assert note.startswith(f"{FA3}/")
        assert f"was left out: it needs the kernel {pinned}, and here is none" in note
        assert "shows no such repo" in note
        assert note.endswith("; to take it or nothing: --recipe bfloat16-fa3")
        assert "\n" not in note
    proxy.reset()
    assert pull(repo, settings).place.recipe == FA3


def test_where_nobody_trusts_who_publishes_the_kernel_the_line_says_how_to(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str, proxy: Proxy
) -> None:
    pinned = publish(f"stranger/{repo.partition('/')[2]}")
    push(pinned)
    pulled = pull(repo, settings)
    assert pulled.place.recipe == SDPA
    assert not [path for _, path in proxy.requests if "stranger" in path]
    (note,) = pulled.notes
    assert "say so once with: hubaoti trust add stranger; to take it" in note
    Trust(settings.trust).add(settings.endpoint, "stranger")
    taken = pull(repo, settings)
    assert (taken.place.recipe, taken.notes) == (FA3, ())
    Trust(settings.trust).block(settings.endpoint, "stranger")
    blocked = pull(repo, settings)
    assert blocked.place.recipe == SDPA
    assert "stranger is blocked on this machine" in blocked.notes[0]


def test_a_kernel_whose_repo_was_renamed_is_left_out_too(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str, proxy: Proxy
) -> None:
    pinned = publish(f"{repo}-kernel")
    push(pinned)
    proxy.matching = "/api/kernels/"
    proxy.mutate = lambda told: told | {"id": "evil/kernel"} if "sha" in told else told
    pulled = pull(repo, settings)
    assert pulled.place.recipe == SDPA
    assert "called evil/kernel now" in pulled.notes[0]
    with pytest.raises(RepoMoved):
        pull(repo, settings, FA3)


def test_a_kernel_that_has_no_build_for_this_gpu_is_left_out_with_a_line(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str
) -> None:
    pinned = publish(f"{repo}-kernel")
    push(pinned)
    newer = replace(HOST, gpus=(Gpu("fake B200", 100, None),))
    pulled = pull_artifact(RepoRef(repo), settings, newer)
    assert pulled.place.recipe == SDPA
    assert pulled.notes == (
        f"{FA3}/{pulled.place.variant} was left out: it needs 9.0a for the kernel {pinned.repo}, "
        "and here is sm_100 (fake B200); to take it or nothing: --recipe bfloat16-fa3",
    )


@pytest.mark.parametrize("lack", ["gone", "untrusted"])
def test_who_names_it_has_the_error_by_name(
    publish: Publish,
    push: Callable[..., str],
    settings: Settings,
    repo: str,
    endpoint: Endpoint,
    lack: str,
) -> None:
    pinned = publish(f"stranger/{repo.partition('/')[2]}")
    push(pinned)
    if lack == "gone":
        Trust(settings.trust).add(settings.endpoint, "stranger")
        drop_kernel(endpoint, pinned.repo)
    error = KernelMissing if lack == "gone" else Untrusted
    place = pull(repo, settings).considered[0].place
    assert place.recipe == FA3
    with pytest.raises(error, match=pinned.repo):
        pull(repo, settings, FA3)
    with pytest.raises(error, match=pinned.repo):
        pull(repo, settings, place=place)
    lock = settings.home / "hubaoti.lock"
    api.lock(repo, settings=settings).write(lock)
    with pytest.raises(error, match=pinned.repo):
        pull(repo, settings, locked=lock)


def test_where_there_is_nothing_else_the_error_stays(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str, endpoint: Endpoint
) -> None:
    pinned = publish(f"stranger/{repo.partition('/')[2]}")
    push(pinned, "fa3")
    with pytest.raises(Untrusted, match="stranger publishes the kernel") as refused:
        pull(repo, settings)
    assert "or pull a recipe that calls no kernel" in refused.value.hint
    Trust(settings.trust).add(settings.endpoint, "stranger")
    drop_kernel(endpoint, pinned.repo)
    with pytest.raises(KernelMissing, match=f"{pinned} cannot be had"):
        pull(repo, settings)


def test_bytes_that_are_not_the_pinned_ones_are_gone_around_by_nobody(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str, proxy: Proxy
) -> None:
    push(publish(f"{repo}-kernel"))
    proxy.matching, proxy.flip = "_ops.py", True
    for recipe in (None, FA3):
        with pytest.raises(KernelDigestMismatch):
            pull(repo, settings, recipe)
    with Mirror.open(settings.mirror) as mirror:
        assert not mirror.ls()


def test_a_kernel_that_cannot_be_asked_for_now_is_no_reason_for_another_artifact(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str, proxy: Proxy
) -> None:
    push(publish(f"{repo}-kernel"))
    proxy.matching, proxy.status = "/api/kernels/", 500
    with pytest.raises(KernelMissing) as refused:
        pull(repo, settings)
    assert isinstance(refused.value.__cause__, HubUnreachable)


# Offline


def test_offline_the_best_of_what_is_here_is_taken(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str
) -> None:
    pinned = publish(f"{repo}-kernel")
    name, offline = f"{repo}@{push(pinned)}", replace(settings, offline=True)
    assert pull(name, settings).place.recipe == FA3
    assert pull(name, offline).place.recipe == FA3
    shutil.rmtree(settings.mirror / "kernels")
    with pytest.raises(KernelMissing, match=f"{pinned} cannot be had"):
        pull(name, offline)  # nothing else is here
    pull(name, settings, SDPA)
    pulled = pull(name, offline)
    assert (pulled.place.recipe, pulled.from_mirror) == (SDPA, True)
    assert f"it needs the kernel {pinned}" in pulled.notes[0]
    assert "HF_HUB_OFFLINE is set" in pulled.notes[0]
    with pytest.raises(KernelMissing, match=f"{pinned} cannot be had"):
        pull(name, offline, FA3)
    assert pull(name, settings).place.recipe == FA3  # and its kernel comes back


def test_what_was_taken_in_its_place_is_there_offline(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str, endpoint: Endpoint
) -> None:
    pinned = publish(f"{repo}-kernel")
    name, offline = f"{repo}@{push(pinned)}", replace(settings, offline=True)
    with pytest.raises(HubUnreachable):
        pull(name, offline)
    drop_kernel(endpoint, pinned.repo)
    pull(name, settings)
    for recipe in (None, SDPA):
        assert pull(name, offline, recipe).place.recipe == SDPA
    with pytest.raises(HubUnreachable):
        pull(name, offline, FA3)
    Trust(settings.trust).remove(settings.endpoint, "acme")
    with pytest.raises(Untrusted, match="acme"):
        pull(name, offline)


# What explain says


def explain(repo: str, settings: Settings) -> dict[Recipe, Considered]:
    found = api.explain_repo(repo, host=HOST, settings=settings).considered
    return {each.place.recipe: each for each in found}


def test_explain_says_of_each_what_a_pull_would(
    publish: Publish,
    push: Callable[..., str],
    settings: Settings,
    repo: str,
    endpoint: Endpoint,
    proxy: Proxy,
) -> None:
    pinned = publish(f"stranger/{repo.partition('/')[2]}")
    push(pinned)
    found = explain(repo, settings)
    assert [*found] == [SDPA, FA3], "the one that is pulled is the first"
    verdict = found[FA3].verdict
    assert verdict is not None and verdict.fit is MatchResult.INCOMPATIBLE
    (lack,) = verdict.refusals
    assert lack.need == f"the kernel {pinned}"
    assert "stranger is not trusted here" in lack.have
    assert "hubaoti trust add stranger" in lack.advice
    assert not [path for _, path in proxy.requests if "stranger" in path]
    Trust(settings.trust).add(settings.endpoint, "stranger")
    proxy.requests.clear()
    assert [*explain(repo, settings)] == [FA3, SDPA]
    assert len([path for _, path in proxy.requests if "stranger" in path]) <= 2
    assert not [*settings.mirror.glob("kernels/*")], "nothing is fetched"
    pull(repo, settings)
    proxy.requests.clear()
    assert [*explain(repo, settings)] == [FA3, SDPA]
    assert not [path for _, path in proxy.requests if "stranger" in path]
    shutil.rmtree(settings.mirror / "kernels")
    drop_kernel(endpoint, pinned.repo)
    lost = explain(repo, settings)[FA3].verdict
    assert lost is not None and "shows no such repo" in lost.refusals[0].have


def test_explain_of_a_commit_that_was_pulled_needs_no_network(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str
) -> None:
    pinned = publish(f"{repo}-kernel")
    name, offline = f"{repo}@{push(pinned)}", replace(settings, offline=True)
    with pytest.raises(HubUnreachable):
        explain(name, offline)
    pull(name, settings)
    assert [*explain(name, offline)] == [FA3]
    pull(name, settings, SDPA)
    assert [*explain(name, offline)] == [FA3, SDPA]
    shutil.rmtree(settings.mirror / "kernels")
    assert [*explain(name, offline)] == [SDPA, FA3]
    notes = api.explain_repo(name, host=HOST, settings=offline).notes
    assert "there may be others" in notes[0]


def test_no_kernel_is_asked_for_where_none_is_called(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str, proxy: Proxy
) -> None:
    push(publish(f"{repo}-kernel"), "sdpa")
    explain(repo, settings)
    pull(repo, settings)
    assert not [path for _, path in proxy.requests if "/kernels/" in path]


def test_the_command_says_the_line_once_more_when_it_is_done(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str, tmp_path: Path
) -> None:
    pinned = publish(f"stranger/{repo.partition('/')[2]}")
    push(pinned)
    host = tmp_path / "host.json"
    host.write_bytes(msgspec.json.encode(HOST.to_dict(), enc_hook=str))
    told = inside(settings, "pull", repo, "--host", host)
    assert "bfloat16-sdpa/" in told.out
    assert f"was left out: it needs the kernel {pinned}" in told.out
    assert "hubaoti trust add stranger" in told.out
    said = inside(settings, "explain", repo, "--host", host).out
    assert f"refused       {FA3}/" in said
    assert f"    needs the kernel {pinned}; here is none that may be used: stranger" in said


# Wherever else the best is chosen


def test_an_engine_takes_of_the_mirror_what_has_its_kernel(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str, tmp_path: Path
) -> None:
    push(publish(f"{repo}-kernel"))
    for recipe in (FA3, SDPA):
        pull(repo, settings, recipe)
    wanted = Wanted(tmp_path / "model", "embed", "cuda", HOST)

    def find(settings: Settings) -> str:
        found = find_in_mirror(wanted, settings)
        assert found is not None
        return found.manifest.build.attention

    offline = replace(settings, offline=True)
    assert find(offline) == "fa3"
    shutil.rmtree(settings.mirror / "kernels")
    assert find(offline) == "sdpa"
    assert find(settings) == "fa3", "it comes again"


def test_among_repos_and_for_a_fleet_it_is_left_out_as_well(
    publish: Publish, push: Callable[..., str], settings: Settings, repo: str
) -> None:
    pinned = publish(f"stranger/{repo.partition('/')[2]}")
    commit, ref = push(pinned), RepoRef(repo)
    told: list[str] = []
    with Mirror.open(settings.mirror) as mirror:
        puller = Puller(mirror, settings, HOST, progress=told.append)

        def choose() -> tuple[Recipe, list[Recipe]]:
            (look,) = survey(puller, [ref], None, lambda _: commit)
            assert look.best is not None
            catalogs = [read_revision_catalog(puller, ref)]
            fleet = pull_fleet(puller, ref, catalogs, frozenset({"cuda"}))
            return look.best.place.recipe, [each.place.recipe for each in fleet]

        assert choose() == (SDPA, [SDPA])
        assert [line for line in told if "was left out: it needs the kernel" in line]
        Trust(settings.trust).add(settings.endpoint, "stranger")
        assert choose() == (FA3, [FA3, SDPA])
        shutil.rmtree(settings.mirror / "kernels")
        offline = replace(puller, settings=replace(settings, offline=True))
        assert [each.place.recipe for each in find_pulled(offline, ref)] == [SDPA]
