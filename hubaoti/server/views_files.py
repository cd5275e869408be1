"""Reading files: trees, paths, contents."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qs, quote

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from hubaoti.server import repos, serializers, validation
from hubaoti.server.errors import (
    ServerError,
    entry_not_found,
    entry_removed,
    malformed_request,
)
from hubaoti.server.fetch import HOLD
from hubaoti.server.repos import Repo
from hubaoti.server.request import ApiRequest
from hubaoti.server.serializers import Json
from hubaoti.server.trees import TreeEntry

_PAGE = 1000
_PATHS = 10_000
_BYTES = "application/octet-stream"
_RANGE = re.compile(r"bytes=\s*(\d+-\d*|-\d+)(\s*,\s*(\d+-\d*|-\d+))*\s*")


class _File(FileResponse):
    # With Starlette's 64 KiB a download costs a third of its speed.
    chunk_size = 2**20


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A file, and where it was asked for."""

    repo: Repo
    oid: str
    path: str
    entry: TreeEntry


class _Paths(msgspec.Struct):
    paths: list[str]
    expand: bool = False


def view_tree(ask: ApiRequest) -> Response:
    """A folder's files and folders, or all that lie below it, in pages."""
    path = ask.word("path").strip("/") if "path" in ask.request.path_params else ""
    prefix = f"{validation.check_folder_path(path)}/" if path else ""
    oid, items = _list_items(ask, ask.word("revision"), ask.flag("expand"))
    if path and items.get(path, {}).get("type") != "directory":
        raise entry_not_found(path, oid)
    after = ask.request.query_params.get("cursor", "")
    found = sorted(item for item in items if item.startswith(prefix) and item > after)
    if not ask.flag("recursive"):
        found = [item for item in found if "/" not in item.removeprefix(prefix)]
    headers = {"X-Repo-Commit": oid}
    if len(found) > _PAGE:
        kind = ask.request.path_params["kind"]
        here = f"/api/{kind}/{ask.repo_id.full_name}/tree/{oid}"
        here += f"/{quote(path, safe='')}" if path else ""
        headers |= ask.next_page(here, cursor=found[_PAGE - 1])
    return JSONResponse([items[item] for item in found[:_PAGE]], headers=headers)


def _list_items(ask: ApiRequest, revision: str, expand: bool) -> tuple[str, dict[str, Json]]:
    with ask.hub.database.reading() as db:
        repo = ask.repo(db)
        oid = repos.resolve(db, repo, revision)
        tree = ask.hub.history.tree(db, repo, oid)
        since = {entry.since for entry in tree.values()} if expand else set()
        revisions = {each: ask.hub.history.revision(db, repo, each) for each in since}
    return oid, serializers.serialize_tree(tree, revisions)


def view_paths(ask: ApiRequest, body: bytes) -> Response:
    """What some paths are; those that do not exist are left out."""
    wanted, expand = _read_wanted_paths(ask.request.headers.get("content-type", ""), body)
    _, items = _list_items(ask, ask.word("revision"), expand)
    found = dict.fromkeys(path.strip("/") for path in wanted)
    return JSONResponse([items[path] for path in found if path in items])


def _read_wanted_paths(media: str, body: bytes) -> tuple[list[str], bool]:
    """The paths of a form or of a JSON body, and whether their last commits are asked for."""
    if "json" in media:
        fields = validation.parse_json_fields(body, _Paths)
        if len(fields.paths) > _PATHS:
            raise malformed_request(f"The body has more than {_PATHS} paths")
        return [validation.check_text(path, "a path") for path in fields.paths], fields.expand
    try:
        form = parse_qs(body.decode(), max_num_fields=_PATHS)
    except ValueError:
        raise malformed_request("The body is not a form of at most 10000 fields") from None
    return form.get("paths", []), validation.is_set(form.get("expand", [""])[-1])


async def view_content(ask: ApiRequest) -> Response:
    """A file's bytes, or the part that `Range` asks for; fetched first where upstream has them."""
    await ask.bring("tree")
    wanted = await run_in_threadpool(_find_file, ask)
    if ask.request.method == "GET":
        ask.hub.metrics.hit(wanted.repo.row)
    answer = await run_in_threadpool(_answer_file, ask, wanted)
    return answer or await _fetch(ask, wanted)


