"""A bundle: an artifact as a folder, before it is pushed. Written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hubaoti import manifest as manifests
from hubaoti.disks import FULL
from hubaoti.errors import (
    BadManifest,
    DigestMismatch,
    DiskFull,
    HubaotiError,
    OutputExists,
)
from hubaoti.manifest import File, Manifest
from hubaoti.package import members_of, sha256_of

SEAL = f"{manifests.FILENAME}.sha256"  # stays here; on the Hub the digest is the artifact's name


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder with a manifest, and the manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def read(cls, path: Path) -> Bundle:
        """Read the manifest of a bundle; its files are looked at by `check`.

        Raises:
            BadManifest: there is none, or it is not a good one.
            HubaotiError: it may not be read.
        """
        file = path / manifests.FILENAME
        with readable(path):
            if not file.is_file():
                raise BadManifest(
                    f"{path} is not a bundle: it has no {manifests.FILENAME}",
                    hint="make one with: hubaoti compile MODEL -o DIR",
                )
            return cls(path, manifests.parse(file.read_bytes(), str(file)))

    def check(self) -> None:
        """Compare every file with the manifest, and every package's entries with their list.

        Raises:
            DigestMismatch: a file is missing, has other bytes, or is not listed.
            BadPackage: a package is damaged, or its entries are not the listed ones.
            HubaotiError: a file may not be read.
        """
        with readable(self.path):
            self._check()

    def _check(self) -> None:
        listed = {file.path: file for file in self.manifest.all_files()}
        for file in listed.values():
            check_file(self.path / file.path, file)
        self._check_seal()
        present = {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()}
        for extra in sorted(present - {*listed, manifests.FILENAME, SEAL}):
            raise DigestMismatch(
                f"{self.path / extra} is not in the manifest",
                hint="remove it, or compile the bundle again",
            )
        for graph in self.manifest.graphs:
            if members_of(self.path / graph.file) != graph.members:
                raise DigestMismatch(
                    f"{graph.file} has other entries than its manifest lists",
                    hint="compile the bundle again",
                )

    def _check_seal(self) -> None:
        """A manifest that was edited may be canonical, and even agree with itself."""
        seal = self.path / SEAL
        if seal.is_file() and seal.read_text() != seal_of(self.manifest):
            raise DigestMismatch(
                f"{self.path / manifests.FILENAME} was edited after it was compiled",
                hint="compile the bundle again",
            )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Finish a bundle: its manifest, and the manifest's own digest beside it."""
    (folder / manifests.FILENAME).write_bytes(manifest.to_json())
    (folder / SEAL).write_text(seal_of(manifest))


def seal_of(manifest: Manifest) -> str:
    """A line that `sha256sum --check` reads."""
    return f"{manifest.digest}  {manifests.FILENAME}\n"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around reading the bundle `path`: what the system refuses, in words."""
    try:
        yield
    except OSError as why:
        raise HubaotiError(
            f"cannot read {why.filename or path}: {why.strerror or why}",
            hint="give the folder of a bundle that you may read",
        ) from why


def check_file(path: Path, file: File) -> None:
    """Compare one file with its entry of a manifest.

    Raises:
        DigestMismatch: it is missing, or has other bytes.
    """
    if path.is_symlink() or not path.is_file():
        raise DigestMismatch(f"{path} is listed and is not there", hint="compile the bundle again")
    found = sha256_of(path)
    if found != file.sha256:
        raise DigestMismatch(
            f"{path} was changed: its sha256 is {found[:12]}…, the manifest says "
            f"{file.sha256[:12]}…",
            hint="compile the bundle again, or copy it again from where it came",
        )


def file_entry(root: Path, path: str) -> File:
    """The manifest's entry of a file that lies below `root`."""
    file = root / path
    return File(path=path, sha256=sha256_of(file), size=file.stat().st_size)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A folder to write a bundle into; it takes the place of `path` when all went well.

    Raises:
        OutputExists: `path` exists and is not a bundle, so it is not ours to replace.
        DiskFull: there is no room for it.
        HubaotiError: its place may not be written.
    """
    path = path.absolute()
    with explained(path):
        refuse_foreign(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield folder
            folder.chmod(0o755)
            replace_folder(folder, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Around work on the bundle `path`: what the system refuses, in words."""
    try:
        yield
    except OSError as why:
        if why.errno in FULL:
            raise DiskFull(
                f"no room on the disk of {path} for the bundle",
                hint="free some space, or choose another folder with -o",
            ) from why
        raise HubaotiError(
            f"cannot write {why.filename or path}: {why.strerror or why}",
            hint="choose a folder that you may write with -o",
        ) from why


def refuse_foreign(path: Path) -> None:
    """Refuse an output folder whose content we did not make."""
    ours = not path.exists() or (
        path.is_dir() and (not any(path.iterdir()) or (path / manifests.FILENAME).is_file())
    )
    if not ours:
        raise OutputExists(
            f"{path} exists and is not a bundle", hint="choose another folder with -o"
        )


def replace_folder(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`; a kill in between leaves `old` whole in a folder beside."""
    if not old.exists():
        new.replace(old)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{old.name}.", dir=old.parent))
    old.replace(aside / "old")
    new.replace(old)
    shutil.rmtree(aside)
