"""Which commit a revision is, and that the repo's owner put it there.

Whoever trusts an owner trusts what lies on a branch or under a tag of theirs. Anybody may propose a
commit to a repo (`refs/pr/1`), which its endpoint then gives by its id like any other; a name may
be somebody else's by now; and who answers for an endpoint may answer what was right a year ago.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version

from hubaoti.errors import BadRequest, RolledBack, Untrusted
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import RepoRef, looks_like_commit
from hubaoti.hub.versions import Release, find_release, read_tag
from hubaoti.mirror import Mirror
from hubaoti.progress import Progress

_DEFAULT = "main"  # of every repo of the Hub, unless a revision is named
_HEADS, _TAGS = _OWN = ("refs/heads/", "refs/tags/")


def resolve_owned(client: HubClient, repo: str, revision: str | None, kind: str = "model") -> str:
    """The full commit id of a revision, which the repo's owner put there.

    Only of an id that is no head are the pages of the history asked for.

    Raises:
        Untrusted: no branch and no tag has it. RepoMoved: the repo has another name now.
        RepoNotFound, AuthFailed, HubUnreachable: from the Hub.
    """
    _refuse_proposals(repo, revision)
    commit = client.resolve(repo, revision, kind)
    if looks_like_commit(revision) and commit.startswith(str(revision)):
        _require_reachable(client, repo, commit, kind)
    return commit


@dataclass(frozen=True, slots=True)
class Revisions:
    """The revisions of an endpoint's repos, and where each was when it was last seen."""

    client: HubClient
    mirror: Mirror
    progress: Progress
    allow_rollback: bool = False

    def pin(self, ref: RepoRef) -> str:
        """The full commit id of a revision; of one that was pulled before nothing is asked.

        Raises:
            Untrusted, RepoMoved: as `resolve_owned`.
            NoVersion: the repo has no such version.
            RolledBack: a tag is at another commit than before, a branch at one that does not come
                after it, or the newest version is older than the one before.
            BadRequest: the revision is an artifact's digest, which names no commit.
        """
        if ref.digest is not None:
            raise BadRequest(
                f"{ref} names an artifact, and no commit that could hold several",
                hint="fetch it with hubaoti pull, or name a branch, a tag or a commit here",
            )
        endpoint = self.client.endpoint
        if ref.commit and self.mirror.index.is_known(endpoint, ref.repo, ref.commit):
            return ref.commit
        self.progress(f"asking {endpoint} for the commit of {ref}")
        name = ref.revision or _DEFAULT
        if ref.specifier is not None:
            release = self._choose_version(ref)
            if release is not None:  # a branch may be called so, too: the list has the tag's commit
                self.require_forward(ref.repo, f"{_TAGS}{release.tag}", release.commit)
                return release.commit
            if self.mirror.seen.find_commit(endpoint, ref.repo, f"{_TAGS}{name}") is None:
                name = f"{_HEADS}{name}"  # else it was a tag
        commit = resolve_owned(self.client, ref.repo, ref.revision)
        if looks_like_commit(name):
            if commit.startswith(name):
                return commit
            self.progress(f"{name} is the name of a branch or a tag here, which is at {commit}")
        self.require_forward(ref.repo, name, commit)
        return commit

    def require_forward(self, repo: str, name: str, commit: str) -> None:
        """See that a branch or a tag did not go back since it was last seen, and remember it.

        A version names a tag, unless it is said to be a branch (`refs/heads/v1`).

        Raises:
            RolledBack: it did.
        """
        is_tag = name.startswith(_TAGS) or read_tag(name) is not None
        name = name.removeprefix(_HEADS).removeprefix(_TAGS)
        before = self.mirror.seen.find_commit(self.client.endpoint, repo, name)
        if is_tag:
            self._require_same_tag(repo, name, commit, before)
        elif before != commit:
            if before is not None and not self.allow_rollback:
                self._require_after(repo, name, before, commit)
            self._record(repo, name, commit)

    def _require_same_tag(self, repo: str, tag: str, commit: str, before: str | None) -> None:
        """See that a tag is where it was when it was last seen, and remember it.

        What has its name now may be a branch. `before` is where it was as a name of either kind.

        Raises:
            RolledBack: it is not.
        """
        name = f"{_TAGS}{tag}"
        before = self.mirror.seen.find_commit(self.client.endpoint, repo, name) or before
        if before not in {None, commit} and not self.allow_rollback:
            raise _describe_rollback(repo, tag, True, before, commit)
        if before != commit:
            self._record(repo, name, commit)

    def _record(self, repo: str, name: str, commit: str) -> None:
        """Remember where a branch or a tag is, if that can be."""
        if self.mirror.index.is_writable:
            self.mirror.seen.record_commit(self.client.endpoint, repo, name, commit)

    def _choose_version(self, ref: RepoRef) -> Release | None:
        """The tag of that name, else the newest version that is meant; None for a branch's name."""
        branches, tags = self.client.list_heads(ref.repo)
        revision = str(ref.revision)
        if revision in tags:
            return Release(Version(revision), revision, tags[revision])
        if revision in branches:
            return None
        release, name = find_release(ref, tags), str(ref.specifier)
        before = self.mirror.seen.find_commit(self.client.endpoint, ref.repo, name)
        newest = None if before is None else read_tag(before)
        if newest is not None and newest > release.version and not self.allow_rollback:
            raise RolledBack(
                f"the newest {ref.revision} of {ref.repo} is {release.tag} now, and was {before}",
                hint=f"ask its publisher where {before} is; if it is meant so, once: hubaoti pull "
                f"{ref} --allow-rollback",
            )
        if before != release.tag:
            self._record(ref.repo, name, release.tag)
        self.progress(f"{ref} is {release.tag}")
        return release

    def _require_after(self, repo: str, name: str, before: str, commit: str) -> None:
        """See that a name is a branch, on which one commit comes after another.

        One that a tag has, too, was a tag's.
        """
        was_tag = name in self.client.tags(repo)
        if not was_tag and before in self.client.history(repo, commit):
            return
        raise _describe_rollback(repo, name, was_tag, before, commit)


