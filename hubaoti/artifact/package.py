"""A `.pt2` as what it is, a zip of native code: read, check and unpack only what a manifest lists.

Nothing is believed that the zip says of itself: names, sizes and digests are compared with the
manifest's while the bytes are read, and an entry that points outside condemns the whole package.
"""

from __future__ import annotations

import errno
import hashlib
import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from hubaoti.artifact.schema import LONGEST_PART, LONGEST_PATH, MOST_FOLDERS, Graph, Member
from hubaoti.disk import explain_unread, open_plain
from hubaoti.errors import BadPackage

_CHUNK = 1 << 20
_ENTRIES = 100_000  # of one package; an honest one has some dozens
# What zipfile and its decompressors raise of damaged files.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    IndexError,
    RuntimeError,
    ValueError,
)
_HINT = "the package is damaged or was made to harm: pull it again, or ask its publisher"


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_bytes(path: Path, sha256: str) -> bool:
    """Whether a file is there, and no link, with these bytes.

    Raises:
        HubaotiError: it could not be read, so nobody knows.
    """
    with suppress(FileNotFoundError), open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    return False


def holds_members(folder: Path, graph: Graph) -> bool:
    """Whether a graph's package lies unpacked in a folder, byte for byte, and no part is a link.

    Raises:
        HubaotiError: a part could not be read.
    """
    with suppress(FileNotFoundError), explain_unread(folder):
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
        members = graph.members
        return is_folder and all(has_bytes(folder / each.path, each.sha256) for each in members)
    return False


def list_members(package: Path) -> tuple[Member, ...]:
    """Every entry of a package, with its digest, in order of the names.

    Raises:
        BadPackage: it is truncated, or an entry points outside of it.
    """
    with _open_archive(package) as archive:
        entries = sorted(_list_safe_entries(package, archive), key=lambda entry: entry.filename)
        return tuple(_hash_member(archive, entry) for entry in entries)


def unpack(package: Path, members: tuple[Member, ...], folder: Path) -> None:
    """Write the listed members below `folder`, read-only, and nothing else.

    Raises:
        BadPackage: a member is missing or has other bytes, or any entry points outside.
    """
    with _open_archive(package) as archive:
        entries = {entry.filename: entry for entry in _list_safe_entries(package, archive)}
        for member in members:
            entry = entries.get(member.path)
            if entry is None or entry.file_size != member.size:
                raise BadPackage(f"{package.name} has not the listed {member.path}", hint=_HINT)
            try:
                _copy_member(archive, entry, member, folder / member.path)
            except (FileExistsError, NotADirectoryError) as error:
                message = f"{package.name}: {member.path} is a file and a folder"
                raise BadPackage(message, hint=_HINT) from error


def copy_unpacked(package: Path, members: tuple[Member, ...], folder: Path) -> None:
    """As `unpack`, of a package that lies unpacked in a folder.

    Raises:
        BadPackage: a member is missing, has other bytes, or points outside.
    """
    for member in members:
        path = package / member.path
        if leads_outside(member.path) or path.is_symlink() or not path.is_file():
            raise BadPackage(f"{package.name} has not the listed {member.path}", hint=_HINT)
        with path.open("rb") as source:
            _write_member(source, member, folder / member.path)


def unpack_all(package: Path, folder: Path) -> None:
    """Unpack a package of our own making."""
    unpack(package, list_members(package), folder)


def pack_folder(folder: Path, package: Path) -> None:
    """Zip a folder so that equal files give equal bytes: sorted names, no times, no modes."""
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, path.read_bytes())


@contextmanager
def _open_archive(package: Path) -> Iterator[zipfile.ZipFile]:
    """The package as a zip; whatever zipfile finds wrong with it is a BadPackage."""
    try:
        with zipfile.ZipFile(package) as archive:
            yield archive
    except (*_DAMAGE, OSError) as error:
        # A made-up offset is an invalid argument of seek, and bz2 gives its errors no number.
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, None):
            raise
        raise BadPackage(f"{package.name} is not a whole zip file: {error}", hint=_HINT) from error


def _list_safe_entries(package: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The entries that are files, once none is found to be a link, a double, or to lead outside."""
    entries = archive.infolist()
    if len(entries) > _ENTRIES:
        raise BadPackage(f"{package.name} has {len(entries)} entries", hint=_HINT)
    seen: set[str] = set()
    for entry in entries:
        name = entry.orig_filename
        if is_overlong(name):
            raise BadPackage(f"{package.name} has an entry {OVERLONG}: {name!r:.120}", hint=_HINT)
        if leads_outside(name) or stat.S_ISLNK(entry.external_attr >> 16):
            raise BadPackage(
                f"{package.name} has an entry that leads outside: {name!r}", hint=_HINT
            )
        if name in seen:
            raise BadPackage(f"{package.name} has two entries called {name!r}", hint=_HINT)
        seen.add(name)
    return [entry for entry in entries if not entry.is_dir()]


def leads_outside(name: str) -> bool:
    """Whether an entry's name is absolute, climbs, or could be read as either somewhere.

    So is every name that is not its own plain spelling (`./a`, `a//b`).
    """
    odd = "\\" in name or "\0" in name or ":" in name
    path = PurePosixPath(name)
    plain = str(path) == name.removesuffix("/") and name != "."
    return not name or odd or not plain or path.is_absolute() or ".." in path.parts


OVERLONG = (
    f"of more than {MOST_FOLDERS} folders within each other, or of a longer name than disks take"
)


def is_overlong(name: str) -> bool:
    """Whether an entry's name has more folders, or more bytes, than a path of a manifest may have.

    Disks would take some of these, and what looks at them afterwards would not.
    """
    path = name.encode("utf-8", "surrogatepass")
    parts = path.split(b"/")
    is_long = len(path) > LONGEST_PATH or any(len(part) > LONGEST_PART for part in parts)
    return is_long or len(parts) > MOST_FOLDERS + 1


def _hash_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Member:
    with archive.open(entry) as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()  # type: ignore[arg-type]
    return Member(path=entry.filename, sha256=digest, size=entry.file_size)


def _copy_member(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, member: Member, target: Path
) -> None:
    """Write one entry while hashing it."""
    with archive.open(entry) as source:
        _write_member(source, member, target)


def _write_member(source: IO[bytes], member: Member, target: Path) -> None:
    """Write a member while hashing it; a zip bomb stops at the listed size."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as sink:
        digest = copy_hashed(source, sink, member.size)
        sink.flush()
        os.fsync(sink.fileno())
    if digest != member.sha256:
        raise BadPackage(f"{member.path} has not the bytes that the manifest lists", hint=_HINT)
    # Execute, too: some systems refuse to map code from a file that may not be executed.
    target.chmod(0o555 if target.suffix == ".so" else 0o444)


def copy_hashed(source: IO[bytes], sink: IO[bytes], limit: int) -> str:
    """Copy at most `limit` bytes; the sha256 of what was copied."""
    digest = hashlib.sha256()
    while limit > 0 and (chunk := source.read(min(_CHUNK, limit))):
        digest.update(chunk)
        sink.write(chunk)
        limit -= len(chunk)
    return digest.hexdigest()
