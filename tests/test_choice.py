"""Which artifact is chosen: the one that reading every manifest would, and few are read."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import CPU, CUDA, make_bundle, make_gpu_host, make_host
from proxies import Proxy

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME, Manifest
from hubaoti.artifact.variant import Recipe
from hubaoti.errors import NoMatch
from hubaoti.host.match import MatchResult, judge
from hubaoti.host.probe import Gpu, Host, Torch
from hubaoti.hub.catalog import Catalog
from hubaoti.hub.choice import choose_artifact, judge_catalog, judge_path, rank_considered
from hubaoti.hub.layout import ArtifactPath, RepoRef, artifact_path
from hubaoti.hub.pull import pull_artifact
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.settings import Settings

RELEASES = ("2.11.0", "2.12.1", "2.13.0", "2.13.1", "2.14.0")
SMS = (75, 80, 86, 90, 120)
KINDS = [
    *({**CPU, "torch": f"{release}+cpu"} for release in RELEASES),
    *({**CUDA, "torch": f"{release}+cu130", "sm": sm} for release in RELEASES for sm in SMS),
]
BUILDS = [
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "attention": "fa3"},
    {"dtype": "bfloat16", "quantization": "int8wo"},
]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[ArtifactPath, Manifest]:
    """Manifests of many kinds of host and build, by their paths: of one path the last."""
    folder = tmp_path_factory.mktemp("bundles")
    levels = ("x86_64_v3", "x86_64_v4")
    made = {}
    for at, (kind, build, level) in enumerate(itertools.product(KINDS, BUILDS, levels)):
        bundle = make_bundle(folder / str(at), target={**kind, "level": level}, **build)
        made[artifact_path(bundle.manifest)] = bundle.manifest
    return made


class Reader:
    """Reads the manifests that are asked for, and counts them."""

    def __init__(self, manifests: dict[ArtifactPath, Manifest]) -> None:
        self.manifests, self.read = manifests, dict[ArtifactPath, Manifest]()

    def __call__(self, places: Iterable[ArtifactPath]) -> Catalog:
        self.read |= {place: self.manifests[place] for place in places}
        return Catalog("a/b", "c" * 40, {}, {**self.read}, ())


def with_torch(host: Host, release: str) -> Host:
    cuda = host.torch.cuda if host.torch else None
    local = "cpu" if cuda is None else "cu130"
    return replace(host, torch=Torch(f"{release}+{local}", cuda, None, Path("/torch")))


HOSTS = {
    "a CPU": make_host(),
    "a newer patch": with_torch(make_host(), "2.13.2"),
    "a better CPU": make_host(level="x86_64_v4", cpu="skylake_avx512"),
    "an H100": make_gpu_host(),
    "an H100 with another patch": with_torch(make_gpu_host(), "2.12.0"),
    "a GPU that has none of its own": replace(make_gpu_host(), gpus=(Gpu("fake", 87, None),)),
    "two GPUs": replace(make_gpu_host(), gpus=(Gpu("fake", 80, None), Gpu("fake", 90, None))),
    "an old driver": replace(make_gpu_host(), driver_cuda="12.0"),
    "a torch of tomorrow": with_torch(make_host(), "2.15.0.dev1"),
    "no torch": make_host(torch=None),
    "a Mac": make_host(os="darwin", level="aarch64"),
}
DOWNLOADED = re.compile(r"\.pt2|\.safetensors|/_cas/|xet-read-token")
RECIPES = (None, "bfloat16-fa3", "bfloat16-sdpa-int8wo", "float32-sdpa+mine")


@pytest.mark.parametrize(("name", "recipe"), [*itertools.product(HOSTS, RECIPES)])
def test_what_is_chosen_is_what_reading_everything_would_choose(
    manifests: dict[ArtifactPath, Manifest], name: str, recipe: str | None
) -> None:
    host, wanted = HOSTS[name], Recipe.parse(recipe) if recipe else None
    reader = Reader(manifests)
    chosen, looked = choose_artifact(manifests, reader, host, wanted)
    every = Catalog("a/b", "c" * 40, {}, {**manifests}, ())
    best = rank_considered(judge_catalog(every, lambda needs: judge(needs, host)), wanted)
    assert (chosen and chosen.place) == (best[0].place if best else None)
    for each in looked:
        truly = judge(manifests[each.place].requires, host)
        assert each.verdict is not None and each.verdict.fit is truly.fit
    if chosen and chosen.verdict and chosen.verdict.fit is MatchResult.EXACT:
        assert len(reader.read) <= 2


@pytest.mark.parametrize("name", HOSTS)
def test_a_path_promises_no_less_than_its_manifest_holds(
    manifests: dict[ArtifactPath, Manifest], name: str
) -> None:
    order = tuple(MatchResult)
    for place, manifest in manifests.items():
        most = judge_path(place.variant, HOSTS[name]).fit
        truly = judge(manifest.requires, HOSTS[name]).fit
        assert order.index(most) <= order.index(truly), place


@pytest.fixture
def two_hundred(tmp_path: Path) -> list[Bundle]:
    """Bundles of 200 variants, of five torches, ten devices, two levels and two dtypes."""
    devices = [CPU, *({**CUDA, "sm": sm} for sm in (70, 75, 80, 86, 87, 89, 90, 100, 120))]
    series = ("2.11.0", "2.12.0", "2.13.0", "2.14.0", "2.15.0")
    dtypes, levels = ("float32", "bfloat16"), ("x86_64_v3", "x86_64_v4")
    bundles = []
    for device, release, level, dtype in itertools.product(devices, series, levels, dtypes):
        local = device["torch"].partition("+")[2]
        target = {**device, "torch": f"{release}+{local}", "level": level}
        folder = tmp_path / f"bundle-{len(bundles)}"
        bundles.append(make_bundle(folder, target=target, dtype=dtype))
    assert len(bundles) == 200
    return bundles


def test_of_two_hundred_variants_at_most_four_requests_go_before_the_download(
    two_hundred: list[Bundle], repo: str, settings: Settings, proxy: Proxy
) -> None:
    push_bundles(two_hundred, Destination(RepoRef(repo), tag="v1.0.0"), settings)
    another = replace(make_gpu_host(), gpus=(Gpu("fake", 80, None),))
    revisions = {None: make_gpu_host(), "v1.0.0": make_host(), "v1": another}
    for revision, host in revisions.items():
        ref = RepoRef(repo, revision)
        proxy.requests.clear()
        pulled = pull_artifact(ref, settings, host, trust=True)
        assert pulled.verdict.fit is MatchResult.EXACT
        asked = [path for _, path in proxy.requests]
        before = [*itertools.takewhile(lambda path: not DOWNLOADED.search(path), asked)]
        assert len(before) <= 4, before
        read = {path for path in before if path.endswith(FILENAME)}
        assert len(read) == 1
    with pytest.raises(NoMatch) as why:  # of all of them, why
        pull_artifact(RepoRef(repo), settings, make_host(os="darwin"))
    assert str(why.value).count("needs the operating system linux") > 20
