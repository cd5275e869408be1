"""A bundle: an artifact as a folder, before it is pushed. Written whole or not at all."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

from hubaoti.artifact import manifest as manifests
from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.package import hash_file, list_members
from hubaoti.artifact.schema import File
from hubaoti.disk import DISK_FULL, OUTPUT, TEMPORARY, are_on_one_disk, find_full_disk
from hubaoti.errors import BadManifest, DigestMismatch, DiskFull, HubaotiError, OutputExists
from hubaoti.folder_trees import list_files, remove_tree

_OURS = "hubaoti-"  # what the names begin with of folders beside a bundle in which it is written
_OLD = "old"  # the bundle that is being replaced, in a folder beside its place
_MADE = re.compile(r"[a-z0-9_]{8}\Z")  # what `mkdtemp` makes up, which did it before
# What may lie in a bundle in the making, beside temporary folders.
_PARTS = {_OLD, "replaced", "graphs", "buffers", "buffers.safetensors", "golden.safetensors"}
_PARTS |= {".parts", manifests.FILENAME, f"{manifests.FILENAME}.sha256"}
_AGAIN = "compile the bundle again"
_EXPORT = "was written by hubaoti mirror export"
_TO_STORE = "store it with: hubaoti mirror import"
SEAL = f"{manifests.FILENAME}.sha256"  # stays here; on the Hub the digest is the artifact's name


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder with a manifest, and the manifest."""

    path: Path
    manifest: Manifest = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Bundle:
        """Read the manifest of a bundle; its files are looked at by `check`.

        Raises:
            BadManifest: there is none, or it is not a good one.
            HubaotiError: it may not be read.
        """
        file = path / manifests.FILENAME
        with explain_read_errors(path):
            if not file.is_file():
                raise _describe_other(path)
            return cls(path, manifests.parse_manifest(_read_start(file), str(file)))

    def check(self) -> None:
        """Compare every file with the manifest, and every package's entries with their list.

        Raises:
            DigestMismatch: a file is missing, has other bytes, or not listed; or it is an export.
            BadManifest: a file has another size than is said.
            BadPackage: a package is damaged, or its entries are not the listed ones.
            HubaotiError: a file may not be read.
        """
        with explain_read_errors(self.path):
            self._check()

    def refuse_exported(self) -> None:
        """See that this is no artifact as `hubaoti mirror export` writes it, which is no bundle.

        Its packages lie unpacked: no bytes of theirs are the ones that the manifest names.

        Raises:
            DigestMismatch: it is one; nothing is wrong with it.
        """
        graphs = self.manifest.graphs
        if graphs and all((self.path / graph.file).is_dir() for graph in graphs):
            raise DigestMismatch(
                f"{self.path} is no bundle: it {_EXPORT}, its packages unpacked",
                hint=f"{_TO_STORE} {self.path} (which verifies it); from the mirror, hubaoti "
                "compile MODEL -o DIR makes a bundle of it that can be pushed",
            )

    def _check(self) -> None:
        self.refuse_exported()
        listed = {file.path: file for file in self.manifest.all_files()}
        for file in listed.values():
            _check_file(self.path / file.path, file)
        self._check_seal()
        files = filter(Path.is_file, list_files(self.path))
        present = {file.relative_to(self.path).as_posix() for file in files}
        for extra in sorted(present - {*listed, manifests.FILENAME, SEAL}):
            hint = f"remove it, or {_AGAIN}"
            raise DigestMismatch(f"{self.path / extra} is not in the manifest", hint=hint)
        for graph in self.manifest.graphs:
            if list_members(self.path / graph.file) != graph.members:
                message = f"{self.path / graph.file} has other entries than its manifest lists"
                raise DigestMismatch(message, hint=_AGAIN)

    def _check_seal(self) -> None:
        """A manifest that was edited may be canonical, and even agree with itself."""
        seal = self.path / SEAL
        if seal.is_file() and _read_start(seal) != _format_seal(self.manifest).encode():
            message = f"{self.path / manifests.FILENAME} was edited after it was compiled"
            raise DigestMismatch(message, hint=_AGAIN)


