"""`hubaoti mirror`: what is stored is found by its digest or repo, shown, pinned and removed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bundles import MEMBERS, make_bundle
from commands import inside
from disks import immovable
from test_leases import running
from test_mirror_store import damage, files_of, put

from hubaoti import errors
from hubaoti.artifact.sizes import format_size
from hubaoti.mirror import Artifact, Mirror
from hubaoti.mirror.facts import Facts, read_facts
from hubaoti.mirror.index import Pin
from hubaoti.mirror.rows import BUILT_HERE, PullOrigin, Signed
from hubaoti.mirror.signer import Signer
from hubaoti.settings import Settings


@pytest.fixture
def mirror(settings: Settings) -> Iterator[Mirror]:
    with Mirror.open(settings.mirror) as found:
        yield found


@pytest.fixture
def artifacts(mirror: Mirror, tmp_path: Path, settings: Settings) -> list[Artifact]:
    """Two artifacts that share a graph, as if they had been pulled of two repos."""
    found = []
    for name in ("one", "two"):
        bundle = make_bundle(tmp_path / name, mode=name)
        origin = PullOrigin(settings.endpoint, f"acme/{name}", "c" * 40, "path")
        found.append(put(mirror, bundle, origin))
        pin = Pin(settings.endpoint, f"acme/{name}", "c" * 40, "", "host")
        mirror.index.record_pull(pin, found[-1].digest, "path")
    return found


def graphs(mirror: Mirror) -> int:
    return len([*(mirror.root / "graphs").iterdir()])


@pytest.mark.parametrize("spelled", ["digest", "beginning", "sha256", "repo", "commit"])
def test_an_artifact_is_called_by_its_digest_or_its_repo(
    artifacts: list[Artifact], settings: Settings, spelled: str
) -> None:
    digest = artifacts[0].digest
    names = {"digest": digest, "beginning": digest[:8], "sha256": f"sha256:{digest[:12]}"}
    names |= {"repo": "acme/one", "commit": f"acme/one@{'c' * 40}"}
    done = inside(settings, "mirror", "path", names[spelled])
    assert (done.code, done.out.strip()) == (0, str(artifacts[0].path))


def test_what_manifests_say_is_read_once(
    artifacts: list[Artifact], mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [each.digest for each in artifacts]
    damage(artifacts[0].path / "hubaoti.json")
    said = {digests[0]: Facts(), digests[1]: Facts.of(artifacts[1].manifest)}
    assert read_facts(mirror, digests) == said
    read = list[str]()
    monkeypatch.setattr(Mirror, "read", lambda _, digest: read.append(digest))
    assert read_facts(mirror, digests) == said and read == digests[:1]  # as it was not whole


def test_of_what_was_built_here_it_is_listed_whether_it_was_pushed_and_where(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings, tmp_path: Path
) -> None:
    built = put(mirror, make_bundle(tmp_path / "built", mode="built"), BUILT_HERE)
    mirror.index.record_built(built.manifest)
    listed = inside(settings, "mirror", "ls").out
    assert "built here, not pushed" in listed and f" {'c' * 40} " in listed
    assert "unpacked" in listed.splitlines()[0]
    where = PullOrigin(settings.endpoint, "me/mine", "d" * 40)
    mirror.usage.record_pushed([built.digest], where)
    listed = inside(settings, "mirror", "ls").out
    (line,) = (each for each in listed.splitlines() if "me/mine" in each)
    assert line.split()[2:4] == ["me/mine", "d" * 40] and "not pushed" not in listed


def test_an_empty_mirror_and_an_empty_trust_say_what_comes_next(settings: Settings) -> None:
    mirror, trust = inside(settings, "mirror", "ls"), inside(settings, "trust", "ls")
    assert "hubaoti pull" in mirror.err and "hubaoti trust add" in trust.err
    assert len(mirror.out.splitlines()) == len(trust.out.splitlines()) == 1
    assert inside(settings, "mirror", "ls", "--json").err == ""


def test_a_collection_that_cannot_free_enough_says_what_holds_how_much(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings, tmp_path: Path
) -> None:
    built = put(mirror, make_bundle(tmp_path / "built", mode="built"), BUILT_HERE)
    mirror.index.record_built(built.manifest)
    assert inside(settings, "trust", "add", "acme").code == 0
    mirror.usage.pin(artifacts[0].digest)
    with running(mirror.root, f"mirror.leases.hold('{artifacts[1].digest}')"):
        done = inside(settings, "mirror", "gc", "--dry-run", "--max-bytes", "1kB")
    size = format_size(next(row.size for row in mirror.ls() if row.digest == built.digest))
    assert "would remove 0 artifacts" in done.out
    for why in ("pinned", "built here, and not pushed", "open in a process"):
        assert f"  {size} stay, because they are {why}" in done.out
    assert "because" not in inside(settings, "mirror", "gc", "--dry-run").out


@pytest.mark.parametrize("words", [["mirror"], ["trust"], ["serve"], ["serve", "token"]])
def test_the_help_of_a_group_ends_its_sentences(words: list[str], settings: Settings) -> None:
    listed = inside(settings, *words, "--help").out.partition("Commands:")[2]
    assert listed and "..." not in listed


def test_what_no_manifest_said_is_listed_as_unknown(
    artifacts: list[Artifact], settings: Settings
) -> None:
    for each in artifacts:
        damage(each.path / "hubaoti.json")
    table = inside(settings, "mirror", "ls").out.splitlines()
    assert [line.split()[:2] for line in table[1:]] == [["unknown", "unknown"]] * 2
    rows = json.loads(inside(settings, "mirror", "ls", "--json").out)
    assert [(row["model"], row["task"]) for row in rows] == [(None, None)] * 2


def test_what_is_decided_of_many_is_what_is_decided_of_each(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings, tmp_path: Path
) -> None:
    built = put(mirror, make_bundle(tmp_path / "built", mode="built"))
    mirror.index.record_built(built.manifest)
    mirror.trust.add_artifact(artifacts[0].digest)
    mirror.index.record_pull(
        Pin(settings.endpoint, "other/one", "d" * 40, "", "host"), artifacts[1].digest, "path"
    )
    mirror.trust.add(settings.endpoint, "other", Signer(key="5" * 64))
    signed = Signed(settings.endpoint, "other/one", "path", f"key {'5' * 64}")
    mirror.seen.record_signed(artifacts[1].digest, signed)
    found = [*artifacts, built]
    decided = mirror.decide_each(each.digest for each in found)
    reasons = [mirror.decide(each.digest).reason for each in found]
    assert [decided[each.digest].reason for each in found] == reasons
    assert len({*reasons}) == 3 and all(each.allowed for each in decided.values())


def test_what_is_not_there_is_said(artifacts: list[Artifact], settings: Settings) -> None:
    for verb in ("show", "path", "rm", "pin", "unpin", "verify"):
        done = inside(settings, "mirror", verb, "0" * 12)
        assert done.code == errors.NoArtifact.exit_code and "mirror ls" in done.err
        assert inside(settings, "mirror", verb, "acme/three").code == errors.NoArtifact.exit_code
        assert inside(settings, "mirror", verb, "acme/one@v1").code == errors.BadRequest.exit_code


def test_all_that_is_known_is_shown(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings
) -> None:
    artifact = artifacts[0]
    mirror.usage.record_open(artifact.digest)
    mirror.usage.pin(artifact.digest)
    (found,) = json.loads(inside(settings, "mirror", "show", "acme/one", "--json").out)
    assert found["row"]["digest"] == artifact.digest and found["path"] == str(artifact.path)
    assert (found["opens"], found["pinned"], found["open_now"]) == (1, True, False)
    assert not found["may_run"] and "acme" in found["why"]
    assert found["origins"] == [f"acme/one@{'c' * 40}/path"]
    assert found["compile_seconds"] == 1.5
    shown = inside(settings, "mirror", "show", "acme/one").out
    assert str(artifact.path) in shown and "  hubaoti mirror pin\n" in shown
    assert found["pinned_by"] == ["hubaoti mirror pin"]


def test_what_is_removed_is_gone_with_the_graphs_that_no_other_has(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings
) -> None:
    assert graphs(mirror) == 1
    assert inside(settings, "mirror", "rm", artifacts[0].digest[:12]).code == 0
    assert not artifacts[0].path.exists() and graphs(mirror) == 1
    assert mirror.artifact(artifacts[1].digest) is not None
    mirror.verify(artifacts[1])
    assert inside(settings, "mirror", "rm", "acme/two").code == 0
    assert mirror.ls() == [] and graphs(mirror) == 0
    assert not any((mirror.root / "tmp").iterdir())


def test_a_digest_may_be_written_in_capitals(artifacts: list[Artifact], settings: Settings) -> None:
    digest = artifacts[0].digest
    for name in (digest[:12].upper(), f"sha256:{digest.upper()}"):
        assert digest in inside(settings, "mirror", "show", name).out
        assert digest in inside(settings, "mirror", "path", name).out
        assert inside(settings, "verify", name).code == 0


def test_what_the_system_does_not_let_go_is_said_and_removed_later(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings
) -> None:
    digest = artifacts[0].digest
    with immovable(artifacts[0].path):
        done = inside(settings, "mirror", "rm", digest)
        assert done.code == 1 and "is not in the mirror any more" in done.err
        assert f"artifacts/{digest}: Operation not permitted" in done.err and "gc" in done.err
        assert artifacts[0].path.is_dir()
    assert inside(settings, "mirror", "gc").code == 0
    assert not artifacts[0].path.exists()


def test_what_is_pinned_is_not_removed(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings
) -> None:
    assert inside(settings, "mirror", "pin", "acme/one").code == 0
    done = inside(settings, "mirror", "rm", "acme/one")
    assert done.code == errors.ArtifactHeld.exit_code and "mirror unpin" in done.err
    assert mirror.artifact(artifacts[0].digest) is not None
    assert "may leave" in inside(settings, "mirror", "unpin", "acme/one").out
    assert "was not pinned" in inside(settings, "mirror", "unpin", "acme/one").out
    assert inside(settings, "mirror", "rm", "acme/one").code == 0


def test_what_a_file_pins_stays_as_long_as_the_file(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings, tmp_path: Path
) -> None:
    lock = tmp_path / "hubaoti.lock"
    lock.write_text(artifacts[0].digest)
    mirror.usage.pin(artifacts[0].digest, str(lock))
    done = inside(settings, "mirror", "rm", "acme/one")
    assert done.code == errors.ArtifactHeld.exit_code and str(lock) in done.err
    assert inside(settings, "mirror", "pin", "acme/one").code == 0
    (found,) = json.loads(inside(settings, "mirror", "show", "acme/one", "--json").out)
    assert found["pinned"] and found["pinned_by"] == [str(lock), "hubaoti mirror pin"]
    for _ in range(2):
        unpinned = inside(settings, "mirror", "unpin", "acme/one").out
        assert unpinned.endswith(f" stays pinned by {lock}\n") and "leave" not in unpinned
    lock.unlink()
    assert inside(settings, "mirror", "rm", "acme/one").code == 0


def test_what_is_open_in_a_process_is_not_removed_until_it_ends(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings
) -> None:
    digest = artifacts[0].digest
    with running(mirror.root, f"mirror.leases.hold('{digest}')") as process:
        done = inside(settings, "mirror", "rm", "acme/one")
        assert done.code == errors.ArtifactHeld.exit_code and "open in a process" in done.err
        mirror.verify(artifacts[0])
        process.kill()
        process.wait()
    assert inside(settings, "mirror", "rm", "acme/one").code == 0


def test_mirror_verify_is_verify(artifacts: list[Artifact], settings: Settings) -> None:
    words = (["--all"], [], ["acme/one"])
    for each in words:
        one, other = (inside(settings, *verb, *each) for verb in (["verify"], ["mirror", "verify"]))
        assert (one.code, one.out) == (other.code, other.out) == (0, one.out)
        assert "whole" in one.out
    damage(artifacts[0].file("golden.safetensors"))
    done = inside(settings, "mirror", "verify", "--all")
    assert done.code == errors.DigestMismatch.exit_code
    assert inside(settings, "mirror", "verify", "--all", "acme/one").code == 2


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Within a time, or it is an error: also what waits for a pipe that nobody writes into."""

    def give_up(*_: object) -> None:
        pytest.fail(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_pipe(path: Path) -> None:
    """A pipe that nobody writes into, in the place of a file."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("words", ["show {}", "verify {}", "ls", "gc", "retry", "rm {}", "path {}"])
@pytest.mark.parametrize("file", ["hubaoti.json", "golden.safetensors"])
def test_of_a_pipe_in_the_place_of_a_file_nothing_is_awaited(
    words: str, file: str, artifacts: list[Artifact], settings: Settings
) -> None:
    make_pipe(artifacts[0].file(file))
    with at_most(20.0):
        inside(settings, "mirror", *words.format(artifacts[0].digest).split())


def test_of_a_pipe_in_the_place_of_a_note_or_a_key_nothing_is_awaited(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings
) -> None:
    mirror.quarantine(artifacts[0].manifest.graphs[0])
    (note,) = (mirror.root / "quarantine").glob("*/.hubaoti-*")
    make_pipe(note)
    name = mirror.trust.keys.keep(b"a key")
    make_pipe(mirror.trust.keys.folder / name)
    with at_most(20.0):
        assert inside(settings, "mirror", "retry").code == 0
        with pytest.raises(errors.HubaotiError, match="no such file"):
            mirror.trust.keys.find(name, "acme")


def test_of_a_pipe_among_what_is_imported_nothing_is_awaited(
    settings: Settings, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    for path in files_of(bundle).values():
        content = path.read_bytes()
        make_pipe(path)
        with at_most(20.0):
            done = inside(settings, "mirror", "import", bundle.path)
        assert (done.code, "is not there" in done.err) == (57, True)
        path.unlink()
        path.write_bytes(content)


# What somebody removed by hand


@pytest.fixture(params=["manifest", "graph"])
def pair(
    request: pytest.FixtureRequest, mirror: Mirror, settings: Settings, tmp_path: Path
) -> list[Artifact]:
    """An artifact that is here, and one of which a folder is gone."""
    origin = PullOrigin(settings.endpoint, "acme/one", "c" * 40, "path")
    found = []
    for name in ("here", "gone"):
        members = {**MEMBERS, "model/root.so": name.encode()}
        found.append(put(mirror, make_bundle(tmp_path / name, members=members), origin))
    gone = found[1]
    graph = gone.graph_folder(gone.manifest.graphs[0])
    shutil.rmtree(gone.path if request.param == "manifest" else graph)
    return found


def test_what_is_gone_is_not_listed_as_if_it_were_there(
    pair: list[Artifact], mirror: Mirror, settings: Settings
) -> None:
    here, gone = (each.digest for each in pair)
    told = inside(settings, "mirror", "ls").out
    (line,) = (line for line in told.splitlines() if gone[:12] in line)
    assert line.startswith(f"gone: {gone[:12]} ")
    assert line.endswith(
        f", acme/one: its files were removed; pull or compile it again, or: hubaoti mirror rm "
        f"{gone[:12]}"
    )
    listed = json.loads(inside(settings, "mirror", "ls", "--json").out)
    assert {row["digest"]: row["gone"] for row in listed} == {here: False, gone: True}
    assert json.loads(inside(settings, "mirror", "stats", "--json").out)["artifacts"] == 1
    told = inside(settings, "mirror", "gc", "--dry-run", "--json").out
    leaving = {each["digest"]: each["why"] for each in json.loads(told)["artifacts"]}
    assert leaving[gone] == "its files are gone"
    mirror.trust.add(settings.endpoint, "acme")
    assert inside(settings, "mirror", "gc").code == 0
    assert [row.digest for row in mirror.ls()] == [here]


@pytest.mark.parametrize("word", ["path", "pin", "verify"])
def test_what_is_gone_has_no_folder_and_cannot_stay(
    word: str, pair: list[Artifact], settings: Settings
) -> None:
    done = inside(settings, "mirror", word, pair[1].digest)
    assert done.code == 10
    assert str(pair[1].path) not in done.out
    assert inside(settings, "mirror", word, pair[0].digest).code == 0


def test_what_is_gone_and_was_built_here_stays_listed_as_gone(
    mirror: Mirror, settings: Settings, tmp_path: Path
) -> None:
    """Half of it is still here, and the other half may be where it was moved to."""
    built = put(mirror, make_bundle(tmp_path / "built"), BUILT_HERE)
    mirror.index.record_built(built.manifest)
    built.path.rename(tmp_path / "moved")
    assert inside(settings, "mirror", "gc").code == 0
    told = inside(settings, "mirror", "ls").out
    assert f"gone: {built.digest[:12]}" in told and ", built here, not pushed: " in told
    (tmp_path / "moved").rename(built.path)
    mirror.verify(built)
    assert "gone: " not in inside(settings, "mirror", "ls").out
