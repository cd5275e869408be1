"""Who asks; repos, one and all; their branches, tags and logs."""

from __future__ import annotations

import asyncio
from sqlite3 import Connection
from urllib.parse import urlencode

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse, Response

from hubaoti.server import card, repos, serializers, trees, validation
from hubaoti.server.errors import BAD_TOKEN, ServerError, malformed_request
from hubaoti.server.listing import Query, list_page
from hubaoti.server.pull_through import PullThrough
from hubaoti.server.repos import Ref, Repo
from hubaoti.server.request import ApiRequest, Body
from hubaoti.server.serializers import Json
from hubaoti.server.validation import RepoId

_SDKS = ("docker", "gradio", "static", "streamlit")
_LOG_PAGE = 500


class _Card(msgspec.Struct):
    content: str


def whoami(ask: ApiRequest) -> Response:
    """Answer with the user, or the name of the token, that asks; 401 without one."""
    if ask.grant is None:
        raise ServerError(401, BAD_TOKEN)
    token = {"displayName": ask.grant.name, "role": ask.grant.role}
    return JSONResponse(
        {
            "type": "user",
            "id": "1",
            "name": ask.grant.name,
            "fullname": ask.grant.name,
            "email": None,
            "isPro": False,
            "orgs": [{"type": "org", "name": owner} for owner in ask.grant.owners],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def validate_yaml(ask: ApiRequest, body: bytes) -> Response:
    """Whether a README's front matter can be read; 400 with the reason when it cannot."""
    content = validation.parse_json_fields(body, _Card).content
    try:
        card.parse_card(content[: card.CARD_LIMIT])
    except card.BadCard as error:
        errors = [{"message": str(error)}]
        raise ServerError(400, str(error), more={"errors": errors, "warnings": []}) from None
    return JSONResponse({"errors": [], "warnings": []})


def view_create(ask: ApiRequest, body: Body) -> Response:
    """Make a repo with its first commit; 409 says where the one of this name is."""
    repo_id = _read_repo_id(ask, body)
    ask.require_owner(repo_id)
    url = f"{ask.base}/{repo_id.page}"
    private = bool(_read_visibility(body))
    _require_free(ask, repo_id)
    changes = _make_first_files(ask, repo_id, body)
    with ask.hub.database.writing() as db:
        if repos.find(db, repo_id) or repos.find_spelled(db, repo_id):
            raise ServerError(
                409, f"You already created this {repo_id.kind} repo", more={"url": url}
            )
        repos.create_repo(db, repo_id, private)
        ask.hub.history.begin(db, ask.repo(db, repo_id), changes)
    return JSONResponse({"url": url, "name": repo_id.full_name, "id": repo_id.full_name})


def _require_free(ask: ApiRequest, name: RepoId) -> None:
    """409 where upstream has a repo of this name, which one of ours would hide."""
    with ask.hub.database.reading() as db:
        known = repos.find(db, name)
    if ask.hub.through is not None and (known is None or known.origin):
        ask.hub.through.require_free(name)


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
    patterns = "".join(
        f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in sorted(trees.LFS_SUFFIXES)
    )
    files = {".gitattributes": patterns}
    if repo_id.kind == "space":
        sdk = body.get("sdk")
        if sdk not in _SDKS:
            raise malformed_request(f"A Space's sdk is one of {', '.join(_SDKS)}, not {sdk!r}")
        files["README.md"] = f"---\ntitle: {repo_id.name}\nsdk: {sdk}\n---\n"
    contents = {path: text.encode() for path, text in files.items()}
    return tuple(
        trees.Put(path, trees.make_regular_entry(content, ask.hub.objects.put(content)))
        for path, content in contents.items()
    )


def view_delete(ask: ApiRequest, body: Body) -> Response:
    """Delete a repo with its refs and commits; 404 where there is none."""
    with ask.hub.database.writing() as db:
        repo = ask.repo(db, _read_repo_id(ask, body))
        ask.require_owner(repo.id)
        repos.delete_repo(db, repo)
    return PlainTextResponse("OK")


def view_move(ask: ApiRequest, body: Body) -> Response:
    """Give a repo another name; the old one leads there, until a repo is made of that name."""
    kind = body.get("type") or "model"
    old, new = (
        validation.parse_repo_id(kind, body.get(key), ask.hub.user)
        for key in ("fromRepo", "toRepo")
    )
    ask.require_owner(new)
    _require_free(ask, new)
    with ask.hub.database.writing() as db:
        repos.move_repo(db, ask.own_repo(db, old), new)
    return JSONResponse({"url": f"{ask.base}/{new.page}"})


def update_settings(ask: ApiRequest, body: Body) -> Response:
    """Make a repo private or public; nothing else can be set."""
    private = _read_visibility(body)
    if body.get("gated"):
        raise malformed_request("Gated repos are not supported by this endpoint")
    with ask.hub.database.writing() as db:
        repo = ask.own_repo(db)
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


async def search(ask: ApiRequest) -> Response:
    """The list of repos of a kind: filtered, sorted, in pages; upstream's come after ours."""
    query = Query.parse(ask.request.query_params)
    page, following, known = await run_in_threadpool(_search_here, ask, query)
    if following is None and ask.hub.through is not None:
        theirs = await _search_upstream(ask, ask.hub.through, query)
        page += [each for each in theirs if each["id"] not in known][: query.limit - len(page)]
    headers = None
    if following is not None:
        headers = ask.next_page(f"/api/{ask.request.path_params['kind']}", cursor=following)
    return JSONResponse(page, headers=headers)


async def _search_upstream(ask: ApiRequest, through: PullThrough, query: Query) -> list[Json]:
    """What upstream lists, of it what this client may see, with the properties it asked for."""
    params = [item for item in ask.request.query_params.multi_items() if item[0] != "cursor"]
    # Of chosen properties upstream says no others, and this one says who may see a repo.
    unasked = {"private"} - query.expand if query.expand else set()
    params += [("expand", name) for name in unasked]
    kind = validation.KINDS[ask.request.path_params["kind"]]
    asking = through.search(kind, urlencode(params))
    theirs = await asyncio.shield(asyncio.wrap_future(asking))
    shown = [each for each in theirs if ask.grant or each.get("private") is False]
    return [{key: each[key] for key in each if key not in unasked} for each in shown]


def _search_here(ask: ApiRequest, query: Query) -> tuple[list[Json], int | None, set[str]]:
    """A page of the repos that are here, where the next one starts, and the names of all."""
    kind = validation.KINDS[ask.request.path_params["kind"]]
    with ask.hub.database.reading() as db:
        found = repos.list_repos(db, kind)
        seen = [repo for repo in found if ask.may_read(repo) and repos.has_main(db, repo)]
        visible = {repo.id.full_name: repo for repo in seen}
        heads = [_serialize_head(ask, db, repo) for repo in seen]
        page, following = list_page(heads, query)
        if query.wants_files:
            for facts in page:
                tree = ask.hub.history.tree(db, visible[facts["id"]], facts["sha"])
                facts |= serializers.serialize_files(tree)
    names = {repo.id.full_name for repo in found}
    return [query.choose(facts) for facts in page], following, names


def _serialize_head(ask: ApiRequest, db: Connection, repo: Repo) -> Json:
    return serializers.serialize_repo(
        repo, ask.hub.history.revision(db, repo, repos.find_head(db, repo, "main"))
    )


def view_storage(ask: ApiRequest) -> Response:
    """What takes how much room: all repos, or those of one owner."""
    owner = ask.word("owner") if "owner" in ask.request.path_params else None
    with ask.hub.database.reading() as db:
        found = [repo for kind in validation.KINDS.values() for repo in repos.list_repos(db, kind)]
        found = [repo for repo in found if repos.has_main(db, repo) and ask.may_read(repo)]
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


def view_refs(ask: ApiRequest) -> Response:
    """Answer with every branch and tag of a repo, and its commit."""
    with ask.hub.database.reading() as db:
        found = repos.list_refs(db, ask.repo(db))
    refs = {
        key: [_serialize_ref(ref) for ref in found if ref.folder == folder]
        for key, folder in (("branches", "heads"), ("tags", "tags"))
    }
    return JSONResponse({**refs, "converts": [], "pullRequests": []})


def _serialize_ref(ref: Ref) -> Json:
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
        repo = ask.own_repo(db)
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
        repos.delete_ref(db, ask.own_repo(db), folder, name)
    return JSONResponse({})


def view_log(ask: ApiRequest) -> Response:
    """A revision's commits, newest first; the next page starts at a commit, so it never shifts."""
    formatted = "formatted" in ask.request.query_params.getlist("expand[]")
    with ask.hub.database.reading() as db:
        repo = ask.repo(db)
        oid = repos.resolve(db, repo, ask.word("revision"))
        *page, last = ask.hub.history.log(db, repo, oid, _LOG_PAGE + 1)
    headers = None
    if len(page) == _LOG_PAGE:
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
        oid = ask.hub.history.squash(db, ask.own_repo(db), branch, title)
    return JSONResponse({"commitOid": oid})
