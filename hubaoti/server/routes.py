"""The table: which request which view answers.

Paths are matched as they arrive, still quoted, for `%2F` in a revision is no slash. A repo may be
spelled `owner/name` or, when it is the endpoint's own user's, `name`: no repo is named like one
of the words that may follow, so the two cannot be confused.
"""

from __future__ import annotations

from starlette.convertors import StringConvertor, register_url_convertor
from starlette.routing import Mount, Route

from hubaoti.server import views_files, views_repos, views_site, views_uploads
from hubaoti.server.request import LIST, ApiRequest, View, pulls, reads, reads_body, streams, writes
from hubaoti.server.validation import KINDS
from hubaoti.server.views_uploads import demand_lfs, demand_xet


class _Kind(StringConvertor):
    regex = "|".join(KINDS)


register_url_convertor("kind", _Kind())

_view_storage = reads(views_repos.view_storage, ApiRequest.demand_token)
_issue_xet_token = reads(views_uploads.issue_xet_token, ApiRequest.demand_write)

_ENDPOINT: list[tuple[str, str, View]] = [
    ("GET", "/", reads(views_site.view_page)),
    ("GET", "/metrics", reads(views_site.view_metrics)),
    ("GET", "/api/whoami-v2", reads(views_repos.whoami)),
    ("POST", "/api/validate-yaml", reads_body(views_repos.validate_yaml)),
    ("POST", "/api/repos/create", writes(views_repos.view_create)),
    ("DELETE", "/api/repos/delete", writes(views_repos.view_delete)),
    ("POST", "/api/repos/move", writes(views_repos.view_move)),
    ("GET", "/api/settings/repositories", _view_storage),
    ("GET", "/api/organizations/{owner}/settings/repositories", _view_storage),
    ("GET", "/api/{kind:kind}", streams(views_repos.search)),
    ("PUT", "/_lfs/{oid}", streams(views_uploads.put_lfs_object, demand_lfs)),
    (
        "POST",
        "/_cas/{epoch}/v1/xorbs/{prefix}/{hash}",
        streams(views_uploads.post_xorb, demand_xet),
    ),
    ("POST", "/_cas/{epoch}/v1/shards", streams(views_uploads.post_shard, demand_xet)),
]

_API: list[tuple[str, str, View]] = [
    ("GET", "/revision/{revision}", pulls(views_repos.view_repo, "tree")),
    ("GET", "/auth-check", pulls(views_repos.check_auth, "refs")),
    ("GET", "/auth-check/write", reads(views_repos.check_auth, ApiRequest.demand_write)),
    ("PUT", "/settings", writes(views_repos.update_settings)),
    ("GET", "/refs", pulls(views_repos.view_refs, "refs")),
    ("GET", "/commits/{revision}", pulls(views_repos.view_log, "log")),
    ("POST", "/branch/{branch}", writes(views_repos.create_branch)),
    ("DELETE", "/branch/{branch}", writes(views_repos.delete_branch)),
    ("POST", "/tag/{revision}", writes(views_repos.create_tag)),
    ("DELETE", "/tag/{revision}", writes(views_repos.delete_tag)),
    ("POST", "/super-squash/{branch}", writes(views_repos.squash)),
    ("GET", "/tree/{revision}", pulls(views_files.view_tree, "tree")),
    ("GET", "/tree/{revision}/{path:path}", pulls(views_files.view_tree, "tree")),
    ("POST", "/paths-info/{revision}", reads_body(views_files.view_paths, "tree")),
    ("POST", "/preupload/{revision}", writes(views_uploads.preupload, LIST)),
    ("GET", "/xet-write-token/{revision}", _issue_xet_token),
    ("POST", "/commit/{revision}", streams(views_uploads.view_commit, ApiRequest.demand_write)),
    ("GET", "", pulls(views_repos.view_repo, "tree")),
]

_PAGES: list[tuple[str, str, View]] = [
    ("GET", "/resolve/{revision}/{path:path}", streams(views_files.view_content)),
    ("GET", "/commit/{revision}", reads(views_site.view_commit)),
    ("POST", ".git/info/lfs/objects/batch", writes(views_uploads.offer_lfs_batch, LIST)),
]


def _make_repo_routes(prefix: str, rows: list[tuple[str, str, View]]) -> list[Route]:
    """The rows for both spellings; all of `name` first, for `owner/name` would take `name/refs`."""
    return [
        Route(f"{prefix}/{repo}{rest}", view, methods=[method])
        for repo in ("{name}", "{owner}/{name}")
        for method, rest, view in rows
    ]


ROUTES = [
    *(Route(path, view, methods=[method]) for method, path, view in _ENDPOINT),
    *_make_repo_routes("/api/{kind:kind}", _API),
    # Whatever else hf_xet asks for first (grants, known chunks) it does without, when it is a 404.
    Mount("/_cas", routes=[]),
    *_make_repo_routes("/{kind:kind}", _PAGES),
    *_make_repo_routes("", _PAGES),
]
