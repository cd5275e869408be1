"""Push: a checked bundle becomes one commit of a Hub repo, its card rendered anew.

It goes to the default branch, beside other artifacts; or to a branch that holds it alone, in the
layout of other loaders.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME, Manifest
from hubaoti.errors import BadPackage, BadRequest, Conflict, HubaotiError
from hubaoti.hub.card import render
from hubaoti.hub.catalog import Catalog, read_catalog
from hubaoti.hub.client import HubClient
from hubaoti.hub.errors import AnswerLost, StaleParent
from hubaoti.hub.layout import ArtifactPath, RepoRef, artifact_path, is_revision
from hubaoti.hub.records import Pushed
from hubaoti.hub.zerogpu import LAYOUT, artifact_branch, lay_out_packages
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import Settings

_README = "README.md"
LARGEST_README = 4 << 20  # bytes
_ATTRIBUTES = ".gitattributes"  # the Hub's own, which says how large files are kept
_BRANCH_CARD = """# {repo}

`package/` on this branch is read by these loaders, which check nothing before they open it:

    spaces.aoti_load(module, "{repo}", revision="{branch}")
    aokit.load(module, "{repo}", revision="{branch}")

and by one that verifies every byte first, and falls back where a graph does not fit:

    hubaoti.spaces.load(module, "{repo}", revision="{branch}")
"""
PUSH_ATTEMPTS = 6  # one, and five more when another push was faster


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a bundle goes: the repo, a tag for the commit, the user's own label in the path.

    `private` is for a repo that is made; one that exists keeps its visibility. `layout` is None, or
    `zerogpu`, which other loaders read from a branch.

    Raises:
        BadRequest: the repo has a revision, the tag is malformed, or the layout unknown.
    """

    repo: RepoRef
    tag: str | None = None
    label: str | None = None
    private: bool = False
    layout: str | None = None

    def __post_init__(self) -> None:
        if self.repo.revision is not None:
            raise BadRequest(
                f"a push goes to the default branch, not to {self.repo}",
                hint=f"push to {self.repo.repo}, and name the commit with --tag",
            )
        if self.tag is not None and not is_revision(self.tag):
            raise BadRequest(f"malformed tag: {self.tag!r:.120}", hint="write it as v1")
        if self.layout not in {None, LAYOUT}:
            raise BadRequest(f"unknown layout: {self.layout!r:.120}", hint=f"there is {LAYOUT}")


@dataclass(frozen=True, slots=True)
class Commit:
    """Where a pushed artifact is. `created` is False when the repo held it already.

    `branch` is None for the default one.
    """

    repo: str
    commit: str
    url: str
    path: str
    digest: str
    tag: str | None
    created: bool
    private: bool
    branch: str | None = None


@dataclass(frozen=True, slots=True)
class _Shipment:
    """A bundle on its way: its place, on a branch of its own or beside others on the default one.

    `packages` are files of the bundle that lie at other paths, too.
    """

    bundle: Bundle
    place: ArtifactPath
    branch: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, Path | bytes]:
        """What is uploaded, by its path in the repo."""
        names = [FILENAME, *(file.path for file in self.bundle.manifest.all_files())]
        paths = {self.place.file(name): name for name in names} | {**self.packages}
        return {path: self.bundle.path / name for path, name in paths.items()}

    def is_in_the_way(self, path: str) -> bool:
        """Whether a file that is there, and not one of ours, leaves with this commit."""
        if self.branch is not None:
            return path != _ATTRIBUTES
        return path.startswith(f"{self.place}/")


def push_bundle(
    bundle: Bundle, to: Destination, settings: Settings, progress: Progress = report_nothing
) -> Commit:
    """Put a bundle into a repo, which is made if missing: one commit, or none if it is there.

    Raises:
        DigestMismatch: the bundle's files are not what its manifest says.
        BadPackage: one of its packages is damaged.
        BadRequest: the label is malformed, or the loaders that a layout is for could not call it.
        Conflict: the path holds an artifact of another key, the tag names another commit, or the
            branch moves faster than we do.
        AuthFailed, RepoNotFound, HubUnreachable: from the Hub.
    """
    shipment = _make_shipment(bundle, to)
    progress(f"checking {bundle.path}")
    _check_bundle(bundle)
    client, repo = HubClient(settings, progress), to.repo.repo
    progress(f"looking into {repo} at {client.endpoint}")
    private = client.create(repo, to.private)
    if to.private and not private:
        progress(f"{repo} is public already, and stays so")
    with _ensure_branch(client, repo, shipment.branch):
        made, created = _commit_on_head(client, shipment, to, progress)
    if to.tag is not None and client.tags(repo).get(to.tag) != made.commit:
        progress(f"tagging {made.commit} as {to.tag}")
        client.tag(repo, to.tag, made.commit)
    return Commit(
        repo=repo,
        commit=made.commit,
        url=made.url,
        path=str(shipment.place),
        digest=bundle.manifest.digest,
        tag=to.tag,
        created=created,
        private=private,
        branch=shipment.branch,
    )


def _make_shipment(bundle: Bundle, to: Destination) -> _Shipment:
    """What goes where."""
    place = artifact_path(bundle.manifest, to.label)
    if to.layout is None:
        return _Shipment(bundle, place)
    return _Shipment(bundle, place, artifact_branch(place), lay_out_packages(bundle.manifest))


