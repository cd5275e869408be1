"""Packages: only listed bytes are unpacked, and nothing a zip says of itself is believed."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from bundles import MEMBERS, tree_of, write_zip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hubaoti.artifact.package import hash_file, leads_outside, list_members, pack_folder, unpack
from hubaoti.artifact.schema import Member
from hubaoti.errors import BadPackage

LIGHT = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    write_zip(tmp_path / "root.pt2", MEMBERS)
    return tmp_path / "root.pt2"


def test_members_are_listed_by_name_with_their_bytes(package: Path, tmp_path: Path) -> None:
    members = list_members(package)
    assert [member.path for member in members] == sorted(MEMBERS)
    assert {member.path: member.size for member in members} == {
        name: len(content) for name, content in MEMBERS.items()
    }
    unpack(package, members, tmp_path / "out")
    assert tree_of(tmp_path / "out") == {member.path: member.sha256 for member in members}


def test_only_listed_members_are_unpacked_read_only(package: Path, tmp_path: Path) -> None:
    listed = tuple(member for member in list_members(package) if member.path.endswith(".so"))
    unpack(package, listed, tmp_path / "out")
    (found,) = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert found.name == "root.so"
    assert not stat.S_IMODE(found.stat().st_mode) & 0o222


def test_equal_folders_give_equal_packages(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        for path, content in MEMBERS.items():
            (folder / path).write_bytes(content)
        os.utime(folder / "model/root.so", (1, hash(name) % 10**6))
        pack_folder(folder, tmp_path / f"{name}.pt2")
    assert hash_file(tmp_path / "a.pt2") == hash_file(tmp_path / "b.pt2")
    unpack(tmp_path / "a.pt2", list_members(tmp_path / "a.pt2"), tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(tmp_path / "a")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../up.so",
        "a/../../up.so",
        "..",
        "C:/x.so",
        "a\\..\\b",
        "\\\\host\\x",
        "a/..",
    ],
)
def test_an_entry_that_leads_outside_condemns_the_package(tmp_path: Path, name: str) -> None:
    write_zip(tmp_path / "evil.pt2", {"model/root.so": b"good", name: b"evil"})
    for act in (list_members, lambda path: unpack(path, (), tmp_path / "out")):
        with pytest.raises(BadPackage, match="leads outside") as caught:
            act(tmp_path / "evil.pt2")
        assert caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"evil.pt2"}


@pytest.mark.parametrize("name", ["a/" * 17 + "b", "a" * 256, "/".join(["a" * 255] * 5)])
def test_an_entry_that_is_too_deep_or_too_long_condemns_the_package(
    tmp_path: Path, name: str
) -> None:
    write_zip(tmp_path / "evil.pt2", {"model/root.so": b"good", name: b"evil"})
    for act in (list_members, lambda path: unpack(path, (), tmp_path / "out")):
        with pytest.raises(BadPackage, match="16 folders within each other, or of a longer name"):
            act(tmp_path / "evil.pt2")
    write_zip(tmp_path / "good.pt2", {"a/" * 16 + "b": b"good"})
    assert len(list_members(tmp_path / "good.pt2")) == 1


def test_a_link_condemns_the_package(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("model/root.so")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "evil.pt2", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(BadPackage, match="leads outside"):
        list_members(tmp_path / "evil.pt2")


def test_two_entries_of_one_name_condemn_the_package(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "evil.pt2", "w") as archive:
        archive.writestr("model/root.so", b"good")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("model/root.so", b"evil")
    with pytest.raises(BadPackage, match="two entries"):
        list_members(tmp_path / "evil.pt2")


def test_a_file_that_is_also_a_folder_is_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "evil.pt2", {"model": b"file", "model/root.so": b"code"})
    members = list_members(tmp_path / "evil.pt2")
    with pytest.raises(BadPackage, match=r"model/root\.so"):
        unpack(tmp_path / "evil.pt2", members, tmp_path / "out")


def test_a_bomb_stops_at_the_listed_size(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/root.so", bytes(20 << 20))
    # The directory promises ten bytes, as the manifest does; the stream has twenty million.
    content = bytearray((tmp_path / "bomb.pt2").read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = struct.pack("<I", 10)
    (tmp_path / "bomb.pt2").write_bytes(content)
    listed = (Member(path="model/root.so", sha256="0" * 64, size=10),)
    with pytest.raises(BadPackage):
        unpack(tmp_path / "bomb.pt2", listed, tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.so")) <= 10


@pytest.mark.parametrize("change", ["sha256", "size", "path"])
def test_a_member_that_is_not_the_listed_one_is_refused(
    package: Path, tmp_path: Path, change: str
) -> None:
    other = {"sha256": "0" * 64, "size": 3, "path": "model/absent.so"}
    fields = {"path": "model/root.so", "sha256": "0" * 64, "size": 5120, change: other[change]}
    listed = Member(**fields)  # type: ignore[arg-type]
    with pytest.raises(BadPackage, match=listed.path):
        unpack(package, (listed,), tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 1, 30, 100, -1, -22])
def test_a_truncated_package_is_refused(package: Path, keep: int) -> None:
    package.write_bytes(package.read_bytes()[:keep])
    with pytest.raises(BadPackage, match="not a whole zip"):
        list_members(package)


@LIGHT
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_a_flipped_bit_is_never_unpacked_as_good(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    with zipfile.ZipFile(folder / "root.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    members = list_members(folder / "root.pt2")
    content = bytearray((folder / "root.pt2").read_bytes())
    for place, mask in flips:
        content[place % len(content)] ^= mask
    (folder / "root.pt2").write_bytes(content)
    try:
        unpack(folder / "root.pt2", members, folder / "out")
    except BadPackage:
        return
    assert tree_of(folder / "out") == {member.path: member.sha256 for member in members}


NAMES = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(["..", ".", "a", "b.so", "", "~", "C:"]), max_size=5).map("/".join),
)


@LIGHT
@given(names=st.lists(NAMES, min_size=1, max_size=5, unique=True))
def test_whatever_the_names_nothing_lands_outside(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    out = folder / "inner/out"
    out.mkdir(parents=True)
    try:
        write_zip(folder / "root.pt2", {name: b"code" for name in names})
    except (UnicodeEncodeError, ValueError, UserWarning):
        return  # no zip at all
    with suppress(BadPackage):
        unpack(folder / "root.pt2", list_members(folder / "root.pt2"), out)
    outside = {path for path in folder.rglob("*") if path.is_file() and out not in path.parents}
    assert outside == {folder / "root.pt2"}


@given(name=NAMES)
def test_what_leads_nowhere_outside_stays_below(name: str) -> None:
    if not leads_outside(name):
        joined = os.path.normpath(Path("/root/out") / name)
        assert joined == "/root/out" or joined.startswith("/root/out/")


@pytest.mark.parametrize("name", ["a/" * 17 + "x", "a/" * 1900 + "x", "b" * 256, "b/" + "c" * 1024])
def test_an_entry_that_no_disk_could_have_condemns_the_package(tmp_path: Path, name: str) -> None:
    write_zip(tmp_path / "bad.pt2", {**MEMBERS, name: b"x"})
    for act in (list_members, lambda path: unpack(path, (), tmp_path / "out")):
        with pytest.raises(BadPackage, match="more than 16 folders"):
            act(tmp_path / "bad.pt2")
    assert not (tmp_path / "out").exists()


def test_an_entry_as_deep_as_honest_ones_may_be_is_unpacked(tmp_path: Path) -> None:
    write_zip(tmp_path / "good.pt2", {"a/" * 16 + "x": b"x"})
    unpack(tmp_path / "good.pt2", list_members(tmp_path / "good.pt2"), tmp_path / "out")
    assert (tmp_path / "out" / ("a/" * 16 + "x")).read_bytes() == b"x"