def _describe_rollback(
    repo: str, name: str, was_tag: bool, before: str | None, commit: str
) -> RolledBack:
    """Where a name was, and is, and how that is taken all the same."""
    what = (
        f"the tag {name} of {repo} was moved, or a branch has its name"
        if was_tag
        else f"{name} of {repo} went back, or has another history"
    )
    return RolledBack(
        f"{what}: here it was last seen at {before}, and now it is at {commit}",
        hint="ask its publisher; if it is meant so, once: hubaoti pull "
        f"{repo}@{name} --allow-rollback",
    )


def _refuse_proposals(repo: str, revision: str | None) -> None:
    """Refuse refs that are no branch and no tag.

    Raises:
        Untrusted: it is one.
    """
    if revision is not None and revision.startswith("refs/") and not revision.startswith(_OWN):
        raise Untrusted(
            f"{revision} of {repo} is no branch and no tag: anybody may have made it",
            hint=f"have the owner of {repo} merge it, and name a branch or a tag",
        )


def _require_reachable(client: HubClient, repo: str, commit: str, kind: str) -> None:
    """See that a branch or a tag of a repo has a commit in its history.

    Raises:
        Untrusted: none has, so that anybody may have made it.
    """
    branches, tags = client.list_heads(repo, kind)
    if commit in {*branches.values(), *tags.values()}:
        return
    for name in sorted(branches, key=lambda name: (name != _DEFAULT, name)):
        if commit in client.history(repo, branches[name], kind):
            return
    raise Untrusted(
        f"no branch and no tag of {repo} has the commit {commit}: anybody may have made it, as a "
        "proposal to the repo",
        hint=f"have the owner of {repo} merge it; hubaoti pull takes what is on a branch or a tag",
    )
