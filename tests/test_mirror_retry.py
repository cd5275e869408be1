"""The way back from quarantine: for what has the right bytes, with all that was known of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import make_bundle
from commands import inside
from test_mirror_store import damage, put

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME
from hubaoti.errors import DigestMismatch
from hubaoti.mirror import Artifact, Mirror
from hubaoti.mirror.index import Pin
from hubaoti.mirror.retry import retry
from hubaoti.settings import Settings

PIN = Pin("https://hub", "acme/tiny", "c" * 40, "", "host")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", graphs=("one", "two"))


@pytest.fixture
def mirror(settings: Settings) -> Iterator[Mirror]:
    with Mirror.open(settings.mirror) as found:
        yield found


@pytest.fixture
def artifact(mirror: Mirror, bundle: Bundle) -> Artifact:
    """An artifact whose two graphs crashed here, as a pull gave it."""
    found = put(mirror, bundle)
    mirror.index.record_pull(PIN, found.digest, "path")
    for graph in found.manifest.graphs:
        mirror.index.record_tested(graph.sha256, "host", "it crashed its process (SIGILL)")
        mirror.quarantine(graph)
    return found


def names_apart(mirror: Mirror) -> list[str]:
    return sorted(path.name.partition("~")[0] for path in (mirror.root / "quarantine").iterdir())


def test_what_is_whole_comes_back_as_it_was(mirror: Mirror, artifact: Artifact) -> None:
    assert mirror.ls() == []
    assert mirror.artifact(artifact.digest) is None
    assert len(names_apart(mirror)) == 2
    retried = retry(mirror)
    assert {*retried.graphs} == {graph.sha256 for graph in artifact.manifest.graphs}
    assert (retried.verdicts, [*retried.artifacts]) == (2, mirror.ls())
    assert mirror.find_pull(PIN) == (artifact, "path")
    assert mirror.ls()[0].origin.repo == "acme/tiny"
    assert mirror.index.find_problem(artifact.manifest.graphs[0].sha256, "host") is None
    assert names_apart(mirror) == []
    mirror.verify(artifact)
    assert [path.name for path in artifact.path.iterdir() if path.name.startswith(".")] == []
    assert retry(mirror).graphs == ()


def test_what_has_other_bytes_stays_apart(mirror: Mirror, artifact: Artifact) -> None:
    bad = artifact.manifest.graphs[0].sha256
    (folder,) = (mirror.root / "quarantine").glob(f"{bad}~*")
    damage(next(file for file in folder.rglob("*.so")))
    retried = retry(mirror)
    assert retried.graphs == (artifact.manifest.graphs[1].sha256,)
    assert retried.artifacts == ()
    assert names_apart(mirror) == [bad]
    assert mirror.artifact(artifact.digest) is None


def test_a_graph_that_was_fetched_again_meanwhile_is_left_alone(
    mirror: Mirror, artifact: Artifact, bundle: Bundle
) -> None:
    again = put(mirror, bundle)
    assert retry(mirror).graphs == ()
    assert mirror.artifact(artifact.digest) == again


def test_a_manifest_that_was_damaged_and_mended_comes_back(mirror: Mirror, bundle: Bundle) -> None:
    artifact = put(mirror, bundle)
    damage(artifact.file("golden.safetensors"))
    with pytest.raises(DigestMismatch):
        mirror.verify(artifact)
    assert retry(mirror).artifacts == ()
    (folder,) = (mirror.root / "quarantine").iterdir()
    damage(folder / "golden.safetensors")  # the very bit again
    assert [row.digest for row in retry(mirror).artifacts] == [artifact.digest]
    assert (artifact.path / FILENAME).is_file()
    mirror.verify(artifact)


@pytest.mark.parametrize("note", [b"", b"[]", b"{}", b'{"graph": 7}'])
def test_a_note_that_cannot_be_read_keeps_no_graph_apart(
    note: bytes, mirror: Mirror, artifact: Artifact
) -> None:
    """Its artifact's manifest is still here; only what the index said is lost."""
    for file in (mirror.root / "quarantine").glob("*/.hubaoti-withdrawn.json"):
        file.write_bytes(note)
    retried = retry(mirror)
    assert len(retried.graphs) == 2
    assert retried.artifacts == ()


def test_graphs_that_crashed_are_listed_and_tried_again_by_a_command(
    settings: Settings, artifact: Artifact
) -> None:
    told = inside(settings, "mirror", "ls").out
    assert told.count("SIGILL") == 2
    assert "hubaoti mirror retry" in told
    done = inside(settings, "mirror", "retry")
    assert done.code == 0
    assert "2 verdicts are forgotten" in done.out
    assert f"{artifact.digest[:12]} is back: acme/tiny" in done.out
    told = inside(settings, "mirror", "ls").out
    assert "SIGILL" not in told
    assert "acme/tiny" in told
