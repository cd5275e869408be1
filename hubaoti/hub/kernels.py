"""Kernels of the Hub: pinned at a commit, by the bytes of one build, and fetched so.

build/<variant>/metadata.json, …    in a repo of the type `kernel`, whose versions are branches
"""

from __future__ import annotations

import mmap
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from msgspec import UNSET

from hubaoti.artifact.kernel_metadata import LARGEST_METADATA, METADATA, parse_metadata
from hubaoti.artifact.kernel_pin import MOST_BYTES, MOST_FILES, KernelBuild, KernelOp, KernelPin
from hubaoti.artifact.kernel_schema import CALLED, list_unknown, read_arguments
from hubaoti.artifact.kernel_variant import KernelHost, choose_variant
from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.package import hash_file
from hubaoti.artifact.schema import File
from hubaoti.artifact.sizes import format_size
from hubaoti.disk import require_disk_room
from hubaoti.errors import (
    BadManifest,
    DigestMismatch,
    DiskFull,
    HubaotiError,
    HubUnreachable,
    KernelArchUnsupported,
    KernelDigestMismatch,
    KernelMissing,
    KernelSchemaMismatch,
    RepoNotFound,
)
from hubaoti.escape import escape_line
from hubaoti.hub.bounds import TooLong
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.records import Entry
from hubaoti.hub.revisions import resolve_owned
from hubaoti.mirror import Mirror
from hubaoti.mirror.rows import Signed
from hubaoti.mirror.trust import Trust
from hubaoti.progress import Progress

_KIND = "kernel"
_ATTEMPTS = 3
_STATUS = "kernel-status.toml"  # of a repo whose kernel lies in another one
_LARGEST_STATUS = 64 << 10  # bytes
_MOST_PLAIN = 64 << 20  # bytes of files that git itself keeps, which have no sha256
# A library keeps the schema of each op that it defines as one string.
_SCHEMA = re.compile(
    rb"(?<![\x20-\x7e])fwd\([\x20-\x7e]{0,8000}?\) -> [\x20-\x7e]{1,400}(?![\x20-\x7e])"
)
PULL_OTHER = "or pull a recipe that calls no kernel, as hubaoti pull REPO --recipe bfloat16-sdpa"
_NO_KERNEL = "name another kernel or version, or compile with sdpa, which needs no kernel"


def pin_kernel(client: HubClient, name: str, host: KernelHost) -> KernelPin:
    """Pin the kernel `owner/name[@version]` as its repo has it now, in the build that `host` loads.

    The host need not be this one. A version is a number, any other revision a branch, a tag or a
    commit. Nothing of the kernel is run: what its op is called with is read from its library.

    Raises:
        BadRequest: this names no kernel.
        RepoNotFound, AuthFailed, HubUnreachable: its commit cannot be asked.
        KernelMissing: it lies in another repo by now.
        KernelArchUnsupported: it has no build for this kind of host.
        KernelSchemaMismatch: no library of its build, or several, have the op that is called, or
            nobody knows how.
        BadManifest: its metadata say nothing, or that it loads other kernels; its files are too
            many, too large, or called as no file may be.
        KernelDigestMismatch: the endpoint gives other bytes than the commit lists.
    """
    ref = RepoRef.parse(name)
    version = int(ref.revision) if ref.revision and ref.revision.isdecimal() else None
    revision = ref.revision if version is None else f"v{version}"
    try:
        commit = resolve_owned(client, ref.repo, revision, _KIND)
        entries = {entry.path: entry for entry in client.files(ref.repo, commit, _KIND)}
    except RepoNotFound as error:
        raise RepoNotFound(
            f"there is no kernel {name}: {error}",
            hint=f"a kernel is a repo of type kernel; {error.hint}",
        ) from error
    except HubUnreachable as error:
        raise HubUnreachable(
            f"the kernel {name} is pinned by what its repo has, which cannot be asked: {error}",
            hint=f"compile where it can be asked, or without it: --attention sdpa; {error.hint}",
        ) from error
    _refuse_moved(client, ref.repo, commit, entries)
    variant = _choose_build(f"{ref.repo}@{commit}", entries, host)
    where = f"build/{variant} of {ref.repo} at {commit}"
    chosen = _choose_files(where, entries, f"build/{variant}/")
    files = {path: _download(client, ref.repo, commit, each) for path, each in chosen.items()}
    metadata = parse_metadata(files[METADATA].read_bytes(), f"{METADATA} in {where}")
    archs = metadata.backend.archs
    return KernelPin(
        repo=ref.repo,
        commit=commit,
        variant=variant,
        namespace=metadata.id,
        files=tuple(
            File(path=path, sha256=hash_file(file), size=file.stat().st_size)
            for path, file in sorted(files.items())
        ),
        ops=(_read_op(ref.repo, files),),
        version=UNSET if metadata.version is None else metadata.version,
        archs=tuple(archs) if archs else UNSET,
    )