def _find_file(ask: ApiRequest) -> _Wanted:
    """The file that is asked for, in the commit that its revision names."""
    path = validation.check_file_path(ask.word("path"))
    with ask.hub.database.reading() as db:
        repo = ask.repo(db)
        oid = repos.resolve(db, repo, ask.word("revision"))
        entry = ask.hub.history.tree(db, repo, oid).get(path)
    if entry is None:
        raise entry_not_found(path, oid)
    return _Wanted(repo, oid, path, entry)


def _answer_file(ask: ApiRequest, file: _Wanted) -> Response | None:
    """The answer that needs nothing of upstream; None where the file has to be fetched."""
    headers = _make_headers(file.oid, file.entry)
    wanted_tags, known_tags = _read_tags(ask, "if-match"), _read_tags(ask, "if-none-match")
    if wanted_tags is not None and wanted_tags.isdisjoint({"*", headers["ETag"]}):
        raise ServerError(412, f"{file.path} of {file.oid} is not what If-Match asks for")
    if known_tags is not None and _matches_etag(known_tags, file.entry):
        return Response(status_code=304, headers=headers)
    wanted = ask.request.headers.get("range")
    if wanted is not None and (len(wanted) > 1000 or not _RANGE.fullmatch(wanted)):
        raise malformed_request(f"Not a range of bytes: {wanted[:100]!r}")
    through = ask.hub.through
    if through is not None and file.repo.origin == through.upstream.url:
        sha256 = through.find_object(file.entry)
        if sha256 is not None and ask.request.method == "GET":
            through.count("hits")
        if sha256 is None and ask.request.method == "HEAD":
            length = {"Content-Length": str(file.entry.size), "Accept-Ranges": "bytes"}
            return Response(headers=headers | length, media_type=_BYTES)
    else:
        sha256 = ask.hub.find_object(file.entry)
        if sha256 is None:
            raise entry_removed(file.path, file.oid)
    return None if sha256 is None else _send(ask, file, sha256)


def _send(ask: ApiRequest, file: _Wanted, sha256: str) -> Response:
    return _File(
        ask.hub.objects.path(sha256),
        headers=_make_headers(file.oid, file.entry),
        filename=file.path.rpartition("/")[2],
        content_disposition_type="inline",
        media_type=_BYTES,
    )


async def _fetch(ask: ApiRequest, file: _Wanted) -> Response:
    """A file that comes from upstream: whole, or, where that takes long, while it comes.

    Then a range is not heeded, as a server may: the client has all of it, or an error.
    """
    through = ask.hub.through
    assert through is not None, "only upstream's files are fetched"
    fetch = through.fetch(file.repo, file.oid, file.path, file.entry)
    if sha256 := await fetch.wait(HOLD):
        return _send(ask, file, sha256)
    headers = _make_headers(file.oid, file.entry) | {"Content-Length": str(file.entry.size)}
    return StreamingResponse(fetch.follow(), headers=headers, media_type=_BYTES)


def _make_headers(oid: str, entry: TreeEntry) -> dict[str, str]:
    headers = {
        "X-Repo-Commit": oid,
        "ETag": f'"{entry.etag}"',
        "Cache-Control": "no-cache",
        # A file is not a page: whatever was uploaded, no browser runs it.
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox; default-src 'none'",
    }
    if entry.lfs:
        headers |= {"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
    return headers


def _read_tags(ask: ApiRequest, field: str) -> set[str] | None:
    """The tags of a precondition, which may come in several fields; None where there is none."""
    values = ask.request.headers.getlist(field)
    return {tag.strip() for value in values for tag in value.split(",")} if values else None


def _matches_etag(tags: set[str], entry: TreeEntry) -> bool:
    """Whether one of the tags, weak ones too, is a file's."""
    return entry.etag in {tag.removeprefix("W/").strip('"') for tag in tags} or "*" in tags
