"""The road of a file into a repo: ask how, send it by LFS or Xet, commit it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hubaoti.server import access, repos, trees, words
from hubaoti.server.ask import Ask, Body, bounded, whole_body
from hubaoti.server.history import Draft
from hubaoti.server.problems import Problem, disk_full, malformed, too_large
from hubaoti.server.uploads import is_large
from hubaoti.server.xet import MAX_SHARD, MAX_XORB, BadXet

MAX_REGULAR = 16 * 2**20
"""The bytes at most of a file that is sent inside its commit."""

_MAX_LINE = MAX_REGULAR * 4 // 3 + 65536
_MAX_COMMIT = 2**30
_MAX_CHANGES = 100_000
_XET_ERRAND = "xet"


def refuse_pr(ask: Ask) -> None:
    """400 to whoever asks for a pull request."""
    if ask.flag("create_pr"):
        raise malformed("Pull requests are not supported by this endpoint")


def preupload(ask: Ask, body: Body) -> Response:
    """Which files are sent apart, and which ones inside their commit."""
    refuse_pr(ask)
    branch = words.ref_name(ask.word("revision"), "heads")
    with ask.hub.database.reading() as db:
        repo = ask.repo(db)
        tree = ask.hub.history.tree(db, repo, repos.head(db, repo, branch))
    files = [_upload_mode(words.item(said), tree) for said in words.items(body, "files")]
    return JSONResponse({"files": files})


def _upload_mode(said: dict[str, Any], tree: trees.Tree) -> dict[str, Any]:
    path, size = words.file_path(said.get("path")), words.size(said.get("size"))
    sample = _decoded(said.get("sample") or "")
    mode = "lfs" if is_large(path, size, sample) else "regular"
    answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
    return answer | ({"oid": tree[path].etag} if path in tree else {})


def _decoded(said: object) -> bytes:
    try:
        return base64.b64decode(words.text(said, "base64", _MAX_LINE), validate=True)
    except binascii.Error:
        raise malformed("Not base64") from None


def lfs_batch(ask: Ask, body: Body) -> Response:
    """Where to send objects that are not here yet; git's own downloads are not served."""
    if body.get("operation") != "upload":
        raise malformed("This endpoint's LFS takes uploads only")
    with ask.hub.database.reading() as db:
        ask.repo(db)
    objects = [_lfs_object(ask, words.item(said)) for said in words.items(body, "objects")]
    answer = {"transfer": "basic", "objects": objects}
    return JSONResponse(answer, media_type="application/vnd.git-lfs+json")


def _lfs_object(ask: Ask, said: dict[str, Any]) -> dict[str, Any]:
    oid, size = words.digest(said.get("oid")), words.size(said.get("size"))
    answer: dict[str, Any] = {"oid": oid, "size": size}
    if ask.hub.objects.size(oid) is None:
        signature = ask.hub.guard.sign(f"lfs {oid} {size}")
        href = f"{ask.base}/_lfs/{oid}?{urlencode({'size': size, 'signature': signature})}"
        answer["actions"] = {"upload": {"href": href, "header": {}}}
    return answer


async def lfs_put(request: Request) -> Response:
    """Take an object; the client sends no token here, so the URL is signed, size included."""
    ask = Ask(request)
    oid, said = words.digest(ask.word("oid")), request.query_params.get("size", "")
    if not ask.hub.guard.honours(f"lfs {oid} {said}", request.query_params.get("signature", "")):
        raise Problem(403, "The upload's URL is not signed by this endpoint, or has expired")
    size = int(said)
    if size > ask.hub.objects.free():
        raise disk_full()
    with ask.hub.objects.receive() as incoming:
        async for chunk in bounded(request, size):
            await run_in_threadpool(incoming.write, chunk)
        await run_in_threadpool(incoming.keep, oid)
    return Response()


def xet_token(ask: Ask) -> Response:
    """Where hf_xet sends its uploads, and the token that it sends with them."""
    ask.demand_token()
    refuse_pr(ask)
    with ask.hub.database.reading() as db:
        repos.head(db, ask.repo(db), words.ref_name(ask.word("revision"), "heads"))
    token = ask.hub.guard.sign(_XET_ERRAND)
    expires, url = int(token.partition(".")[0]), f"{ask.base}/_cas/{ask.hub.epoch}"
    headers = {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return JSONResponse({"casUrl": url, "exp": expires, "accessToken": token}, headers=headers)


def _xet(request: Request) -> Ask:
    """A Xet upload, by the holder of a token that we signed."""
    ask = Ask(request)
    if ask.word("epoch") != ask.hub.epoch:
        raise Problem(404, "No such Xet store; ask for a new write token")
    token = access.bearer(request.headers.get("authorization"))
    if not ask.hub.guard.honours(_XET_ERRAND, token):
        raise Problem(401, "The Xet token is not signed by this endpoint, or has expired")
    return ask


async def xorb_post(request: Request) -> Response:
    """Take a xorb."""
    ask = _xet(request)
    name = words.digest(ask.word("hash"))
    with ask.hub.objects.receive() as incoming:
        async for chunk in bounded(request, MAX_XORB):
            await run_in_threadpool(incoming.write, chunk)
        try:
            new = await run_in_threadpool(ask.hub.ingest.keep_xorb, name, incoming)
        except BadXet as error:
            raise malformed(str(error)) from None
    return JSONResponse({"was_inserted": new})


async def shard_post(request: Request) -> Response:
    """Take a shard, and put its files together."""
    ask = _xet(request)
    shard = await whole_body(request, MAX_SHARD)
    try:
        await run_in_threadpool(ask.hub.ingest.assemble, shard)
    except BadXet as error:
        raise malformed(str(error)) from None
    return JSONResponse({"result": 1})


async def commit(request: Request) -> Response:
    """Commit the changes of an NDJSON body, all or none."""
    ask = Ask(request)
    ask.demand_token()
    refuse_pr(ask)
    branch = words.ref_name(ask.word("revision"), "heads")
    await run_in_threadpool(_branch_is_there, ask, branch)
    header: dict[str, Any] | None = None
    changes: list[trees.Change] = []
    async for line in _lines(request):
        said = words.json_object(line)
        value = words.item(said.get("value"))
        if header is None:
            header = _header(said.get("key"), value)
        elif len(changes) == _MAX_CHANGES:
            raise Problem(413, f"A commit has at most {_MAX_CHANGES} changes")
        else:
            changes.append(await run_in_threadpool(_change, ask, said.get("key"), value))
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
    text = words.text(said, "content", _MAX_LINE)
    content = _decoded(text) if encoding == "base64" else text.encode()
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