def _describe_other(path: Path) -> BadManifest:
    """The error of what is no bundle: what it is instead, and what to do with it."""
    if path.suffix == ".tar" and path.is_file():
        message = f"{path} is not a bundle: such a file {_EXPORT}"
        return BadManifest(message, hint=f"{_TO_STORE} {path}")
    lacks = f"it holds no {manifests.FILENAME}" if path.exists() else "there is no such folder"
    hint = "make one with: hubaoti compile MODEL -o DIR"
    return BadManifest(f"{path} is not a bundle: {lacks}", hint=hint)


def find_bundles(path: Path) -> list[Bundle]:
    """The bundle in a folder, or each of a folder of bundles, which holds nothing else.

    Raises:
        BadManifest: there is none, or something else is beside those that there are.
        HubaotiError: it may not be read.
    """
    with explain_read_errors(path):
        # Hidden is a folder in which a bundle is being written.
        inside = sorted(each for each in path.glob("*") if not each.name.startswith("."))
        is_group = any((each / manifests.FILENAME).is_file() for each in inside)
        is_one = (path / manifests.FILENAME).is_file()
    if is_one or not is_group:
        return [Bundle.read(path)]
    return [Bundle.read(each) for each in inside]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Finish a bundle: its manifest, and the manifest's own digest beside it."""
    (folder / manifests.FILENAME).write_bytes(manifest.to_json())
    (folder / SEAL).write_text(_format_seal(manifest))


def _read_start(path: Path) -> bytes:
    """A file, or so much of one as no manifest has."""
    with path.open("rb") as file:
        return file.read(manifests.LARGEST_MANIFEST + 1)


def _format_seal(manifest: Manifest) -> str:
    return f"{manifest.digest}  {manifests.FILENAME}\n"


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Around reading the bundle `path`: what the system refuses, in words."""
    try:
        yield
    except OSError as error:
        raise HubaotiError(
            f"cannot read {error.filename or path}: {error.strerror or error}",
            hint="give the folder of a bundle that you may read",
        ) from error


def _check_file(path: Path, file: File) -> None:
    """Compare one file with its entry.

    Raises:
        DigestMismatch: it is missing, or has other bytes.
        BadManifest: it has another size than is said.
    """
    if path.is_symlink() or not path.is_file():
        raise DigestMismatch(f"{path} is listed and is not there", hint=_AGAIN)
    found = hash_file(path)
    if found != file.sha256:
        raise DigestMismatch(
            f"{path} was changed: its sha256 is {found[:12]}…, the manifest says "
            f"{file.sha256[:12]}…",
            hint=f"{_AGAIN}, or copy it again from where it came",
        )
    if (size := path.stat().st_size) != file.size:
        raise BadManifest(
            f"the manifest says that {path} has {file.size} bytes; it has {size}, and is the file "
            "that was meant",
            hint=_AGAIN,
        )


def make_file_entry(root: Path, path: str) -> File:
    """The manifest's entry of a file that lies below `root`."""
    file = root / path
    return File(path=path, sha256=hash_file(file), size=file.stat().st_size)


