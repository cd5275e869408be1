"""Push: a checked bundle becomes one commit of a Hub repo, its card rendered anew."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from hubaoti.bundle import Bundle
from hubaoti.errors import BadPackage, BadRequest, Conflict
from hubaoti.hub.card import render
from hubaoti.hub.catalog import Catalog, read_catalog
from hubaoti.hub.client import HubClient, Pushed
from hubaoti.hub.layout import Place, RepoRef, is_revision, place_of
from hubaoti.hub.words import StaleParent
from hubaoti.manifest import FILENAME, Manifest
from hubaoti.settings import Settings
from hubaoti.steps import Say, silent

README = "README.md"
ATTEMPTS = 6  # one, and five more when another push was faster


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a bundle goes: the repo, a tag for the commit, the user's own label in the path.

    `private` is for a repo that is made; one that exists keeps its visibility.

    Raises:
        BadRequest: the repo has a revision, or the tag is malformed.
    """

    repo: RepoRef
    tag: str | None = None
    label: str | None = None
    private: bool = False

    def __post_init__(self) -> None:
        if self.repo.revision is not None:
            raise BadRequest(
                f"a push goes to the default branch, not to {self.repo}",
                hint=f"push to {self.repo.repo}, and name the commit with --tag",
            )
        if self.tag is not None and not is_revision(self.tag):
            raise BadRequest(f"malformed tag: {self.tag!r:.120}", hint="write it as v1")


@dataclass(frozen=True, slots=True)
class Commit:
    """Where a pushed artifact is. `created` is False when the repo held it already."""

    repo: str
    commit: str
    url: str
    path: str
    digest: str
    tag: str | None
    created: bool
    private: bool


def push(bundle: Bundle, to: Destination, settings: Settings, say: Say = silent) -> Commit:
    """Put a bundle into a repo, which is made if missing: one commit, or none if it is there.

    Raises:
        DigestMismatch: the bundle's files are not what its manifest says.
        BadPackage: one of its packages is damaged.
        Conflict: the path holds an artifact of another key, the tag names another commit, or the
            branch moves faster than we do.
        AuthFailed, RepoNotFound, HubUnreachable: from the Hub.
    """
    place = place_of(bundle.manifest, to.label)
    say(f"checking {bundle.path}")
    check(bundle)
    client, repo = HubClient(settings), to.repo.repo
    say(f"looking into {repo} at {client.endpoint}")
    private = client.create(repo, to.private)
    if to.private and not private:
        say(f"{repo} is public already, and stays so")
    made, created = commit_on_head(client, bundle, place, to, say)
    if to.tag is not None and client.tags(repo).get(to.tag) != made.commit:
        say(f"tagging {made.commit[:12]} as {to.tag}")
        client.tag(repo, to.tag, made.commit)
    return Commit(
        repo=repo,
        commit=made.commit,
        url=made.url,
        path=str(place),
        digest=bundle.manifest.digest,
        tag=to.tag,
        created=created,
        private=private,
    )


def check(bundle: Bundle) -> None:
    """See that a bundle is what its manifest says.

    Raises:
        DigestMismatch, BadPackage: it is not.
    """
    try:
        bundle.check()
    except BadPackage as why:
        hint = "compile the bundle again, or copy it again from where it came"
        raise BadPackage(str(why), hint=hint) from why


def commit_on_head(
    client: HubClient, bundle: Bundle, place: Place, to: Destination, say: Say
) -> tuple[Pushed, bool]:
    """The commit that holds the bundle, and whether it was made now; retried on a moving head."""
    repo = to.repo.repo
    for attempt in range(ATTEMPTS):
        catalog = read_catalog(client, repo, client.resolve(repo))
        present = is_present(catalog, place, bundle.manifest)
        if to.tag is not None:
            require_free(client, repo, to.tag, catalog.commit if present else None)
        if present:
            say(f"{repo} holds {place} already")
            return Pushed(
                catalog.commit, f"{client.endpoint}/{repo}/commit/{catalog.commit}"
            ), False
        try:
            say(f"uploading {place} ({bundle.manifest.size / 1e6:.1f} MB)")
            return commit(client, catalog, bundle, place), True
        except StaleParent:
            say("another push was faster: reading the repo again")
            time.sleep(random.uniform(0, 0.2 * (attempt + 1)))
    raise Conflict(
        f"{repo} changed {ATTEMPTS} times while this bundle was pushed",
        hint="nothing was pushed; try again when others are done",
    )


def is_present(catalog: Catalog, place: Place, manifest: Manifest) -> bool:
    """Whether a commit holds this very artifact, all of it, at this place.

    Raises:
        Conflict: it holds another one there, which is not ours to replace.
    """
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
    whole = all(place.file(file.path) in catalog.files for file in manifest.all_files())
    return whole and there.digest == manifest.digest


def require_free(client: HubClient, repo: str, tag: str, commit: str | None) -> None:
    """See, before anything is uploaded, that a tag is free, or on this commit already.

    Raises:
        Conflict: it names another commit.
    """
    there = client.tags(repo).get(tag)
    if there is not None and there != commit:
        raise Conflict(
            f"the tag {tag} of {repo} names another commit, {there[:12]}",
            hint="choose another tag: one that others pinned should not move",
        )


def commit(client: HubClient, catalog: Catalog, bundle: Bundle, place: Place) -> Pushed:
    """One commit: the bundle's files, those of the artifact it replaces removed, the new card."""
    manifest = bundle.manifest
    names = [FILENAME, *(file.path for file in manifest.all_files())]
    add: dict[str, Path | bytes] = {place.file(name): bundle.path / name for name in names}
    stale = [path for path in catalog.files if path.startswith(f"{place}/") and path not in add]
    add[README] = new_card(client, catalog, place, manifest).encode()
    return client.commit(catalog.repo, add, stale, f"Add {place}", catalog.commit)


def new_card(client: HubClient, catalog: Catalog, place: Place, manifest: Manifest) -> str:
    """The README once the artifact is there."""
    there = catalog.files.get(README)
    text = decoded(client.read(catalog.repo, catalog.commit, there)) if there else ""
    artifacts = {**catalog.readable, place: manifest}
    unreadable = tuple(str(each) for each in catalog.artifacts if each not in artifacts)
    return render(catalog.repo, text, artifacts, manifest, unreadable)


def decoded(readme: bytes) -> str:
    """The text of a README that is there, without the mark that some editors begin it with.

    Raises:
        Conflict: it is no text, so nothing can be added to it.
    """
    try:
        return readme.decode("utf-8-sig")
    except UnicodeDecodeError as why:
        hint = "save it as UTF-8, then push again"
        raise Conflict(f"the repo's README.md is not UTF-8: {why}", hint=hint) from why
