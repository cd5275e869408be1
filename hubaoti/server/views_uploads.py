"""The road of a file into a repo: ask how, send it by LFS or Xet."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from hubaoti.server import auth, repos, trees, validation
from hubaoti.server.errors import ServerError, disk_full, malformed_request
from hubaoti.server.request import ApiRequest, Body, read_bounded, read_whole_body
from hubaoti.server.uploads import is_large
from hubaoti.server.xet import MAX_SHARD, MAX_XORB, BadXet

_XET_ERRAND = "xet"


def preupload(ask: ApiRequest, body: Body) -> Response:
    """Which files are sent apart, and which ones inside their commit."""
    ask.refuse_pr()
    branch = validation.check_ref_name(ask.word("revision"), "heads")
    with ask.hub.database.reading() as db:
        repo = ask.repo(db)
        tree = ask.hub.history.tree(db, repo, repos.find_head(db, repo, branch))
    files = [
        _choose_upload_mode(validation.check_item(entry), tree)
        for entry in validation.check_list(body, "files")
    ]
    return JSONResponse({"files": files})


def _choose_upload_mode(entry: dict[str, Any], tree: trees.Tree) -> dict[str, Any]:
    path, size = (
        validation.check_file_path(entry.get("path")),
        validation.check_size(entry.get("size")),
    )
    sample = validation.decode_base64(entry.get("sample") or "", 65536)
    mode = "lfs" if is_large(path, size, sample) else "regular"
    answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
    return answer | ({"oid": tree[path].etag} if path in tree else {})


def offer_lfs_batch(ask: ApiRequest, body: Body) -> Response:
    """Where to send objects that are not here yet; git's own downloads are not served."""
    if body.get("operation") != "upload":
        raise malformed_request("This endpoint's LFS takes uploads only")
    with ask.hub.database.reading() as db:
        ask.repo(db)
    objects = [
        _offer_lfs_object(ask, validation.check_item(entry))
        for entry in validation.check_list(body, "objects")
    ]
    answer = {"transfer": "basic", "objects": objects}
    return JSONResponse(answer, media_type="application/vnd.git-lfs+json")


def _offer_lfs_object(ask: ApiRequest, entry: dict[str, Any]) -> dict[str, Any]:
    oid, size = validation.check_digest(entry.get("oid")), validation.check_size(entry.get("size"))
    answer: dict[str, Any] = {"oid": oid, "size": size}
    if ask.hub.objects.size(oid) is None:
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
    if size > ask.hub.objects.free():
        raise disk_full()
    with ask.hub.objects.receive() as incoming:
        async for chunk in read_bounded(ask.request, size):
            await run_in_threadpool(incoming.write, chunk)
        await run_in_threadpool(incoming.keep, oid)
    return Response()


def issue_xet_token(ask: ApiRequest) -> Response:
    """Where hf_xet sends its uploads, and the token that it sends with them."""
    ask.refuse_pr()
    with ask.hub.database.reading() as db:
        repos.find_head(db, ask.repo(db), validation.check_ref_name(ask.word("revision"), "heads"))
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
    if ask.word("epoch") != ask.hub.epoch:
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
        try:
            new = await run_in_threadpool(ask.hub.ingest.keep_xorb, name, incoming)
        except BadXet as error:
            raise malformed_request(str(error)) from None
    return JSONResponse({"was_inserted": new})


async def post_shard(ask: ApiRequest) -> Response:
    """Take a shard, and put its files together."""
    shard = await read_whole_body(ask.request, MAX_SHARD)
    try:
        await run_in_threadpool(ask.hub.ingest.assemble, shard)
    except BadXet as error:
        raise malformed_request(str(error)) from None
    return JSONResponse({"result": 1})
