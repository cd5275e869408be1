"""Bundles: checked against their manifest, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from bundles import changed, make_bundle, tree_of, write_zip

from hubaoti.artifact.bundle import (
    SEAL,
    Bundle,
    explain_read_errors,
    make_file_entry,
    write_bundle,
    write_manifest,
)
from hubaoti.artifact.manifest import FILENAME
from hubaoti.errors import BadManifest, DigestMismatch, HubaotiError, OutputExists


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", graphs=("root", "step"))


def test_a_bundle_is_read_as_it_was_written(bundle: Bundle) -> None:
    found = Bundle.read(bundle.path)
    assert found == bundle
    found.check()


def test_equal_builds_have_equal_digests(tmp_path: Path, bundle: Bundle) -> None:
    other = make_bundle(tmp_path / "other", graphs=("root", "step"))
    assert other.manifest.digest == bundle.manifest.digest
    assert tree_of(other.path) == tree_of(bundle.path)


def test_a_manifest_edited_into_another_good_one_is_refused(bundle: Bundle) -> None:
    write_manifest(bundle.path, bundle.manifest)
    bundle.check()
    seal = (bundle.path / SEAL).read_text()
    assert seal == f"{bundle.manifest.digest}  {FILENAME}\n"
    graphs = tuple(
        msgspec.structs.replace(graph, bounds={**graph.bounds, "batch": (1, 4)})
        for graph in bundle.manifest.graphs
    )
    changed(bundle, graphs=graphs)
    with pytest.raises(DigestMismatch, match="edited after it was compiled"):
        Bundle.read(bundle.path).check()


@pytest.mark.parametrize("path", ["graphs/root.pt2", "graphs/step.pt2", "golden.safetensors"])
@pytest.mark.parametrize("edit", ["flip", "cut", "remove", "link", "folder"])
def test_an_edited_file_is_named(bundle: Bundle, path: str, edit: str) -> None:
    file = bundle.path / path
    content = file.read_bytes()
    file.unlink()
    if edit == "flip":
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif edit == "cut":
        file.write_bytes(content[:-1])
    elif edit == "link":
        (bundle.path.parent / "outside").write_bytes(content)
        file.symlink_to(bundle.path.parent / "outside")
    elif edit == "folder":
        file.mkdir()
    with pytest.raises(DigestMismatch, match=path.rpartition("/")[2]) as caught:
        bundle.check()
    assert caught.value.hint
    assert caught.value.exit_code == 10


@pytest.mark.parametrize("name", ["extra.so", ".hidden", "graphs/more/extra.pt2"])
def test_an_added_file_is_named(bundle: Bundle, name: str) -> None:
    (bundle.path / name).parent.mkdir(exist_ok=True)
    (bundle.path / name).write_bytes(b"x")
    with pytest.raises(DigestMismatch, match=Path(name).name):
        bundle.check()


def test_a_package_whose_entries_are_not_the_listed_ones_is_refused(bundle: Bundle) -> None:
    graph = bundle.manifest.graphs[0]
    write_zip(bundle.path / graph.file, {"model/other.so": b"x"})
    entry = make_file_entry(bundle.path, graph.file)
    swapped = msgspec.structs.replace(graph, sha256=entry.sha256, size=entry.size)
    edited = changed(bundle, graphs=(swapped, bundle.manifest.graphs[1]))
    with pytest.raises(DigestMismatch, match="other entries"):
        edited.check()


@pytest.mark.parametrize("where", ["graphs", "files"])
def test_a_size_that_is_not_the_file_s_is_refused(bundle: Bundle, where: str) -> None:
    first, *rest = getattr(bundle.manifest, where)
    edited = changed(bundle, **{where: (msgspec.structs.replace(first, size=1), *rest)})
    with pytest.raises(BadManifest, match=r"says that .* has 1 bytes; it has \d+"):
        edited.check()


def test_a_folder_that_is_no_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BadManifest, match="not a bundle") as caught:
        Bundle.read(tmp_path)
    assert "hubaoti compile" in caught.value.hint


def test_what_may_not_be_read_is_named(bundle: Bundle) -> None:
    with pytest.raises(HubaotiError, match="cannot read"):
        Bundle.read(Path("x" * 300))
    with (
        pytest.raises(HubaotiError, match=r"cannot read .*\.pt2"),
        explain_read_errors(bundle.path),
    ):
        raise PermissionError(13, "Permission denied", "graphs/root.pt2")


def test_writing_gives_a_whole_folder(tmp_path: Path) -> None:
    with write_bundle(tmp_path / "deep/out") as folder:
        (folder / FILENAME).write_text("{}")
        assert not (tmp_path / "deep/out").exists()
    assert tree_of(tmp_path / "deep/out").keys() == {FILENAME}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_writing_replaces_a_bundle_and_an_empty_folder(tmp_path: Path, bundle: Bundle) -> None:
    (tmp_path / "empty").mkdir()
    for path in (bundle.path, tmp_path / "empty"):
        with write_bundle(path) as folder:
            (folder / "new").write_text("x")
        assert tree_of(path).keys() == {"new"}
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "empty"}


@pytest.mark.parametrize("error", [HubaotiError("x"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_what_was_there(
    tmp_path: Path, bundle: Bundle, error: BaseException
) -> None:
    before = tree_of(bundle.path)
    with pytest.raises(type(error)), write_bundle(bundle.path) as folder:
        (folder / "half").write_text("x")
        raise error
    assert tree_of(bundle.path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_not_ours_is_never_replaced(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
        output /= "thesis.txt"
    output.write_text("years of work")
    with pytest.raises(OutputExists) as caught, write_bundle(tmp_path / "out"):
        pass
    assert "-o" in caught.value.hint
    assert output.read_text() == "years of work"


def test_a_bundle_may_be_read_by_others(tmp_path: Path) -> None:
    with write_bundle(tmp_path / "out") as folder:
        (folder / FILENAME).write_text("{}")
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o755  # noqa: PTH116
