"""Artifacts between machines, without a Hub: in a folder, or in one file of it.

    <digest's beginning>/     as a bundle, but that its packages are folders, as in the mirror

The file is a plain tar. Neither says anything that is believed: each byte that comes in is compared
with its manifest, and an artifact is of a stranger until somebody on this machine says otherwise.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti.artifact.manifest import FILENAME, LARGEST_MANIFEST, Manifest, parse_manifest
from hubaoti.artifact.package import OVERLONG, is_overlong, leads_outside
from hubaoti.disk import explain_disk_errors, open_given, require_disk_room
from hubaoti.errors import BadExport, BadRequest, HubaotiError, OutputExists, first_line
from hubaoti.mirror.artifact import Artifact, compute_unpacked_size
from hubaoti.mirror.folders import make_workspace

if TYPE_CHECKING:
    from hubaoti.mirror.store import Mirror

_ENDING = ".tar"
_MOST = 100_000  # entries of one export
_LONGEST_HEADER = 1 << 20  # bytes
# What tarfile raises of damaged files, and of headers that each stand for the next one's.
_DAMAGE = (tarfile.TarError, ValueError, LookupError, ArithmeticError, EOFError, RecursionError)
_AGAIN = "export it again on the machine that has it: hubaoti mirror export"
_ELSEWHERE = "choose another folder for it"


def export(mirror: Mirror, artifacts: Sequence[Artifact], output: Path) -> None:
    """Write artifacts into a folder, or into one file, if its name ends in .tar.

    Raises:
        DigestMismatch: one was changed; it is in quarantine.
        OutputExists: there is something already. BadRequest: there is no folder for it.
        DiskFull: there is no room.
    """
    for artifact in artifacts:
        mirror.verify_own(artifact)
    if output.exists():
        raise OutputExists(f"{output} is there already", hint="choose another name")
    parent, is_file = output.absolute().parent, output.suffix == _ENDING
    if not parent.is_dir():
        raise BadRequest(f"there is no folder {parent}", hint="make it, or name another")
    needed = (2 if is_file else 1) * sum(compute_unpacked_size(e.manifest) for e in artifacts)
    with explain_disk_errors(parent, needed, "name another place"), make_workspace(parent) as work:
        require_disk_room(parent, needed, _ELSEWHERE)
        for artifact in artifacts:
            _write(artifact, work / "folder" / artifact.digest[:12])
        if is_file:
            with tarfile.open(work / "file", "x:", format=tarfile.PAX_FORMAT) as archive:
                archive.add(work / "folder", ".", filter=_anonymize)
        (work / ("file" if is_file else "folder")).rename(output)


def import_artifacts(mirror: Mirror, source: Path) -> list[Artifact]:
    """Store the artifacts that `export` wrote into a folder or a file, or bundles in a folder.

    Whom to trust is for others to say.

    Raises:
        BadExport: it is none, or was made to harm. BadManifest: a manifest cannot be read.
        DigestMismatch, BadPackage: an artifact is not as its manifest says; it is not listed.
        DiskFull, MirrorFull: there is no room.
    """
    mirror.index.require_writable()
    if source.is_dir():
        return _import_folder(mirror, source)
    with make_workspace(mirror.root / "tmp") as work, _naming(source, work / "folder"):
        _unpack(source, work / "folder")
        return _import_folder(mirror, work / "folder")


@contextmanager
def _naming(source: Path, folder: Path) -> Iterator[None]:
    """Around work on what was unpacked into a folder: its errors name the file that it came in."""
    try:
        yield
    except HubaotiError as error:
        message = str(error).replace(str(folder), str(source))
        if message == str(error):
            raise
        raise type(error)(message, hint=error.hint) from error


def _write(artifact: Artifact, folder: Path) -> None:
    """All of an artifact, below a folder that is made."""
    folder.mkdir(parents=True)
    for file in artifact.manifest.files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.file(file.path), target)
    for graph in artifact.manifest.graphs:
        for member in graph.members:
            target = folder / graph.file / member.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.graph_folder(graph) / member.path, target)
    (folder / FILENAME).write_bytes(artifact.manifest.to_json())


def _import_folder(mirror: Mirror, source: Path) -> list[Artifact]:
    """Store each artifact whose manifest lies in a folder, or in one below it."""
    found = [source] if (source / FILENAME).is_file() else sorted(source.iterdir())
    folders = [folder for folder in found if (folder / FILENAME).is_file()]
    if not folders:
        raise BadExport(f"{source} holds no artifact: no folder in it has {FILENAME}", hint=_AGAIN)
    artifacts = []
    for folder in folders:
        manifest = _read_manifest(folder / FILENAME)
        files = {file.path: folder / file.path for file in manifest.all_files()}
        for path in files.values():  # of a pipe nothing is awaited
            if not (path.is_file() or path.is_dir()):
                raise BadExport(f"{path} is listed and is not there", hint=_AGAIN)
        try:
            artifacts.append(mirror.put(manifest, files))
        except FileNotFoundError as error:
            raise BadExport(f"{error.filename} is listed and is not there", hint=_AGAIN) from error
    return artifacts


def _read_manifest(path: Path) -> Manifest:
    if path.is_symlink() or path.stat().st_size > LARGEST_MANIFEST:
        raise BadExport(f"{path} is a link, or too large for a manifest", hint=_AGAIN)
    return parse_manifest(path.read_bytes(), str(path))


def _anonymize(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """An entry that says nothing of the machine that wrote it."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member


