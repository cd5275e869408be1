"""The mirror: artifacts as verified files, each whole or absent.

    index.sqlite3       what is here and where it came from
    hub/                huggingface_hub's cache folders, one for each endpoint: transport. Packages
                        leave them once they are unpacked, so nothing lies here twice
    artifacts/<digest>/ the manifest and the small tensors
    graphs/<sha256>/    one unpacked package, read-only
    kernels/<digest>/   one build of a kernel, read-only, promised by nobody: it is there or not
    quarantine/         the newest broken copies, to be looked at
    tmp/
    locks/              who has which artifact open, and who does what alone

Everything is written below tmp/, hashed while it is written, synced and renamed; its row comes
last. Whatever is killed in between leaves nothing that is believed.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from hubaoti.artifact.kernel_pin import KernelBuild, KernelPin
from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.package import has_bytes, holds_members
from hubaoti.artifact.schema import File, Graph
from hubaoti.artifact.variant import Recipe
from hubaoti.disk import explain_disk_errors, require_disk_room, sync_folder
from hubaoti.errors import HubaotiError, KernelDigestMismatch
from hubaoti.mirror.answers import Answers
from hubaoti.mirror.artifact import (
    Artifact,
    compute_unpacked_size,
    describe_changed,
    has_sizes,
    holds_small,
    read_artifact,
    require_short_names,
    unpack_synced,
    write_small,
)
from hubaoti.mirror.folders import (
    make_private,
    make_workspace,
    may_write,
    refuse_shared,
    sweep_folder,
)
from hubaoti.mirror.gc import make_room
from hubaoti.mirror.index import Index
from hubaoti.mirror.kernel import KERNELS, holds_kernel, require_kernel, write_kernel
from hubaoti.mirror.leases import Leases
from hubaoti.mirror.policy import Decision, Evidence, decide
from hubaoti.mirror.quarantine import Note, set_apart
from hubaoti.mirror.rebuild import find_whole
from hubaoti.mirror.rows import BUILT_HERE, Pin, PullOrigin, Row
from hubaoti.mirror.seen import Seen
from hubaoti.mirror.trust import Trust
from hubaoti.mirror.usage import Usage

_FOLDERS = ("hub", "artifacts", "graphs", KERNELS, "quarantine", "tmp", "locks")
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}
_ATTEMPTS = 3


class Mirror:
    """The local store below one folder; safe beside other processes."""

    def __init__(self, root: Path, index: Index) -> None:
        self.root = root
        self.index = index
        self._apart = root / "quarantine"
        self.leases = Leases(root / "locks")
        self.usage = Usage(index)
        self.answers = Answers(index)
        self.seen = Seen(index)

    @classmethod
    def open(cls, root: Path) -> Mirror:
        """Open the mirror below `root`, or make one; one that may not be written is only read.

        Raises:
            UnsafeFolder: other users own or may write it.
            DiskFull: there is no room for it.
            HubaotiError: its folder or its index cannot be used.
        """
        index = root / "index.sqlite3"
        with explain_disk_errors(root):
            # One that was baked into an image: what was put there before can be used.
            is_writable = not index.is_file() or (may_write(root) and may_write(index))
            see = make_private if is_writable else refuse_shared
            for folder in (root, *(root / name for name in _FOLDERS)):
                see(folder)
            for suffix in ("", "-wal", "-shm"):
                refuse_shared(root / f"index.sqlite3{suffix}")
            if is_writable:
                sweep_folder(root / "tmp")
            is_new = is_writable and not index.is_file()
        # What lies there was of an index that was lost. It is read before there is a new one: what
        # cannot be read now is asked for again, and not taken for something that nobody promises.
        lost = find_whole(root) if is_new else []
        mirror = cls(root, Index(index, is_writable))
        for promise in lost:
            mirror.index.keep(promise)
        return mirror

    def close(self) -> None:
        """Let go of the index; the files stay as they are."""
        self.index.close()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def trust(self) -> Trust:
        """Whose code may run on this machine, as is said beside the mirror."""
        return Trust(self.root.with_name("trust.toml"))

    def decide(self, digest: str, *origins: PullOrigin) -> Decision:
        """Whether an artifact may run here: by what is known of it, and where it comes from now."""
        return decide(self.gather_evidence(digest, *origins), self.trust.read())

    def gather_evidence(self, digest: str, *origins: PullOrigin) -> Evidence:
        """All that is known of an artifact by which it is decided, and where it comes from now."""
        known, signed = self.index.list_origins(digest), self.seen.list_signed(digest)
        return Evidence(digest, self.index.is_built(digest), (*known, *origins), signed)

    def decide_each(self, digests: Iterable[str]) -> dict[str, Decision]:
        """The same of many artifacts, for what is known of all of them."""
        origins, signed = self.index.list_all_origins(), self.seen.list_all_signed()
        built, said = self.usage.list_built(), self.trust.read()
        return {
            each: decide(
                Evidence(each, each in built, origins.get(each, ()), signed.get(each, ())), said
            )
            for each in digests
        }

    def require_allowed(self, digest: str) -> None:
        """See that an artifact may be opened here.

        Raises:
            Blocked: somebody said that it may not.
            Untrusted: it was not built here, and nobody who is trusted now published it.
            Unsigned: somebody did of whom a signature is asked, and none was verified.
        """
        if error := self.decide(digest).refusal:
            raise error

    def put(
        self,
        manifest: Manifest,
        files: Mapping[str, Path],
        origin: PullOrigin = BUILT_HERE,
        recipe: Recipe | None = None,
    ) -> Artifact:
        """Store an artifact, given its files by their paths in the manifest.

        Nothing is believed of the files: each byte that lands here is hashed on its way. `recipe`
        is the label under which it is listed, by default the manifest's. What is worth least leaves
        for it, where there would be more than the budget.

        Raises:
            MirrorFull: it was pulled, and too little may leave for it.
            DigestMismatch: a file has other bytes than the manifest lists.
            BadManifest: a name in it is too long, or too deep.
            BadPackage: a package is damaged, or lacks a listed member.
            DiskFull: there is no room; nothing half-written stays.
        """
        self.index.require_writable()
        require_short_names(manifest)
        digest = manifest.digest
        path = self.root / "artifacts" / digest
        artifact = Artifact(digest, path, self.root / "graphs", manifest)
        row = Row(
            digest=artifact.digest,
            key=manifest.key,
            recipe=str(recipe or manifest.recipe),
            variant=str(manifest.variant),
            size=compute_unpacked_size(manifest),
            added=time.time(),
            origin=origin,
        )
        with self.leases.changing_files():
            if self.index.row(digest) is None:
                make_room(self, row.size, is_pulled=bool(origin.repo))
            self._store(artifact, files)
            self.index.add(row, {graph.sha256 for graph in manifest.graphs})
        return artifact

    def put_graph(self, graph: Graph, package: Path) -> Path:
        """Unpack a package that is of no artifact, and promise nothing of it; where it lies.

        Raises:
            BadPackage: it is damaged, or lacks a listed member.
            DiskFull: there is no room; nothing half-written stays.
        """
        self.index.require_writable()
        target, tmp = self.root / "graphs" / graph.sha256, self.root / "tmp"
        needed = sum(member.size for member in graph.members)
        self.leases.hold(graph.sha256)
        if not holds_members(target, graph):
            with explain_disk_errors(tmp, needed), make_workspace(tmp) as work:
                require_disk_room(tmp, needed)
                unpack_synced(package, graph, work / graph.sha256)
                self._settle(work / graph.sha256, target, partial(holds_members, target, graph))
        return target

    def put_kernel(self, build: KernelBuild, files: Mapping[str, Path]) -> None:
        """Store a build of a kernel, given its files by their paths in it.

        Raises:
            KernelDigestMismatch: a file has other bytes than were pinned.
            DiskFull: there is no room; nothing half-written stays.
        """
        self.index.require_writable()
        target, tmp = self.root / KERNELS / build.digest, self.root / "tmp"
        self.leases.hold(build.digest)
        with explain_disk_errors(tmp, build.size), make_workspace(tmp) as work:
            require_disk_room(tmp, build.size)
            write_kernel(build, files, work / build.digest)
            self._settle(work / build.digest, target, partial(holds_kernel, build, target))

    def has_kernel(self, pin: KernelPin) -> bool:
        """Whether a pinned kernel needs not be fetched; it stays as long as this process lives."""
        self.leases.hold(pin.id)  # also before the artifact is here that needs it
        return (self.root / KERNELS / pin.id).is_dir()

    def verify_kernel(self, pin: KernelPin) -> None:
        """Hash a pinned kernel again.

        Raises:
            KernelMissing: it is not here.
            KernelDigestMismatch: it has other bytes, or a file too many; it is in quarantine, so
                that it is fetched again.
        """
        try:
            require_kernel(pin, self.root / KERNELS)
        except KernelDigestMismatch:
            if self.index.is_writable:
                set_apart(self.root / KERNELS / pin.id, self._apart)
            raise

    def artifact(self, digest: str) -> Artifact | None:
        """The artifact of this digest; None when it is not here, or not whole.

        Its manifest is hashed again before it is believed; see `verify` for the other files.

        Raises:
            HubaotiError: a file of it could not be looked at.
        """
        if self.index.row(digest) is None:
            return None
        artifact = self.read(digest, is_known=True)
        if artifact is None or not has_sizes(artifact):
            self._withdraw(digest, None if artifact else self.root / "artifacts" / digest)
            return None
        return artifact

    def ls(self) -> list[Row]:
        """What is here, the newest first; of a damaged index nothing."""
        self.index.require_whole()
        return self.index.rows()

    def find_pull(self, pin: Pin) -> tuple[Artifact, str] | None:
        """The artifact that this pull gave before, and its path in the repo."""
        found = self.index.find_pull(pin)
        if found is None:
            return None
        artifact = self.artifact(found[0])
        return None if artifact is None else (artifact, found[1])

    def verify(self, artifact: Artifact) -> None:
        """Hash every file of an artifact again, and of the kernels that it calls.

        Raises:
            DigestMismatch: as `verify_own`.
            KernelMissing, KernelDigestMismatch: as `verify_kernel`.
        """
        self.verify_own(artifact)
        for pin in artifact.manifest.requires.kernels:
            self.verify_kernel(pin)

    def verify_own(self, artifact: Artifact) -> None:
        """Hash every file of an artifact again.

        Raises:
            DigestMismatch: one has other bytes; it is in quarantine, the artifact no longer here.
        """
        for graph in artifact.manifest.graphs:
            self.verify_graph(graph)
        for file in artifact.manifest.files:
            self.verify_file(artifact, file)

    def verify_graph(self, graph: Graph) -> None:
        """Hash an unpacked graph again, member by member.

        Raises:
            DigestMismatch: one has other bytes; the graph is in quarantine, and every artifact
                that holds it no longer here, so that the next pull fetches it again.
        """
        folder = self.root / "graphs" / graph.sha256
        for member in graph.members:
            if not has_bytes(folder / member.path, member.sha256):
                self.quarantine(graph)
                raise describe_changed(folder / member.path)

    def quarantine(self, graph: Graph) -> None:
        """Keep a graph apart that must not be opened, and promise no artifact that holds it."""
        if self.index.is_writable:
            note = Note(graph, tuple(self.index.list_promises(graph.sha256)))
            remove = partial(self.index.remove_graph, graph.sha256)
            set_apart(self.root / "graphs" / graph.sha256, self._apart, note, remove)

    def withdraw(self, artifact: Artifact) -> None:
        """Keep an artifact apart that must not be opened; others that hold its graphs stay."""
        self._withdraw(artifact.digest, artifact.path)

    def verify_file(self, artifact: Artifact, file: File) -> Path:
        """Hash one of the small tensors' files again; where it lies.

        Raises:
            DigestMismatch: it has other bytes; the artifact is in quarantine and no longer here.
        """
        path = artifact.file(file.path)
        if not has_bytes(path, file.sha256):
            self._withdraw(artifact.digest, artifact.path)
            raise describe_changed(path)
        return path

    def read(
        self, digest: str, folder: Path | None = None, is_known: bool = False
    ) -> Artifact | None:
        """The artifact, promised or not, whose manifest lies in a folder: `read_artifact`.

        Raises:
            HubaotiError: it could not be read.
        """
        return read_artifact(self.root, digest, folder, is_known)

    def _store(self, artifact: Artifact, files: Mapping[str, Path]) -> None:
        """Write what is missing; the artifact's own folder, which names the graphs, comes last."""
        graphs = [
            graph
            for graph in artifact.manifest.graphs
            if not holds_members(artifact.graph_folder(graph), graph)
        ]
        needed = sum(member.size for graph in graphs for member in graph.members)
        needed += sum(file.size for file in artifact.manifest.files)
        tmp = self.root / "tmp"
        with explain_disk_errors(tmp, needed):
            require_disk_room(tmp, needed)
            with make_workspace(tmp) as work:
                for graph in graphs:
                    folder = work / graph.sha256
                    unpack_synced(files[graph.file], graph, folder)
                    target = artifact.graph_folder(graph)
                    self._settle(folder, target, partial(holds_members, target, graph))
                if not holds_small(artifact):
                    folder = work / artifact.digest
                    write_small(artifact.manifest, files, folder)
                    self._settle(folder, artifact.path, partial(holds_small, artifact))

    def _settle(self, folder: Path, target: Path, is_good: Callable[[], bool]) -> None:
        """Give a written folder its name, unless another process gave an equal one the name."""
        sync_folder(folder)
        for _ in range(_ATTEMPTS):
            try:
                folder.rename(target)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                if is_good():
                    return
                set_apart(target, self._apart)
            else:
                sync_folder(target.parent)
                return
        raise HubaotiError(f"{target} is replaced again and again", hint="run it again")

    def _withdraw(self, digest: str, broken: Path | None = None) -> None:
        """Promise an artifact no longer, its broken folder kept apart.

        A mirror that may not be written keeps both.
        """
        if self.index.is_writable:
            remove = partial(self.index.remove, digest)
            if broken is None:
                remove()
            else:
                promise = self.index.read_promise(digest)
                note = Note(None, (promise,) if promise else ())
                set_apart(broken, self._apart, note, remove)
