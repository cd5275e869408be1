"""Branches, tags, the log, squashing."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from hubaoti.server import repos, shapes, words
from hubaoti.server.ask import Ask, Body
from hubaoti.server.repos import Ref

_PAGE = 500


def refs(ask: Ask) -> Response:
    """Every branch and tag."""
    with ask.hub.database.reading() as db:
        found = repos.refs(db, ask.repo(db))
    said = {
        key: [_ref(ref) for ref in found if ref.folder == folder]
        for key, folder in (("branches", "heads"), ("tags", "tags"))
    }
    return JSONResponse({**said, "converts": [], "pullRequests": []})


def _ref(ref: Ref) -> dict[str, str]:
    full = f"refs/{ref.folder}/{ref.name}"
    return {"name": ref.name, "ref": full, "targetCommit": ref.oid}


def create_branch(ask: Ask, body: Body) -> Response:
    """A new branch, from a revision (`startingPoint`) or from main."""
    name = words.ref_name(ask.word("branch"), "heads")
    start = words.text(body.get("startingPoint") or "main", "startingPoint")
    return _add(ask, "heads", name, start)


def create_tag(ask: Ask, body: Body) -> Response:
    """A new tag on a revision."""
    name = words.ref_name(body.get("tag"), "tags")
    message = words.text(body.get("message") or "", "the tag's message", 65536)
    return _add(ask, "tags", name, ask.word("revision"), message)


def _add(ask: Ask, folder: str, name: str, revision: str, message: str = "") -> Response:
    with ask.hub.database.writing() as db:
        repo = ask.repo(db)
        ref = Ref(folder, name, repos.resolve(db, repo, revision))
        repos.add_ref(db, repo, ref, message)
    return JSONResponse(_ref(ref))


def delete_branch(ask: Ask, body: Body) -> Response:
    """Delete a branch; its commits stay."""
    return _delete(ask, "heads", words.ref_name(ask.word("branch"), "heads"))


def delete_tag(ask: Ask, body: Body) -> Response:
    """Delete a tag."""
    return _delete(ask, "tags", words.ref_name(ask.word("revision"), "tags"))


def _delete(ask: Ask, folder: str, name: str) -> Response:
    with ask.hub.database.writing() as db:
        repos.delete_ref(db, ask.repo(db), folder, name)
    return JSONResponse({})


def log(ask: Ask) -> Response:
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
    said = [shapes.commit(commit, ask.hub.user, formatted=formatted) for commit in page]
    return JSONResponse(said, headers=headers)


def squash(ask: Ask, body: Body) -> Response:
    """One commit in place of a branch's history."""
    branch = words.ref_name(ask.word("branch"), "heads")
    title = words.text(body.get("message") or f"Super-squash branch {branch!r}", "the message")
    with ask.hub.database.writing() as db:
        oid = ask.hub.history.squash(db, ask.repo(db), branch, title)
    return JSONResponse({"commitOid": oid})
