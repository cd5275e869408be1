"""Repos: create, delete, move, settings, one's description, the list of all."""

from __future__ import annotations

from sqlite3 import Connection

from starlette.responses import JSONResponse, PlainTextResponse, Response

from hubaoti.server import repos, serializers, trees, validation
from hubaoti.server.errors import ServerError, malformed_request
from hubaoti.server.listing import Query, list_page
from hubaoti.server.repos import Repo
from hubaoti.server.request import ApiRequest, Body
from hubaoti.server.serializers import Json
from hubaoti.server.uploads import LFS_SUFFIXES
from hubaoti.server.validation import RepoId

_SDKS = ("docker", "gradio", "static", "streamlit")


def view_create(ask: ApiRequest, body: Body) -> Response:
    """Make a repo with its first commit; 409 says where the one of this name is."""
    repo_id = _read_repo_id(ask, body)
    url = f"{ask.base}/{repo_id.page}"
    private = bool(_read_visibility(body))
    changes = _make_first_files(ask, repo_id, body)
    with ask.hub.database.writing() as db:
        if repos.find(db, repo_id):
            raise ServerError(
                409, f"You already created this {repo_id.kind} repo", more={"url": url}
            )
        repos.create_repo(db, repo_id, private)
        ask.hub.history.begin(db, ask.repo(db, repo_id), changes)
    return JSONResponse({"url": url, "name": repo_id.full_name, "id": repo_id.full_name})


def _read_repo_id(ask: ApiRequest, body: Body) -> RepoId:
    name, owner = body.get("name"), body.get("organization")
    full = f"{owner}/{name}" if owner and isinstance(name, str) else name
    return validation.parse_repo_id(body.get("type") or "model", full, ask.hub.user)


def _read_visibility(body: Body) -> bool | None:
    """What a body says about who may read; None when it says nothing."""
    visibility = body.get("visibility", body.get("private"))
    meanings = {"private": True, "public": False, True: True, False: False, None: None}
    if not isinstance(visibility, str | bool | None) or visibility not in meanings:
        raise malformed_request(f"Visibility must be public or private, not {visibility!r}")
    return meanings[visibility]


def _make_first_files(ask: ApiRequest, repo_id: RepoId, body: Body) -> tuple[trees.TreeChange, ...]:
    patterns = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in sorted(LFS_SUFFIXES))
    files = {".gitattributes": patterns}
    if repo_id.kind == "space":
        sdk = body.get("sdk")
        if sdk not in _SDKS:
            raise malformed_request(f"A Space's sdk is one of {', '.join(_SDKS)}, not {sdk!r}")
        files["README.md"] = f"---\ntitle: {repo_id.name}\nsdk: {sdk}\n---\n"
    return tuple(_store_file(ask, path, content.encode()) for path, content in files.items())


def _store_file(ask: ApiRequest, path: str, content: bytes) -> trees.Put:
    return trees.Put(path, trees.make_regular_entry(content, ask.hub.objects.put(content)))


def view_delete(ask: ApiRequest, body: Body) -> Response:
    """Delete a repo with its refs and commits; 404 where there is none."""
    with ask.hub.database.writing() as db:
        repos.delete_repo(db, ask.repo(db, _read_repo_id(ask, body)))
    return PlainTextResponse("OK")


def view_move(ask: ApiRequest, body: Body) -> Response:
    """Give a repo another name; the old one is free again."""
    kind = body.get("type") or "model"
    old, new = (
        validation.parse_repo_id(kind, body.get(key), ask.hub.user)
        for key in ("fromRepo", "toRepo")
    )
    with ask.hub.database.writing() as db:
        repos.move_repo(db, ask.repo(db, old), new)
    return JSONResponse({"url": f"{ask.base}/{new.page}"})


def update_settings(ask: ApiRequest, body: Body) -> Response:
    """Make a repo private or public; nothing else can be set."""
    private = _read_visibility(body)
    if body.get("gated"):
        raise malformed_request("Gated repos are not supported by this endpoint")
    with ask.hub.database.writing() as db:
        repo = ask.repo(db)
        if private is not None:
            repos.set_private(db, repo, private)
        now_private = repo.private if private is None else private
    return JSONResponse({"private": now_private, "gated": False})


def view_repo(ask: ApiRequest) -> Response:
    """All about a repo, at a revision or at its main branch."""
    query = ask.request.query_params
    revision = ask.word("revision") if "revision" in ask.request.path_params else "main"
    with ask.hub.database.reading() as db:
        repo = ask.repo(db)
        oid = repos.resolve(db, repo, revision)
        head, tree = ask.hub.history.revision(db, repo, oid), ask.hub.history.tree(db, repo, oid)
    facts = serializers.serialize_repo(repo, head) | serializers.serialize_files(
        tree, blobs=ask.flag("blobs")
    )
    return JSONResponse(serializers.choose_properties(facts, expand=set(query.getlist("expand"))))


def search(ask: ApiRequest) -> Response:
    """The list of repos of a kind: filtered, sorted, in pages."""
    kind = ask.request.path_params["kind"]
    query = Query.parse(ask.request.query_params)
    with ask.hub.database.reading() as db:
        found = [
            _serialize_head(ask, db, repo)
            for repo in _list_visible(ask, db, validation.KINDS[kind])
        ]
        page, following = list_page(found, query)
        if query.wants_files:
            page = [
                facts | _serialize_repo_files(ask, db, validation.KINDS[kind], facts)
                for facts in page
            ]
    headers = ask.next_page(f"/api/{kind}", cursor=following) if following is not None else None
    return JSONResponse([query.shown(facts) for facts in page], headers=headers)


def _list_visible(ask: ApiRequest, db: Connection, kind: str) -> list[Repo]:
    return [repo for repo in repos.list_repos(db, kind) if ask.trusted or not repo.private]


def _serialize_head(ask: ApiRequest, db: Connection, repo: Repo) -> Json:
    return serializers.serialize_repo(
        repo, ask.hub.history.revision(db, repo, repos.find_head(db, repo, "main"))
    )


def _serialize_repo_files(ask: ApiRequest, db: Connection, kind: str, facts: Json) -> Json:
    repo = ask.repo(db, validation.parse_repo_id(kind, facts["id"], ask.hub.user))
    return serializers.serialize_files(ask.hub.history.tree(db, repo, facts["sha"]))


def view_storage(ask: ApiRequest) -> Response:
    """What takes how much room: all repos, or those of one owner."""
    owner = ask.word("owner") if "owner" in ask.request.path_params else None
    with ask.hub.database.reading() as db:
        found = [repo for kind in validation.KINDS.values() for repo in repos.list_repos(db, kind)]
        stored = [
            _serialize_storage(ask, db, repo) for repo in found if owner in {None, repo.id.owner}
        ]
    total = sum(repo["storage"] for repo in stored) or 1
    return JSONResponse(
        [repo | {"storagePercent": 100 * repo["storage"] / total} for repo in stored]
    )


def _serialize_storage(ask: ApiRequest, db: Connection, repo: Repo) -> Json:
    head = _serialize_head(ask, db, repo)
    return {
        "id": repo.id.full_name,
        "type": repo.id.kind,
        "updatedAt": head["lastModified"],
        "visibility": "private" if repo.private else "public",
        "storage": serializers.count_storage(ask.hub.history.tree(db, repo, head["sha"])),
    }


def check_auth(ask: ApiRequest) -> Response:
    """Whether the repo is there, for this client."""
    with ask.hub.database.reading() as db:
        ask.repo(db)
    return PlainTextResponse("OK")
