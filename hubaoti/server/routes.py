"""The table: which request which view answers.

Paths are matched as they arrive, still quoted, for `%2F` in a revision is no slash. A repo may be
spelled `owner/name` or, when it is the endpoint's own user's, `name`: no repo is named like one
of the words that may follow, so the two cannot be confused.
"""

from __future__ import annotations

from starlette.convertors import Convertor, register_url_convertor
from starlette.routing import Mount, Route

from hubaoti.server import views_account, views_files, views_refs, views_repos, views_uploads
from hubaoti.server.ask import Endpoint, reads, writes
from hubaoti.server.words import KINDS


class _Kind(Convertor[str]):
    regex = "|".join(KINDS)

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("kind", _Kind())

_API = [
    ("GET", "", reads(views_repos.describe)),
    ("GET", "/revision/{revision}", reads(views_repos.describe)),
    ("GET", "/auth-check", reads(views_repos.auth_check)),
    ("GET", "/auth-check/{write:path}", reads(views_repos.auth_check)),
    ("PUT", "/settings", writes(views_repos.settings)),
    ("GET", "/refs", reads(views_refs.refs)),
    ("GET", "/commits/{revision}", reads(views_refs.log)),
    ("POST", "/branch/{branch}", writes(views_refs.create_branch)),
    ("DELETE", "/branch/{branch}", writes(views_refs.delete_branch)),
    ("POST", "/tag/{revision}", writes(views_refs.create_tag)),
    ("DELETE", "/tag/{revision}", writes(views_refs.delete_tag)),
    ("POST", "/super-squash/{branch}", writes(views_refs.squash)),
    ("GET", "/tree/{revision}", reads(views_files.tree)),
    ("GET", "/tree/{revision}/{path:path}", reads(views_files.tree)),
    ("POST", "/paths-info/{revision}", views_files.paths),
    ("POST", "/preupload/{revision}", writes(views_uploads.preupload)),
    ("GET", "/xet-write-token/{revision}", reads(views_uploads.xet_token)),
    ("POST", "/commit/{revision}", views_uploads.commit),
]


def _on_every_repo(prefix: str, method: str, rest: str, endpoint: Endpoint) -> list[Route]:
    # `name` first: `owner/name` would take `name/refs` for a repo.
    repos = ("{name}", "{owner}/{name}")
    return [Route(f"{prefix}/{repo}{rest}", endpoint, methods=[method]) for repo in repos]


def _pages() -> list[Route]:
    """What lies outside of `/api`: a model's page has no prefix, the other kinds' have theirs."""
    routes: list[Route] = []
    for prefix in ("/{kind:kind}", ""):
        content, batch = reads(views_files.content), writes(views_uploads.lfs_batch)
        routes += _on_every_repo(prefix, "GET", "/resolve/{revision}/{path:path}", content)
        routes += _on_every_repo(prefix, "POST", ".git/info/lfs/objects/batch", batch)
    return routes


ROUTES = [
    Route("/api/whoami-v2", reads(views_account.whoami), methods=["GET"]),
    Route("/api/validate-yaml", views_account.validate_yaml, methods=["POST"]),
    Route("/api/repos/create", writes(views_repos.create), methods=["POST"]),
    Route("/api/repos/delete", writes(views_repos.delete), methods=["DELETE"]),
    Route("/api/repos/move", writes(views_repos.move), methods=["POST"]),
    Route("/api/{kind:kind}", reads(views_repos.search), methods=["GET"]),
    *[route for row in _API for route in _on_every_repo("/api/{kind:kind}", *row)],
    Route("/_lfs/{oid}", views_uploads.lfs_put, methods=["PUT"]),
    Route("/_cas/{epoch}/v1/xorbs/{prefix}/{hash}", views_uploads.xorb_post, methods=["POST"]),
    Route("/_cas/{epoch}/v1/shards", views_uploads.shard_post, methods=["POST"]),
    # Whatever else hf_xet asks for first (grants, known chunks) it does without, when it is a 404.
    Mount("/_cas", routes=[]),
    *_pages(),
]
