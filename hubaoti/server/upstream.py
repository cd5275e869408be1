"""The door to the endpoint that ours pulls through: what it says, bounded, and never believed.

Requests carry the token that this endpoint was given for its upstream, and nothing of a client's.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from hubaoti.errors import BadRequest
from hubaoti.server import validation
from hubaoti.server.errors import ServerError, says_full
from hubaoti.server.repos import Ref
from hubaoti.server.trees import Tree, TreeEntry
from hubaoti.server.validation import RepoId

PATIENCE = 10.0
"""Seconds without a byte from upstream, after which it counts as gone."""

_MOST_ANSWERED = 32 * 2**20  # bytes of one answer
_LONGEST = 60.0  # seconds of one answer
_MOST_PAGES = 200
_MOST_FILES = 100_000
_PIECE = 2**20  # bytes
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOB = re.compile(r"[0-9a-f]{40}")
_HIDDEN = frozenset({"RepoNotFound", "GatedRepo", "RevisionNotFound", "EntryNotFound"})


class UpstreamGone(Exception):
    """It cannot be asked now: no connection, no answer in time, busy, or broken."""


class UpstreamOdd(UpstreamGone):
    """It answers, and not as the protocol says: what it says of this one thing cannot be had."""


class UpstreamMissing(Exception):
    """It says that it shows no such repo, revision or file."""


@dataclass(frozen=True, slots=True)
class UpstreamRepo:
    """What upstream says of a repo: its name there, whether all may read it, its refs and card."""

    name: str
    private: bool
    created: str
    card: dict[str, Any]
    date: str
    refs: tuple[Ref, ...]


def _is_endpoint(url: str) -> bool:
    """Whether an endpoint can be asked at this URL, which carries nobody's password."""
    try:
        parts = urlsplit(url)
        named = parts.port != 0 and bool(parts.hostname)  # a port beyond 65535 is an error
    except ValueError:
        return False
    return named and parts.scheme in {"http", "https"} and "@" not in parts.netloc


@dataclass(frozen=True)
class Upstream:
    """How it is asked; its URL is also the mark of what was copied from it."""

    url: str
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not _is_endpoint(self.url):
            hint = "write it as https://huggingface.co; its token is HUBAOTI_UPSTREAM_TOKEN"
            raise BadRequest("--upstream is no URL of an endpoint", hint=hint)
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def describe(self, name: RepoId) -> UpstreamRepo:
        """What it says of a repo as it is now.

        Raises:
            UpstreamMissing, UpstreamGone
        """
        facts = self._ask(_api(name))
        found = self._ask(f"{_api(name)}/refs")
        card = facts.get("cardData")
        gated = facts.get("gated") not in {None, False}
        return UpstreamRepo(
            name=_text(facts, "id"),
            private=facts.get("private") is not False or gated,
            created=_text(facts, "createdAt"),
            card=card if isinstance(card, dict) else {},
            date=_text(facts, "lastModified"),
            refs=tuple(sorted(_parse_refs(found), key=lambda ref: (ref.folder, ref.name))),
        )

    def has(self, name: RepoId) -> bool:
        """Whether it shows a repo of this name, or of an older one.

        Raises:
            UpstreamGone
        """
        try:
            self._ask(_api(name))
        except UpstreamMissing:
            return False
        return True

    def find_commit(self, name: RepoId, revision: str) -> str:
        """The full id of the commit that it knows by this id.

        Raises:
            UpstreamMissing, UpstreamGone
        """
        found = self._ask(f"{_api(name)}/revision/{quote(revision, safe='')}")
        return _full_commit(found.get("sha"))

    def list_files(self, name: RepoId, commit: str) -> Tree:
        """A commit's files; the digests of those that git itself keeps are not known yet ("").

        Raises:
            UpstreamMissing, UpstreamGone: or it lists what cannot be a repo's files.
        """
        found: dict[str, TreeEntry] = {}
        for item in self._iterate(f"{_api(name)}/tree/{commit}?recursive=true&expand=false"):
            if item.get("type") == "file":
                path, entry = _parse_entry(item)
                found[path] = entry
            if len(found) > _MOST_FILES:
                raise UpstreamOdd(f"it lists more than {_MOST_FILES} files of {name}")
        return found

    def list_commits(self, name: RepoId, commit: str) -> list[tuple[str, str, str, str]]:
        """A commit and those before it: ids, titles, messages, dates, the newest first.

        Raises:
            UpstreamMissing, UpstreamGone
        """
        return [
            (
                _full_commit(item.get("id")),
                _text(item, "title"),
                _text(item, "message"),
                _text(item, "date"),
            )
            for item in self._iterate(f"{_api(name)}/commits/{commit}")
        ]

    def search(self, kind: str, query: str) -> list[dict[str, Any]]:
        """The first page of the repos of a kind that a list's query finds, as it lists them.

        Raises:
            UpstreamMissing, UpstreamGone
        """
        found, _ = self._read_page(f"{self.url}/api/{kind}s?{query}")
        listed = found if isinstance(found, list) else []
        return [item for item in listed if isinstance(item, dict) and _text(item, "id")]

    @contextmanager
    def open_file(
        self, name: RepoId, commit: str, path: str, offset: int
    ) -> Iterator[Iterator[bytes]]:
        """A file's bytes from an offset on, in pieces.

        Raises:
            UpstreamMissing, UpstreamGone: also by the pieces.
        """
        headers = {"range": f"bytes={offset}-"} if offset else {}
        url = f"/{name.page}/resolve/{commit}/{quote(path)}"
        with self._open(url, headers) as response:
            if offset and response.status_code != 206:
                raise UpstreamGone("it does not go on with a file that was cut off")
            yield response.iter_bytes(_PIECE)

    def _iterate(self, path: str) -> Iterator[dict[str, Any]]:
        """The items of a list, over its pages, all of them at this upstream."""
        following: str | None = self.url + path
        for _ in range(_MOST_PAGES):
            if following is None:
                return
            found, following = self._read_page(following)
            if not isinstance(found, list):
                raise UpstreamOdd("it answers with something else than a list")
            yield from (item for item in found if isinstance(item, dict))
        raise UpstreamOdd(f"its list has more than {_MOST_PAGES} pages")

    def _ask(self, path: str) -> dict[str, Any]:
        found, _ = self._read_page(self.url + path)
        if not isinstance(found, dict):
            raise UpstreamOdd("it answers with something else than an object")
        return found

    def _read_page(self, url: str) -> tuple[Any, str | None]:
        """A page's JSON, and the URL of the next one, if there is one."""
        if not url.startswith(f"{self.url}/"):
            raise UpstreamOdd("its next page is another endpoint's")  # who gets no token of it
        body, end = bytearray(), time.monotonic() + _LONGEST
        with self._open(url.removeprefix(self.url), {}) as response:
            for piece in response.iter_bytes():
                body += piece
                if len(body) > _MOST_ANSWERED:
                    raise UpstreamOdd(f"its answer has more than {_MOST_ANSWERED} bytes")
                if time.monotonic() > end:
                    raise UpstreamGone(f"its answer takes longer than {_LONGEST:.0f} s")
            following = response.links.get("next", {}).get("url")
        try:
            return json.loads(bytes(body)), following
        except (ValueError, RecursionError):
            raise UpstreamOdd("its answer is no JSON") from None

    @contextmanager
    def _open(self, path: str, headers: dict[str, str]) -> Iterator[Any]:
        """A response whose body is not read yet; what is no success is raised."""
        from huggingface_hub import get_session
        from huggingface_hub.utils._headers import build_hf_headers

        sent = build_hf_headers(token=self.token or False, library_name="hubaoti-serve")
        sent |= {"accept-encoding": "identity", **headers}  # what is packed has no bound
        with (
            _translate_errors(),
            get_session().stream(
                "GET", self.url + path, headers=sent, timeout=PATIENCE, follow_redirects=True
            ) as response,
        ):
            _require_success(response)
            yield response


