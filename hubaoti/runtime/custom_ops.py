"""Ops that only a caller has, by the modules that it names: nothing that is published says them."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from hubaoti.errors import BadRequest, MissingOps, first_line


def register_ops(ops: Sequence[str], path: Sequence[bytes] = ()) -> str:
    """Import the modules that register a caller's ops; what tells them, and whether they changed.

    A process of our own looks for them where its caller would: in the caller's `path`.

    Raises:
        BadRequest: what is named is no list of modules.
        MissingOps: one cannot be imported.
    """
    require_module_names(ops)
    if ops and path:
        sys.path[:] = map(os.fsdecode, path)
    for name in ops:
        try:
            importlib.import_module(name)
        except Exception as error:  # it is the caller's own code
            raise MissingOps(
                f"{name}, which is to register ops, cannot be imported: "
                f"{type(error).__name__}: {first_line(error)}",
                hint="name a module that can be imported from here: install it, or have its folder "
                "in PYTHONPATH",
            ) from error
    return f"{' '.join(ops)} {_digest_op_files(ops)}"


def require_module_names(ops: Sequence[str]) -> None:
    """See that modules are named, as another process can import them.

    Raises:
        BadRequest: they are not.
    """
    if not isinstance(ops, (list, tuple)) or not all(isinstance(name, str) for name in ops):
        raise BadRequest(f"ops={ops!r:.120} is no list of modules", hint='as ops=["my.ops"]')
    for name in ops:
        if name == "__main__" or not all(part.isidentifier() for part in name.split(".")):
            raise BadRequest(
                f"no other process can import {name!r:.120}",
                hint="put the ops into a module of their own, and name it from its first package "
                'on: ops=["my.ops"]',
            )


def _digest_op_files(ops: Sequence[str]) -> str:
    """A digest of when the files were written of the modules, or of all of their packages."""
    packages = [sys.modules[name.partition(".")[0]] for name in ops]
    files = sorted({file for package in packages for file in _list_package_files(package)})
    return hashlib.sha256("\n".join(map(_describe_file_stat, files)).encode()).hexdigest()[:12]


def _list_package_files(package: ModuleType) -> Iterator[Path]:
    """The files of a module, or of all that are in a package."""
    if file := getattr(package, "__file__", None):
        yield Path(file)
    for folder in getattr(package, "__path__", ()):
        for kind in ("*.py", "*.so"):
            yield from Path(folder).rglob(kind)


def _describe_file_stat(file: Path) -> str:
    """A file's path, its size and when it was written; the path alone where it is gone."""
    try:
        found = file.stat()
    except OSError:  # it is in a zip, or gone
        return f"{file}"
    return f"{file} {found.st_size} {found.st_mtime_ns}"
