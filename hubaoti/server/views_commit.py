"""A commit: the lines of its body become changes, and the changes one commit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hubaoti.server import repos, trees, words
from hubaoti.server.ask import Ask, bounded
from hubaoti.server.history import Draft
from hubaoti.server.problems import Problem, malformed, too_large

MAX_REGULAR = 16 * 2**20
"""The bytes at most of a file that is sent inside its commit."""

_MAX_LINE = MAX_REGULAR * 4 // 3 + 65536
_MAX_COMMIT = 2**30
_MAX_CHANGES = 100_000


_Scalar = str | int | float | bool | None | msgspec.UnsetType


class _Value(msgspec.Struct):
    """All that a line may say, of whatever kind it is."""

    summary: _Scalar = msgspec.UNSET
    description: _Scalar = msgspec.UNSET
    parentCommit: _Scalar = msgspec.UNSET  # as the Hub calls it
    path: _Scalar = msgspec.UNSET
    content: _Scalar = msgspec.UNSET
    encoding: _Scalar = msgspec.UNSET
    algo: _Scalar = msgspec.UNSET
    oid: _Scalar = msgspec.UNSET
    size: _Scalar = msgspec.UNSET

    def given(self) -> dict[str, Any]:
        """What the line says."""
        return {
            name: value
            for name, value in msgspec.structs.asdict(self).items()
            if value is not msgspec.UNSET
        }


class _Line(msgspec.Struct):
    key: str
    value: _Value


async def commit(ask: Ask) -> Response:
    """Commit the changes of an NDJSON body, all or none."""
    ask.refuse_pr()
    branch = words.ref_name(ask.word("revision"), "heads")
    await run_in_threadpool(_branch_is_there, ask, branch)
    header: dict[str, Any] | None = None
    changes: list[trees.Change] = []
    async for line in _lines(ask.request):
        said = words.json_fields(line, _Line)
        value = said.value.given()
        if header is None:
            header = _header(said.key, value)
        elif len(changes) == _MAX_CHANGES:
            raise Problem(413, f"A commit has at most {_MAX_CHANGES} changes")
        else:
            changes.append(await run_in_threadpool(_change, ask, said.key, value))
    if header is None:
        raise malformed("The commit has no header")
    return await run_in_threadpool(_commit, ask, branch, _draft(header, changes))


def _branch_is_there(ask: Ask, branch: str) -> None:
    with ask.hub.database.reading() as db:
        repos.head(db, ask.repo(db), branch)


async def _lines(request: Request) -> AsyncIterator[bytes]:
    """The body's lines that hold something."""
    rest = bytearray()
    async for chunk in bounded(request, _MAX_COMMIT):
        *lines, tail = chunk.split(b"\n")
        for line in lines:
            rest += line
            if rest.strip():
                yield bytes(rest)
            rest.clear()
        rest += tail
        if len(rest) > _MAX_LINE:
            raise too_large("A file inside a commit", MAX_REGULAR)
    if rest.strip():
        yield bytes(rest)


def _header(key: object, value: dict[str, Any]) -> dict[str, Any]:
    if key != "header":
        raise malformed("The commit's first line must be its header")
    return value


def _draft(header: dict[str, Any], changes: list[trees.Change]) -> Draft:
    parent = words.text(header.get("parentCommit") or "", "parentCommit")
    if parent and not words.is_commit(parent):
        raise malformed(f"parentCommit is not a commit: {parent[:100]!r}")
    return Draft(
        title=words.text(header.get("summary"), "the summary", 65536) or "Commit",
        message=words.text(header.get("description") or "", "the description", 2**20),
        parent=parent,
        changes=tuple(changes),
    )


def _change(ask: Ask, key: object, value: dict[str, Any]) -> trees.Change:
    """One change; a file's bytes are stored before the commit that names them."""
    if key == "deletedFile":
        return trees.Delete(words.file_path(value.get("path")))
    if key == "deletedFolder":
        return trees.Delete(words.folder_path(value.get("path")), folder=True)
    path = words.file_path(value.get("path"))
    if key == "file":
        return trees.Put(path, _regular(ask, value))
    if key == "lfsFile":
        return trees.Put(path, _large(ask, path, value))
    raise malformed(f"Unknown kind of change: {str(key)[:100]!r}")


def _regular(ask: Ask, value: dict[str, Any]) -> trees.Entry:
    said, encoding = value.get("content"), value.get("encoding", "utf-8")
    if encoding not in ("base64", "utf-8"):
        raise malformed(f"Unknown encoding: {str(encoding)[:100]!r}")
    if encoding == "base64":
        content = words.base64_bytes(said, _MAX_LINE)
    else:
        content = words.text(said, "content", _MAX_LINE).encode()
    if len(content) > MAX_REGULAR:
        raise too_large("A file inside a commit", MAX_REGULAR)
    return trees.regular(content, ask.hub.objects.put(content))


def _large(ask: Ask, path: str, value: dict[str, Any]) -> trees.Entry:
    oid = words.digest(value.get("oid"))
    size = ask.hub.objects.size(oid)
    if value.get("algo", "sha256") != "sha256":
        raise malformed("LFS objects are named by SHA-256")
    if size is None:
        raise malformed(f"LFS object {oid} ({path}) was not uploaded")
    if "size" in value and words.size(value["size"]) != size:
        raise malformed(f"LFS object {oid} ({path}) has {size} bytes, not {value['size']}")
    return trees.large(oid, size)


def _commit(ask: Ask, branch: str, draft: Draft) -> Response:
    card = ask.hub.history.card_after(draft.changes)
    with ask.hub.database.writing() as db:
        repo = ask.repo(db)
        oid = ask.hub.history.commit(db, repo, branch, draft, card)
    url = f"{ask.base}/{repo.id.page}/commit/{oid}"
    return JSONResponse({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
