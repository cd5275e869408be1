"""Pull: pins, judges all, asks for trust, verifies each byte, and asks nothing twice."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from bundles import (
    CPU,
    CUDA,
    changed,
    make_bundle,
    make_file_entry,
    make_gpu_host,
    make_host,
    tree_of,
    write_zip,
)
from commands import hubaoti
from disks import read_only
from huggingface_hub import HfApi
from proxies import Proxy

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.canonical import encode_canonical
from hubaoti.artifact.manifest import FILENAME
from hubaoti.artifact.variant import Recipe
from hubaoti.errors import (
    AuthFailed,
    BadLock,
    BadManifest,
    BadPackage,
    BadRequest,
    DigestMismatch,
    DiskFull,
    HubaotiError,
    HubUnreachable,
    NewerSchema,
    NoArtifact,
    NoMatch,
    RepoNotFound,
    Untrusted,
)
from hubaoti.host.extras import format_install
from hubaoti.host.match import MatchResult
from hubaoti.host.probe import Gpu, Host, Torch
from hubaoti.hub.choice import Pulled
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import ArtifactPath, RepoRef, artifact_path
from hubaoti.hub.pull import fingerprint, pull_artifact
from hubaoti.hub.push import Commit, Destination, push_bundles
from hubaoti.mirror import Mirror
from hubaoti.mirror.trust import Trust
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

HOST = make_host()


def ship(
    tmp_path: Path, repo: str, settings: Settings, name: str = "bundle", **make: object
) -> Commit:
    bundle = make_bundle(tmp_path / name, **make)  # type: ignore[arg-type]
    return push_bundles([bundle], Destination(RepoRef(repo)), settings)


def get(repo: str, settings: Settings, **wish: object) -> Pulled:
    return pull_artifact(RepoRef.parse(repo), settings, HOST, trust=True, **wish)  # type: ignore[arg-type]


def upload(repo: str, settings: Settings, files: dict[str, bytes]) -> str:
    """Put files into a repo as anyone could, without our checks; the commit."""
    api = HfApi(settings.endpoint, token=settings.token)
    api.create_repo(repo, exist_ok=True)
    for path, content in files.items():
        oid = api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo).oid
    return str(oid)


def upload_bundle(repo: str, settings: Settings, bundle: Bundle) -> str:
    """Put a bundle into a repo whatever it holds."""
    place = artifact_path(bundle.manifest)
    names = tree_of(bundle.path)
    files = {place.file(name): (bundle.path / name).read_bytes() for name in names}
    return upload(repo, settings, files)


def left_over(settings: Settings) -> list[str]:
    """What lies in the mirror beside its index and the transport's folder."""
    names = tree_of(settings.mirror)
    return [name for name in names if not name.startswith(("index.sqlite3", "hub/", "locks/"))]


