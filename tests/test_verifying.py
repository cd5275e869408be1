"""Verify: bytes are hashed again, graphs opened again, and each no says which and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import CPU, CUDA, make_bundle, put_trusted
from commands import inside

from hubaoti import errors
from hubaoti.api import Verified, verify
from hubaoti.artifact.bundle import Bundle
from hubaoti.mirror import Artifact, Mirror, PullOrigin
from hubaoti.mirror.rows import Pin
from hubaoti.mirror.trust import Trust
from hubaoti.runtime import first_open
from hubaoti.runtime.open_child import OpenVerdict
from hubaoti.settings import Settings

GOOD = {"opened": True, "compared": True, "problem": "", "lasting": False, "device": "cpu"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", endpoint="http://127.0.0.1:9")


@pytest.fixture
def mirror(settings: Settings) -> Iterator[Mirror]:
    with Mirror.open(settings.mirror) as found:
        yield found


@pytest.fixture
def artifact(decoder_bundle: Bundle, mirror: Mirror) -> Artifact:
    return put_trusted(decoder_bundle, mirror)


def pulled(bundle: Bundle, mirror: Mirror, settings: Settings, repo: str = "acme/x") -> Artifact:
    """A bundle in the mirror as if it had been pulled."""
    files = {file.path: bundle.path / file.path for file in bundle.manifest.all_files()}
    origin = PullOrigin(settings.endpoint, repo, "c" * 40, "path")
    artifact = mirror.put(bundle.manifest, files, origin)
    pin = Pin(settings.endpoint, repo, "c" * 40, "", "host")
    mirror.index.record_pull(pin, artifact.digest, "path")
    return artifact


def the_error(found: list[Verified]) -> errors.HubaotiError:
    (each,) = found
    assert each.error is not None and each.error.hint
    return each.error


# Bytes


def test_what_is_whole_is_whole(artifact: Artifact, mirror: Mirror, settings: Settings) -> None:
    (found,) = verify(settings=settings)
    assert (found.digest, found.error, found.graphs) == (artifact.digest, None, ())
    manifest = artifact.manifest
    assert (found.recipe, found.variant) == (str(manifest.recipe), str(manifest.variant))


def test_an_empty_mirror_is_whole(settings: Settings) -> None:
    assert verify(settings=settings) == []


def test_a_flipped_bit_is_found_kept_apart_and_hides_no_other(
    tmp_path: Path, mirror: Mirror, settings: Settings
) -> None:
    levels = ("x86_64_v2", "x86_64_v3")
    bundles = [
        make_bundle(tmp_path / level, {**CPU, "level": level}, {"model/x.so": level.encode()})
        for level in levels
    ]
    first, second = (put_trusted(bundle, mirror) for bundle in bundles)
    member = next(first.graph_folder(first.manifest.graphs[0]).rglob("*.so"))
    member.chmod(0o644)
    member.write_bytes(b"X86_64_v2")
    found = {each.digest: each.error for each in verify(settings=settings)}
    assert isinstance(found[first.digest], errors.DigestMismatch)
    assert str(member) in str(found[first.digest])
    assert found[second.digest] is None
    assert mirror.artifact(first.digest) is None
    assert [each.digest for each in verify(settings=settings)] == [second.digest]


def test_a_manifest_that_was_changed_is_told(
    artifact: Artifact, mirror: Mirror, settings: Settings
) -> None:
    path = artifact.path / "hubaoti.json"
    path.chmod(0o644)
    path.write_bytes(b"{}")
    assert isinstance(the_error(verify(settings=settings)), errors.DigestMismatch)


def test_a_bundle_is_hashed_where_it_lies_and_the_mirror_stays_as_it_is(
    tmp_path: Path, settings: Settings, mirror: Mirror
) -> None:
    bundle = make_bundle(tmp_path / "bundles" / "one")
    make_bundle(tmp_path / "bundles" / "two", CUDA)
    assert [each.error for each in verify(bundle.path, settings=settings)] == [None]
    assert len(verify(str(tmp_path / "bundles"), settings=settings)) == 2
    (bundle.path / "golden.safetensors").write_bytes(b"other")
    error = the_error(verify(bundle.path, settings=settings))
    assert isinstance(error, errors.DigestMismatch)
    assert mirror.ls() == []
    with pytest.raises(errors.BadManifest, match="is not a bundle: there is no such folder"):
        verify(tmp_path / "nowhere", settings=settings)


def test_an_artifact_is_named_by_its_digest_or_its_repo(
    tmp_path: Path, mirror: Mirror, settings: Settings
) -> None:
    first = pulled(make_bundle(tmp_path / "one"), mirror, settings)
    second = put_trusted(make_bundle(tmp_path / "two", CUDA), mirror)

    def names(what: str) -> list[str]:
        return [each.digest for each in verify(what, settings=settings)]

    assert names(first.digest) == names(first.digest[:12]) == [first.digest]
    assert names(second.digest[:8]) == [second.digest]
    assert names("acme/x") == names(f"acme/x@{'c' * 40}") == [first.digest]


@pytest.mark.parametrize(
    ("what", "kind", "hint"),
    [
        ("f" * 12, errors.NoArtifact, "mirror ls"),
        ("acme/y", errors.NoArtifact, "hubaoti pull acme/y"),
        (f"acme/x@{'d' * 40}", errors.NoArtifact, "hubaoti pull"),
        ("acme/x@v1", errors.BadRequest, "full commit id"),
        ("Not a name", errors.BadRequest, "owner/name"),
        ("nope", errors.BadRequest, "a bundle's folder"),
    ],
)
def test_what_is_not_there_is_said(
    what: str, kind: type[errors.HubaotiError], hint: str, settings: Settings
) -> None:
    with pytest.raises(kind) as caught:
        verify(what, settings=settings)
    assert hint in caught.value.hint


# Opening


def test_graphs_are_opened_again_and_what_came_of_it_is_remembered(
    artifact: Artifact, mirror: Mirror, settings: Settings
) -> None:
    mirror.index.record_built(artifact.manifest)  # which would exempt it from a first open
    said: list[str] = []
    for _ in range(2):
        (found,) = verify(opens=True, settings=settings, progress=said.append)
        (graph,) = found.graphs
        assert found.error is None
        assert (graph.graph, graph.opened, graph.compared) == ("model.layers", True, True)
        assert (graph.problem, graph.lasting, graph.device) == ("", False, "cpu")
    assert said.count("first open") == 2
    host = first_open.name_host_kind(torch.device("cpu"))
    name = first_open.name_tested(artifact.manifest.graphs[0], artifact)
    assert mirror.index.find_problem(name, host) == ""


def told(monkeypatch: pytest.MonkeyPatch, **verdict: Any) -> None:
    """A child that would say this of each graph."""

    def answers(path: Path, graphs: Path, entries: Any, *_: Any) -> list[OpenVerdict]:
        return [OpenVerdict(entry.id, **verdict) for entry in entries]

    monkeypatch.setattr(first_open, "open_in_child", answers)


def test_a_crash_is_remembered_and_keeps_the_graph_shut(
    artifact: Artifact, mirror: Mirror, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, problem="it crashed its process (SIGSEGV)", opened=True)
    (found,) = verify(artifact.digest, opens=True, settings=settings)
    (graph,) = found.graphs
    assert isinstance(found.error, errors.Quarantined)
    assert (graph.opened, graph.compared, graph.lasting) == (True, False, True)
    assert "SIGSEGV" in graph.problem
    assert mirror.artifact(artifact.digest) is None
    name = first_open.name_tested(artifact.manifest.graphs[0], artifact)
    assert [each for each, _ in mirror.index.problems()] == [name]


def test_what_is_held_against_a_graph_is_not_tried_again(
    decoder_bundle: Bundle, artifact: Artifact, mirror: Mirror, settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    told(monkeypatch, problem="it crashed its process (SIGSEGV)")
    verify(artifact.digest, opens=True, settings=settings)
    monkeypatch.setattr(first_open, "open_in_child", lambda *a: pytest.fail("it was tried again"))
    error = the_error(verify(decoder_bundle.path, opens=True, settings=settings))
    assert isinstance(error, errors.Quarantined)
    assert "hubaoti mirror retry" in error.hint


def test_what_may_have_been_this_moment_s_is_held_against_nothing(
    artifact: Artifact, mirror: Mirror, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, problem="its process was ended (SIGTERM)", lasting=False)
    (found,) = verify(opens=True, settings=settings)
    assert isinstance(found.error, errors.NotTried)
    assert not found.graphs[0].lasting
    assert mirror.artifact(artifact.digest) is not None


def test_graphs_behind_one_that_came_to_nothing_are_named_too(
    tmp_path: Path, mirror: Mirror, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_trusted(make_bundle(tmp_path / "two", torch_here(), graphs=("root", "step")), mirror)

    def answers(path: Path, graphs: Path, entries: Any, *_: Any) -> list[OpenVerdict]:
        return [OpenVerdict("root", "its process was ended (SIGTERM)", lasting=False)]

    monkeypatch.setattr(first_open, "open_in_child", answers)
    (found,) = verify(opens=True, settings=settings)
    assert [graph.graph for graph in found.graphs] == ["root", "step"]
    assert "not tried" in found.graphs[1].problem
    assert not found.graphs[1].opened


def torch_here() -> dict[str, str]:
    """The kind of this host, for a bundle without code."""
    return {**CPU, "torch": str(torch.__version__), "level": "x86_64"}


def test_what_is_for_another_host_is_not_opened(
    tmp_path: Path, mirror: Mirror, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_open, "open_in_child", lambda *a: pytest.fail("it was opened"))
    put_trusted(make_bundle(tmp_path / "old", {**CPU, "torch": "2.3.0+cpu"}), mirror)
    assert "torch 2.3.0" in str(the_error(verify(opens=True, settings=settings)))
    put_trusted(make_bundle(tmp_path / "gpu", CUDA), mirror)
    found = verify(opens=True, settings=settings)
    assert all(isinstance(each.error, errors.NoMatch) for each in found)
    assert any("sm_90" in str(each.error) for each in found)
    graphs = [graph for each in found for graph in each.graphs]
    assert {graph.device for graph in graphs} == {"cpu", "cuda"}
    assert all(graph.problem and not graph.opened and not graph.lasting for graph in graphs)
    assert mirror.index.problems() == []


def test_code_of_a_publisher_who_is_trusted_no_more_is_hashed_and_not_run(
    decoder_bundle: Bundle, mirror: Mirror, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled(decoder_bundle, mirror, settings)
    with monkeypatch.context() as patch:
        patch.setattr(first_open, "open_in_child", lambda *a: pytest.fail("it was opened"))
        assert [each.error for each in verify(settings=settings)] == [None]
        error = the_error(verify(opens=True, settings=settings))
    assert isinstance(error, errors.Untrusted)
    assert "acme" in str(error)
    Trust(settings.trust).add(settings.endpoint, "acme")
    told(monkeypatch, opened=True, compared=True)
    assert [each.error for each in verify(opens=True, settings=settings)] == [None]


def test_a_bundle_that_is_opened_is_put_into_the_mirror_if_it_is_whole(
    tmp_path: Path, decoder_bundle: Bundle, mirror: Mirror, settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    told(monkeypatch, opened=True, compared=True)
    mirror.trust.add_artifact(decoder_bundle.manifest.digest)
    assert [each.error for each in verify(decoder_bundle.path, opens=True, settings=settings)] == [
        None
    ]
    assert [row.digest for row in mirror.ls()] == [decoder_bundle.manifest.digest]
    broken = make_bundle(tmp_path / "broken")
    mirror.trust.add_artifact(broken.manifest.digest)
    (broken.path / "golden.safetensors").write_bytes(b"other")
    assert isinstance(
        the_error(verify(broken.path, opens=True, settings=settings)), errors.DigestMismatch
    )
    assert len(mirror.ls()) == 1


# The command


def test_the_command_prints_each_graph_s_verdict_as_json(
    artifact: Artifact, mirror: Mirror, settings: Settings
) -> None:
    done = inside(settings, "verify", artifact.digest[:12], "--open")
    assert done.code == 0, done
    head, line = done.out.splitlines()
    assert head.startswith(artifact.digest[:12]) and head.endswith(": whole")
    assert json.loads(line) == {"graph": "model.layers", **GOOD}
    (facts,) = json.loads(inside(settings, "verify", "--json").out)
    assert facts["digest"] == artifact.digest
    assert (facts["problem"], facts["graphs"]) == ("", [])


def test_its_exit_code_is_that_of_what_is_wrong(
    tmp_path: Path, settings: Settings, mirror: Mirror
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    assert inside(settings, "verify", bundle.path).code == 0
    (bundle.path / "golden.safetensors").write_bytes(b"other")
    for words in ((), ("--json",), ("--quiet",)):
        done = inside(settings, "verify", bundle.path, *words)
        assert done.code == errors.DigestMismatch.exit_code
        assert "golden.safetensors" in done.err and "hint: " in done.err
    (facts,) = json.loads(inside(settings, "verify", bundle.path, "--json").out)
    assert "golden.safetensors" in facts["problem"]


def test_how_graphs_are_opened_is_asked_only_where_they_are(settings: Settings) -> None:
    done = inside(settings, "verify", "--device", "cpu")
    assert done.code == 2
    assert "add --open" in done.err
