"""Repos of packages that `spaces` and `aokit` read: found, fetched, unpacked; without digests.

package/root/package.pt2                        the whole module
package/submodules/<dotted.name>/package.pt2    a module inside of it, or each child of a list
{BlockClass}[.{variant}]/package.pt2            every module of a class
config[.{variant}].json                         {"kernels": [...]}: what `get_kernel` is called with
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hubaoti.artifact.package import hash_file, list_members
from hubaoti.artifact.schema import Graph, Outputs
from hubaoti.errors import BadRequest, DigestMismatch, HubaotiError, RepoMoved, Untrusted
from hubaoti.escape import escape_line
from hubaoti.hub.catalog import Catalog
from hubaoti.hub.client import HubClient
from hubaoti.hub.kernels import require_kernel_publisher
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import Puller
from hubaoti.hub.records import Entry
from hubaoti.hub.revisions import resolve_owned
from hubaoti.hub.zerogpu import PACKAGE, PACKAGE_ROOT, SUBMODULES
from hubaoti.mirror.trust import Trust

_LARGEST = 1 << 20  # bytes of a config
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
# What `kernels.get_kernel` is called with; anything else could do more than fetch.
_WORDS = {"repo_id", "revision", "version"}


class NoDigests(UserWarning):
    """A package came without a manifest: nothing says which bytes its publisher meant."""


class Config(msgspec.Struct):
    """What is read of a repo's `config.json`: the kernels that its packages call."""

    kernels: list[dict[str, Any]] = []


@dataclass(frozen=True, slots=True)
class Package:
    """A package of a repo, and whom it serves: a module by its path, or all of a class."""

    path: str
    module: str | None = None
    cls: str | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """Packages that lie unpacked in the mirror, each as a graph of which little is known."""

    endpoint: str
    repo: str
    commit: str
    packages: tuple[tuple[Package, Graph], ...]
    kernels: tuple[dict[str, Any], ...]

    def require_trusted(self, trust: Trust) -> None:
        """See that who published them, and their kernels, may still have code run here.

        No digest stands for them: what was said of their publishers is all that is asked.

        Raises:
            Blocked, Untrusted: somebody may not. Unsigned: he has to sign, and these cannot be.
        """
        what = f"packages in {self.repo} at {self.endpoint} (commit {self.commit}, no manifest)"
        owner = RepoRef(self.repo).owner
        trust.require(self.endpoint, owner, what, f"say so once with: hubaoti trust add {owner}")
        _require_kernel_publishers(trust, self.endpoint, self.repo, self.kernels)


def find_packages(catalog: Catalog, variant: str | None) -> tuple[Package, ...]:
    """The packages of a commit: the one layout, or else the folders of classes.

    Raises:
        BadRequest: the variant is no name.
    """
    if variant is not None and not _NAME.fullmatch(variant):
        raise BadRequest(f"malformed variant: {variant!r:.120}", hint="write it as fa3")
    found = tuple(_find_packages_by_path(catalog))
    return found or tuple(_find_packages_by_class(catalog, variant))


def _find_packages_by_path(catalog: Catalog) -> Iterator[Package]:
    """The packages below `package/`: of the whole module, and of those inside of it."""
    for path in sorted(catalog.files):
        if path == f"{PACKAGE_ROOT}/{PACKAGE}":
            yield Package(path, module="")
        start, _, name = path.rpartition("/")
        module = start.removeprefix(f"{SUBMODULES}/")
        if name == PACKAGE and module != start and _NAME.fullmatch(module):
            yield Package(path, module=module)


def _find_packages_by_class(catalog: Catalog, variant: str | None) -> Iterator[Package]:
    """The packages in folders that are called as a class, and perhaps as a variant."""
    for path in sorted(catalog.files):
        folder, _, name = path.rpartition("/")
        cls, _, rest = folder.partition(".")
        if name == PACKAGE and cls.isidentifier() and rest == (variant or ""):
            yield Package(path, cls=cls)


