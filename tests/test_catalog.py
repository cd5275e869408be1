"""What a repo may cost whoever only looks at it: its publisher is not trusted yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import rfc8785
from bundles import make_bundle, make_host
from huggingface_hub import CommitOperationAdd, HfApi
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from proxies import Proxy

from hubaoti.artifact.canonical import convert_large_integers, encode_canonical, is_canonical
from hubaoti.artifact.manifest import (
    LARGEST_MANIFEST,
    MOST_GRAPHS,
    MOST_MEMBERS,
    MOST_VALUES,
    Manifest,
    parse_manifest,
)
from hubaoti.artifact.schema import Constant, ConstantOrigin, File, Member
from hubaoti.errors import BadManifest, DigestMismatch, HubaotiError, HubUnreachable, Untrusted
from hubaoti.hub import client as door
from hubaoti.hub import pull_all
from hubaoti.hub.catalog import Allowance, read_catalog
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import RepoRef, artifact_path
from hubaoti.hub.pull import Puller, pull_artifact
from hubaoti.mirror import Mirror
from hubaoti.settings import Settings

SHA = "a" * 64


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle").manifest


def graphs(manifest: Manifest, count: int, **fields: Any) -> Manifest:
    """A manifest of so many graphs."""
    found = tuple(
        msgspec.structs.replace(manifest.graphs[0], id=f"g{at}", file=f"graphs/g{at}.pt2", **fields)
        for at in range(count)
    )
    return msgspec.structs.replace(manifest, graphs=found)


def members(count: int) -> tuple[Member, ...]:
    return tuple(Member(path=f"model/{at}.so", sha256=SHA, size=1) for at in range(count))


def constants(count: int, file: str | None = None) -> tuple[Constant, ...]:
    return tuple(
        Constant(
            fqn=f"model.layers.{at}.self_attn.q_proj.weight",
            dtype="bfloat16",
            shape=(8192, 8192),
            stride=(8192, 1),
            origin=ConstantOrigin(
                checkpoint=(f"model.layers.{at}.self_attn.q_proj.weight",), file=file
            ),
        )
        for at in range(count)
    )


def with_members(manifest: Manifest) -> Manifest:
    return graphs(manifest, 1, members=members(36_000))


def with_files(manifest: Manifest) -> Manifest:
    files = tuple(File(path=f"files/{at}", sha256=SHA, size=1) for at in range(9_990))
    files = (*files, File(path="golden.safetensors", sha256=SHA, size=1))
    more = graphs(manifest, 4_000, members=(), constants=constants(1, "golden.safetensors"))
    return msgspec.structs.replace(more, files=files)


def with_constants(manifest: Manifest) -> Manifest:
    return graphs(manifest, 1, constants=constants(17_000))


@pytest.mark.parametrize("make", [with_members, with_files, with_constants])
def test_four_megabytes_of_a_manifest_are_read_in_a_second(
    manifest: Manifest, make: Callable[[Manifest], Manifest]
) -> None:
    text = make(manifest).to_json()
    assert 3.5e6 < len(text) < 5.5e6
    start = time.process_time()
    parse_manifest(text, "x")
    # Half a second; line coverage doubles it, a busy machine again. It took 17 to 32 before.
    assert time.process_time() - start < 8.0 * len(text) / 4e6


def excessive(manifest: Manifest) -> dict[str, tuple[str, Manifest]]:
    shape = "+".join(f"a{at}" for at in range(1000))
    entry = msgspec.structs.replace(manifest.graphs[0].inputs[0], shape=(shape,))
    config = {"nested": [[]] * MOST_VALUES}
    return {
        "graphs": (f"lists {MOST_GRAPHS + 1} graphs", graphs(manifest, MOST_GRAPHS + 1)),
        "members": (
            f"lists {MOST_MEMBERS + 4} members",
            graphs(manifest, 4, members=members(MOST_MEMBERS // 4 + 1)),
        ),
        "a long shape": ("length <= 1000", graphs(manifest, 1, inputs=(entry,))),
        "values": (
            f"more than {MOST_VALUES} values",
            msgspec.structs.replace(
                manifest, program=msgspec.structs.replace(manifest.program, config=config)
            ),
        ),
    }


@pytest.mark.parametrize("what", ["graphs", "members", "a long shape", "values"])
def test_what_would_cost_too_much_is_refused_in_words(manifest: Manifest, what: str) -> None:
    said, bad = excessive(manifest)[what]
    text = bad.to_json()
    start = time.process_time()
    with pytest.raises(BadManifest, match=said):
        parse_manifest(text, "x")
    assert time.process_time() - start < 10  # 100 ms; it would be many seconds


def test_no_list_of_missing_libraries_is_endless(manifest: Manifest) -> None:
    value = msgspec.json.decode(manifest.to_json())
    value["requires"]["libraries"] = [f"lib{at}.so" for at in range(501)]
    with pytest.raises(BadManifest, match="malformed libraries") as why:
        parse_manifest(encode_canonical(value), "x")
    assert len(str(why.value)) < 1000


def test_a_thousand_contradictions_are_told_in_short(manifest: Manifest) -> None:
    bad = graphs(manifest, 1000, bounds={})
    with pytest.raises(BadManifest, match="dim batch has no bounds; .*and 991 more") as why:
        parse_manifest(bad.to_json(), "x")
    assert len(str(why.value)) < 1000


def test_an_artifact_of_eighty_layers_and_many_graphs_is_far_within_the_bounds(
    manifest: Manifest,
) -> None:
    modules = tuple(f"model.layers.{at}" for at in range(80))
    regions = graphs(manifest, 40, modules=modules, members=members(40), constants=constants(9))
    whole = graphs(manifest, 4, members=members(400), constants=constants(9 * 80))
    for honest in (regions, whole):
        text = honest.to_json()
        parse_manifest(text, "x")
        assert len(text) < LARGEST_MANIFEST / 10
        assert sum(text.count(sign) for sign in (b",", b"[", b"{")) < MOST_VALUES / 4


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@examples(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | NUMBERS | TEXT,
        lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner) | st.tuples(inner),
    )
)
def test_the_canonical_form_is_that_of_the_reference(value: Any) -> None:
    try:
        expected = rfc8785.dumps(convert_large_integers(value))
    except rfc8785.CanonicalizationError:
        with pytest.raises(ValueError):
            encode_canonical(value)
    else:
        assert encode_canonical(value) == expected


@examples(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "B", "é", "\u2028", "1.0"]),
        st.lists(NUMBERS | st.sampled_from([",1.0,", "[1e5]", ":1E5,", "é", None, 2**53, 1e-7])),
    ),
    st.sampled_from(["canonical", "sorted", "plain"]),
)
def test_a_text_is_canonical_where_the_reference_writes_it_so(value: Any, written: str) -> None:
    try:
        canonical = encode_canonical(value)
    except ValueError:
        return
    texts = {"sorted": msgspec.json.encode(value, order="sorted")}
    texts |= {"plain": msgspec.json.encode(value), "canonical": canonical}
    text = texts[written]
    assert is_canonical(text, msgspec.json.decode(text)) == (text == canonical)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {1: 2}, {"a": b"b"}, {1j}])
def test_what_is_no_json_has_no_canonical_form(value: Any) -> None:
    with pytest.raises(ValueError):
        encode_canonical(value)


def upload(repo: str, settings: Settings, files: dict[str, bytes]) -> str:
    """Put files into a repo in one commit, without our checks."""
    api = HfApi(settings.endpoint, token=settings.token)
    api.create_repo(repo, exist_ok=True)
    add = [CommitOperationAdd(path, content) for path, content in files.items()]
    return str(api.create_commit(repo, add, commit_message="add").oid)


def manifests(manifest: Manifest, count: int) -> dict[str, bytes]:
    """As many manifests, each of them good, at the paths of so many recipes."""
    return {artifact_path(manifest, f"n{at}").manifest: manifest.to_json() for at in range(count)}


def test_a_repo_of_thousands_of_manifests_is_refused_before_one_is_read(
    manifest: Manifest, repo: str, settings: Settings, proxy: Proxy
) -> None:
    upload(repo, settings, manifests(manifest, 2001))
    proxy.requests.clear()
    with pytest.raises(BadManifest, match=rf"{repo} at \w+ has more manifests than are read: 1000"):
        pull_artifact(RepoRef(repo), settings, make_host(os="darwin"))
    assert not [path for _, path in proxy.requests if "/resolve/" in path]
    with pytest.raises(Untrusted):  # one of them fits, and its publisher is a stranger
        pull_artifact(RepoRef(repo), settings, make_host())
    assert len([path for _, path in proxy.requests if "/resolve/" in path]) == 1


def test_many_manifests_of_an_honest_repo_are_read(
    manifest: Manifest, repo: str, settings: Settings
) -> None:
    commit = upload(repo, settings, manifests(manifest, 60))
    assert len(read_catalog(HubClient(settings), repo, commit).readable) == 60


def test_what_all_manifests_weigh_together_is_bounded(
    manifest: Manifest, repo: str, settings: Settings
) -> None:
    commit, size = upload(repo, settings, manifests(manifest, 3)), len(manifest.to_json())
    client = HubClient(settings)
    read_catalog(client, repo, commit, Allowance(bytes=3 * size))
    with pytest.raises(BadManifest, match="more manifests"):
        read_catalog(client, repo, commit, Allowance(bytes=3 * size - 1))


def test_a_repo_of_more_files_than_are_looked_at_says_so(
    manifest: Manifest, repo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, proxy: Proxy
) -> None:
    upload(repo, settings, {f"f{at:05}": b"" for at in range(4500)})
    proxy.requests.clear()
    monkeypatch.setattr(door, "MOST_FILES", 1500)
    with pytest.raises(HubaotiError, match=f"{repo} at .* more than 1500 files") as why:
        pull_artifact(RepoRef(repo), settings, make_host())
    assert why.value.hint
    assert len([path for _, path in proxy.requests if "/tree/" in path]) == 2  # of five pages


@pytest.mark.parametrize("slow", ["/tree/", "hubaoti.json"])
def test_an_endpoint_that_drips_is_not_read_for_ever(
    manifest: Manifest, repo: str, settings: Settings, proxy: Proxy, slow: str
) -> None:
    commit = upload(repo, settings, manifests(manifest, 40))
    proxy.matching, proxy.pause = slow, 3.0
    start = time.monotonic()
    with pytest.raises(HubUnreachable, match="takes more than 300 s"):
        read_catalog(HubClient(settings), repo, commit, Allowance(end=start + 1))
    assert time.monotonic() - start < 3


def test_no_more_is_read_of_a_manifest_than_its_commit_lists(
    manifest: Manifest, repo: str, settings: Settings, proxy: Proxy
) -> None:
    commit = upload(repo, settings, manifests(manifest, 1))
    proxy.matching, proxy.endless = "hubaoti.json", True
    (found,) = read_catalog(HubClient(settings), repo, commit).artifacts.values()
    assert isinstance(found, DigestMismatch)
    assert proxy.sent < 64 << 20


def test_branches_are_counted_together(
    manifest: Manifest, repo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(repo, settings, {})
    api = HfApi(settings.endpoint, token=settings.token)
    for at in range(5):
        api.create_branch(repo, branch=f"zerogpu/{at}")
    with Mirror.open(settings.mirror) as mirror:
        puller = Puller(mirror, settings, make_host())
        assert len([*pull_all.read_branch_catalogs(puller, RepoRef(repo))]) == 5
        monkeypatch.setattr(pull_all, "Allowance", lambda: Allowance(manifests=4))
        with pytest.raises(BadManifest, match="in its branches has more manifests"):
            list(pull_all.read_branch_catalogs(puller, RepoRef(repo)))
