"""The road of a file into a repo: ask how, send it by LFS or Xet."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from hubaoti.server import access, repos, trees, words
from hubaoti.server.ask import Ask, Body, bounded, whole_body
from hubaoti.server.problems import Problem, disk_full, malformed
from hubaoti.server.uploads import is_large
from hubaoti.server.xet import MAX_SHARD, MAX_XORB, BadXet

_XET_ERRAND = "xet"


def preupload(ask: Ask, body: Body) -> Response:
    """Which files are sent apart, and which ones inside their commit."""
    ask.refuse_pr()
    branch = words.ref_name(ask.word("revision"), "heads")
    with ask.hub.database.reading() as db:
        repo = ask.repo(db)
        tree = ask.hub.history.tree(db, repo, repos.head(db, repo, branch))
    files = [_upload_mode(words.item(said), tree) for said in words.items(body, "files")]
    return JSONResponse({"files": files})


def _upload_mode(said: dict[str, Any], tree: trees.Tree) -> dict[str, Any]:
    path, size = words.file_path(said.get("path")), words.size(said.get("size"))
    sample = words.base64_bytes(said.get("sample") or "", 65536)
    mode = "lfs" if is_large(path, size, sample) else "regular"
    answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
    return answer | ({"oid": tree[path].etag} if path in tree else {})


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


def demand_lfs(ask: Ask) -> None:
    """403 unless we signed the URL, size included: the client sends no token here."""
    oid, query = words.digest(ask.word("oid")), ask.request.query_params
    errand = f"lfs {oid} {query.get('size', '')}"
    if not ask.hub.guard.honours(errand, query.get("signature", "")):
        raise Problem(403, "The upload's URL is not signed by this endpoint, or has expired")


async def lfs_put(ask: Ask) -> Response:
    """Take an object of the size that we signed."""
    oid, size = words.digest(ask.word("oid")), int(ask.request.query_params["size"])
    if size > ask.hub.objects.free():
        raise disk_full()
    with ask.hub.objects.receive() as incoming:
        async for chunk in bounded(ask.request, size):
            await run_in_threadpool(incoming.write, chunk)
        await run_in_threadpool(incoming.keep, oid)
    return Response()


def xet_token(ask: Ask) -> Response:
    """Where hf_xet sends its uploads, and the token that it sends with them."""
    ask.refuse_pr()
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


def demand_xet(ask: Ask) -> None:
    """404 for another root's URL, 401 unless we signed the token."""
    if ask.word("epoch") != ask.hub.epoch:
        raise Problem(404, "No such Xet store; ask for a new write token")
    token = access.bearer(ask.request.headers.get("authorization"))
    if not ask.hub.guard.honours(_XET_ERRAND, token):
        raise Problem(401, "The Xet token is not signed by this endpoint, or has expired")


async def xorb_post(ask: Ask) -> Response:
    """Take a xorb."""
    name = words.digest(ask.word("hash"))
    with ask.hub.objects.receive() as incoming:
        async for chunk in bounded(ask.request, MAX_XORB):
            await run_in_threadpool(incoming.write, chunk)
        try:
            new = await run_in_threadpool(ask.hub.ingest.keep_xorb, name, incoming)
        except BadXet as error:
            raise malformed(str(error)) from None
    return JSONResponse({"was_inserted": new})


async def shard_post(ask: Ask) -> Response:
    """Take a shard, and put its files together."""
    shard = await whole_body(ask.request, MAX_SHARD)
    try:
        await run_in_threadpool(ask.hub.ingest.assemble, shard)
    except BadXet as error:
        raise malformed(str(error)) from None
    return JSONResponse({"result": 1})
