"""A build of a kernel as it lies in the mirror: its files, and no other, in a repo's own layout.

<digest>/build/<variant>/metadata.json, …
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from hubaoti.artifact.kernel_metadata import LARGEST_METADATA, METADATA
from hubaoti.artifact.kernel_pin import KernelBuild, KernelPin
from hubaoti.artifact.package import copy_hashed, has_bytes
from hubaoti.disk import sync_folder
from hubaoti.errors import KernelDigestMismatch, KernelMissing

KERNELS = "kernels"
_FETCH = "pull the artifact again, which brings its kernels, or an sdpa recipe, which needs none"


def variant_folder(folder: Path, build: KernelBuild) -> Path:
    """The folder of a build's files, below that of its kernel."""
    return folder / "build" / build.variant


def write_kernel(build: KernelBuild, files: Mapping[str, Path], folder: Path) -> None:
    """Write a build's files, each hashed on its way, for us alone.

    Raises:
        KernelDigestMismatch: one has other bytes than were pinned.
    """
    inner = variant_folder(folder, build)
    inner.mkdir(mode=0o700, parents=True)
    for file in build.files:
        target = inner / file.path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with files[file.path].open("rb") as source, target.open("xb") as sink:
            digest = copy_hashed(source, sink, file.size + 1)
            sink.flush()
            os.fsync(sink.fileno())
        if digest != file.sha256 or target.stat().st_size != file.size:
            raise KernelDigestMismatch(
                f"{file.path} of the kernel {build.namespace} is not the file that was pinned",
                hint="fetch it again; if it stays so, ask its publisher",
            )
        target.chmod(0o555 if ".so" in target.name else 0o444)
    for each in (folder, *filter(Path.is_dir, folder.rglob("*"))):
        each.chmod(0o700)
        sync_folder(each)


def read_metadata(folder: Path, build: KernelBuild) -> bytes:
    """What a build says of itself, as far as it may say anything.

    Raises:
        KernelDigestMismatch: the file is not among the build's, or too large.
    """
    sizes = {file.path: file.size for file in build.files}
    if sizes.get(METADATA, LARGEST_METADATA + 1) > LARGEST_METADATA:
        raise KernelDigestMismatch(
            f"the kernel {build.namespace} has no {METADATA} of at most {LARGEST_METADATA} bytes",
            hint="compile the artifact again, with a kernel that says what it is",
        )
    return (variant_folder(folder, build) / METADATA).read_bytes()


def holds_kernel(build: KernelBuild, folder: Path) -> bool:
    """Whether a folder has the files of a build, byte for byte, and nothing else."""
    return next(_find_problems(build, folder), None) is None


def require_kernel(pin: KernelPin, folder: Path) -> KernelBuild:
    """See that a pinned kernel lies in its folder below `folder`; which build it is.

    Raises:
        KernelMissing: it does not, or the pin says nothing of its files.
        KernelDigestMismatch: it has other bytes, or a file that is not its own.
    """
    build = pin.build
    if build is None:
        raise KernelMissing(
            f"the kernel {pin} is pinned without its files, so none can be verified",
            hint="compile the artifact again, or pull an sdpa recipe, which needs no kernel",
        )
    if not (folder / build.digest).is_dir():
        raise KernelMissing(f"the kernel {pin} ({build.variant}) is not here", hint=_FETCH)
    for problem in _find_problems(build, folder / build.digest):
        raise KernelDigestMismatch(
            f"the kernel {pin} is not as it was pinned: {problem}", hint=_FETCH
        )
    return build


def _find_problems(build: KernelBuild, folder: Path) -> Iterator[str]:
    """What is wrong with a folder: any file or folder that is not the build's, other bytes."""
    if folder.is_symlink():
        yield "its folder is a link"
        return
    inner = variant_folder(folder, build)
    files = {inner / file.path: file for file in build.files}
    folders = {parent for path in files for parent in path.parents}
    for parent, names, others in os.walk(folder):
        for path in (Path(parent) / name for name in (*names, *others)):
            if path.is_symlink() or path not in (folders if path.is_dir() else files):
                yield f"{path.relative_to(folder)} is none of its files"
    for path, file in files.items():
        if not has_bytes(path, file.sha256):
            yield f"{file.path} has other bytes"
