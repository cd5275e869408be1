"""Artifacts between machines, without a Hub: in a folder, or in one file of it.

    <digest's beginning>/     as a bundle, but that its packages are folders, as in the mirror

The file is a plain tar. Neither says anything that is believed: each byte that comes in is compared
with its manifest, and an artifact is of a stranger until somebody on this machine says otherwise.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti.artifact.manifest import FILENAME, LARGEST_MANIFEST, Manifest, parse_manifest
from hubaoti.artifact.package import leads_outside
from hubaoti.disk import explain_disk_errors, require_disk_room
from hubaoti.errors import BadExport, OutputExists
from hubaoti.mirror.artifact import Artifact, compute_unpacked_size
from hubaoti.mirror.folders import make_workspace

if TYPE_CHECKING:
    from hubaoti.mirror.store import Mirror

_ENDING = ".tar"
_MOST = 100_000  # entries of one export
_AGAIN = "export it again on the machine that has it: hubaoti mirror export"
_ELSEWHERE = "choose another folder for it"


def export(mirror: Mirror, artifacts: Sequence[Artifact], output: Path) -> None:
    """Write artifacts into a folder, or into one file, if its name ends in .tar.

    Raises:
        DigestMismatch: one was changed; it is in quarantine.
        OutputExists: there is something already. DiskFull: there is no room.
    """
    for artifact in artifacts:
        mirror.verify_own(artifact)
    if output.exists():
        raise OutputExists(f"{output} is there already", hint="choose another name")
    parent, is_file = output.absolute().parent, output.suffix == _ENDING
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
    with make_workspace(mirror.root / "tmp") as work:
        _unpack(source, work / "folder")
        return _import_folder(mirror, work / "folder")


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
        size = source.stat().st_size
        with tarfile.open(source, "r:") as archive:
            folder.mkdir(mode=0o700)
            with explain_disk_errors(folder, size):
                require_disk_room(folder, size)
                for at, member in enumerate(archive):
                    _copy_member(archive, member, folder, at)
    except (tarfile.TarError, ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadExport(f"{source} cannot be read: {reason}", hint=_AGAIN) from error


def _copy_member(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, at: int) -> None:
    """Write one entry. A file's bytes lie in the tar as they are, so no bomb is in it."""
    name = member.name.removeprefix("./")
    if member.isdir() and (name == "." or not leads_outside(name)):
        return
    found = archive.extractfile(member) if member.isreg() and not member.issparse() else None
    if at >= _MOST or leads_outside(name) or found is None:
        raise BadExport(f"it has an entry that no export has: {name!r:.120}", hint=_AGAIN)
    target = folder / name
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with found as content, target.open("xb") as sink:
        shutil.copyfileobj(content, sink)
