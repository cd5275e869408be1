"""Kernels that graphs call: judged, loaded by the kernels library, registered behind our ops.

An op is one for a whole process, so a process has one build of a kernel for each kind of device:
the first one that was opened. Graphs that pin another build are refused there, by name, and answer
in a process of their own. Builds are told apart by their bytes, not by repo or commit.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
)
from pathlib import Path

import torch

from hubaoti.artifact.kernel_metadata import METADATA, parse_metadata
from hubaoti.artifact.kernel_pin import KernelBuild, KernelPin
from hubaoti.artifact.kernel_variant import KernelHost
from hubaoti.artifact.package import hash_file
from hubaoti.errors import (
    CannotOpen,
    KernelArchUnsupported,
    KernelConflict,
    KernelMissing,
    KernelSchemaMismatch,
    MissingDependency,
    first_line,
)
from hubaoti.mirror.kernel import read_metadata
from hubaoti.runtime.attention_ops import NAMESPACE
from hubaoti.runtime.kernel_adapters import adapt_kernel
from hubaoti.runtime.locks import ForkSafeLock

NO_KERNEL = "pull a recipe that needs no kernel, as hubaoti pull REPO --recipe bfloat16-sdpa"
_LIBRARY = torch.library.Library(NAMESPACE, "IMPL")  # type: ignore[no-untyped-call]
_LOCK = ForkSafeLock()
# What this process has, by digests: of builds by their namespaces, and of those that answer our
# ops by kind of device. Neither is ever undone: a library is not unloaded.
_LOADED: dict[str, str] = {}
_ANSWERING: dict[str, str] = {}


def judge_kernels(pins: Sequence[KernelPin], device: torch.device) -> None:
    """See that pinned kernels were built for a device, this torch and this system.

    Raises:
        KernelArchUnsupported: one was not.
    """
    cuda = torch.version.cuda if device.type == "cuda" else None
    host = KernelHost(torch.__version__, cuda, platform.machine(), platform.system().lower())
    for pin in pins:
        here = f"torch {host.torch} on {host.machine} {host.os}"
        built = pin.list_misfits(host)
        if not built and device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            here = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
            built = [] if pin.supports(10 * major + minor) else [pin.describe_archs()]
        if built:
            raise KernelArchUnsupported(
                f"the kernel {pin} is built for {' and '.join(built)}; here is {here}",
                hint=NO_KERNEL,
            )


def open_kernels(pins: Sequence[KernelPin], folder: Path, device: torch.device) -> None:
    """Have pinned kernels, which lie below `folder`, answer our ops on a device.

    The caller has verified their bytes: loading one runs its code. What is here already is not
    loaded again.

    Raises:
        KernelArchUnsupported: one was built for something else.
        KernelMissing: a pin says nothing of its files. MissingDependency: there is no kernels
            library. CannotOpen: one cannot be loaded.
        KernelSchemaMismatch: its ops are not the ones that were pinned.
        KernelConflict: this process has another build, or another library of its namespace.
    """
    judge_kernels(pins, device)
    with _LOCK:
        for pin in pins:
            if pin.build is None:
                raise KernelMissing(
                    f"the kernel {pin} is pinned without its files, so none can be verified",
                    hint=f"compile the artifact again, or {NO_KERNEL}",
                )
            if not (folder / pin.build.digest).is_dir():
                raise KernelMissing(
                    f"the kernel {pin} is not here", hint=f"pull it, or {NO_KERNEL}"
                )
            _open_build(pin.full_name, pin.build, folder / pin.build.digest, device)


def _open_build(name: str, build: KernelBuild, folder: Path, device: torch.device) -> None:
    """One build: loaded, its ops compared, registered."""
    other = _ANSWERING.get(device.type)
    if other == build.digest:
        return
    if other is not None:
        raise KernelConflict(
            f"this process has another build of a kernel than {name}, and its ops answer for it",
            hint="open the artifact in a process of its own",
        )
    if not _is_loaded(name, build):
        _load(name, build, folder, device)
        _LOADED[build.namespace] = build.digest
    for op, function in adapt_kernel(build, name).items():
        _LIBRARY.impl(op, function, device.type.upper())  # type: ignore[no-untyped-call]
    _ANSWERING[device.type] = build.digest


def _is_loaded(name: str, build: KernelBuild) -> bool:
    """Whether this process has a build already, loaded here or by whoever uses kernels beside us.

    Raises:
        KernelConflict: its namespace is another library's: a second one would end the process.
    """
    if build.namespace in _LOADED:
        same = _LOADED[build.namespace] == build.digest
    else:
        module = sys.modules.get(build.namespace)
        if module is None and not _has_ops(build.namespace):
            return False
        file = getattr(module, "__file__", None)  # who has ops and no file is not of any folder
        places = [*Path(file).parents][:2] if file else []
        same = any(_has_files(build, place) for place in places)
    if not same:
        raise KernelConflict(
            f"this process has another library that is called {build.namespace}, as the ops of "
            f"{name} are",
            hint="open the artifact in a process of its own",
        )
    return True


def _has_ops(namespace: str) -> bool:
    # Private, checked on torch 2.11 to 2.15: torch.library itself asks so.
    return any(op.startswith(f"{namespace}::") for op in torch._C._dispatch_get_all_op_names())


def _has_files(build: KernelBuild, folder: Path) -> bool:
    """Whether a folder has a build's files, byte for byte, as the kernels library's cache has."""
    try:
        return all(hash_file(folder / file.path) == file.sha256 for file in build.files)
    except OSError:
        return False


def _load(name: str, build: KernelBuild, folder: Path, device: torch.device) -> None:
    """Have the kernels library import a build, which registers its ops."""
    found = parse_metadata(read_metadata(folder, build), f"{METADATA} of {name}")
    if found.id != build.namespace:
        raise KernelSchemaMismatch(
            f"the ops of {name} are called {found.id} and were pinned as {build.namespace}",
            hint="compile the artifact again, with the kernel as it is now",
        )
    try:
        from kernels import get_local_kernel
    except ImportError as error:
        other = getattr(sys.modules.get("kernels"), "__file__", None)
        lacks = f"{other} is another one" if other else "it is not there"
        raise MissingDependency(
            f"the artifact calls the kernel {name}, which the kernels library loads: {lacks}",
            hint="call the other one otherwise" if other else "install it: pip install kernels",
        ) from error
    _leave_no_bytecode(folder)
    try:
        with _no_bytecode():
            get_local_kernel(folder, backend="cpu" if device.type == "cpu" else None)
    except Exception as error:  # of its own code, of what it imports, of the system that loads it
        raise CannotOpen(
            f"the kernel {name} cannot be loaded: {first_line(error)}",
            hint=f"install what it needs, or {NO_KERNEL}",
        ) from error


class _Source(SourceFileLoader):
    """A module of source, of which no bytecode is kept."""

    def set_data(self, path: str, data: object, *, _mode: int = 0o666) -> None:
        """Keep nothing."""


def _leave_no_bytecode(folder: Path) -> None:
    """Have what a kernel imports later, from its own folders, leave no bytecode there either."""
    loaders = (ExtensionFileLoader, [*EXTENSION_SUFFIXES]), (_Source, [*SOURCE_SUFFIXES])
    for each in (path for path in folder.rglob("*") if path.is_dir()):
        sys.path_importer_cache[str(each)] = FileFinder(str(each), *loaders)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """While modules leave no bytecode beside them, which would be a file that nobody pinned."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