@contextmanager
def _translate_errors() -> Iterator[None]:
    from huggingface_hub import errors

    # Its transport's root, which is httpx in its releases 1 and httpx2 in 2.
    root = errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except (root, OSError, errors.OfflineModeIsEnabled) as error:
        if says_full(error):
            raise  # which is of what its caller writes
        raise UpstreamGone(f"{type(error).__name__}: {error}"[:300]) from error


def _require_success(response: Any) -> None:
    status, code = response.status_code, response.headers.get("x-error-code", "")
    if status in {401, 403, 404} and code in _HIDDEN:
        raise UpstreamMissing(code)
    if status not in {200, 206}:
        kind = UpstreamGone if status == 429 or status >= 500 else UpstreamOdd
        raise kind(f"it answers with the status {status}")


def _api(name: RepoId) -> str:
    return f"/api/{name.kind}s/{name.full_name}"


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    return value.encode("utf-8", "replace").decode()[:65536] if isinstance(value, str) else ""


def _full_commit(value: object) -> str:
    if not isinstance(value, str) or not _COMMIT.fullmatch(value):
        raise UpstreamOdd(f"it names a commit that is none: {str(value)[:60]!r}")
    return value


def _parse_refs(found: dict[str, Any]) -> Iterator[Ref]:
    """The branches and tags that it lists; those that ours could not have are left out."""
    for key, folder in (("branches", "heads"), ("tags", "tags")):
        listed = found.get(key)
        for item in listed[:_MOST_FILES] if isinstance(listed, list) else ():
            try:
                name = validation.check_ref_name(item.get("name"), folder)
            except ServerError:
                continue
            yield Ref(folder, name, _full_commit(item.get("targetCommit")))


def _parse_entry(item: dict[str, Any]) -> tuple[str, TreeEntry]:
    """A file, as a tree lists it."""
    try:
        path = validation.check_file_path(item.get("path"))
        size, lfs = validation.check_size(item.get("size")), item.get("lfs")
        sha256 = validation.check_digest(lfs.get("oid")) if isinstance(lfs, dict) else ""
    except ServerError as error:
        raise UpstreamOdd(error.message) from None
    blob = item.get("oid")
    if not isinstance(blob, str) or not _BLOB.fullmatch(blob):
        raise UpstreamOdd(f"it lists {path!r} without a blob's id")
    return path, TreeEntry(blob, size, sha256, lfs=bool(sha256))