def bring_kernels(
    manifest: Manifest, mirror: Mirror, client: HubClient, trust: Trust, progress: Progress
) -> None:
    """See that the kernels that an artifact calls lie in the mirror, and that each may run here.

    Who names an artifact's publisher names no kernel's: that one has to be trusted by himself. What
    is missing is fetched and verified.

    Raises:
        Untrusted: the publisher of a kernel is not trusted, whether it lies there or not.
        KernelMissing: the repo does not have it, or cannot be asked.
        KernelDigestMismatch: what it has are other bytes than were pinned.
        DiskFull: there is no room; nothing half-written stays.
    """
    signed = mirror.seen.list_signed(manifest.digest)
    require_kernel_publishers(manifest, client.endpoint, trust, signed)
    fetch_kernels(client, mirror, manifest.requires.kernels, progress)


def require_kernel_publishers(
    manifest: Manifest, endpoint: str, trust: Trust, signed: Iterable[Signed]
) -> None:
    """See that who publishes an artifact's kernels is trusted; whose signed it, pinned them too.

    Raises:
        Untrusted, Unsigned, Blocked: as `require_kernel_publisher`.
    """
    for pin in manifest.requires.kernels:
        require_kernel_publisher(trust, endpoint, pin.repo, f"commit {pin.commit}", signed)


def require_kernel_publisher(
    trust: Trust, endpoint: str, repo: str, which: str, signed: Iterable[Signed] = ()
) -> None:
    """See that who publishes a kernel is trusted by himself: an artifact may name anybody's.

    Where he has to sign, his signature of the artifact, which pins the kernel, is one of both.

    Raises:
        Untrusted: he is not. Unsigned: he has to sign, and did not.
    """
    owner = RepoRef(repo).owner
    advice = f"say so once with: hubaoti trust add {owner}; {PULL_OTHER}"
    trust.require(endpoint, owner, f"the kernel {repo} at {endpoint} ({which})", advice, signed)


def fetch_kernels(
    client: HubClient, mirror: Mirror, pins: Sequence[KernelPin], progress: Progress
) -> None:
    """See that pinned kernels lie in the mirror: what is missing is fetched and verified.

    Raises:
        KernelMissing, KernelDigestMismatch, DiskFull: as `bring_kernels`.
    """
    for pin in pins:
        if mirror.has_kernel(pin):
            continue
        build = require_build(pin)
        with mirror.leases.alone(pin.id, progress):
            if mirror.has_kernel(pin):  # by now: another process has fetched it
                continue
            progress(f"downloading the kernel {pin.repo} ({format_size(build.size)})")
            # As they were downloaded, and as they are kept, they lie there together for a while.
            require_disk_room(mirror.root, 2 * build.size)
            _store(client, mirror, pin)