def test_a_pushed_bundle_is_pulled_byte_for_byte(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    made = ship(tmp_path, repo, settings)
    pulled = get(repo, settings)
    assert pulled.artifact.digest == made.digest
    assert pulled.commit == made.commit
    assert str(pulled.place) == made.path
    assert pulled.verdict.fit is MatchResult.EXACT
    assert not pulled.from_mirror
    graph = pulled.artifact.manifest.graphs[0]
    unpacked = tree_of(pulled.artifact.graph_folder(graph))
    assert unpacked == {member.path: member.sha256 for member in graph.members}
    small = tree_of(pulled.artifact.path)
    assert small.keys() == {FILENAME, "golden.safetensors"}
    with Mirror.open(settings.mirror) as mirror:
        mirror.verify(pulled.artifact)
        (row,) = mirror.ls()
    assert (row.origin.repo, row.origin.commit, row.origin.publisher) == (repo, made.commit, "acme")


def test_the_zips_do_not_stay_once_they_are_unpacked(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    ship(tmp_path, repo, settings)
    assert get(repo, settings).artifact
    kept = {Path(name).name for name in tree_of(settings.mirror / "hub")}
    assert not any(name.endswith((".pt2", ".safetensors", ".incomplete")) for name in kept)


def test_a_second_pull_asks_nothing_but_the_revision(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    ship(tmp_path, repo, settings)
    get(repo, settings)
    proxy.requests.clear()
    again = get(repo, settings)
    assert again.from_mirror
    assert proxy.requests == [("GET", f"/api/models/{repo}")]


def test_huggingface_hub_asks_nothing_of_its_own(
    tmp_path: Path,
    repo: str,
    settings: Settings,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ship(tmp_path, repo, settings)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    assert hubaoti(settings, "pull", repo, "--trust").code == 0
    proxy.requests.clear()
    assert hubaoti(settings, "pull", repo).code == 0
    assert proxy.requests == [("GET", f"/api/models/{repo}")]


def test_a_second_pull_of_a_full_commit_asks_nothing(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    made = ship(tmp_path, repo, settings)
    get(repo, settings)
    proxy.requests.clear()
    again = get(f"{repo}@{made.commit}", settings)
    assert again.from_mirror
    assert proxy.requests == []


def test_only_the_chosen_artifacts_graphs_are_fetched(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    ship(tmp_path, repo, settings, "cpu")
    ship(tmp_path, repo, settings, "cuda", target=CUDA)
    proxy.requests.clear()
    get(repo, settings)
    fetched = {path for _, path in proxy.requests if "/resolve/" in path}
    graphs = {path for path in fetched if not path.endswith(FILENAME)}
    assert graphs and all("torch2.13-cpu-" in path for path in graphs)


def test_a_warm_pull_never_imports_the_hubs_client(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    made = ship(tmp_path, repo, settings)
    get(repo, settings)
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; from bundles import make_host\n"
        "from hubaoti.hub.layout import RepoRef; from hubaoti.hub.pull import pull_artifact\n"
        "from hubaoti.settings import Settings\n"
        f"settings = Settings(home=Path({str(settings.home)!r}), endpoint={settings.endpoint!r})\n"
        f"pulled = pull_artifact(RepoRef({repo!r}, {made.commit!r}), settings, make_host())\n"
        "assert pulled.from_mirror\n"
        "heavy = {'huggingface_hub', 'torch', 'httpx', 'jinja2', 'numpy'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_host_that_changed_chooses_anew(tmp_path: Path, repo: str, settings: Settings) -> None:
    ship(tmp_path, repo, settings, "cpu")
    ship(tmp_path, repo, settings, "cuda", target=CUDA)
    assert get(repo, settings).place.variant.device == "cpu"
    moved = pull_artifact(RepoRef(repo), settings, make_gpu_host(), trust=True)
    assert moved.place.variant.device == "cuda"
    assert not moved.from_mirror


def test_the_fingerprint_ignores_what_no_verdict_reads() -> None:
    same = replace(HOST, disk_free=5, memory=7, notes=("x",), kernels=frozenset({"a@b"}))
    assert fingerprint(same) == fingerprint(HOST)
    assert fingerprint(replace(HOST, glibc="2.17")) != fingerprint(HOST)


def test_a_mirrored_artifact_that_no_longer_fits_is_not_used(
    tmp_path: Path, repo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(tmp_path, repo, settings)
    get(repo, settings)
    monkeypatch.setattr("hubaoti.hub.pull.fingerprint", lambda _: fingerprint(HOST))
    old = make_host(glibc="2.5")
    with pytest.raises(NoMatch, match="glibc"):
        pull_artifact(RepoRef(repo), settings, old, trust=True)


def test_nothing_that_fits_lists_every_variant_with_every_reason(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    ship(tmp_path, repo, settings, "cpu", target={**CPU, "level": "x86_64_v4"})
    ship(tmp_path, repo, settings, "cuda", target=CUDA)
    old = make_host(torch=Torch("2.12.0+cpu", None, None, Path("/torch")))
    with pytest.raises(NoMatch) as caught:
        pull_artifact(RepoRef(repo), settings, old, trust=True)
    message = str(caught.value)
    for word in ("sm90", "x86_64_v4", "torch 2.12.0+cpu", "no NVIDIA GPU", "a CPU of level"):
        assert word in message
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert left_over(settings) == []


def test_an_asked_recipe_is_a_condition(tmp_path: Path, repo: str, settings: Settings) -> None:
    ship(tmp_path, repo, settings, "plain")
    ship(tmp_path, repo, settings, "small", quantization="int8wo")
    assert get(repo, settings).place.recipe == Recipe("float32", "sdpa")
    quantized = Recipe("float32", "sdpa", "int8wo")
    assert get(repo, settings, recipe=quantized).place.recipe == quantized
    with pytest.raises(NoMatch, match="is not of the recipe bfloat16-sdpa"):
        get(repo, settings, recipe=Recipe("bfloat16", "sdpa"))


NAMED = "float32-sdpa/torch2.13-cpu-x86_64_v3-linux"
WITHOUT_TORCH = make_host(torch=None)


def named(repo: str, settings: Settings, path: str = NAMED, host: Host = WITHOUT_TORCH) -> Pulled:
    return pull_artifact(
        RepoRef.parse(repo), settings, host, place=ArtifactPath.parse(path), trust=True
    )


def test_a_named_artifact_is_fetched_without_a_torch_and_says_which_it_needs(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    ship(tmp_path, repo, settings)
    for from_mirror in (False, True):
        pulled = named(repo, settings)
        assert (str(pulled.place), pulled.from_mirror) == (NAMED, from_mirror)
        (note,) = pulled.verdict.notes
        assert (pulled.verdict.fit, note.need) == (MatchResult.COMPATIBLE, "torch 2.13.0+cpu")
        assert note.have == "no torch"
        assert "torch==2.13.0" in note.advice


def test_a_named_artifact_is_judged_by_everything_but_its_torch(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    libraries = ("libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libcudart.so.13", "libodd.so.2")
    bundle = make_bundle(tmp_path / "odd")
    requires = replace(bundle.manifest.requires, libraries=libraries, glibc="2.17")
    push_bundles([changed(bundle, requires=requires)], Destination(RepoRef(repo)), settings)
    with pytest.raises(NoMatch, match="the libraries libodd.so.2") as caught:
        named(repo, settings)
    assert not any(word in str(caught.value) for word in ("no torch", "libtorch", "libcudart"))
    old = replace(WITHOUT_TORCH, libraries=frozenset({"libodd.so.2"}), glibc="2.5")
    with pytest.raises(NoMatch, match=r"needs glibc 2\.17"):
        named(repo, settings, host=old)
    assert left_over(settings) == []


def test_a_named_artifact_for_another_torch_is_refused_where_there_is_one(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    ship(tmp_path, repo, settings)
    named(repo, settings)  # it is in the mirror
    other = make_host(torch=Torch("2.12.0+cpu", None, None, Path("/torch")))
    with pytest.raises(NoMatch, match="here is torch 2.12.0"):
        named(repo, settings, host=other)
    assert named(repo, settings, host=HOST).verdict.fit is MatchResult.EXACT


@pytest.mark.parametrize("torch", [None, Torch("2.13.0+cu130", "13.0", None, Path("/torch"))])
def test_a_named_artifact_for_a_gpu_is_fetched_where_none_is(
    tmp_path: Path, repo: str, settings: Settings, torch: Torch | None
) -> None:
    """As for an image, which is made on a machine without one."""
    (made,) = ship(tmp_path, repo, settings, "cuda", target=CUDA).artifacts
    pulled = named(repo, settings, made.path, make_host(torch=torch))
    needs = [note.need for note in pulled.verdict.notes]
    assert needs[-1] == f"an NVIDIA GPU of sm_{CUDA['sm']}"
    assert pulled.verdict.fit is MatchResult.COMPATIBLE
    other = make_host(torch=torch, gpus=(Gpu("a GPU", 75, 1 << 40),))
    with pytest.raises(NoMatch, match=r"sm_75"):
        named(repo, settings, made.path, other)


def test_a_named_artifact_is_the_only_one_that_is_looked_at(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    ship(tmp_path, repo, settings, "plain")
    ship(tmp_path, repo, settings, "small", quantization="int8wo")
    small = NAMED.replace("sdpa", "sdpa-int8wo")
    pulled = named(repo, settings, small)
    assert [str(each.place) for each in pulled.considered] == [small] == [str(pulled.place)]
    with pytest.raises(NoArtifact, match=r"holds no artifact float32-fa3/") as caught:
        named(repo, settings, NAMED.replace("sdpa", "fa3"))
    assert NAMED in caught.value.hint and small in caught.value.hint
    with pytest.raises(BadRequest, match="a recipe is asked for, and a path"):
        get(repo, settings, recipe=Recipe("float32", "sdpa"), place=ArtifactPath.parse(NAMED))


def test_where_no_torch_is_installed_a_choice_says_to_install_one(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    ship(tmp_path, repo, settings)
    with pytest.raises(NoMatch, match="no torch is installed here") as caught:
        pull_artifact(RepoRef(repo), settings, WITHOUT_TORCH, trust=True)
    series = CPU["torch"].rpartition(".")[0]
    both = f'pip install "torch=={series}.*", then {format_install("run")};'
    assert both in caught.value.hint, "the extra alone would bring another torch"
    assert f"hubaoti pull {repo} --path {NAMED}" in caught.value.hint


def test_a_quantized_artifact_alone_is_offered_not_taken(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    ship(tmp_path, repo, settings, quantization="int8wo")
    with pytest.raises(NoMatch, match="--recipe float32-sdpa-int8wo"):
        get(repo, settings)


def test_a_repo_without_artifacts_says_so(repo: str, settings: Settings) -> None:
    upload(repo, settings, {"weights.txt": b"none", f"odd/{FILENAME}": b"{}"})
    with pytest.raises(NoArtifact, match=f"odd/{FILENAME} is ignored") as caught:
        get(repo, settings)
    assert caught.value.exit_code == 14


def test_a_missing_repo_and_a_missing_revision_say_so(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    with pytest.raises(RepoNotFound, match="acme/absent"):
        get("acme/absent", settings)
    ship(tmp_path, repo, settings)
    with pytest.raises(RepoNotFound, match="revision.*nine"):
        get(f"{repo}@nine", settings)
    with pytest.raises(RepoNotFound):
        get(f"{repo}@{'0' * 40}", settings)


def test_who_names_a_tag_that_is_not_there_is_told_of_those_that_are(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    made, hub = ship(tmp_path, repo, settings), HubClient(settings)
    with pytest.raises(RepoNotFound) as caught:
        get(f"{repo}@nine", settings)
    assert caught.value.hint.startswith("check the name")
    for at in range(12):
        hub.tag(repo, f"v{at:02}", made.commit)
    with pytest.raises(RepoNotFound) as caught:
        get(f"{repo}@ninety", settings)
    assert caught.value.hint.startswith("its tags are v11, v10, v09,")
    assert "v02 and 2 more; check the name" in caught.value.hint


NEWER = encode_canonical({"schema": 5, "something": "else"})
PLACE = "float32-sdpa/torch2.13-cpu-x86_64_v4-linux"


def test_a_newer_manifest_hides_no_good_one(tmp_path: Path, repo: str, settings: Settings) -> None:
    ship(tmp_path, repo, settings)
    better = NAMED.replace("sdpa", "fa3")
    upload(repo, settings, {f"{better}/{FILENAME}": NEWER})
    pulled = get(repo, settings)
    bad = [each for each in pulled.considered if each.error is not None]
    assert [type(each.error) for each in bad] == [NewerSchema]
    assert [str(each.place) for each in bad] == [better]


def test_a_manifest_that_its_path_rules_out_is_not_even_read(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    ship(tmp_path, repo, settings)
    upload(repo, settings, {f"{PLACE}/{FILENAME}": NEWER})
    proxy.requests.clear()
    pulled = get(repo, settings)
    ruled_out = [each for each in pulled.considered if each.verdict and each.verdict.refusals]
    assert [str(each.place) for each in ruled_out] == [PLACE]
    assert not [path for _, path in proxy.requests if PLACE in path]


@pytest.mark.parametrize(
    ("content", "error"), [(NEWER, NewerSchema), (b"{", BadManifest), (b"\xff" * 99, BadManifest)]
)
def test_a_manifest_alone_that_cannot_be_read_says_why(
    repo: str, settings: Settings, content: bytes, error: type[HubaotiError]
) -> None:
    upload(repo, settings, {f"{PLACE}/{FILENAME}": content})
    with pytest.raises(error, match=PLACE) as caught:
        get(repo, settings)
    assert type(caught.value) is error
    assert caught.value.hint


def test_an_artifact_under_another_ones_path_is_refused(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    bundle = make_bundle(tmp_path / "bundle", target={**CPU, "level": "x86_64_v4"})
    content = (bundle.path / FILENAME).read_bytes()
    upload(repo, settings, {f"float32-sdpa/torch2.13-cpu-x86_64_v2-linux/{FILENAME}": content})
    with pytest.raises(BadManifest, match="describes float32-sdpa/torch2.13-cpu-x86_64_v4"):
        get(repo, settings)


def test_strangers_code_is_not_fetched(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    made = ship(tmp_path, repo, settings)
    proxy.requests.clear()
    with pytest.raises(Untrusted) as caught:
        pull_artifact(RepoRef(repo), settings, HOST)
    for word in ("acme", settings.endpoint, repo, made.commit, made.digest, "native code"):
        assert word in str(caught.value)
    assert "--trust" in caught.value.hint
    assert not [path for _, path in proxy.requests if ".pt2" in path]
    assert left_over(settings) == []


def test_a_publisher_is_trusted_once_for_all(tmp_path: Path, repo: str, settings: Settings) -> None:
    ship(tmp_path, repo, settings)
    get(repo, settings)
    assert pull_artifact(RepoRef(repo), settings, HOST).from_mirror
    ship(tmp_path, f"{repo}-2", settings, "second", mode="other")
    assert not pull_artifact(RepoRef(f"{repo}-2"), settings, HOST).from_mirror


def test_a_publisher_that_lost_trust_is_not_opened_from_the_mirror(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    made = ship(tmp_path, repo, settings)
    get(repo, settings)
    assert Trust(settings.trust).remove(settings.endpoint, "acme")
    with pytest.raises(Untrusted):
        pull_artifact(RepoRef(repo, made.commit), settings, HOST)


def test_what_this_machine_built_needs_no_trust(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    push_bundles([bundle], Destination(RepoRef(repo)), settings)
    with Mirror.open(settings.mirror) as mirror:
        mirror.index.record_built(bundle.manifest)
    assert pull_artifact(RepoRef(repo), settings, HOST).artifact.digest == bundle.manifest.digest
    assert not settings.trust.exists()
    assert pull_artifact(RepoRef(repo), settings, HOST, trust=True).from_mirror
    assert Trust(settings.trust).holds(settings.endpoint, "acme")  # which was said


def test_another_endpoint_with_the_same_names_is_another_publisher(
    tmp_path: Path, repo: str, settings: Settings, endpoint: Endpoint
) -> None:
    ship(tmp_path, repo, settings)
    Trust(settings.trust).add(settings.endpoint, RepoRef(repo).owner)
    other = replace(settings, endpoint=endpoint.url)
    with pytest.raises(Untrusted):
        pull_artifact(RepoRef(repo), other, HOST)
    get(repo, settings)
    assert pull_artifact(RepoRef(repo), other, HOST).artifact, "its bytes are known to be theirs"


def test_a_flipped_bit_on_the_way_is_never_opened(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    ship(tmp_path, repo, settings)
    proxy.matching, proxy.flip = ".pt2", True
    with pytest.raises(DigestMismatch, match="root.pt2") as caught:
        get(repo, settings)
    assert caught.value.exit_code == 10
    assert left_over(settings) == []
    proxy.reset()
    assert get(repo, settings).artifact  # and the bad copy does not stay in the way


def test_a_flipped_bit_in_a_manifest_is_never_believed(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    ship(tmp_path, repo, settings)
    proxy.matching, proxy.flip = FILENAME, True
    with pytest.raises(DigestMismatch, match="gives other bytes"):
        get(repo, settings)
    proxy.reset()
    assert get(repo, settings).artifact


def test_a_connection_dropped_in_the_middle_leaves_nothing(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client's patience between its retries
    ship(tmp_path, repo, settings)
    proxy.matching, proxy.cut_after = ".pt2", 100
    with pytest.raises(HubUnreachable, match=settings.endpoint) as caught:
        get(repo, settings)
    assert caught.value.exit_code == 17
    assert left_over(settings) == []
    assert not list(settings.mirror.rglob("*.incomplete"))
    proxy.reset()
    assert get(repo, settings).artifact


def test_a_repo_with_a_truncated_package_is_refused_before_it_is_fetched(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    package = bundle.path / "graphs/root.pt2"
    package.write_bytes(package.read_bytes()[:-10])
    upload_bundle(repo, settings, bundle)
    proxy.requests.clear()
    with pytest.raises(DigestMismatch, match="root.pt2 has"):
        get(repo, settings)
    assert not [path for _, path in proxy.requests if ".pt2" in path]


def test_a_repo_without_a_listed_file_says_which(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle.path / "golden.safetensors").unlink()
    upload_bundle(repo, settings, bundle)
    with pytest.raises(DigestMismatch, match="golden.safetensors is missing"):
        get(repo, settings)


@pytest.mark.parametrize("name", ["../evil.so", "/tmp/evil.so", "model/../../evil.so"])
def test_a_package_that_points_outside_is_never_unpacked(
    tmp_path: Path, repo: str, settings: Settings, name: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    graph = bundle.manifest.graphs[0]
    package = bundle.path / graph.file
    write_zip(package, {"model/root.so": b"good", name: b"evil"})
    content = package.read_bytes()
    entry = make_file_entry(bundle.path, graph.file)
    hostile = msgspec.structs.replace(graph, sha256=entry.sha256, size=len(content))
    upload_bundle(repo, settings, changed(bundle, graphs=(hostile,)))
    with pytest.raises(BadPackage, match=f"linux of {repo}: .*leads outside") as caught:
        get(repo, settings)
    assert "publisher" in caught.value.hint
    assert left_over(settings) == []
    assert not list(tmp_path.rglob("evil.so"))


def test_an_entry_that_no_manifest_lists_is_not_unpacked(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    graph = bundle.manifest.graphs[0]
    fewer = msgspec.structs.replace(graph, members=graph.members[:1])
    upload_bundle(repo, settings, changed(bundle, graphs=(fewer,)))
    pulled = get(repo, settings)
    assert tree_of(pulled.artifact.graph_folder(fewer)).keys() == {graph.members[0].path}


def test_too_small_a_disk_is_found_before_anything_is_fetched(
    tmp_path: Path, repo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, proxy: Proxy
) -> None:
    ship(tmp_path, repo, settings)
    monkeypatch.setattr("hubaoti.disk.free_bytes", lambda _: 100)
    proxy.requests.clear()
    with pytest.raises(DiskFull, match="needed") as caught:
        get(repo, settings)
    assert caught.value.exit_code == 18
    assert not [path for _, path in proxy.requests if ".pt2" in path]


def test_a_broken_copy_in_the_mirror_is_fetched_again(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    ship(tmp_path, repo, settings)
    artifact = get(repo, settings).artifact
    graph = artifact.manifest.graphs[0]
    member = artifact.graph_folder(graph) / graph.members[1].path
    member.chmod(0o600)
    member.write_bytes(bytes(graph.members[1].size))
    with Mirror.open(settings.mirror) as mirror, pytest.raises(DigestMismatch, match=member.name):
        mirror.verify_graph(graph)
    again = get(repo, settings)
    assert not again.from_mirror
    with Mirror.open(settings.mirror) as mirror:
        mirror.verify(again.artifact)


def test_a_new_commit_of_the_same_artifact_fetches_no_graph(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    ship(tmp_path, repo, settings)
    get(repo, settings)
    upload(repo, settings, {"notes.txt": b"more"})
    proxy.requests.clear()
    assert not get(repo, settings).from_mirror
    assert not [path for _, path in proxy.requests if ".pt2" in path]


def test_many_pulls_at_once_all_get_it(tmp_path: Path, repo: str, settings: Settings) -> None:
    ship(tmp_path, repo, settings)
    with ThreadPoolExecutor(4) as pool:
        pulls = [pool.submit(get, repo, settings) for _ in range(4)]
        digests = {each.result().artifact.digest for each in pulls}
    assert len(digests) == 1
    assert left_over(settings)
    with Mirror.open(settings.mirror) as mirror:
        mirror.verify(get(repo, settings).artifact)


def test_a_private_repo_is_shown_to_its_token_only(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    made = push_bundles([bundle], Destination(RepoRef(repo), private=True), settings)
    assert made.private
    assert get(repo, settings).artifact.digest == made.digest
    stranger = replace(settings, home=tmp_path / "other", token=None)
    with pytest.raises((RepoNotFound, AuthFailed)) as caught:
        get(repo, stranger)
    assert "HF_TOKEN" in caught.value.hint
    with pytest.raises((RepoNotFound, AuthFailed)) as caught:
        get(repo, replace(stranger, token="hf_wrong"))
    assert "hf_wrong" not in str(caught.value) + caught.value.hint


def test_offline_only_a_pulled_commit_is_there(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    made = ship(tmp_path, repo, settings)
    get(repo, settings)
    proxy.requests.clear()
    offline = dataclasses.replace(settings, offline=True)
    assert get(f"{repo}@{made.commit}", offline).from_mirror
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE"):
        get(repo, offline)
    assert proxy.requests == []


def test_a_home_in_a_read_only_image_gives_the_commits_that_are_in_it(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    made = ship(tmp_path, repo, settings)
    get(repo, settings)
    upload(repo, settings, {"notes.txt": b"more"})
    proxy.requests.clear()
    with read_only(settings.home):
        pulled = get(f"{repo}@{made.commit}", settings)
        assert pulled.from_mirror
        with Mirror.open(settings.mirror) as mirror:
            mirror.verify(pulled.artifact)
        assert proxy.requests == []
        with pytest.raises(HubaotiError, match="read-only") as caught:
            get(repo, settings)
        assert "commit" in caught.value.hint
        with pytest.raises(HubaotiError, match="Read-only"):
            Trust(settings.trust).add(settings.endpoint, "stranger")


def test_an_endpoint_that_is_down_is_named(repo: str, settings: Settings) -> None:
    with pytest.raises(HubUnreachable, match="http://127.0.0.1:9 "):
        get(repo, dataclasses.replace(settings, endpoint="http://127.0.0.1:9"))


def test_the_steps_are_said(tmp_path: Path, repo: str, settings: Settings) -> None:
    said: list[str] = []
    ship(tmp_path, repo, settings)
    pull_artifact(RepoRef(repo), settings, HOST, trust=True, progress=said.append)
    assert [line.split()[0] for line in said] == [
        "asking",
        "reading",
        "downloading",
        "downloading",
        "unpacking",
    ]


def test_downloads_that_another_pull_removed_are_fetched_again(
    tmp_path: Path, repo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(tmp_path, repo, settings)
    put, calls = Mirror.put, [0]

    def vanish(self: Mirror, *args: object) -> object:
        calls[0] += 1
        if calls[0] < 3:
            raise FileNotFoundError
        return put(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Mirror, "put", vanish)
    assert get(repo, settings).artifact
    calls[0] = -9
    monkeypatch.setattr(Mirror, "artifact", lambda *_: None)
    with pytest.raises(HubaotiError, match="removed 3 times"):
        get(repo, settings)


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
@pytest.mark.parametrize("size", ["300k", "800k"], ids=["downloading", "unpacking"])
def test_a_disk_that_fills_up_on_the_way_leaves_nothing(
    tmp_path: Path, repo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        small = replace(settings, home=disk / "home")
        ship(tmp_path, repo, settings, members={"model/root.so": bytes(500_000)})
        for module in ("hub.fetch", "mirror.store"):
            monkeypatch.setattr(f"hubaoti.{module}.require_disk_room", lambda *_: None)
        with pytest.raises(DiskFull, match="free") as caught:
            get(repo, small)
        assert caught.value.hint
        assert left_over(small) == []
        assert not any((small.mirror / "tmp").iterdir())
        assert not list(small.mirror.rglob("*.incomplete"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_lockfile_whose_name_is_no_text_is_refused_before_anything_is_fetched(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    ship(tmp_path, repo, settings)
    lock = tmp_path / "\udcff.lock"
    assert hubaoti(settings, "lock", repo, "-o", lock).code == 0
    done = hubaoti(settings, "pull", repo, "--trust", "--lockfile", lock)
    assert done.code == BadLock.exit_code and "no UTF-8" in done.err and "rename" in done.err
    assert not any((settings.mirror / "artifacts").iterdir())