@contextmanager
def _ensure_branch(client: HubClient, repo: str, branch: str | None) -> Iterator[None]:
    """While there is this branch; one that was made for a commit that failed does not stay."""
    made = branch is not None and client.make_branch(repo, branch)
    try:
        yield
    except BaseException:
        if made and branch is not None:
            with suppress(HubaotiError):
                client.drop_branch(repo, branch)
        raise


def _check_bundle(bundle: Bundle) -> None:
    """See that a bundle is what its manifest says."""
    try:
        bundle.check()
    except BadPackage as error:
        hint = "compile the bundle again, or copy it again from where it came"
        raise BadPackage(str(error), hint=hint) from error


def _commit_on_head(
    client: HubClient, shipment: _Shipment, to: Destination, progress: Progress
) -> tuple[Pushed, bool]:
    """The commit that holds the bundle, and whether it was made now; retried on a moving head."""
    repo, bundle, place = to.repo.repo, shipment.bundle, shipment.place
    lost = False
    for attempt in range(PUSH_ATTEMPTS):
        catalog = read_catalog(client, repo, client.resolve(repo, shipment.branch))
        present = _is_present(catalog, shipment)
        if to.tag is not None:
            _require_free(client, repo, to.tag, catalog.commit if present else None)
        if present:
            progress(f"{repo} holds {place} {'now' if lost else 'already'}")
            url = f"{client.endpoint}/{repo}/commit/{catalog.commit}"
            return Pushed(catalog.commit, url), lost
        try:
            progress(f"uploading {place} ({bundle.manifest.size / 1e6:.1f} MB)")
            return _commit_shipment(client, catalog, shipment), True
        except StaleParent as error:
            lost = lost or isinstance(error, AnswerLost)
            moved = "no answer came, and the repo changed" if lost else "another push was faster"
            progress(f"{moved}: reading the repo again")
            time.sleep(random.uniform(0, 0.2 * (attempt + 1)))
    raise Conflict(
        f"{repo} changed {PUSH_ATTEMPTS} times while this bundle was pushed",
        hint="nothing was pushed; try again when others are done",
    )


def _is_present(catalog: Catalog, shipment: _Shipment) -> bool:
    """Whether a commit holds this very artifact, all of it; another is not ours to replace."""
    place, manifest = shipment.place, shipment.bundle.manifest
    there = catalog.artifacts.get(place)
    if there is None:
        return False
    hint = "push beside it with --label NAME"
    if not isinstance(there, Manifest):
        raise Conflict(f"{catalog.repo} holds an unreadable {place}: {there}", hint=hint)
    if there.key != manifest.key:
        raise Conflict(
            f"{catalog.repo} holds another artifact at {place}: its key is {there.key[:12]}, "
            f"this one's {manifest.key[:12]}",
            hint=hint,
        )
    whole = shipment.files.keys() <= catalog.files.keys()
    return whole and there.digest == manifest.digest


def _require_free(client: HubClient, repo: str, tag: str, commit: str | None) -> None:
    """See, before anything is uploaded, that a tag is free, or on this commit already."""
    there = client.tags(repo).get(tag)
    if there is not None and there != commit:
        raise Conflict(
            f"the tag {tag} of {repo} names another commit, {there}",
            hint="choose another tag: one that others pinned should not move",
        )


def _commit_shipment(client: HubClient, catalog: Catalog, shipment: _Shipment) -> Pushed:
    """One commit: the bundle's files, those of the artifact it replaces removed, the new card."""
    add, manifest = shipment.files, shipment.bundle.manifest
    if shipment.branch is None:
        card = _render_card(client, catalog, shipment)
    else:
        text = _BRANCH_CARD.format(repo=catalog.repo, branch=shipment.branch)
        card = render(catalog.repo, text, {shipment.place: manifest}, manifest)
    add[_README] = card.encode()
    stale = [path for path in catalog.files if shipment.is_in_the_way(path) and path not in add]
    message = f"Add {shipment.place}"
    return client.commit(catalog.repo, add, stale, message, catalog.commit, shipment.branch)


def _render_card(client: HubClient, catalog: Catalog, shipment: _Shipment) -> str:
    """The README of the default branch once the artifact is there."""
    place, manifest = shipment.place, shipment.bundle.manifest
    there = catalog.files.get(_README)
    if there is not None and there.size > LARGEST_README:
        hint = "make it smaller, then push again: images are better files of their own"
        raise Conflict(f"the repo's README.md has {there.size / 1e6:.1f} MB", hint=hint)
    text = decode_readme(client.read(catalog.repo, catalog.commit, there)) if there else ""
    artifacts = {**catalog.readable, place: manifest}
    unreadable = tuple(str(each) for each in catalog.artifacts if each not in artifacts)
    return render(catalog.repo, text, artifacts, manifest, unreadable)


def decode_readme(readme: bytes) -> str:
    """The text of a README that is there, without the mark that some editors begin it with.

    Raises:
        Conflict: it is no text, so nothing can be added to it.
    """
    try:
        return readme.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "save it as UTF-8, then push again"
        raise Conflict(f"the repo's README.md is not UTF-8: {error}", hint=hint) from error