def _store(client: HubClient, mirror: Mirror, pin: KernelPin) -> None:
    """Download a kernel into the mirror; what was downloaded is not kept twice."""
    require_owner_of(client, pin)
    for _ in range(_ATTEMPTS):
        files = download_build(client, pin)
        try:
            mirror.put_kernel(require_build(pin), files)
        except FileNotFoundError:  # another pull of it removed what we shared
            if mirror.has_kernel(pin):
                return
        except DiskFull:  # what is whole need not be fetched again
            raise
        except HubaotiError:
            _drop(client, files)
            raise
        else:
            _drop(client, files)
            return
    raise KernelMissing(
        f"the downloads of the kernel {pin} were removed {_ATTEMPTS} times",
        hint=f"see who else works in {mirror.root}, then pull again",
    )


def require_owner_of(client: HubClient, pin: KernelPin) -> None:
    """See that a kernel's owner has put it there: who pinned it is who made the artifact.

    Raises:
        Untrusted: no branch and no tag has its commit. RepoMoved: it is called otherwise by now.
        KernelMissing: it is not there, or cannot be asked.
    """
    try:
        resolve_owned(client, pin.repo, pin.commit, _KIND)
    except (RepoNotFound, HubUnreachable) as error:
        raise _describe_gone(pin, error) from error


def _drop(client: HubClient, files: Mapping[str, Path]) -> None:
    for file in files.values():
        client.drop(file)


def require_published(client: HubClient, manifest: Manifest) -> None:
    """See, before an artifact is pushed, that its kernels are where it says.

    Raises:
        KernelMissing: one is not, so nobody who pulls the artifact could open it.
    """
    for pin in manifest.requires.kernels:
        entries = _list_build(client, pin)
        build = pin.build
        for file in () if build is None else build.files:
            there = entries.get(file.path)
            if there is None or there.size != file.size or there.sha256 not in {None, file.sha256}:
                raise KernelMissing(
                    f"{file.path} of the kernel {pin} is not there as it was pinned",
                    hint="compile again, with the kernel as it is now",
                )


def _refuse_moved(client: HubClient, repo: str, commit: str, entries: Mapping[str, Entry]) -> None:
    """Refuse a repo that says that its kernel lies in another one."""
    now = repo
    if (status := entries.get(_STATUS)) and status.size <= _LARGEST_STATUS:
        try:
            found = tomllib.loads(client.read(repo, commit, status, _KIND).decode())
        except (ValueError, RecursionError):  # it says nothing
            found = {}
        now = str(found.get("destination", repo)) if found.get("kind") == "redirect" else repo
    if now != repo:
        raise KernelMissing(
            f"the kernel {repo} is called {escape_line(now, 120)} by now",
            hint="name that one, if you trust who publishes it",
        )


def _choose_files(where: str, entries: Mapping[str, Entry], start: str) -> dict[str, Entry]:
    """The files of a build by their paths in it; bytecode, which nobody needs, is none of them.

    Raises:
        BadManifest: they are too many or too large to be looked at, or have no metadata.
    """
    found = {
        path.removeprefix(start): entry
        for path, entry in entries.items()
        if path.startswith(start) and not path.endswith(".pyc")
    }
    plain = sum(entry.size for entry in found.values() if entry.sha256 is None)
    total = sum(entry.size for entry in found.values())
    if METADATA not in found or found[METADATA].size > LARGEST_METADATA:
        problem = f"it has no {METADATA} of at most {LARGEST_METADATA} bytes"
    elif len(found) > MOST_FILES or plain > _MOST_PLAIN or total > MOST_BYTES:
        problem = f"it has {len(found)} files of {total} bytes"
    else:
        return found
    raise BadManifest(f"{where} cannot be pinned: {problem}", hint=_NO_KERNEL)


def _choose_build(where: str, entries: Mapping[str, Entry], host: KernelHost) -> str:
    """The build of a repo for a host, by its folder's name."""
    parts = [path.split("/") for path in entries]
    names = sorted({part[1] for part in parts if len(part) > 2 and part[0] == "build"})
    if variant := choose_variant(names, host):
        return variant
    device = "a CPU" if host.cuda is None else f"CUDA {host.cuda}"
    raise KernelArchUnsupported(
        f"{where} has no build for torch {host.torch}, {device}, {host.machine} {host.os}; it has "
        f"{escape_line(', '.join(names), 1000) or 'none'}",
        hint=_NO_KERNEL,
    )