@contextmanager
def write_bundle(path: Path) -> Iterator[Path]:
    """A folder to write a bundle into; it takes the place of `path` when all went well.

    Raises:
        OutputExists: `path` exists and is not a bundle, so it is not ours to replace.
        DiskFull: there is no room for it.
        HubaotiError: its place may not be written.
    """
    path = path.absolute()
    with _explain_write_errors(path):
        tidy(path)
        _refuse_foreign(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _make_locked_folder(path) as folder:
            yield folder
            folder.chmod(0o755)
            _replace_folder(folder, path)


def tidy(path: Path) -> None:
    """Remove what killed writers of the bundle `path` left beside it, and nobody holds any more.

    Where one was killed in the middle of a replacement, the last whole bundle is put back.
    """
    path = path.absolute()
    left = [path.parent.glob(f".{escape(path.name)}.{end}") for end in (f"{_OURS}*", "????????")]
    for folder in itertools.chain(*left):
        with suppress(OSError):
            if _is_ours(folder):
                handle = _lock_folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    _clear(folder, path)
                finally:
                    os.close(handle)


def _is_ours(folder: Path) -> bool:
    """Whether a folder beside a bundle is one in which it was written.

    By its name; one of an older hubaoti as `mkdtemp` makes it, with parts of a bundle that is not
    whole, since a whole one is somebody's copy, and with nothing else.
    """
    status, name = folder.lstat(), folder.name.rpartition(".")[2]
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return False
    if name.startswith(_OURS):
        return True
    there = [each.name for each in folder.iterdir()]
    parts = all(each in _PARTS or _MADE.match(each[3:]) for each in there)
    made = _MADE.match(name) is not None and status.st_mode & 0o777 == 0o700
    return made and bool(there) and manifests.FILENAME not in there and parts


@contextmanager
def _make_locked_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, held as long as this process, or one that it forks, lives."""
    folder, handle = path.with_name(f".{path.name}.{_OURS}{secrets.token_hex(8)}"), None
    try:  # around its making, too: whoever stops us may do so at any moment
        while handle is None:
            folder.mkdir(mode=0o700)
            with suppress(FileNotFoundError):  # who tidies up was faster
                handle = _lock_folder(folder, fcntl.LOCK_EX)
        yield folder
    finally:
        _clear(folder, path)
        if handle is not None:
            os.close(handle)


def _lock_folder(folder: Path, how: int) -> int:
    """A handle that holds the lock of a folder; the system lets go of it when we are killed.

    FileNotFoundError where it is gone by now; OSError where it is held, and `how` is not to wait.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, how)
        folder.lstat()
    except FileNotFoundError:
        os.close(handle)
        raise
    except OSError:
        if how & fcntl.LOCK_NB:
            os.close(handle)
            raise
        # A disk without locks: then nobody takes our folder for a left one, either.
    return handle


def _clear(folder: Path, path: Path) -> None:
    """Remove a folder beside `path`; a whole bundle in it is put back, and in no case removed."""
    if (folder / _OLD).exists() and not path.exists():
        (folder / _OLD).replace(path)
    if not (folder / _OLD).exists():
        remove_tree(folder, ignore_errors=True)


@contextmanager
def _explain_write_errors(path: Path) -> Iterator[None]:
    """Around work on the bundle `path`: what the system refuses, in words."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise _describe_full_disk(path, error) from error
        raise HubaotiError(
            f"cannot write {error.filename or path}: {error.strerror or error}",
            hint="choose a folder that you may write with -o",
        ) from error


@contextmanager
def explain_store_errors(path: Path) -> Iterator[None]:
    """Around what comes after a bundle was written: what fails there does not hide it.

    Raises:
        HubaotiError: as it came, and where the bundle is.
    """
    try:
        yield
    except HubaotiError as error:
        raise type(error)(
            f"{error}; the bundle was compiled and is whole in {path}, the mirror has it not",
            hint=f"{error.hint}; {path} can be pushed as it is",
        ) from error


def _describe_full_disk(path: Path, error: OSError) -> DiskFull:
    """The error that says which disk is full: that of the bundle `path`, or a temporary one."""
    folder = find_full_disk(error, path.parent)
    if are_on_one_disk(folder, path.parent):
        hint = f"free some space, or {OUTPUT}"
        return DiskFull(f"no room on the disk of {path} for the bundle", hint=hint)
    return DiskFull(
        f"no room on the disk of {folder}, where temporary files are",
        hint=f"free some space there, or {TEMPORARY}",
    )


def _refuse_foreign(path: Path) -> None:
    """Refuse an output folder whose content we did not make."""
    ours = not path.exists() or (
        path.is_dir() and (not any(path.iterdir()) or (path / manifests.FILENAME).is_file())
    )
    if not ours:
        raise OutputExists(
            f"{path} exists and is not a bundle", hint="choose another folder with -o"
        )


def _replace_folder(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`; a kill in between leaves `old` whole in a folder beside."""
    if not old.exists():
        new.replace(old)
        return
    with _make_locked_folder(old) as aside:
        old.replace(aside / _OLD)
        new.replace(old)
        (aside / _OLD).replace(aside / "replaced")  # which may be removed now