def _unpack(source: Path, folder: Path) -> None:
    """Write the plain files of a tar below `folder`; any other entry condemns it."""
    try:
        with open_given(source) as file, tarfile.open(None, "r:", _Bounded(file.raw)) as archive:
            entries, size = _list_entries(source, archive), os.fstat(file.fileno()).st_size
            with explain_disk_errors(folder, size):
                require_disk_room(folder, size)
                folder.mkdir(mode=0o700)
                for name, entry in entries.items():
                    _copy_entry(archive, entry, folder / name)
    except (*_DAMAGE, OSError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise BadExport(f"{source} cannot be read: {reason}", hint=_AGAIN) from error


class _Bounded(BufferedReader):
    """A tar, of which nothing is read at once that would fill the memory.

    tarfile reads the whole of a header that says how long a name is, however long that would be.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        """So many bytes.

        Raises:
            tarfile.ReadError: they are too many.
        """
        if size is None or not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"it has a header of {size} bytes")
        return super().read(size)


def _list_entries(source: Path, archive: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """The plain files of a tar, by their names, once all of its entries were looked at.

    Raises:
        BadExport: one is something else, or has a name that no export has, or that of another.
    """
    files, folders = dict[str, tarfile.TarInfo](), set[str]()
    for entry in archive:
        name = entry.name.removeprefix("./")
        if entry.isdir() and name == ".":
            continue
        is_plain = entry.isdir() or (entry.isreg() and not entry.issparse())
        if not is_plain or leads_outside(name) or len(files) + len(folders) >= _MOST:
            raise BadExport(f"{source} has an entry that no export has: {name!r:.120}", hint=_AGAIN)
        if is_overlong(name):
            raise BadExport(f"{source} has an entry {OVERLONG}: {name!r:.120}", hint=_AGAIN)
        if name in files:
            raise BadExport(f"{source} has two entries called {name!r:.120}", hint=_AGAIN)
        if entry.isdir():
            folders.add(name)
        else:
            files[name] = entry
        folders.update(name[: slash.start()] for slash in re.finditer("/", name))
    for name in sorted(files.keys() & folders):
        raise BadExport(f"in {source}, {name!r:.120} is a file and a folder", hint=_AGAIN)
    return files


def _copy_entry(archive: tarfile.TarFile, entry: tarfile.TarInfo, target: Path) -> None:
    """Write one entry. A file's bytes lie in the tar as they are, so no bomb is in it."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = archive.extractfile(entry)
    assert found is not None  # only plain files are listed
    with found as content, target.open("xb") as sink:
        shutil.copyfileobj(content, sink)
