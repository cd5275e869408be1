"""Repos: create, delete, move, settings, one's description, the list of all."""

from __future__ import annotations

from sqlite3 import Connection

from starlette.responses import JSONResponse, PlainTextResponse, Response

from hubaoti.server import repos, shapes, trees, words
from hubaoti.server.ask import Ask, Body
from hubaoti.server.listing import Query, page_of
from hubaoti.server.problems import Problem, malformed
from hubaoti.server.repos import Repo
from hubaoti.server.shapes import Json
from hubaoti.server.uploads import LFS_SUFFIXES
from hubaoti.server.words import RepoId

_SDKS = ("docker", "gradio", "static", "streamlit")


def create(ask: Ask, body: Body) -> Response:
    """Make a repo with its first commit; 409 says where the one of this name is."""
    repo_id = _named(ask, body)
    url = f"{ask.base}/{repo_id.page}"
    private = bool(_private(body))
    changes = _first_files(ask, repo_id, body)
    with ask.hub.database.writing() as db:
        if repos.find(db, repo_id):
            raise Problem(409, f"You already created this {repo_id.kind} repo", more={"url": url})
        repos.create(db, repo_id, private)
        ask.hub.history.begin(db, ask.repo(db, repo_id), changes)
    return JSONResponse({"url": url, "name": repo_id.full_name, "id": repo_id.full_name})


def _named(ask: Ask, body: Body) -> RepoId:
    name, owner = body.get("name"), body.get("organization")
    full = f"{owner}/{name}" if owner and isinstance(name, str) else name
    return words.repo_id(body.get("type") or "model", full, ask.hub.user)


def _private(body: Body) -> bool | None:
    """What a body says about who may read; None when it says nothing."""
    said = body.get("visibility", body.get("private"))
    meanings = {"private": True, "public": False, True: True, False: False, None: None}
    if not isinstance(said, str | bool | None) or said not in meanings:
        raise malformed(f"Visibility must be public or private, not {said!r}")
    return meanings[said]


def _first_files(ask: Ask, repo_id: RepoId, body: Body) -> tuple[trees.Change, ...]:
    patterns = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in sorted(LFS_SUFFIXES))
    files = {".gitattributes": patterns}
    if repo_id.kind == "space":
        sdk = body.get("sdk")
        if sdk not in _SDKS:
            raise malformed(f"A Space's sdk is one of {', '.join(_SDKS)}, not {sdk!r}")
        files["README.md"] = f"---\ntitle: {repo_id.name}\nsdk: {sdk}\n---\n"
    return tuple(_put(ask, path, content.encode()) for path, content in files.items())


def _put(ask: Ask, path: str, content: bytes) -> trees.Put:
    return trees.Put(path, trees.regular(content, ask.hub.objects.put(content)))


def delete(ask: Ask, body: Body) -> Response:
    """Delete a repo."""
    with ask.hub.database.writing() as db:
        repos.delete(db, ask.repo(db, _named(ask, body)))
    return PlainTextResponse("OK")


def move(ask: Ask, body: Body) -> Response:
    """Give a repo another name; the old one is free again."""
    kind = body.get("type") or "model"
    old, new = (words.repo_id(kind, body.get(key), ask.hub.user) for key in ("fromRepo", "toRepo"))
    with ask.hub.database.writing() as db:
        repos.move(db, ask.repo(db, old), new)
    return JSONResponse({"url": f"{ask.base}/{new.page}"})


def settings(ask: Ask, body: Body) -> Response:
    """Make a repo private or public; nothing else can be set."""
    private = _private(body)
    if body.get("gated"):
        raise malformed("Gated repos are not supported by this endpoint")
    with ask.hub.database.writing() as db:
        repo = ask.repo(db)
        if private is not None:
            repos.set_private(db, repo, private)
        now_private = repo.private if private is None else private
    return JSONResponse({"private": now_private, "gated": False})


def describe(ask: Ask) -> Response:
    """All about a repo, at a revision or at its main branch."""
    query = ask.request.query_params
    revision = ask.word("revision") if "revision" in ask.request.path_params else "main"
    with ask.hub.database.reading() as db:
        repo = ask.repo(db)
        oid = repos.resolve(db, repo, revision)
        head, tree = ask.hub.history.revision(db, repo, oid), ask.hub.history.tree(db, repo, oid)
    said = shapes.repo(repo, head) | shapes.files(tree, blobs=ask.flag("blobs"))
    return JSONResponse(shapes.chosen(said, expand=set(query.getlist("expand"))))


def search(ask: Ask) -> Response:
    """The list of repos of a kind: filtered, sorted, in pages."""
    kind = ask.request.path_params["kind"]
    query = Query.parse(ask.request.query_params)
    with ask.hub.database.reading() as db:
        found = [_head(ask, db, repo) for repo in _visible(ask, db, words.KINDS[kind])]
        page, following = page_of(found, query)
        if query.wants_files:
            page = [said | _files(ask, db, words.KINDS[kind], said) for said in page]
    headers = ask.next_page(f"/api/{kind}", cursor=following) if following is not None else None
    return JSONResponse([query.shown(said) for said in page], headers=headers)


def _visible(ask: Ask, db: Connection, kind: str) -> list[Repo]:
    return [repo for repo in repos.every(db, kind) if ask.trusted or not repo.private]


def _head(ask: Ask, db: Connection, repo: Repo) -> Json:
    return shapes.repo(repo, ask.hub.history.revision(db, repo, repos.head(db, repo, "main")))


def _files(ask: Ask, db: Connection, kind: str, said: Json) -> Json:
    repo = ask.repo(db, words.repo_id(kind, said["id"], ask.hub.user))
    return shapes.files(ask.hub.history.tree(db, repo, said["sha"]))


def storage(ask: Ask) -> Response:
    """What takes how much room: all repos, or those of one owner."""
    owner = ask.word("owner") if "owner" in ask.request.path_params else None
    with ask.hub.database.reading() as db:
        found = [repo for kind in words.KINDS.values() for repo in repos.every(db, kind)]
        said = [_stored(ask, db, repo) for repo in found if owner in {None, repo.id.owner}]
    total = sum(repo["storage"] for repo in said) or 1
    return JSONResponse([repo | {"storagePercent": 100 * repo["storage"] / total} for repo in said])


def _stored(ask: Ask, db: Connection, repo: Repo) -> Json:
    head = _head(ask, db, repo)
    return {
        "id": repo.id.full_name,
        "type": repo.id.kind,
        "updatedAt": head["lastModified"],
        "visibility": "private" if repo.private else "public",
        "storage": shapes.storage(ask.hub.history.tree(db, repo, head["sha"])),
    }


def auth_check(ask: Ask) -> Response:
    """Whether the repo is there, for this client."""
    with ask.hub.database.reading() as db:
        ask.repo(db)
    return PlainTextResponse("OK")
