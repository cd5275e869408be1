"""Branches, tags, the log, squashing."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from hubaoti.server import repos, serializers, validation
from hubaoti.server.repos import Ref
from hubaoti.server.request import ApiRequest, Body

_PAGE = 500


def view_refs(ask: ApiRequest) -> Response:
    """Answer with every branch and tag of a repo, and its commit."""
    with ask.hub.database.reading() as db:
        found = repos.list_refs(db, ask.repo(db))
    refs = {
        key: [_serialize_ref(ref) for ref in found if ref.folder == folder]
        for key, folder in (("branches", "heads"), ("tags", "tags"))
    }
    return JSONResponse({**refs, "converts": [], "pullRequests": []})


def _serialize_ref(ref: Ref) -> dict[str, str]:
    full = f"refs/{ref.folder}/{ref.name}"
    return {"name": ref.name, "ref": full, "targetCommit": ref.oid}


def create_branch(ask: ApiRequest, body: Body) -> Response:
    """Make a branch, from a revision (`startingPoint`) or from main; 409 if it is there."""
    name = validation.check_ref_name(ask.word("branch"), "heads")
    start = validation.check_text(body.get("startingPoint") or "main", "startingPoint")
    return _create_ref(ask, "heads", name, start)


def create_tag(ask: ApiRequest, body: Body) -> Response:
    """Make a tag on a revision; 409 if it is there."""
    name = validation.check_ref_name(body.get("tag"), "tags")
    message = validation.check_text(body.get("message") or "", "the tag's message", 65536)
    return _create_ref(ask, "tags", name, ask.word("revision"), message)


def _create_ref(
    ask: ApiRequest, folder: str, name: str, revision: str, message: str = ""
) -> Response:
    with ask.hub.database.writing() as db:
        repo = ask.repo(db)
        ref = Ref(folder, name, repos.resolve(db, repo, revision))
        repos.add_ref(db, repo, ref, message)
    return JSONResponse(_serialize_ref(ref))


def delete_branch(ask: ApiRequest, body: Body) -> Response:
    """Delete a branch, but not main; its commits stay."""
    return _remove_ref(ask, "heads", validation.check_ref_name(ask.word("branch"), "heads"))


def delete_tag(ask: ApiRequest, body: Body) -> Response:
    """Delete a tag; the commit that it names stays."""
    return _remove_ref(ask, "tags", validation.check_ref_name(ask.word("revision"), "tags"))


def _remove_ref(ask: ApiRequest, folder: str, name: str) -> Response:
    with ask.hub.database.writing() as db:
        repos.delete_ref(db, ask.repo(db), folder, name)
    return JSONResponse({})


def view_log(ask: ApiRequest) -> Response:
    """A revision's commits, newest first; the next page starts at a commit, so it never shifts."""
    formatted = "formatted" in ask.request.query_params.getlist("expand[]")
    with ask.hub.database.reading() as db:
        repo = ask.repo(db)
        oid = repos.resolve(db, repo, ask.word("revision"))
        *page, last = ask.hub.history.log(db, repo, oid, _PAGE + 1)
    headers = None
    if len(page) == _PAGE:
        kind = ask.request.path_params["kind"]
        headers = ask.next_page(f"/api/{kind}/{repo.id.full_name}/commits/{last.oid}")
    else:
        page.append(last)
    commits = [
        serializers.serialize_commit(commit, ask.hub.user, formatted=formatted) for commit in page
    ]
    return JSONResponse(commits, headers=headers)


def squash(ask: ApiRequest, body: Body) -> Response:
    """One commit in place of a branch's history."""
    branch = validation.check_ref_name(ask.word("branch"), "heads")
    title = validation.check_text(
        body.get("message") or f"Super-squash branch {branch!r}", "the message"
    )
    with ask.hub.database.writing() as db:
        oid = ask.hub.history.squash(db, ask.repo(db), branch, title)
    return JSONResponse({"commitOid": oid})
