"""The repo, branch and tag of a push: made when they are needed, taken back when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from hubaoti.errors import BadRequest, Conflict, HubaotiError
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import is_revision, looks_like_commit

_COMMIT_DIGITS = 40
_HEADS = {"HEAD", "main"}  # of a repo that there is not yet, too


@dataclass(slots=True)
class EnsuredRepo:
    """A repo that is there for a push; `own` are its heads that nobody but this push made."""

    private: bool
    own: set[str]

    def holds(self, commit: str) -> None:
        """This push made a commit there: a repo that it made leaves with it, where it fails."""
        if self.own:
            self.own.add(commit)


@contextmanager
def ensure_repo(client: HubClient, repo: str, private: bool) -> Iterator[EnsuredRepo]:
    """While there is the repo.

    One that was made for a push that failed does not stay, unless somebody else pushed to it since.
    """
    made = client.create(repo, private)
    there = EnsuredRepo(made.private, set() if made.first is None else {made.first})
    try:
        yield there
    except BaseException:
        if there.own:
            with suppress(HubaotiError):
                if client.resolve(repo) in there.own:
                    client.drop_repo(repo)
        raise


@contextmanager
def ensure_branch(client: HubClient, repo: str, branch: str | None) -> Iterator[None]:
    """While there is this branch; one that was made for a commit that failed does not stay."""
    made = branch is not None and client.make_branch(repo, branch)
    try:
        yield
    except BaseException:
        if made and branch is not None:
            with suppress(HubaotiError):
                client.drop_branch(repo, branch)
        raise


def refuse_tag(tag: str) -> None:
    """See that a tag may be called so, and that its name says nothing else.

    Raises:
        BadRequest: it may not, or it reads as a commit's id or as a ref's path.
    """
    if not is_revision(tag):
        raise BadRequest(f"malformed tag: {tag!r:.120}", hint="write it as v1")
    is_commit = len(tag) == _COMMIT_DIGITS and looks_like_commit(tag)
    if is_commit or tag.startswith("refs/") or tag in _HEADS:
        what = "a commit's id" if is_commit else "a ref that is there already, and no tag of ours"
        raise BadRequest(f"the tag {tag} reads as {what}", hint="choose another: v1")


def require_free(client: HubClient, repo: str, tag: str, commit: str | None, move: bool) -> None:
    """See, before anything is uploaded, that a tag is free, or on this commit already, or moves.

    Raises:
        Conflict: it names another commit, and is not to be moved; or a branch is called so.
    """
    branches, tags = client.list_heads(repo)
    if tag in branches:
        raise Conflict(
            f"{repo} has a branch {tag}: with a tag of that name, nobody knows which is meant",
            hint="choose another tag: v1",
        )
    there = tags.get(tag)
    if there is not None and there != commit and not move:
        raise Conflict(
            f"the tag {tag} of {repo} names another commit, {there}",
            hint="choose another tag: one that others pinned should not move; or move it with "
            "--move-tag",
        )


def set_tag(
    client: HubClient, repo: str, tag: str, commit: str, move: bool, stays: bool
) -> str | None:
    """Have a tag name a commit, which `stays` where that fails: then it is said which it is.

    The commit that it was moved from, if it was.

    Raises:
        Conflict: it names another commit by now, and is not to be moved.
    """
    try:
        return _set_tag(client, repo, tag, commit, move)
    except HubaotiError as error:
        if not stays:
            raise
        raise type(error)(
            f"{repo} has the commit {commit} now, and the tag {tag} is not set: {error}",
            hint=f"{error.hint}; the same push again sets the tag alone",
        ) from error


def _set_tag(client: HubClient, repo: str, tag: str, commit: str, move: bool) -> str | None:
    """The same; one that cannot be moved stays where it was.

    The Hub moves no tag: it is removed, and made anew.
    """
    there = client.tags(repo).get(tag)
    if there == commit:
        return None
    moved = there if move else None
    if moved is not None:
        client.drop_tag(repo, tag)
    try:
        client.tag(repo, tag, commit)
    except BaseException:
        if moved is not None:
            with suppress(HubaotiError):
                client.tag(repo, tag, moved)
        raise
    return moved
