"""The road of files into a repo: ask how, send them by LFS or Xet, commit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hubaoti.server import auth, repos, trees, validation
from hubaoti.server.errors import ServerError, malformed_request, too_large
from hubaoti.server.history import Draft
from hubaoti.server.request import ApiRequest, Body, read_bounded, read_whole_body
from hubaoti.server.xet import MAX_SHARD, MAX_XORB

_XET_ERRAND = "xet"

MAX_REGULAR = 16 * 2**20
"""The bytes at most of a file that is sent inside its commit."""

_MAX_LINE = MAX_REGULAR * 4 // 3 + 65536
_MAX_COMMIT = 2**30
_MAX_CHANGES = 100_000


_Scalar = str | int | float | bool | None


class _Value(msgspec.Struct):
    """All that a line may say, of whatever kind it is."""

    summary: _Scalar = None
    description: _Scalar = None
    parentCommit: _Scalar = None  # as the Hub calls it
    path: _Scalar = None
    content: _Scalar = None
    encoding: _Scalar = "utf-8"
    algo: _Scalar = "sha256"
    oid: _Scalar = None
    size: _Scalar | msgspec.UnsetType = msgspec.UNSET


class _Line(msgspec.Struct):
    key: str
    value: _Value


def preupload(ask: ApiRequest, body: Body) -> Response:
    """Which files are sent apart, and which ones inside their commit."""
    ask.refuse_pr()
    branch = validation.check_ref_name(ask.word("revision"), "heads")
    with ask.hub.database.reading() as db:
        repo = ask.own_repo(db)
        tree = ask.hub.history.tree(db, repo, repos.find_head(db, repo, branch))
    files = [*validation.iterate_objects(body, "files")]
    ask.hub.objects.require_room(sum(_count_new_bytes(entry, tree) for entry in files))
    return JSONResponse({"files": [_choose_upload_mode(entry, tree) for entry in files]})


def _count_new_bytes(entry: dict[str, Any], tree: trees.Tree) -> int:
    """A file's bytes; none where the branch has one of its path and size, for it may be that."""
    size = validation.check_size(entry.get("size"))
    old = tree.get(validation.check_file_path(entry.get("path")))
    return 0 if old and old.size == size else size


def _choose_upload_mode(entry: dict[str, Any], tree: trees.Tree) -> dict[str, Any]:
    path = validation.check_file_path(entry.get("path"))
    size = validation.check_size(entry.get("size"))
    sample = validation.decode_base64(entry.get("sample") or "", 65536)
    mode = "lfs" if trees.is_large(path, size, sample) else "regular"
    answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
    return answer | ({"oid": tree[path].etag} if path in tree else {})


def offer_lfs_batch(ask: ApiRequest, body: Body) -> Response:
    """Where to send objects that are not here yet; git's own downloads are not served."""
    if body.get("operation") != "upload":
        raise malformed_request("This endpoint's LFS takes uploads only")
    with ask.hub.database.reading() as db:
        ask.own_repo(db)
    objects = validation.iterate_objects(body, "objects")
    answer = {"transfer": "basic", "objects": [_offer_lfs_object(ask, each) for each in objects]}
    return JSONResponse(answer, media_type="application/vnd.git-lfs+json")


def _offer_lfs_object(ask: ApiRequest, entry: dict[str, Any]) -> dict[str, Any]:
    oid, size = validation.check_digest(entry.get("oid")), validation.check_size(entry.get("size"))
    answer: dict[str, Any] = {"oid": oid, "size": size}
    if ask.hub.objects.touch(oid) is None:
        signature = ask.hub.guard.sign(f"lfs {oid} {size}")
        href = f"{ask.base}/_lfs/{oid}?{urlencode({'size': size, 'signature': signature})}"
        answer["actions"] = {"upload": {"href": href, "header": {}}}
    return answer


def demand_lfs(ask: ApiRequest) -> None:
    """403 unless we signed the URL, size included: the client sends no token here."""
    oid, query = validation.check_digest(ask.word("oid")), ask.request.query_params
    errand = f"lfs {oid} {query.get('size', '')}"
    if not ask.hub.guard.honours(errand, query.get("signature", "")):
        raise ServerError(403, "The upload's URL is not signed by this endpoint, or has expired")


async def put_lfs_object(ask: ApiRequest) -> Response:
    """Take an object of the size that we signed."""
    oid, size = validation.check_digest(ask.word("oid")), int(ask.request.query_params["size"])
    with ask.hub.objects.receive(size) as incoming:
        async for chunk in read_bounded(ask.request, size):
            await run_in_threadpool(incoming.write, chunk)
        await run_in_threadpool(incoming.keep, oid)
    return Response()


