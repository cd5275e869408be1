"""The repo, branch and tag of a push: made when they are needed, taken back when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hubaoti.errors import Conflict, HubaotiError
from hubaoti.hub.client import HubClient


@contextmanager
def ensure_repo(client: HubClient, repo: str, private: bool) -> Iterator[bool]:
    """While there is the repo; whether it is private.

    One that was made for a push that failed does not stay, unless somebody else pushed to it since.
    """
    made = client.create(repo, private)
    try:
        yield made.private
    except BaseException:
        if made.first is not None:
            with suppress(HubaotiError):
                if client.resolve(repo) == made.first:
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


def require_free(client: HubClient, repo: str, tag: str, commit: str | None) -> None:
    """See, before anything is uploaded, that a tag is free, or on this commit already.

    Raises:
        Conflict: it names another commit.
    """
    there = client.tags(repo).get(tag)
    if there is not None and there != commit:
        raise Conflict(
            f"the tag {tag} of {repo} names another commit, {there}",
            hint="choose another tag: one that others pinned should not move; or move it with "
            "--move-tag",
        )


def set_tag(client: HubClient, repo: str, tag: str, commit: str, move: bool) -> str | None:
    """Have a tag name a commit; one that cannot be moved stays where it was.

    The commit that it was moved from, if it was.

    The Hub moves no tag: it is removed, and made anew.

    Raises:
        Conflict: it names another commit by now, and is not to be moved.
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