def _read_op(repo: str, files: Mapping[str, Path]) -> KernelOp:
    """The op that computes everything, as the libraries of a build define it."""
    libraries = [file for path, file in files.items() if path.endswith(".so")]
    found = sorted({schema for library in libraries for schema in _find_schemas(library)})
    if len(found) != 1:
        said = "; ".join(each.decode() for each in found) or "none"
        raise KernelSchemaMismatch(
            f"the libraries of {repo} define {len(found)} ops {CALLED}, not one: {said}",
            hint=_NO_KERNEL,
        )
    schema = found[0].decode()
    if problems := list_unknown(read_arguments(schema)):
        raise KernelSchemaMismatch(
            f"nobody knows how to call the op {CALLED} of {repo}: it {', '.join(problems)}",
            hint=_NO_KERNEL,
        )
    return KernelOp(CALLED, schema)


def _find_schemas(library: Path) -> set[bytes]:
    if not library.stat().st_size:
        return set()
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return {bytes(found[0]) for found in _SCHEMA.finditer(text)}


def _list_build(client: HubClient, pin: KernelPin) -> dict[str, Entry]:
    """The files of a pinned build, as its commit lists them."""
    start = f"build/{pin.build.variant}/" if pin.build else ""
    try:
        found = client.files(pin.repo, pin.commit, _KIND)
    except (RepoNotFound, HubUnreachable) as error:
        raise _describe_gone(pin, error) from error
    return {each.path.removeprefix(start): each for each in found if each.path.startswith(start)}


def require_build(pin: KernelPin) -> KernelBuild:
    """The build that a pin says; one that says none cannot be verified.

    Raises:
        KernelMissing: it says none.
    """
    if pin.build is None:
        raise KernelMissing(
            f"the kernel {pin} is pinned without its files, so none can be verified",
            hint="ask the publisher of the artifact to compile it again",
        )
    return pin.build


def download_build(client: HubClient, pin: KernelPin) -> dict[str, Path]:
    """A pinned build's files by their paths in it; their bytes are for who uses them to compare.

    Raises:
        KernelMissing: the repo does not have it, or cannot be asked.
        KernelDigestMismatch: a file is larger than it was pinned.
    """
    build = require_build(pin)
    start = f"build/{build.variant}/"
    try:
        return {
            file.path: _take(client, pin.repo, pin.commit, start + file.path, file.size)
            for file in build.files
        }
    except (RepoNotFound, HubUnreachable) as error:
        raise _describe_gone(pin, error) from error


def _describe_gone(pin: KernelPin, error: RepoNotFound | HubUnreachable) -> KernelMissing:
    hint = f"{error.hint}; {PULL_OTHER}"
    return KernelMissing(f"the kernel {pin} cannot be had: {error}", hint=hint)


def _download(client: HubClient, repo: str, commit: str, entry: Entry) -> Path:
    """A downloaded file, with the bytes that its commit lists."""
    try:
        if entry.sha256 is None:
            client.read(repo, commit, entry, _KIND)
    except DigestMismatch as error:
        raise KernelDigestMismatch(f"{error}", hint=error.hint) from error
    path = _take(client, repo, commit, entry.path, entry.size)
    if entry.sha256 not in {None, hash_file(path)}:
        client.drop(path)
        raise _describe_others(client, repo, entry.path)
    return path


def _take(client: HubClient, repo: str, commit: str, path: str, size: int) -> Path:
    """A downloaded file; no more of it is taken than it may have."""
    try:
        return client.download(repo, commit, path, size, _KIND)
    except TooLong as error:
        raise _describe_others(client, repo, path) from error


def _describe_others(client: HubClient, repo: str, path: str) -> KernelDigestMismatch:
    return KernelDigestMismatch(
        f"{client.endpoint} gives other bytes of {path} of {repo} than it lists",
        hint="try again; if it stays so, the endpoint or something on the way is broken",
    )
