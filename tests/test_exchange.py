"""Artifacts between machines, and after an index was lost: whole, of nobody who is trusted."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import make_bundle, tree_of
from commands import inside
from test_mirror_commands import at_most
from test_mirror_store import damage, put

from hubaoti import errors
from hubaoti.mirror import BUILT_HERE, Artifact, Mirror
from hubaoti.mirror.exchange import import_artifacts
from hubaoti.settings import Settings


@pytest.fixture
def mirror(settings: Settings) -> Iterator[Mirror]:
    with Mirror.open(settings.mirror) as found:
        yield found


@pytest.fixture
def artifacts(mirror: Mirror, tmp_path: Path) -> list[Artifact]:
    """Two artifacts that were built here."""
    found = []
    for name in ("one", "two"):
        bundle = make_bundle(tmp_path / name, mode=name)
        found.append(put(mirror, bundle, BUILT_HERE))
        mirror.index.record_built(bundle.manifest)
    return found


@pytest.fixture
def elsewhere(settings: Settings, tmp_path: Path) -> Settings:
    """Another machine."""
    return replace(settings, home=tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["folder", "file.tar"])
def test_what_is_exported_is_imported_whole_and_trusted_by_nobody(
    artifacts: list[Artifact], settings: Settings, elsewhere: Settings, tmp_path: Path, name: str
) -> None:
    digests = sorted(each.digest for each in artifacts)
    output = tmp_path / "out" / name
    output.parent.mkdir()
    done = inside(settings, "mirror", "export", *digests, output)
    assert done.code == 0 and "2 artifacts" in done.out, done.err
    done = inside(elsewhere, "mirror", "import", output)
    assert done.code == 0 and f"trust add {digests[0]}" in done.out
    with Mirror.open(elsewhere.mirror) as mirror:
        assert sorted(row.digest for row in mirror.ls()) == digests
        for digest in digests:
            artifact = mirror.artifact(digest)
            assert artifact is not None
            mirror.verify(artifact)
            with pytest.raises(errors.Untrusted):
                mirror.require_allowed(digest)
        assert tree_of(mirror.root / "graphs") == tree_of(settings.mirror / "graphs")
        assert not any((mirror.root / "tmp").iterdir())
    assert inside(elsewhere, "trust", "add", digests[0]).code == 0
    again = json.loads(inside(elsewhere, "mirror", "import", output, "--json").out)
    assert sorted(again["artifacts"]) == digests and again["not_trusted"] == digests[1:]
    assert [path.name for path in output.parent.iterdir()] == [name]


@pytest.mark.parametrize("command", ["verify", "push", "push --as-is", "verify .tar"])
def test_an_export_is_refused_by_its_name_and_not_as_damaged(
    artifacts: list[Artifact], settings: Settings, tmp_path: Path, command: str
) -> None:
    name, _, ending = command.partition(" ")
    output = tmp_path / f"out{ending if ending == '.tar' else ''}"
    digests = [each.digest for each in artifacts]
    assert "push and verify refuse" in inside(settings, "mirror", "export", "--help").out
    assert inside(settings, "mirror", "export", *digests, output).code == 0
    more = ["acme/x"] * (name == "push") + ["--as-is"] * (ending == "--as-is")
    done = inside(settings, name, output, *more)
    refusal = errors.BadManifest if output.suffix else errors.DigestMismatch
    assert done.code == refusal.exit_code
    assert "written by hubaoti mirror export" in done.err and "compile the bundle" not in done.err
    assert "hubaoti mirror import" in done.err and str(output) in done.err


def test_an_export_says_nothing_of_the_machine_that_wrote_it(
    artifacts: list[Artifact], settings: Settings, tmp_path: Path
) -> None:
    inside(settings, "mirror", "export", artifacts[0].digest, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as archive:
        owners = {(e.uid, e.gid, e.uname, e.gname, e.mtime) for e in archive}
    assert owners == {(0, 0, "", "", 0)}


def test_what_is_there_is_not_written_over(
    artifacts: list[Artifact], settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_text("mine")
    done = inside(settings, "mirror", "export", artifacts[0].digest, tmp_path / "a.tar")
    assert done.code == errors.OutputExists.exit_code
    assert (tmp_path / "a.tar").read_text() == "mine"


def test_what_was_changed_is_not_exported(
    artifacts: list[Artifact], settings: Settings, tmp_path: Path
) -> None:
    damage(artifacts[0].file("golden.safetensors"))
    done = inside(settings, "mirror", "export", artifacts[0].digest, tmp_path / "a.tar")
    assert done.code == errors.DigestMismatch.exit_code and not (tmp_path / "a.tar").exists()


def write_tar(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:") as archive:
        for each in members:
            archive.addfile(each, io.BytesIO(bytes(each.size)))
    return path


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0
) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, size
    return made


@pytest.mark.parametrize(
    "member",
    [
        entry("../outside"),
        entry("/tmp/outside"),
        entry("a/../../outside"),
        entry("link", tarfile.SYMTYPE, "/etc"),
        entry("hard", tarfile.LNKTYPE, "/etc/passwd"),
        entry("device", tarfile.CHRTYPE),
        entry("pipe", tarfile.FIFOTYPE),
        entry("a//b"),
    ],
    ids=lambda member: member.name,
)
def test_an_entry_that_no_export_has_condemns_the_file(
    mirror: Mirror, tmp_path: Path, member: tarfile.TarInfo
) -> None:
    file = write_tar(tmp_path / "a.tar", entry("one/hubaoti.json", size=3), member)
    with pytest.raises(errors.BadExport):
        import_artifacts(mirror, file)
    assert mirror.ls() == [] and not any((mirror.root / "tmp").iterdir())
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 99, b"\x1f\x8b\x08" + bytes(600)])
def test_what_is_no_export_is_said(mirror: Mirror, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises((errors.BadExport, errors.BadManifest)):
        import_artifacts(mirror, tmp_path / "a.tar")
    with pytest.raises(errors.BadExport):
        import_artifacts(mirror, tmp_path / "absent.tar")


def test_a_changed_byte_of_an_export_is_never_stored(
    artifacts: list[Artifact], settings: Settings, elsewhere: Settings, tmp_path: Path
) -> None:
    inside(settings, "mirror", "export", artifacts[0].digest, tmp_path / "a.tar")
    whole = (tmp_path / "a.tar").read_bytes()
    at = whole.index(b"goldengolden") + 3
    (tmp_path / "a.tar").write_bytes(whole[:at] + b"G" + whole[at + 1 :])
    assert inside(elsewhere, "mirror", "import", tmp_path / "a.tar").code != 0
    with Mirror.open(elsewhere.mirror) as mirror:
        assert mirror.ls() == []


@pytest.mark.parametrize(
    "names",
    [
        ["a/" * 1900 + "f"],
        ["a/" * 17 + "f"],
        ["/".join(["b" * 200] * 6)],
        ["b" * 256],
        ["é" * 128],
        ["one/x", "one/x"],
        ["one/x", "one/x/y"],
        ["one/x/y", "one/x"],
        ["one/x", "./one/x"],
    ],
    ids=lambda names: names[-1][:20],
)
def test_a_name_that_no_disk_could_have_condemns_the_file_before_anything_is_unpacked(
    settings: Settings, tmp_path: Path, names: list[str]
) -> None:
    file = write_tar(tmp_path / "a.tar", *(entry(name, size=1) for name in names))
    done = inside(settings, "mirror", "import", file)
    assert done.code == errors.BadExport.exit_code and str(file) in done.err
    assert "cannot write" not in done.err
    with Mirror.open(settings.mirror) as mirror:
        assert mirror.ls() == [] and not any((mirror.root / "tmp").iterdir())


def test_a_header_that_would_fill_the_memory_or_never_end_condemns_the_file(
    mirror: Mirror, tmp_path: Path
) -> None:
    huge = entry("name", tarfile.GNUTYPE_LONGNAME, size=8 << 30)
    with (tmp_path / "huge.tar").open("wb") as sink:
        sink.write(huge.tobuf())
        sink.truncate(9 << 30)
    each = tarfile.TarInfo.create_pax_global_header({"comment": "x"}).replace(b"g", b"x", 1)
    header = bytearray(each)
    header[156:157] = tarfile.XHDTYPE
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    (tmp_path / "chain.tar").write_bytes(bytes(header) * 5000)
    for name in ("huge.tar", "chain.tar"):
        with pytest.raises(errors.BadExport, match=f"{name} cannot be read"):
            import_artifacts(mirror, tmp_path / name)


def test_of_a_pipe_in_the_place_of_an_export_nothing_is_awaited(
    settings: Settings, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with at_most(20.0):
        done = inside(settings, "mirror", "import", tmp_path / "a.tar")
    assert done.code == errors.BadExport.exit_code and "a pipe or a device" in done.err


@pytest.mark.parametrize("harm", ["changed", "missing", "no manifest", "nothing"])
def test_what_is_wrong_with_an_export_names_its_file_and_no_temporary_one(
    artifacts: list[Artifact], settings: Settings, elsewhere: Settings, tmp_path: Path, harm: str
) -> None:
    inside(settings, "mirror", "export", artifacts[0].digest, tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    if harm == "changed":
        damage(folder / "golden.safetensors")
    elif harm == "missing":
        (folder / "golden.safetensors").unlink()
    elif harm == "no manifest":
        (folder / "hubaoti.json").write_text("{}")
    else:
        (folder / "hubaoti.json").unlink()
    with tarfile.open(tmp_path / "a.tar", "w:") as archive:
        archive.add(tmp_path / "out", ".")
    done = inside(elsewhere, "mirror", "import", tmp_path / "a.tar")
    assert done.code not in {0, 1}
    assert f"{tmp_path}/a.tar" in done.err and "/tmp/" not in done.err.replace(str(tmp_path), "")
    assert str(elsewhere.mirror) not in done.err


def test_a_place_without_its_folder_is_said(
    artifacts: list[Artifact], settings: Settings, tmp_path: Path
) -> None:
    for name in ("nodir/x.tar", "nodir/x"):
        done = inside(settings, "mirror", "export", artifacts[0].digest, tmp_path / name)
        assert done.code == errors.BadRequest.exit_code
        assert f"there is no folder {tmp_path}/nodir" in done.err


# An index that was lost


def test_a_lost_index_is_made_again_from_the_files_and_trusts_nobody(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings
) -> None:
    before = {(row.digest, row.key, row.recipe, row.variant, row.size) for row in mirror.ls()}
    mirror.close()
    for file in settings.mirror.glob("index.sqlite3*"):
        file.unlink()
    with Mirror.open(settings.mirror) as found:
        after = {(row.digest, row.key, row.recipe, row.variant, row.size) for row in found.ls()}
        assert after == before
        for artifact in artifacts:
            assert found.artifact(artifact.digest) == artifact
            with pytest.raises(errors.Untrusted, match="not built on this machine"):
                found.require_allowed(artifact.digest)


def test_what_is_not_whole_is_not_promised_again(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings
) -> None:
    mirror.close()
    artifacts[0].file("golden.safetensors").unlink()
    for file in settings.mirror.glob("index.sqlite3*"):
        file.unlink()
    with Mirror.open(settings.mirror) as found:
        assert [row.digest for row in found.ls()] == [artifacts[1].digest]


@pytest.mark.parametrize("harm", ["overwritten", "a table is gone"])
def test_a_damaged_index_is_moved_aside_and_made_again(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings, harm: str
) -> None:
    mirror.close()
    index = settings.mirror / "index.sqlite3"
    if harm == "overwritten":
        index.write_bytes(b"not a database, but long enough to be looked at" * 99)
    else:
        with closing(sqlite3.connect(index)) as db:
            db.execute("drop table pulls")
    assert "mirror rebuild" in inside(settings, "pull", "acme/x").err or harm != "overwritten"
    done = inside(settings, "mirror", "rebuild")
    assert done.code == 0 and "in the index again: 2 artifacts\n" in done.out, done.err
    assert "damaged index is in" in done.out
    for artifact in artifacts:
        assert f"trust add {artifact.digest}" in done.out
    assert inside(settings, "mirror", "verify", "--all").code == 0


def test_an_index_that_is_well_keeps_all_that_it_knows(
    artifacts: list[Artifact], mirror: Mirror, settings: Settings
) -> None:
    mirror.index.remove(artifacts[0].digest)
    done = inside(settings, "mirror", "rebuild")
    assert "in the index again: 1 artifact\n" in done.out and "trust add" not in done.out
    assert mirror.artifact(artifacts[0].digest) == artifacts[0]
    mirror.require_allowed(artifacts[0].digest)


def test_a_bundle_is_imported_like_an_export(elsewhere: Settings, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "one")
    done = inside(elsewhere, "mirror", "import", bundle.path)
    assert done.code == 0 and f"trust add {bundle.manifest.digest}" in done.out, done.err


@pytest.mark.parametrize(
    ("name", "error"),
    [("root.so", errors.BadPackage), ("golden.safetensors", errors.BadExport)],
)
def test_what_lacks_a_file_is_not_stored(
    artifacts: list[Artifact],
    settings: Settings,
    elsewhere: Settings,
    tmp_path: Path,
    name: str,
    error: type[errors.HubaotiError],
) -> None:
    inside(settings, "mirror", "export", artifacts[0].digest, tmp_path / "out")
    next((tmp_path / "out").rglob(name)).unlink()
    assert inside(elsewhere, "mirror", "import", tmp_path / "out").code == error.exit_code
    with Mirror.open(elsewhere.mirror) as mirror:
        assert mirror.ls() == [] and not any((mirror.root / "tmp").iterdir())
