"""A commit: the lines of its body become changes, and the changes one commit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hubaoti.server import repos, trees, validation
from hubaoti.server.errors import ServerError, malformed_request, too_large
from hubaoti.server.history import Draft
from hubaoti.server.request import ApiRequest, read_bounded

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
        """What the line says, by name; what it leaves out is not there."""
        return {
            name: value
            for name, value in msgspec.structs.asdict(self).items()
            if value is not msgspec.UNSET
        }


class _Line(msgspec.Struct):
    key: str
    value: _Value


async def view_commit(ask: ApiRequest) -> Response:
    """Commit the changes of an NDJSON body, all or none."""
    ask.refuse_pr()
    branch = validation.check_ref_name(ask.word("revision"), "heads")
    await run_in_threadpool(_require_branch, ask, branch)
    header: dict[str, Any] | None = None
    changes: list[trees.TreeChange] = []
    async for line in _read_lines(ask.request):
        parsed = validation.parse_json_fields(line, _Line)
        value = parsed.value.given()
        if header is None:
            header = _read_header(parsed.key, value)
        elif len(changes) == _MAX_CHANGES:
            raise ServerError(413, f"A commit has at most {_MAX_CHANGES} changes")
        else:
            changes.append(await run_in_threadpool(_read_change, ask, parsed.key, value))
    if header is None:
        raise malformed_request("The commit has no header")
    return await run_in_threadpool(_commit_draft, ask, branch, _make_draft(header, changes))


def _require_branch(ask: ApiRequest, branch: str) -> None:
    with ask.hub.database.reading() as db:
        repos.find_head(db, ask.repo(db), branch)


async def _read_lines(request: Request) -> AsyncIterator[bytes]:
    """The lines of the body that hold something; 413 for one that is too long."""
    rest = bytearray()
    async for chunk in read_bounded(request, _MAX_COMMIT):
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


def _read_header(key: object, value: dict[str, Any]) -> dict[str, Any]:
    if key != "header":
        raise malformed_request("The commit's first line must be its header")
    return value


def _make_draft(header: dict[str, Any], changes: list[trees.TreeChange]) -> Draft:
    parent = validation.check_text(header.get("parentCommit") or "", "parentCommit")
    if parent and not validation.is_commit(parent):
        raise malformed_request(f"parentCommit is not a commit: {parent[:100]!r}")
    return Draft(
        title=validation.check_text(header.get("summary"), "the summary", 65536) or "Commit",
        message=validation.check_text(header.get("description") or "", "the description", 2**20),
        parent=parent,
        changes=tuple(changes),
    )


def _read_change(ask: ApiRequest, key: object, value: dict[str, Any]) -> trees.TreeChange:
    """One change; a file's bytes are stored before the commit that names them."""
    if key == "deletedFile":
        return trees.Delete(validation.check_file_path(value.get("path")))
    if key == "deletedFolder":
        return trees.Delete(validation.check_folder_path(value.get("path")), folder=True)
    path = validation.check_file_path(value.get("path"))
    if key == "file":
        return trees.Put(path, _store_regular(ask, value))
    if key == "lfsFile":
        return trees.Put(path, _find_lfs_entry(ask, path, value))
    raise malformed_request(f"Unknown kind of change: {str(key)[:100]!r}")


def _store_regular(ask: ApiRequest, value: dict[str, Any]) -> trees.TreeEntry:
    text, encoding = value.get("content"), value.get("encoding", "utf-8")
    if encoding not in ("base64", "utf-8"):
        raise malformed_request(f"Unknown encoding: {str(encoding)[:100]!r}")
    if encoding == "base64":
        content = validation.decode_base64(text, _MAX_LINE)
    else:
        content = validation.check_text(text, "content", _MAX_LINE).encode()
    if len(content) > MAX_REGULAR:
        raise too_large("A file inside a commit", MAX_REGULAR)
    return trees.make_regular_entry(content, ask.hub.objects.put(content))


def _find_lfs_entry(ask: ApiRequest, path: str, value: dict[str, Any]) -> trees.TreeEntry:
    oid = validation.check_digest(value.get("oid"))
    size = ask.hub.objects.size(oid)
    if value.get("algo", "sha256") != "sha256":
        raise malformed_request("LFS objects are named by SHA-256")
    if size is None:
        raise malformed_request(f"LFS object {oid} ({path}) was not uploaded")
    if "size" in value and validation.check_size(value["size"]) != size:
        raise malformed_request(f"LFS object {oid} ({path}) has {size} bytes, not {value['size']}")
    return trees.make_lfs_entry(oid, size)


def _commit_draft(ask: ApiRequest, branch: str, draft: Draft) -> Response:
    card = ask.hub.history.card_after(draft.changes)
    with ask.hub.database.writing() as db:
        repo = ask.repo(db)
        oid = ask.hub.history.commit(db, repo, branch, draft, card)
    url = f"{ask.base}/{repo.id.page}/commit/{oid}"
    return JSONResponse({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