def issue_xet_token(ask: ApiRequest) -> Response:
    """Where hf_xet sends its uploads, and the token that it sends with them."""
    ask.refuse_pr()
    with ask.hub.database.reading() as db:
        branch = validation.check_ref_name(ask.word("revision"), "heads")
        repos.find_head(db, ask.own_repo(db), branch)
    token = ask.hub.guard.sign(_XET_ERRAND)
    expires, url = int(token.partition(".")[0]), f"{ask.base}/_cas/{ask.hub.epoch}"
    headers = {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return JSONResponse({"casUrl": url, "exp": expires, "accessToken": token}, headers=headers)


def demand_xet(ask: ApiRequest) -> None:
    """404 for another root's URL, 401 unless we signed the token."""
    if not ask.hub.knows_epoch(ask.word("epoch")):
        raise ServerError(404, "No such Xet store; ask for a new write token")
    token = auth.read_bearer(ask.request.headers.get("authorization"))
    if not ask.hub.guard.honours(_XET_ERRAND, token):
        raise ServerError(401, "The Xet token is not signed by this endpoint, or has expired")


async def post_xorb(ask: ApiRequest) -> Response:
    """Store a xorb; answers whether it is new, 400 where its hash is another."""
    name = validation.check_digest(ask.word("hash"))
    with ask.hub.objects.receive() as incoming:
        async for chunk in read_bounded(ask.request, MAX_XORB):
            await run_in_threadpool(incoming.write, chunk)
        new = await run_in_threadpool(ask.hub.ingest.keep_xorb, name, incoming)
    return JSONResponse({"was_inserted": new})


async def post_shard(ask: ApiRequest) -> Response:
    """Take a shard, and put its files together."""
    shard = await read_whole_body(ask.request, MAX_SHARD)
    await run_in_threadpool(ask.hub.ingest.assemble, shard)
    return JSONResponse({"result": 1})


async def view_commit(ask: ApiRequest) -> Response:
    """Commit the changes of an NDJSON body, all or none."""
    ask.refuse_pr()
    branch = validation.check_ref_name(ask.word("revision"), "heads")
    await run_in_threadpool(_require_branch, ask, branch)
    header: _Value | None = None
    changes: list[trees.TreeChange] = []
    async for text in _read_lines(ask.request):
        line = validation.parse_json_fields(text, _Line)
        if header is None:
            if line.key != "header":
                raise malformed_request("The commit's first line must be its header")
            header = line.value
        elif len(changes) == _MAX_CHANGES:
            raise ServerError(413, f"A commit has at most {_MAX_CHANGES} changes")
        else:
            changes.append(await run_in_threadpool(_read_change, ask, line.key, line.value))
    if header is None:
        raise malformed_request("The commit has no header")
    return await run_in_threadpool(_commit_draft, ask, branch, _make_draft(header, changes))


def _require_branch(ask: ApiRequest, branch: str) -> None:
    with ask.hub.database.reading() as db:
        repos.find_head(db, ask.own_repo(db), branch)


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


def _make_draft(header: _Value, changes: list[trees.TreeChange]) -> Draft:
    parent = validation.check_text(header.parentCommit or "", "parentCommit")
    if parent and not validation.is_commit(parent):
        raise malformed_request(f"parentCommit is not a commit: {parent[:100]!r}")
    return Draft(
        title=validation.check_text(header.summary, "the summary", 65536) or "Commit",
        message=validation.check_text(header.description or "", "the description", 2**20),
        parent=parent,
        changes=tuple(changes),
    )


def _read_change(ask: ApiRequest, key: str, value: _Value) -> trees.TreeChange:
    """One change; a file's bytes are stored before the commit that names them."""
    if key == "deletedFile":
        return trees.Delete(validation.check_file_path(value.path))
    if key == "deletedFolder":
        return trees.Delete(validation.check_folder_path(value.path), folder=True)
    path = validation.check_file_path(value.path)
    if key == "file":
        return trees.Put(path, _store_regular(ask, value))
    if key == "lfsFile":
        return trees.Put(path, _find_lfs_entry(ask, path, value))
    raise malformed_request(f"Unknown kind of change: {key[:100]!r}")


def _store_regular(ask: ApiRequest, value: _Value) -> trees.TreeEntry:
    if value.encoding == "base64":
        content = validation.decode_base64(value.content, _MAX_LINE)
    elif value.encoding == "utf-8":
        content = validation.check_text(value.content, "content", _MAX_LINE).encode()
    else:
        raise malformed_request(f"Unknown encoding: {str(value.encoding)[:100]!r}")
    if len(content) > MAX_REGULAR:
        raise too_large("A file inside a commit", MAX_REGULAR)
    return trees.make_regular_entry(content, ask.hub.objects.put(content))


def _find_lfs_entry(ask: ApiRequest, path: str, value: _Value) -> trees.TreeEntry:
    oid = validation.check_digest(value.oid)
    size = ask.hub.objects.touch(oid)
    if value.algo != "sha256":
        raise malformed_request("LFS objects are named by SHA-256")
    if size is None:
        raise malformed_request(f"LFS object {oid} ({path}) was not uploaded")
    if value.size is not msgspec.UNSET and validation.check_size(value.size) != size:
        raise malformed_request(f"LFS object {oid} ({path}) has {size} bytes, not {value.size}")
    return trees.make_lfs_entry(oid, size)


def _commit_draft(ask: ApiRequest, branch: str, draft: Draft) -> Response:
    card = ask.hub.history.card_after(draft.changes)
    with ask.hub.database.writing() as db:
        repo = ask.own_repo(db)
        oid = ask.hub.history.commit(db, repo, branch, draft, card)
    url = f"{ask.base}/{repo.id.page}/commit/{oid}"
    return JSONResponse({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
