"""What outside may say: every name, path, digest and body is checked here before it is used.

Each function returns its word, safe to use, or raises a `ServerError`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec

from hubaoti.server.errors import malformed_request

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space", "kernels": "kernel"}
"""A repo's kind, as URLs spell it and as bodies do."""

_OPERATIONS = """
    auth-check branch commit commits paths-info preupload refs resolve revision settings
    super-squash tag tree xet-read-token xet-write-token
"""

OPERATIONS = frozenset(_OPERATIONS.split())
"""Words that follow a repo's name in a URL, so no repo may be named so."""

_MAX_VALUES = 100_000
_DEPTH = 100
_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_IN_REFS = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(?:/|$)")


_Fields = TypeVar("_Fields", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class RepoId:
    """A repo's kind and full name; `str` is how messages spell it."""

    kind: str
    owner: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.full_name}"

    @property
    def full_name(self) -> str:
        """The name as `owner/name`, without the kind."""
        return f"{self.owner}/{self.name}"

    @property
    def page(self) -> str:
        """The repo's path on the endpoint: `owner/name`, `datasets/owner/name`, …"""
        return self.full_name if self.kind == "model" else f"{self.kind}s/{self.full_name}"


def parse_repo_id(kind: object, name: object, default_owner: str) -> RepoId:
    """Parse `owner/name`, or `name` alone, which is the default owner's."""
    if kind not in KINDS.values():
        raise malformed_request(f"Invalid repo type: {kind!r}")
    parts = check_text(name, "the repo's name").split("/")
    owner, name = parts if len(parts) == 2 else (default_owner, "/".join(parts))
    if not (is_owner(owner) and _is_segment(name)):
        raise malformed_request(f"Invalid repo name: {'/'.join(parts)!r}")
    if name in OPERATIONS or name.endswith(".git"):
        raise malformed_request(f"{name!r} cannot name a repo")
    return RepoId(str(kind), owner, name)


def is_owner(word: str) -> bool:
    """Whether a user or an organization can be named so."""
    return _is_segment(word) and word not in {"api", *KINDS}


def _is_segment(word: str) -> bool:
    return bool(_SEGMENT.fullmatch(word)) and "--" not in word and ".." not in word


def check_digest(word: object) -> str:
    """A SHA-256, as 64 lower-case hex digits; else 400."""
    if not isinstance(word, str) or not _DIGEST.fullmatch(word):
        raise malformed_request(f"Not a SHA-256 digest: {str(word)[:100]!r}")
    return word


def is_commit(word: str) -> bool:
    """Whether this could be a commit, in full or by its first 7 digits or more."""
    return bool(_COMMIT.fullmatch(word))


def check_file_path(word: object) -> str:
    """A file's path in a repo: relative, of plain segments, none of them `.git`."""
    path = check_text(word, "a path", 1024)
    segments = path.split("/")
    if len(segments) > _DEPTH or "\\" in path or any(not _is_path_segment(s) for s in segments):
        raise malformed_request(f"Invalid path in repo: {path[:200]!r}")
    return path


def check_folder_path(word: object) -> str:
    """A folder's path; the slash that clients put at its end is dropped."""
    return check_file_path(check_text(word, "a path").removesuffix("/"))


def _is_path_segment(segment: str) -> bool:
    hostile = segment in {"", ".", ".."} or segment.lower() == ".git"
    return not hostile and not _CONTROL.search(segment) and len(segment.encode()) <= 255


def check_ref_name(word: object, folder: str) -> str:
    """A branch's (`folder="heads"`) or tag's (`"tags"`) name, by git's rules for refs."""
    name = check_text(word, "a ref's name").removeprefix(f"refs/{folder}/")
    if name.startswith("refs/"):
        raise malformed_request(
            f"Invalid reference: {name!r}; only branches and tags are served, no PRs"
        )
    edges = name.startswith(("/", ".", "-")) or name.endswith(("/", "."))
    if not name or edges or name in {"@", "HEAD"} or _NOT_IN_REFS.search(name) or len(name) > 200:
        raise malformed_request(f"Invalid reference name: {name[:200]!r}")
    if len(name) == 40 and is_commit(name):
        raise malformed_request(f"Invalid reference name: {name!r} reads as a commit")
    return name


def check_text(word: object, what: str, limit: int = 4096) -> str:
    """A string that is really text: bounded, and of Unicode that can be written down."""
    if not isinstance(word, str) or len(word) > limit:
        raise malformed_request(f"{what} must be a string of at most {limit} characters")
    try:
        word.encode()
    except UnicodeEncodeError:
        raise malformed_request(f"{what} is not valid Unicode") from None
    return word


def is_set(word: str) -> bool:
    """Whether a flag of a query or a form is set."""
    return word.lower() in {"1", "true", "yes"}


def decode_base64(word: object, limit: int) -> bytes:
    """What `limit` characters of base64, at most, stand for."""
    try:
        return base64.b64decode(check_text(word, "base64", limit), validate=True)
    except ValueError:
        raise malformed_request("Not base64") from None


def check_size(word: object) -> int:
    """A file's size in bytes: a whole number below 2**53; else 400."""
    if not isinstance(word, int) or isinstance(word, bool) or not 0 <= word < 2**53:
        raise malformed_request(f"Not a size in bytes: {str(word)[:100]}")
    return word


def unquote_segment(segment: str) -> str:
    """A URL's segment as its sender meant it."""
    try:
        return check_text(unquote_to_bytes(segment).decode(), "the URL")
    except UnicodeDecodeError:
        raise malformed_request("The URL is not valid UTF-8") from None


def parse_json_object(body: bytes) -> dict[str, Any]:
    """A JSON body that is an object; an empty body is an empty one.

    It may hold so many values: three bytes of JSON can become fifty of memory.
    """
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > _MAX_VALUES:
        raise malformed_request(f"The body holds more than {_MAX_VALUES} values")
    try:
        found = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise malformed_request("The body is not valid JSON") from None
    if not isinstance(found, dict):
        raise malformed_request("The body must be a JSON object")
    return found


def parse_json_fields(body: bytes, kind: type[_Fields]) -> _Fields:
    """The fields of a JSON body that its view needs; the rest takes no memory, however long."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise malformed_request("The body is not the JSON that is needed here") from None


def iterate_objects(body: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of the list that a body holds under a key; 400 where there is another."""
    found = body.get(key)
    if not isinstance(found, list):
        raise malformed_request(f"The body needs a list: {key!r}")
    for item in found:
        if not isinstance(item, dict):
            raise malformed_request("Each item must be a JSON object")
        yield item
