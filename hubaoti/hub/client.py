"""What is asked of the Hub: commits, files, branches and tags, read and written.

huggingface_hub is the transport: what it brings is verified by those who asked for it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from hubaoti.errors import (
    BadRequest,
    DigestMismatch,
    HubaotiError,
    RepoNotFound,
)
from hubaoti.escape import escape_line
from hubaoti.hub.bounds import TooLong, make_limit_bar
from hubaoti.hub.door import Door
from hubaoti.hub.errors import AnswerLost
from hubaoti.hub.records import CommitId, Created, Entry, Pushed, Refs, Text
from hubaoti.hub.renames import describe_renamed
from hubaoti.hub.retry import LIBRARY, find_response_status

_LONGEST_SILENCE = 600  # seconds without a byte, after which nobody waits for the rest
_TAGS_SHOWN = 10  # to who asks for one that there is not
MOST_FILES = 100_000  # of a commit, folders counted; what the Hub recommends at most

_MODEL = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*/)?[A-Za-z0-9_][A-Za-z0-9_.-]*")


class HubClient(Door):
    """The Hub at `settings.endpoint`. Every method may raise these, and those it names itself:

    Raises:
        RepoMoved: the repo is called otherwise by now, and perhaps somebody else's.
        RepoNotFound: there is no such repo, revision or file, or not for this token.
        AuthFailed: the token is missing, wrong, or may not do this.
        HubUnreachable: the endpoint is down, stays busy, drops the connection, says what no Hub
            says, or we are offline.
        DiskFull: there is no room for what was asked for.

    `progress` is told when the endpoint is busy and has to be waited for.
    """

    # Reading

    def resolve(self, repo: str, revision: str | None = None, kind: str = "model") -> str:
        """The full commit id that a revision (by default the default branch) is at now."""
        what = f"{repo}@{revision}" if revision else repo
        try:
            return self._ask(what, lambda _: self._head(repo, revision, kind))
        except RepoNotFound as error:
            tags = self._list_some_tags(repo) if revision and kind == "model" else ""
            error.hint = f"{tags}{error.hint}"
            raise

    def _list_some_tags(self, repo: str) -> str:
        """The beginning of a hint for who named a tag that a repo does not have."""
        with suppress(HubaotiError):
            if tags := sorted(self.tags(repo), reverse=True):
                more = f" and {len(tags) - _TAGS_SHOWN} more" if len(tags) > _TAGS_SHOWN else ""
                shown = ", ".join(escape_line(each, 80) for each in tags[:_TAGS_SHOWN])
                return f"its tags are {shown}{more}; "
        return ""

    def _head(self, repo: str, revision: str | None, kind: str = "model") -> str:
        found = self._api.repo_info(repo, revision=revision, repo_type=kind)
        name = self._convert(found.id, Text, f"does not say what {repo} is called")
        if name != repo:  # a redirect that was followed
            raise describe_renamed(repo, self.endpoint, name)
        commit: str = self._convert(found.sha, CommitId, f"names no commit of {repo}")
        return commit

    def files(self, repo: str, commit: str, kind: str = "model") -> tuple[Entry, ...]:
        """Every file of a commit.

        Raises:
            HubaotiError: they are too many to be looked at.
        """
        from huggingface_hub.hf_api import RepoFile

        with self._door(f"{repo}@{commit}"):
            how: dict[str, Any] = {"revision": commit, "repo_type": kind}
            tree = self._api.list_repo_tree(repo, recursive=True, **how)
            listed = [*islice(tree, MOST_FILES + 1)]
        if len(listed) > MOST_FILES:
            raise HubaotiError(
                f"{repo} at {commit} lists more than {MOST_FILES} files and folders",
                hint="name a revision that has fewer, or ask its publisher for one",
            )
        found = [
            {"path": f.path, "size": f.size, "blob": f.blob_id, "sha256": f.lfs and f.lfs.sha256}
            for f in listed
            if isinstance(f, RepoFile)
        ]
        wrong = f"lists the files of {repo} in no way of the Hub's"
        entries: tuple[Entry, ...] = self._convert(found, tuple[Entry, ...], wrong)
        return entries

    def download(
        self, repo: str, commit: str, path: str, limit: int | None = None, kind: str = "model"
    ) -> Path:
        """A file of a commit, in this endpoint's cache folder; asked for once.

        Raises:
            TooLong: it has more bytes than the limit.
        """

        def download(_: bool) -> Path:
            bar = None if limit is None else make_limit_bar(limit)
            options: dict[str, Any] = {"cache_dir": self.cache, "tqdm_class": bar}
            options |= {"revision": commit, "repo_type": kind}
            fetch = partial(self._api.hf_hub_download, repo, path, **options)
            try:
                return Path(fetch())
            except FileNotFoundError as error:
                if error.errno is None:  # huggingface_hub's own, not the system's
                    raise
                return Path(fetch())  # another process dropped the file while we linked to it

        return self._ask(f"{path} of {repo}", download, of_files=True)

    def sweep(self) -> None:
        """Remove what killed downloads left; a living one has written to its file just now."""
        for path in self.cache.glob("*/blobs/*.incomplete"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LONGEST_SILENCE:
                    path.unlink()

    def read(self, repo: str, commit: str, entry: Entry, kind: str = "model") -> bytes:
        """The bytes of a small file, compared with what the commit lists; no more are taken.

        Raises:
            DigestMismatch: the endpoint gives others.
        """
        for _ in range(2):
            with suppress(TooLong):
                path = self.download(repo, commit, entry.path, entry.size, kind)
                if path.stat().st_size == entry.size and entry.is_of(content := path.read_bytes()):
                    return content
                self.drop(path)  # it may have been changed here, since it was downloaded
        raise self._describe_others(repo, entry)

    def fetch(self, repo: str, commit: str, entry: Entry) -> bytes:
        """The bytes of a small file as `read` gives them, by one request: none of it is kept.

        huggingface_hub asks for a file's size and digest before it downloads it; the list has them.

        Raises:
            DigestMismatch: the endpoint gives others.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
        )

        url = hf_hub_url(repo, entry.path, revision=commit, endpoint=self.endpoint)

        def get(_: bool) -> bytes:
            api = self._api
            headers = build_hf_headers(token=api.token, library_name=LIBRARY, headers=api.headers)
            options: dict[str, Any] = {"headers": headers, "follow_redirects": True}
            content = b""
            with get_session().stream("GET", url, **options) as response:
                hf_raise_for_status(response)
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > entry.size:
                        break
            return content

        for _ in range(2):
            content = self._ask(f"{entry.path} of {repo}", get, of_files=True)
            if len(content) == entry.size and entry.is_of(content):
                return content
        raise self._describe_others(repo, entry)

    def _describe_others(self, repo: str, entry: Entry) -> DigestMismatch:
        return DigestMismatch(
            f"{self.endpoint} gives other bytes of {entry.path} than {repo} lists",
            hint="try again; if it stays so, the endpoint or something on the way is broken",
        )

    def drop(self, path: Path) -> None:
        """Remove a downloaded file, and what it links to, from the cache folder."""
        cache = self.cache.resolve()
        with suppress(FileNotFoundError):
            while path.parent.resolve().is_relative_to(cache):
                target = path.parent / path.readlink() if path.is_symlink() else None
                path.unlink()
                if target is None:
                    break
                path = target

    def model_folder(
        self, model: str, revision: str | None = None, patterns: Iterable[str] = ()
    ) -> tuple[Path, str]:
        """A model's files that match the patterns, in huggingface_hub's own cache; its commit.

        Offline, or when the Hub cannot be asked, what is there already is used.

        Raises:
            BadRequest: this is no model's id.
        """
        if not _MODEL.fullmatch(model):
            raise BadRequest(f"malformed model id: {model!r:.120}", hint="write it as owner/name")
        offline, allowed = self._settings.offline, list(patterns)

        def snapshot(_: bool) -> Path:
            from huggingface_hub.errors import LocalEntryNotFoundError

            options: dict[str, Any] = {"allow_patterns": allowed, "local_files_only": offline}
            try:
                # By its own name, not by its commit: so it is found by that name when offline.
                return Path(self._api.snapshot_download(model, revision=revision, **options))
            except LocalEntryNotFoundError as error:  # of the cache, once the endpoint failed
                raise error.__cause__ or error from error.__cause__

        folder = self._ask(model, snapshot, local=offline, of_files=True, follows=True)
        return folder, self._convert(folder.name, CommitId, f"names no commit of {model}")

    # Writing

    def create(self, repo: str, private: bool) -> Created:
        """See that a repo exists; one that does decides itself whether it is private."""

        def create(again: bool) -> Created:
            there = self._find_repo(repo)  # else one is made anew under a name that another had
            made = self._make_repo(repo, private) and not again  # else by whom, nobody knows
            found = self._api.repo_info(repo) if made or there is None else there
            how = f"does not say whether {repo} is private"
            is_private = bool(self._convert(found.private, bool | None, how))
            how = f"names no commit of {repo}"
            return Created(is_private, self._convert(found.sha, CommitId, how) if made else None)

        return self._ask(repo, create, writing=True)

    def _find_repo(self, repo: str) -> Any:
        """What the endpoint says of a repo; None where it shows none, or none to this token."""
        try:
            return self._api.repo_info(repo)
        except Exception as error:
            if find_response_status(error) not in {401, 403, 404}:
                raise
            return None

    def _make_repo(self, repo: str, private: bool) -> bool:
        """Make a repo; False where there is one already."""
        try:
            self._api.create_repo(repo, private=private)
        except Exception as error:
            status = find_response_status(error)
            if status == 403:  # it may be there, for who may not make one
                self._api.create_repo(repo, private=private, exist_ok=True)
            elif status != 409:
                raise
            return False
        return True

    def drop_repo(self, repo: str) -> None:
        """Remove a repo, if it is there, with all that it holds."""
        self._ask(repo, lambda _: self._api.delete_repo(repo, missing_ok=True), writing=True)

    def commit(
        self,
        repo: str,
        add: Mapping[str, Path | bytes],
        delete: Iterable[str],
        message: str,
        parent: str,
        branch: str | None = None,
    ) -> Pushed:
        """Make one commit on top of `parent`, the head of a branch, with all of this or none of it.

        Raises:
            StaleParent: `parent` is no longer the head. AnswerLost: perhaps because of this commit.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationDelete(path, is_folder=False) for path in delete),
            *(CommitOperationAdd(path, content) for path, content in add.items()),
        ]

        def send(again: bool) -> Pushed:
            if again and self._head(repo, branch) != parent:
                raise AnswerLost(repo)
            made = self._api.create_commit(
                repo, operations, commit_message=message, parent_commit=parent, revision=branch
            )
            found = {"commit": made.oid, "url": made.commit_url}
            how = f"names no commit that it made in {repo}"
            pushed: Pushed = self._convert(found, Pushed, how)
            return pushed

        return self._ask(repo, send, writing=True)

    def tags(self, repo: str) -> dict[str, str]:
        """The full commit id that each tag of a repo names."""
        return self.list_heads(repo)[1]

    def branches(self, repo: str) -> dict[str, str]:
        """The full commit id that each branch of a repo is at."""
        return self.list_heads(repo)[0]

    def list_heads(self, repo: str, kind: str = "model") -> tuple[dict[str, str], dict[str, str]]:
        """The full commit id that each branch of a repo is at, and each tag."""
        return self._ask(repo, lambda _: self._heads(repo, kind))

    def list_proposals(self, repo: str) -> dict[str, str]:
        """The full commit id of each proposal to a repo (`refs/pr/1`), which anybody may make."""

        def list_refs(_: bool) -> dict[str, str]:
            found = self._api.list_repo_refs(repo, include_pull_requests=True).pull_requests or ()
            how = f"lists the proposals to {repo} in no way of the Hub's"
            return dict(self._convert([(x.name, x.target_commit) for x in found], Refs, how))

        return self._ask(repo, list_refs)

    def _heads(self, repo: str, kind: str = "model") -> tuple[dict[str, str], dict[str, str]]:
        refs = self._api.list_repo_refs(repo, repo_type=kind)
        how = f"lists the branches and tags of {repo} in no way of the Hub's"
        branches, tags = (
            dict(self._convert([(each.name, each.target_commit) for each in found], Refs, how))
            for found in (refs.branches, refs.tags)
        )
        return branches, tags

    def history(self, repo: str, commit: str, kind: str = "model") -> list[str]:
        """The full ids of a commit and all before it, the newest first."""

        def list_commits(_: bool) -> list[str]:
            found = self._api.list_repo_commits(repo, revision=commit, repo_type=kind)
            how = f"lists the commits of {repo} in no way of the Hub's"
            ids: list[str] = self._convert([x.commit_id for x in found], list[CommitId], how)
            return ids

        return self._ask(repo, list_commits)

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Name a commit.

        Raises:
            Conflict: the name is taken.
        """

        def create(again: bool) -> None:
            try:
                self._api.create_tag(repo, tag=name, revision=commit)
            except Exception as error:
                made = again and find_response_status(error) == 409 and self._heads(repo)[1]
                if not made or made.get(name) != commit:
                    raise

        self._ask(f"tag {name} of {repo}", create, writing=True)

    def drop_tag(self, repo: str, name: str) -> None:
        """Remove a tag, which has to be there; its commit stays."""

        def drop(again: bool) -> None:
            try:
                self._api.delete_tag(repo, tag=name)
            except Exception as error:
                if not (again and find_response_status(error) == 404):
                    raise

        self._ask(f"tag {name} of {repo}", drop, writing=True)

    def make_branch(self, repo: str, name: str) -> bool:
        """See that a branch exists, off the default one; whether it was made now."""
        if name in self.branches(repo):
            return False

        def create(_: bool) -> None:
            self._api.create_branch(repo, branch=name, exist_ok=True)

        self._ask(f"branch {name} of {repo}", create, writing=True)
        return True

    def drop_branch(self, repo: str, name: str) -> None:
        """Remove a branch, which has to be there; its commits stay."""

        def drop(again: bool) -> None:
            try:
                self._api.delete_branch(repo, branch=name)
            except Exception as error:
                if not (again and find_response_status(error) == 404):
                    raise

        self._ask(f"branch {name} of {repo}", drop, writing=True)