def fetch_packages(
    puller: Puller,
    ref: RepoRef,
    catalog: Catalog,
    packages: tuple[Package, ...],
    variant: str | None,
) -> Fetched:
    """The packages, unpacked: of a publisher who is trusted, with the bytes that the commit lists.

    Raises:
        Untrusted: code of this publisher, or of a kernel's, may not run here.
        BadPackage: one is damaged, or made to harm.
        DigestMismatch: the endpoint gives other bytes than the commit lists.
    """
    client, commit = puller.client, catalog.commit
    puller.require_publisher(ref, f"packages in {ref.repo}", f"commit {commit}, no manifest")
    named = _read_kernels(client, catalog, variant)
    _require_kernel_publishers(Trust(puller.settings.trust), client.endpoint, ref.repo, named)
    kernels = tuple(_pin_kernel(client, each) for each in named)
    found = []
    for package in packages:
        puller.progress(f"downloading {package.path}")
        path = _download_verified(client, catalog, catalog.files[package.path])
        graph = _make_package_entry(path, package)
        puller.mirror.put_graph(graph, path)
        client.drop(path)
        found.append((package, graph))
    return Fetched(client.endpoint, catalog.repo, commit, tuple(found), kernels)


def _require_kernel_publishers(
    trust: Trust, endpoint: str, repo: str, kernels: Iterable[dict[str, Any]]
) -> None:
    """See that who publishes a kernel is trusted by himself: a config may name anybody's."""
    for each in kernels:
        which = f"{_read_kernel_revision(each) or 'no revision'}, which {repo} calls"
        require_kernel_publisher(trust, endpoint, each["repo_id"], which)


def _download_verified(client: HubClient, catalog: Catalog, entry: Entry) -> Path:
    """A downloaded file, with the bytes that its commit lists."""
    path = client.download(catalog.repo, catalog.commit, entry.path)
    same = hash_file(path) == entry.sha256 if entry.sha256 else entry.is_of(path.read_bytes())
    if not same:
        client.drop(path)
        raise DigestMismatch(
            f"{client.endpoint} gives other bytes of {entry.path} than {catalog.repo} lists",
            hint="try again; if it stays so, the endpoint or something on the way is broken",
        )
    return path


def _make_package_entry(path: Path, package: Package) -> Graph:
    """All that can be known of a package by looking at its zip."""
    return Graph(
        id=package.path.removesuffix(f"/{PACKAGE}").replace("/", "."),
        file=PACKAGE,
        sha256=hash_file(path),
        size=path.stat().st_size,
        members=list_members(path),
        modules=() if package.module is None else (package.module,),
        bounds={},
        call={"args": [], "kwargs": {}},
        inputs=(),
        outputs=Outputs(template=None, tensors=()),
        constants=(),
    )


def _read_kernels(
    client: HubClient, catalog: Catalog, variant: str | None
) -> tuple[dict[str, Any], ...]:
    """What the repo's config says that `get_kernel` is to be called with."""
    name = f"config.{variant}.json" if variant else "config.json"
    entry = catalog.files.get(name)
    if entry is None or entry.size > _LARGEST:
        return ()
    try:
        kernels = msgspec.json.decode(client.read(catalog.repo, catalog.commit, entry), type=Config)
    except msgspec.MsgspecError as error:
        message = f"{name} of {catalog.repo} cannot be read: {escape_line(str(error))}"
        raise BadRequest(message, hint=_NO_KERNEL) from error
    for each in kernels.kernels:
        if not each.keys() <= _WORDS or not isinstance(each.get("repo_id"), str):
            message = f"{name} of {catalog.repo} names no kernel: {escape_line(str(each))}"
            raise BadRequest(message, hint=_NO_KERNEL)
    return tuple(kernels.kernels)


def _pin_kernel(client: HubClient, kernel: dict[str, Any]) -> dict[str, Any]:
    """A kernel at the commit that its revision is at now: no worker gets another one later.

    Where the endpoint tells no commit of it, it stays as it is, for the kernels library to find.
    """
    try:
        commit = resolve_owned(client, kernel["repo_id"], _read_kernel_revision(kernel), "kernel")
    except (RepoMoved, Untrusted):
        raise
    except HubaotiError:
        return kernel
    return {"repo_id": kernel["repo_id"], "revision": commit}


def _read_kernel_revision(kernel: dict[str, Any]) -> str | None:
    """A kernel's revision; its versions are branches."""
    version = kernel.get("version")
    found = kernel.get("revision") if version is None else f"v{version}"
    return None if found is None else str(found)


_NO_KERNEL = "ask its publisher for a config whose kernels have a repo_id, and perhaps a revision"
