"""Push: checked bundles become one commit of a Hub repo, its card rendered anew.

They go to the default branch, beside other artifacts; or one goes to a branch that holds it alone,
in the layout of other loaders.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME, Manifest
from hubaoti.artifact.sizes import format_size
from hubaoti.artifact.statement import SIGNATURE
from hubaoti.errors import BadPackage, BadRequest, Conflict
from hubaoti.hub.card import render
from hubaoti.hub.catalog import Catalog, read_catalog, read_claims
from hubaoti.hub.client import HubClient
from hubaoti.hub.errors import AnswerLost, StaleParent
from hubaoti.hub.kernels import require_published
from hubaoti.hub.layout import ArtifactPath, RepoRef, artifact_path
from hubaoti.hub.push_refs import ensure_branch, ensure_repo, refuse_tag, require_free, set_tag
from hubaoti.hub.records import Pushed
from hubaoti.hub.signatures import CommitSignatures
from hubaoti.hub.signing import Signing
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
PUSH_ATTEMPTS = 24  # of each round one push is made, so this many may be made at once


@dataclass(frozen=True, slots=True)
class Destination:
    """Where bundles go: the repo, a tag for the commit, the user's own label in their paths.

    `private` is for a repo that is made; one that exists keeps its visibility. `layout` is None, or
    `zerogpu`, which other loaders read from a branch. `move_tag` takes a tag from another commit,
    and `replace` a path from an artifact of another key, or one that cannot be read. `signing` is
    with what they are signed.

    Raises:
        BadRequest: the repo has a revision, the tag is malformed, or none and to be moved, or the
            layout is unknown.
    """

    repo: RepoRef
    tag: str | None = None
    label: str | None = None
    private: bool = False
    layout: str | None = None
    move_tag: bool = False
    replace: bool = False
    signing: Signing | None = None

    def __post_init__(self) -> None:
        if self.repo.revision is not None:
            raise BadRequest(
                f"a push goes to the default branch, not to {self.repo}",
                hint=f"push to {self.repo.repo}, and name the commit with --tag",
            )
        if self.tag is not None:
            refuse_tag(self.tag)
        if self.move_tag and self.tag is None:
            raise BadRequest("a tag is to be moved, and none is named", hint="name it with --tag")
        if self.layout not in {None, LAYOUT}:
            raise BadRequest(f"unknown layout: {self.layout!r:.120}", hint=f"there is {LAYOUT}")


@dataclass(frozen=True, slots=True)
class Published:
    """An artifact of a commit, by its path. `created` is False when the repo held it already.

    It was `signed` where its signature came with this commit.
    """

    path: str
    digest: str
    created: bool
    signed: bool = False


@dataclass(frozen=True, slots=True)
class Commit:
    """Where pushed artifacts are, in the order of their bundles.

    `created` is False when the repo held all of them already. `branch` is None for the default one.
    `moved_from` is the commit from which the tag was taken.
    """

    repo: str
    commit: str
    url: str
    artifacts: tuple[Published, ...]
    tag: str | None
    created: bool
    private: bool
    branch: str | None = None
    moved_from: str | None = None

    @property
    def path(self) -> str:
        """The path of the artifact, the first one's of several."""
        return self.artifacts[0].path

    @property
    def digest(self) -> str:
        """The digest of the artifact, the first one's of several."""
        return self.artifacts[0].digest


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A bundle on its way to its place. `packages` are files that lie at other paths, too.

    Its `signature` are files beside its own. Where `is_there`, they alone are uploaded.
    """

    bundle: Bundle
    place: ArtifactPath
    packages: Mapping[str, str] = field(default_factory=dict)
    signature: Mapping[str, bytes] = field(default_factory=dict)
    is_there: bool = False

    @property
    def files(self) -> dict[str, Path | bytes]:
        """What is uploaded, by its path in the repo."""
        signature = {self.place.file(name): text for name, text in self.signature.items()}
        return {**({} if self.is_there else self._list_own()), **signature}

    def _list_own(self) -> dict[str, Path]:
        names = [FILENAME, *(file.path for file in self.bundle.manifest.all_files())]
        paths = {self.place.file(name): name for name in names} | {**self.packages}
        return {path: self.bundle.path / name for path, name in paths.items()}


@dataclass(frozen=True, slots=True)
class _Shipment:
    """What goes into one commit: of a branch that holds it alone, or of the default one."""

    parcels: tuple[_Parcel, ...]
    branch: str | None = None

    def __str__(self) -> str:
        first, *others = self.parcels
        return f"{first.place} and {len(others)} more" if others else f"{first.place}"

    @property
    def size(self) -> int:
        """The bytes of its bundles."""
        return sum(each.bundle.manifest.size for each in self.parcels if not each.is_there)

    @property
    def files(self) -> dict[str, Path | bytes]:
        """What is uploaded, by its path in the repo."""
        return {path: file for parcel in self.parcels for path, file in parcel.files.items()}

    def is_in_the_way(self, path: str) -> bool:
        """Whether a file that is there, and not one of ours, leaves with this commit."""
        moved = [each.place for each in self.parcels if not each.is_there]
        if self.branch is not None:
            return bool(moved) and path != _ATTRIBUTES
        return any(path.startswith(f"{place}/") for place in moved)


def push_bundles(
    bundles: Sequence[Bundle],
    to: Destination,
    settings: Settings,
    progress: Progress = report_nothing,
) -> Commit:
    """Put bundles into a repo, which is made if missing: one commit of those that it lacks.

    Where it has all of them there is no commit; where one cannot be pushed, none is.

    Raises:
        DigestMismatch: a bundle's files are not what its manifest says.
        BadPackage: one of its packages is damaged.
        KernelMissing: a kernel that one calls is not where it says.
        BadRequest: the label is malformed, two bundles have one path or not the same layout, or the
            loaders that a layout is for could not call one; or they cannot be signed.
        Conflict: a path holds an artifact of another key, the tag names another commit, or the
            branch moves faster than we do.
        AuthFailed, RepoNotFound, HubUnreachable: from the Hub.
    """
    shipment = _make_shipment(bundles, to)
    for bundle in bundles:
        progress(f"checking {bundle.path}")
        _check_bundle(bundle)
    client, repo = HubClient(settings, progress), to.repo.repo
    for bundle in bundles:
        require_published(client, bundle.manifest)
    progress(f"looking into {repo} at {client.endpoint}")
    with ensure_repo(client, repo, to.private) as there:
        if to.private and not there.private:
            progress(f"{repo} is public already, and stays so")
        with ensure_branch(client, repo, shipment.branch):
            made, sent = _commit_on_head(client, shipment, to, progress)
            there.holds(made.commit)
            moved = None
            if to.tag is not None:
                progress(f"tagging {made.commit} as {to.tag}")
                stays = not there.own and shipment.branch is None
                moved = set_tag(client, repo, to.tag, made.commit, to.move_tag, stays)
    new = {each.place for each in sent if not each.is_there}
    signed = {each.place for each in sent if each.signature}
    return Commit(
        repo=repo,
        commit=made.commit,
        url=made.url,
        artifacts=tuple(
            Published(str(p.place), p.bundle.manifest.digest, p.place in new, p.place in signed)
            for p in shipment.parcels
        ),
        tag=to.tag,
        created=bool(new),
        private=there.private,
        branch=shipment.branch,
        moved_from=moved,
    )


def _make_shipment(bundles: Sequence[Bundle], to: Destination) -> _Shipment:
    """What goes where."""
    if not bundles:
        raise BadRequest("no bundle is to be pushed", hint="name one, or a folder of bundles")
    places = [artifact_path(bundle.manifest, to.label) for bundle in bundles]
    if to.layout is None:
        _require_places(bundles, places)
        return _Shipment(tuple(map(_Parcel, bundles, places)))
    if len(bundles) > 1:
        raise BadRequest(
            f"the layout {to.layout} has a branch for each artifact, and one commit is on one "
            f"branch: {_list_paths(bundles)} cannot be pushed together",
            hint=f"push them one by one with --layout {to.layout}",
        )
    packages = lay_out_packages(bundles[0].manifest)
    return _Shipment((_Parcel(bundles[0], places[0], packages),), artifact_branch(places[0]))


def _require_places(bundles: Sequence[Bundle], places: Sequence[ArtifactPath]) -> None:
    """See that bundles that are pushed together have places of their own, and one layout."""
    for place, count in Counter(places).items():
        if count > 1:
            same = [each for each, at in zip(bundles, places, strict=True) if at == place]
            raise BadRequest(
                f"only one artifact can be {place}; for it here are {_list_paths(same)}",
                hint="push one of them with the others, and another by itself with --label NAME",
            )
    ours = [bundle for bundle in bundles if bundle.manifest.build.layout != LAYOUT]
    if theirs := [bundle for bundle in bundles if bundle not in ours] if ours else []:
        raise BadRequest(
            f"bundles of two layouts do not go into one commit: with --layout {LAYOUT} was "
            f"compiled {_list_paths(theirs)}; without it {_list_paths(ours)}",
            hint=f"push each of the first with --layout {LAYOUT}, and then the others",
        )


def _list_paths(bundles: Sequence[Bundle]) -> str:
    return ", ".join(str(bundle.path) for bundle in bundles)


def _check_bundle(bundle: Bundle) -> None:
    """See that a bundle is what its manifest says."""
    try:
        bundle.check()
    except BadPackage as error:
        hint = "compile the bundle again, or copy it again from where it came"
        raise BadPackage(str(error), hint=hint) from error


def _commit_on_head(
    client: HubClient, shipment: _Shipment, to: Destination, progress: Progress
) -> tuple[Pushed, Sequence[_Parcel]]:
    """The commit that holds all of it, and what it got now; retried on a moving head."""
    repo = to.repo.repo
    lost: Sequence[_Parcel] = ()  # what was sent, and no answer came
    for attempt in range(PUSH_ATTEMPTS):
        catalog = read_catalog(client, repo, client.resolve(repo, shipment.branch))
        missing = [*_find_missing(client, catalog, shipment.parcels, to)]
        if to.tag is not None:
            commit = None if missing else catalog.commit
            require_free(client, repo, to.tag, commit, to.move_tag)
        if not missing:
            progress(f"{repo} holds {shipment} {'now' if lost else 'already'}")
            url = f"{client.endpoint}/{repo}/commit/{catalog.commit}"
            return Pushed(catalog.commit, url), lost
        part = replace(shipment, parcels=tuple(missing))
        alone = "their signatures" if part.parcels[1:] else "its signature"
        try:
            progress(f"uploading {part} ({format_size(part.size) if part.size else alone})")
            return _commit_shipment(client, catalog, part), missing
        except StaleParent as error:
            lost = missing if isinstance(error, AnswerLost) else lost
            moved = "no answer came, and the repo changed" if lost else "another push was faster"
            progress(f"{moved}: reading the repo again")
            time.sleep(random.uniform(0, 0.2 * (attempt + 1)))
    raise Conflict(
        f"{repo} changed {PUSH_ATTEMPTS} times while {shipment} was pushed",
        hint="nothing was pushed; try again when others are done",
    )


def _find_missing(
    client: HubClient, catalog: Catalog, parcels: Sequence[_Parcel], to: Destination
) -> Iterator[_Parcel]:
    """What a commit lacks: an artifact, or the signature of one that it holds already."""
    there = CommitSignatures(client, catalog.repo, catalog.commit, catalog.files)
    for parcel in parcels:
        is_there, manifest = _is_present(catalog, parcel, to.replace), parcel.bundle.manifest
        signature = there.make_missing(parcel.place, manifest, to.signing, is_there)
        if signature or not is_there:
            yield replace(parcel, signature=signature, is_there=is_there)


def _is_present(catalog: Catalog, parcel: _Parcel, replace_other: bool) -> bool:
    """Whether a commit holds this very artifact, all of it; another is not ours to replace.

    Raises:
        Conflict: it holds another, and nobody said that it is to be replaced.
    """
    place, manifest = parcel.place, parcel.bundle.manifest
    there = catalog.artifacts.get(place)
    if there is None:
        return False
    if replace_other and not (isinstance(there, Manifest) and there.key == manifest.key):
        return False
    hint = "push beside it with --label NAME, or in its place with --replace"
    if not isinstance(there, Manifest):
        raise Conflict(f"{catalog.repo} holds an unreadable {place}: {there}", hint=hint)
    if there.key != manifest.key:
        raise Conflict(
            f"{catalog.repo} holds another artifact at {place}: its key is {there.key[:12]}, "
            f"this one's {manifest.key[:12]}",
            hint=hint,
        )
    whole = parcel.files.keys() <= catalog.files.keys()
    return whole and there.digest == manifest.digest


def _commit_shipment(client: HubClient, catalog: Catalog, shipment: _Shipment) -> Pushed:
    """One commit: the bundles' files, those of artifacts they replace removed, the new card."""
    add = shipment.files
    add[_README] = _render_card(client, catalog, shipment).encode()
    stale = [path for path in catalog.files if shipment.is_in_the_way(path) and path not in add]
    message = f"{'Add' if shipment.size else 'Sign'} {shipment}"
    return client.commit(catalog.repo, add, stale, message, catalog.commit, shipment.branch)


def _render_card(client: HubClient, catalog: Catalog, shipment: _Shipment) -> str:
    """The README of the branch once the artifacts are there."""
    ours = {each.place: each.bundle.manifest for each in shipment.parcels}
    newest = shipment.parcels[-1].bundle.manifest
    sent = {p.place: p.signature.get(SIGNATURE) for p in shipment.parcels if p.files}
    signers = read_claims(client, catalog, sent)
    if shipment.branch is not None:
        text = _BRANCH_CARD.format(repo=catalog.repo, branch=shipment.branch)
        where = f"{catalog.repo}@{shipment.branch}"
        return render(where, text, ours, newest, signers=signers)
    there = catalog.files.get(_README)
    if there is not None and there.size > LARGEST_README:
        hint = "make it smaller, then push again: images are better files of their own"
        raise Conflict(f"the repo's README.md has {format_size(there.size)}", hint=hint)
    text = decode_readme(client.read(catalog.repo, catalog.commit, there)) if there else ""
    artifacts = {**catalog.readable, **ours}
    unreadable = tuple(str(each) for each in catalog.artifacts if each not in artifacts)
    return render(catalog.repo, text, artifacts, newest, unreadable, signers)


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
