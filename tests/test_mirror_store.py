"""The mirror: whole and verified, or absent; beside other processes, and after a kill."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from bundles import MEMBERS, make_bundle, tree_of, write_zip
from disks import immovable, read_only
from test_folder_trees import nest

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME
from hubaoti.artifact.schema import Member
from hubaoti.artifact.variant import Recipe
from hubaoti.errors import (
    BadManifest,
    BadPackage,
    DigestMismatch,
    DiskFull,
    HubaotiError,
    UnsafeFolder,
)
from hubaoti.mirror import BUILT_HERE, Artifact, Mirror, PullOrigin
from hubaoti.mirror.folders import keep_newest
from hubaoti.mirror.gc import collect
from hubaoti.mirror.index import Index, Pin
from hubaoti.mirror.retry import retry

ORIGIN = PullOrigin("https://hub", "acme/tiny", "c" * 40, "float32-sdpa/x")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    with Mirror.open(tmp_path / "home/mirror") as found:
        yield found


def files_of(bundle: Bundle) -> dict[str, Path]:
    return {file.path: bundle.path / file.path for file in bundle.manifest.all_files()}


def put(mirror: Mirror, bundle: Bundle, origin: PullOrigin = ORIGIN) -> Artifact:
    return mirror.put(bundle.manifest, files_of(bundle), origin)


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def holds_nothing(mirror: Mirror) -> bool:
    return mirror.ls() == [] and all(
        is_empty(mirror.root / name) for name in ("tmp", "graphs", "artifacts")
    )


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


def test_what_is_put_is_found_again(mirror: Mirror, bundle: Bundle) -> None:
    artifact = put(mirror, bundle)
    assert mirror.artifact(artifact.digest) == artifact
    rows = mirror.index.rows(bundle.manifest.key)
    assert [mirror.artifact(row.digest) for row in rows] == [artifact]
    assert mirror.index.rows("0" * 64) == []
    assert artifact.file("golden.safetensors").read_bytes() == b"golden" * 100
    so = artifact.graph_folder(bundle.manifest.graphs[0]) / "model/root.so"
    assert so.read_bytes() == MEMBERS["model/root.so"]
    mirror.verify(artifact)
    assert is_empty(mirror.root / "tmp")


def test_files_are_read_only_and_folders_are_ours(mirror: Mirror, bundle: Bundle) -> None:
    put(mirror, bundle)
    for path in mirror.root.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif "sqlite3" not in path.name and path.parent.name != "locks":
            assert not mode & 0o222, path


def test_the_listing_says_where_it_came_from(mirror: Mirror, bundle: Bundle) -> None:
    before = time.time()
    artifact = mirror.put(
        bundle.manifest, files_of(bundle), ORIGIN, Recipe("float32", "sdpa", None, "mine")
    )
    (row,) = mirror.ls()
    assert row.digest == artifact.digest
    assert (row.recipe, row.variant) == ("float32-sdpa+mine", str(bundle.manifest.variant))
    assert before <= row.added <= time.time()
    assert row.origin == ORIGIN and row.origin.publisher == "acme"
    held = sum(path.stat().st_size for path in mirror.root.glob("[ag]*/**/*") if path.is_file())
    assert row.size == held


def test_what_was_built_here_has_no_publisher(mirror: Mirror, bundle: Bundle) -> None:
    put(mirror, bundle, BUILT_HERE)
    assert mirror.ls()[0].origin.publisher == ""
    assert not mirror.index.is_built(bundle.manifest.digest)
    mirror.index.record_built(bundle.manifest)
    assert mirror.index.is_built(bundle.manifest.digest)


def test_putting_twice_is_putting_once(mirror: Mirror, bundle: Bundle) -> None:
    first = put(mirror, bundle)
    before = {path: path.stat().st_mtime_ns for path in first.graphs.rglob("*")}
    assert put(mirror, bundle) == first
    assert {path: path.stat().st_mtime_ns for path in first.graphs.rglob("*")} == before
    assert len(mirror.ls()) == 1


def test_two_artifacts_share_a_graph(mirror: Mirror, tmp_path: Path, bundle: Bundle) -> None:
    other = make_bundle(tmp_path / "other", mode="other")
    assert other.manifest.digest != bundle.manifest.digest
    put(mirror, bundle), put(mirror, other)
    assert len(list((mirror.root / "graphs").iterdir())) == 1
    damage(next((mirror.root / "graphs").rglob("*.so")))
    with pytest.raises(DigestMismatch):
        mirror.verify_graph(bundle.manifest.graphs[0])
    assert mirror.ls() == []  # neither is promised any more
    put(mirror, other)
    assert mirror.artifact(bundle.manifest.digest) is None
    assert mirror.artifact(other.manifest.digest) is not None


@pytest.mark.parametrize("path", ["golden.safetensors", "graphs/root.pt2"])
def test_a_file_with_other_bytes_is_never_stored(mirror: Mirror, bundle: Bundle, path: str) -> None:
    damage(bundle.path / path)
    with pytest.raises((DigestMismatch, BadPackage)):
        put(mirror, bundle)
    assert mirror.ls() == []
    assert is_empty(mirror.root / "tmp") and is_empty(mirror.root / "artifacts")


def test_a_package_of_another_size_than_is_said_is_never_stored(
    mirror: Mirror, bundle: Bundle
) -> None:
    graphs = (msgspec.structs.replace(bundle.manifest.graphs[0], size=1),)
    manifest = msgspec.structs.replace(bundle.manifest, graphs=graphs)
    with pytest.raises(BadManifest, match=r"says that graphs/root\.pt2 has 1 bytes"):
        mirror.put(manifest, files_of(bundle), ORIGIN)
    assert holds_nothing(mirror)


def test_a_missing_member_is_never_stored(mirror: Mirror, bundle: Bundle) -> None:
    write_zip(bundle.path / "graphs/root.pt2", {"model/root.so": b"x"})
    with pytest.raises(BadPackage, match="has not the listed"):
        put(mirror, bundle)
    assert holds_nothing(mirror)


def test_a_flipped_bit_in_the_mirror_is_found_and_kept_apart(
    mirror: Mirror, bundle: Bundle
) -> None:
    artifact = put(mirror, bundle)
    graph = bundle.manifest.graphs[0]
    damage(artifact.graph_folder(graph) / "model/root.so")
    with pytest.raises(DigestMismatch, match=r"root\.so") as caught:
        mirror.verify(artifact)
    assert "pull, compile or import it" in caught.value.hint
    assert mirror.artifact(artifact.digest) is None
    assert not artifact.graph_folder(graph).exists()
    assert len(list((mirror.root / "quarantine").iterdir())) == 1
    put(mirror, bundle)
    mirror.verify(artifact)


# Each looks at files of an artifact that is whole.
LOOKS: dict[str, Callable[[Mirror, Bundle], object]] = {
    "verify": lambda mirror, bundle: mirror.verify(read(mirror, bundle)),
    "a graph": lambda mirror, bundle: mirror.verify_graph(bundle.manifest.graphs[0]),
    "find": lambda mirror, bundle: mirror.artifact(bundle.manifest.digest),
    "put again": lambda mirror, bundle: put(mirror, bundle),
    "retry": lambda mirror, _: retry(mirror),
    "gc": lambda mirror, _: collect(mirror),
}


def read(mirror: Mirror, bundle: Bundle) -> Artifact:
    """The artifact of a bundle, whether or not anything can be read."""
    digest = bundle.manifest.digest
    return Artifact(
        digest, mirror.root / "artifacts" / digest, mirror.root / "graphs", bundle.manifest
    )


def require_kept(mirror: Mirror, bundle: Bundle) -> None:
    """See that an artifact that was built here is here as it was."""
    assert [row.digest for row in mirror.ls()] == [bundle.manifest.digest]
    assert is_empty(mirror.root / "quarantine")
    mirror.verify(read(mirror, bundle))
    assert collect(mirror).orphans == ()


@contextmanager
def no_descriptors() -> Iterator[None]:
    """As in a process that may open no more files."""
    limits, taken = resource.getrlimit(resource.RLIMIT_NOFILE), list[int]()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("look", LOOKS)
def test_without_descriptors_nothing_is_broken(look: str, mirror: Mirror, bundle: Bundle) -> None:
    put(mirror, bundle, BUILT_HERE)
    mirror.index.record_built(bundle.manifest)
    with no_descriptors(), suppress(HubaotiError, OSError):
        LOOKS[look](mirror, bundle)
    require_kept(mirror, bundle)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EACCES])
def test_a_file_that_cannot_be_read_is_not_a_broken_one(
    number: int, mirror: Mirror, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(mirror, bundle, BUILT_HERE)

    def unreadable(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    for look in ("verify", "find", "put again"):
        monkeypatch.setattr("hubaoti.disk._open_no_link", unreadable)
        with pytest.raises(HubaotiError, match="cannot read") as caught:
            LOOKS[look](mirror, bundle)
        assert not isinstance(caught.value, DigestMismatch)
        monkeypatch.undo()
        require_kept(mirror, bundle)


def test_a_lost_index_is_not_made_again_of_what_cannot_be_read(
    mirror: Mirror, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an artifact that was not read just then would be promised by nobody, and collected."""
    put(mirror, bundle)
    mirror.close()
    for file in mirror.root.glob("index.sqlite3*"):
        file.unlink()

    def unreadable(path: str, flags: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr("hubaoti.disk._open_no_link", unreadable)
    with pytest.raises(HubaotiError, match="cannot read"):
        Mirror.open(mirror.root)
    monkeypatch.undo()
    with Mirror.open(mirror.root) as again:
        require_kept(again, bundle)


def test_a_changed_tensor_is_found_and_kept_apart(mirror: Mirror, bundle: Bundle) -> None:
    artifact = put(mirror, bundle)
    assert mirror.verify_file(artifact, bundle.manifest.files[0]).is_file()
    damage(artifact.file("golden.safetensors"))
    with pytest.raises(DigestMismatch, match="golden"):
        mirror.verify(artifact)
    assert mirror.artifact(artifact.digest) is None
    put(mirror, bundle)
    mirror.verify(artifact)


def test_a_link_in_the_place_of_a_member_is_no_member(mirror: Mirror, bundle: Bundle) -> None:
    artifact = put(mirror, bundle)
    member = artifact.graph_folder(bundle.manifest.graphs[0]) / "model/root.so"
    outside = bundle.path / "outside.so"
    shutil.move(member, outside)
    member.symlink_to(outside)
    with pytest.raises(DigestMismatch):
        mirror.verify(artifact)


def test_a_changed_manifest_is_not_believed(mirror: Mirror, bundle: Bundle) -> None:
    artifact = put(mirror, bundle)
    damage(artifact.path / FILENAME)
    assert mirror.artifact(artifact.digest) is None
    assert mirror.ls() == []
    put(mirror, bundle)
    assert mirror.artifact(artifact.digest) == artifact


def test_a_promise_that_the_disk_lacks_is_withdrawn(mirror: Mirror, bundle: Bundle) -> None:
    artifact = put(mirror, bundle)
    shutil.rmtree(artifact.graph_folder(bundle.manifest.graphs[0]))
    assert mirror.artifact(artifact.digest) is None
    assert mirror.ls() == []
    put(mirror, bundle)
    shutil.rmtree(artifact.path)
    assert mirror.artifact(artifact.digest) is None
    assert mirror.artifact("0" * 64) is None


def test_a_damaged_copy_is_replaced_by_a_put(mirror: Mirror, bundle: Bundle) -> None:
    artifact = put(mirror, bundle)
    damage(artifact.graph_folder(bundle.manifest.graphs[0]) / "model/root.so")
    damage(artifact.file("golden.safetensors"))
    put(mirror, bundle)
    mirror.verify(artifact)
    assert len(list((mirror.root / "quarantine").iterdir())) == 2


def test_only_the_newest_broken_copies_are_kept(mirror: Mirror, bundle: Bundle) -> None:
    quarantine = mirror.root / "quarantine"
    for turn in range(7):
        artifact = put(mirror, bundle)
        damage(artifact.file("golden.safetensors"))
        with pytest.raises(DigestMismatch):
            mirror.verify(artifact)
        (newest,) = (path for path in quarantine.iterdir() if not (path / "turn").exists())
        (newest / "turn").write_text(str(turn))
        os.utime(newest, (turn, turn))
    kept = sorted(path.read_text() for path in quarantine.glob("*/turn"))
    assert kept == ["2", "3", "4", "5", "6"]


def test_broken_copies_beyond_a_size_go_the_oldest_first(tmp_path: Path) -> None:
    for turn, size in enumerate((10, 10, 10, 50)):
        (tmp_path / f"{turn}").mkdir()
        (tmp_path / f"{turn}/file").write_bytes(bytes(size))
        os.utime(tmp_path / f"{turn}", (turn, turn))
    keep_newest(tmp_path, 5, 60)
    assert {path.name for path in tmp_path.iterdir()} == {"3", "2"}
    keep_newest(tmp_path, 5, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"3"}


def test_a_pull_is_remembered_with_its_artifact(mirror: Mirror, bundle: Bundle) -> None:
    pin = Pin("https://hub", "acme/tiny", "c" * 40, "", "host")
    mirror.index.record_pull(pin, "0" * 64, "path")
    assert mirror.find_pull(pin) is None  # of an artifact that is not here there is no memory
    artifact = put(mirror, bundle)
    mirror.index.record_pull(pin, artifact.digest, "path")
    assert mirror.find_pull(pin) == (artifact, "path")
    assert mirror.find_pull(replace(pin, endpoint="https://other")) is None
    damage(artifact.path / FILENAME)
    assert mirror.find_pull(pin) is None
    assert mirror.index.find_pull(pin) is None


def test_what_a_repo_gave_is_known_also_where_another_gave_it_first(
    mirror: Mirror, bundle: Bundle, tmp_path: Path
) -> None:
    first, second = Pin("https://hub", "acme/a", "a" * 40, "", "host"), "b" * 40
    one = put(mirror, bundle)
    two = put(mirror, make_bundle(tmp_path / "other", mode="other"))
    for repo in ("acme/a", "acme/b"):
        mirror.index.record_pull(replace(first, repo=repo), one.digest, "path")
    mirror.index.record_pull(replace(first, commit=second), two.digest, "path")
    assert mirror.index.list_pulls("https://hub", "acme/a") == [two.digest, one.digest]
    assert mirror.index.list_pulls("https://hub", "acme/a", "a" * 40) == [one.digest]
    assert mirror.index.list_pulls("https://hub", "acme/b") == [one.digest]
    assert mirror.index.list_pulls("https://other", "acme/b") == []


def put_in_process(root: Path, folder: Path) -> str:
    with Mirror.open(root) as mirror:
        return put(mirror, Bundle.read(folder)).digest


def test_many_processes_put_the_same_artifact_at_once(tmp_path: Path, bundle: Bundle) -> None:
    root = tmp_path / "mirror"  # and all of them make the mirror
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        digests = pool.starmap(put_in_process, [(root, bundle.path)] * 8)
        pool.close()
        pool.join()
    assert set(digests) == {bundle.manifest.digest}
    with Mirror.open(root) as mirror:
        (row,) = mirror.ls()
        found = mirror.artifact(row.digest)
        assert found is not None
        mirror.verify(found)
        assert is_empty(root / "tmp") and is_empty(root / "quarantine")


SLOW_PUT = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from hubaoti.artifact import package
from hubaoti.artifact.bundle import Bundle
from hubaoti.mirror import Mirror
import time

def slow(*a, copy=package.copy_hashed):
    print("writing", flush=True)
    time.sleep(0.05)
    digest = copy(*a)
    print("written", flush=True)
    time.sleep(0.05)
    return digest

package.copy_hashed = slow
bundle = Bundle.read(Path(sys.argv[2]))
files = {file.path: bundle.path / file.path for file in bundle.manifest.all_files()}
with Mirror.open(Path(sys.argv[1])) as mirror:
    mirror.put(bundle.manifest, files)
"""


def start_slow_put(root: Path, bundle: Bundle) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_PUT, str(root), str(bundle.path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("lines", [1, 2, 3, 4])
def test_a_kill_at_any_moment_leaves_nothing_that_is_believed(
    tmp_path: Path, bundle: Bundle, lines: int
) -> None:
    root = tmp_path / "mirror"
    with start_slow_put(root, bundle) as process:
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not is_empty(root / "tmp")
    with Mirror.open(root) as mirror:
        assert holds_nothing(mirror)
        mirror.verify(put(mirror, bundle))


def test_an_interrupted_put_removes_its_traces(tmp_path: Path, bundle: Bundle) -> None:
    root = tmp_path / "mirror"
    with start_slow_put(root, bundle) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode != 0
    assert is_empty(root / "tmp")
    with Mirror.open(root) as mirror:
        assert holds_nothing(mirror)


def test_a_living_process_s_work_is_not_swept(tmp_path: Path, bundle: Bundle) -> None:
    root = tmp_path / "mirror"
    with start_slow_put(root, bundle) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with Mirror.open(root):
            assert not is_empty(root / "tmp")
        process.communicate()
    assert process.returncode == 0
    with Mirror.open(root) as mirror:
        assert len(mirror.ls()) == 1


def test_what_a_killed_process_left_is_swept_however_deep_it_is(tmp_path: Path) -> None:
    Mirror.open(tmp_path / "mirror").close()
    left = tmp_path / "mirror/tmp/0123456789abcdef"
    left.mkdir()
    nest(left, 2000)
    Mirror.open(tmp_path / "mirror").close()
    assert is_empty(tmp_path / "mirror/tmp")


def test_what_cannot_be_swept_is_in_nobody_s_way(tmp_path: Path, bundle: Bundle) -> None:
    Mirror.open(tmp_path / "mirror").close()
    left = tmp_path / "mirror/tmp/0123456789abcdef"
    left.mkdir()
    (left / "file").write_text("x")
    with immovable(left / "file"), Mirror.open(tmp_path / "mirror") as mirror:
        put(mirror, bundle)
        assert len(mirror.ls()) == 1
    Mirror.open(tmp_path / "mirror").close()
    assert is_empty(tmp_path / "mirror/tmp")


@pytest.mark.parametrize("name", ["a/" * 17 + "x.so", "b" * 256])
def test_what_no_disk_could_have_is_never_stored(mirror: Mirror, bundle: Bundle, name: str) -> None:
    graph = bundle.manifest.graphs[0]
    members = tuple(replace_member(each, name) for each in graph.members)
    long = msgspec.structs.replace(graph, members=members)
    manifest = msgspec.structs.replace(bundle.manifest, graphs=(long,))
    with pytest.raises(BadManifest, match="more than 16 folders"):
        mirror.put(manifest, files_of(bundle), ORIGIN)
    assert holds_nothing(mirror)


def replace_member(member: Member, name: str) -> Member:
    return Member(path=name, sha256=member.sha256, size=member.size)


def test_a_file_that_vanished_is_the_callers_to_explain(mirror: Mirror, bundle: Bundle) -> None:
    (bundle.path / "graphs/root.pt2").unlink()
    with pytest.raises(FileNotFoundError):
        put(mirror, bundle)
    assert holds_nothing(mirror)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=400k,mode=0700", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    small_disk: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", members={"model/root.so": os.urandom(1 << 20)})
    with Mirror.open(small_disk / "mirror") as mirror:
        with pytest.raises(DiskFull, match=r"1\.0 MiB needed, 0\.[0-9] MiB free") as caught:
            put(mirror, bundle)
        assert caught.value.hint
        assert holds_nothing(mirror)


def test_a_disk_that_fills_during_unpacking_leaves_nothing(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "bundle", members={"model/root.so": os.urandom(1 << 20)})
    with Mirror.open(small_disk / "mirror") as mirror:
        monkeypatch.setattr("hubaoti.mirror.store.require_disk_room", lambda *_: None)
        with pytest.raises(DiskFull, match="needed"):
            put(mirror, bundle)
        assert holds_nothing(mirror)


def test_a_disk_without_room_for_the_index_is_said(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(396 << 10))
    with pytest.raises(DiskFull, match="free") as caught:
        Mirror.open(small_disk / "mirror").close()
    assert "HUBAOTI_HOME" in caught.value.hint


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", members={"model/root.so": os.urandom(1 << 20)})
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from hubaoti.artifact.bundle import Bundle; from hubaoti.mirror import Mirror\n"
        "from hubaoti.errors import DiskFull\n"
        "bundle = Bundle.read(Path(sys.argv[1]))\n"
        "files = {file.path: bundle.path / file.path for file in bundle.manifest.all_files()}\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with Mirror.open(Path(sys.argv[2])) as mirror:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "    try:\n"
        "        mirror.put(bundle.manifest, files)\n"
        "    except DiskFull:\n"
        "        assert not any((mirror.root / 'tmp').iterdir())\n"
        "        print('full')\n"
    )
    command = [sys.executable, "-c", code, str(bundle.path), str(tmp_path / "mirror")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "full\n"


@pytest.mark.parametrize("name", [".", "graphs", "tmp", "index.sqlite3", "index.sqlite3-wal"])
def test_what_others_may_write_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "mirror"
    keeper = Mirror.open(root)  # keeps the -wal file there
    keeper.index.record_built(make_bundle(tmp_path / "bundle").manifest)
    (root / name).chmod(0o777)
    with pytest.raises(UnsafeFolder, match="may be written") as caught:
        Mirror.open(root)
    assert "chmod" in caught.value.hint
    keeper.close()


def test_what_another_user_owns_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    root = tmp_path / "mirror"
    Mirror.open(root).close()
    os.chown(root / "graphs", 12345, -1)
    with pytest.raises(UnsafeFolder, match="user 12345") as caught:
        Mirror.open(root)
    assert "chown" in caught.value.hint


def test_a_place_where_nothing_can_be_made_is_named() -> None:
    with pytest.raises(HubaotiError, match="cannot make /proc/nowhere"):
        Mirror.open(Path("/proc/nowhere/mirror"))


def test_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give links away")
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "mirror").symlink_to(tmp_path / "real")
    Mirror.open(tmp_path / "mirror").close()  # our own link to our own folder is ours
    os.chown(tmp_path / "mirror", 12345, -1, follow_symlinks=False)
    with pytest.raises(UnsafeFolder):
        Mirror.open(tmp_path / "mirror")


def test_folders_above_are_made_for_us_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        Mirror.open(tmp_path / "a/b/mirror").close()
    finally:
        os.umask(old)
    for folder in ("a", "a/b", "a/b/mirror", "a/b/mirror/graphs"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


def test_a_file_in_the_place_of_the_mirror_is_said(tmp_path: Path) -> None:
    (tmp_path / "mirror").write_text("x")
    with pytest.raises(HubaotiError, match="cannot write") as caught:
        Mirror.open(tmp_path / "mirror")
    assert caught.value.hint


def test_a_disk_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "ro,mode=0700", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a read-only disk cannot be mounted here")
    try:
        with pytest.raises(HubaotiError, match="Read-only") as caught:
            Mirror.open(folder / "mirror")
        assert "HUBAOTI_HOME" in caught.value.hint
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_mirror_gives_what_it_has(tmp_path: Path, bundle: Bundle) -> None:
    home, pin = tmp_path / "home", Pin("https://hub", "acme/tiny", "c" * 40, "", "host")
    with Mirror.open(home / "mirror") as mirror:
        artifact = put(mirror, bundle)
        mirror.index.record_pull(pin, artifact.digest, "path")
        for folder in ("tmp", "quarantine", "hub"):  # an image may lack what was empty
            (mirror.root / folder).rmdir()
    with read_only(home), Mirror.open(home / "mirror") as mirror:
        assert [row.digest for row in mirror.ls()] == [artifact.digest]
        assert mirror.find_pull(pin) == (artifact, "path")
        mirror.verify(artifact)


def test_a_read_only_mirror_says_that_it_is_where_it_had_to_write(
    tmp_path: Path, bundle: Bundle
) -> None:
    home = tmp_path / "home"
    with Mirror.open(home / "mirror") as mirror:
        artifact = put(mirror, bundle)
    damage(artifact.file("golden.safetensors"))
    with read_only(home), Mirror.open(home / "mirror") as mirror:
        works: list[Callable[[], object]] = [
            lambda: put(mirror, bundle),
            lambda: mirror.index.record_built(bundle.manifest),
            lambda: mirror.index.remove(artifact.digest),
            mirror.index.require_writable,
        ]
        for work in works:
            with pytest.raises(HubaotiError, match=r"mirror is read-only") as caught:
                work()
            assert "HUBAOTI_HOME" in caught.value.hint
        with pytest.raises(DigestMismatch, match="golden"):
            mirror.verify(artifact)


def test_what_was_last_written_to_a_baked_index_is_seen(tmp_path: Path, bundle: Bundle) -> None:
    """A process that is killed leaves its rows in the -wal file beside the index."""
    living = Mirror.open(tmp_path / "living")
    put(living, bundle)
    shutil.copytree(living.root, tmp_path / "home/mirror")
    living.close()
    assert (tmp_path / "home/mirror/index.sqlite3-wal").stat().st_size
    with read_only(tmp_path / "home"), Mirror.open(tmp_path / "home/mirror") as mirror:
        assert [row.digest for row in mirror.ls()] == [bundle.manifest.digest]


def forbid_all() -> None:
    """Take from this process root's right to write what its permissions forbid."""
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def test_a_mirror_with_read_only_permissions_gives_what_it_has(
    tmp_path: Path, bundle: Bundle
) -> None:
    root = tmp_path / "home/mirror"
    with Mirror.open(root) as mirror:
        put(mirror, bundle)
    paths = [root.parent, *root.parent.rglob("*")]
    before = {path: path.stat().st_mode for path in paths}
    for path, mode in before.items():
        path.chmod(mode & ~0o222)
    code = (
        "import sys; from pathlib import Path; from hubaoti.mirror import Mirror\n"
        "with Mirror.open(Path(sys.argv[1])) as mirror:\n"
        "    (row,) = mirror.ls()\n"
        "    mirror.verify(mirror.artifact(row.digest))\n"
        "    print(mirror.index.is_writable)\n"
    )
    command = [sys.executable, "-c", code, str(root)]
    done = subprocess.run(command, preexec_fn=forbid_all, capture_output=True, text=True)
    for path, mode in before.items():
        path.chmod(mode)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_damaged_index_says_what_to_do_and_the_files_are_used_again(
    tmp_path: Path, bundle: Bundle
) -> None:
    root = tmp_path / "mirror"
    with Mirror.open(root) as mirror:
        put(mirror, bundle)
    (root / "index.sqlite3").write_bytes(b"not a database, but long enough to be looked at" * 99)
    with pytest.raises(HubaotiError, match="damaged") as caught:
        Mirror.open(root)
    assert "remove" in caught.value.hint
    for path in root.glob("index.sqlite3*"):
        path.unlink()
    with Mirror.open(root) as mirror:
        before = tree_of(root / "graphs")
        put(mirror, bundle)
        assert tree_of(root / "graphs") == before


def test_an_index_of_a_newer_hubaoti_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "mirror"
    with Mirror.open(root) as mirror:
        mirror.index._db.execute("pragma user_version = 99")
    with pytest.raises(HubaotiError, match="newer hubaoti"):
        Mirror.open(root)


def test_a_busy_index_says_so(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hubaoti.mirror.index.PATIENCE", 0.05)
    with Mirror.open(tmp_path / "mirror") as mirror, Mirror.open(tmp_path / "mirror") as other:
        other.index._db.execute("begin immediate")
        with pytest.raises(HubaotiError, match="busy"):
            mirror.index.record_built(bundle.manifest)
        other.index._db.execute("rollback")
        mirror.index.record_built(bundle.manifest)


def test_an_index_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(HubaotiError, match="unable to open"):
        Index(tmp_path / "absent/index.sqlite3")


def test_opening_and_listing_is_fast(tmp_path: Path, bundle: Bundle) -> None:
    root = tmp_path / "mirror"
    with Mirror.open(root) as mirror:
        put(mirror, bundle)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        with Mirror.open(root) as mirror:
            assert len(mirror.ls()) == 1
        best = min(best, time.perf_counter() - start)
    assert best < 0.05
