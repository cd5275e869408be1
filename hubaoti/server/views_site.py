"""What people and their monitors look at: one page, and what is counted."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from sqlite3 import Connection

import jinja2
from starlette.responses import HTMLResponse, RedirectResponse, Response

from hubaoti.artifact.sizes import format_size
from hubaoti.artifact.variant import Variant
from hubaoti.errors import HubaotiError
from hubaoti.server import repos, serializers
from hubaoti.server.metrics import TEXT, format_metrics
from hubaoti.server.repos import Repo
from hubaoti.server.request import ApiRequest
from hubaoti.server.trees import Tree
from hubaoti.server.validation import KINDS

_MANIFEST = "hubaoti.json"
_PAGE = Path(__file__).with_name("page.html")
_MOST_REPOS = 500


@dataclass(frozen=True, slots=True)
class _Artifact:
    """One of a repo's artifacts, by its path: how it was built, and what it needs of a host."""

    recipe: str
    variant: str
    host: str
    size: str


@dataclass(frozen=True, slots=True)
class _Row:
    """A repo, as the page shows it."""

    id: str
    kind: str
    origin: str
    private: bool
    hides: bool
    size: str
    hits: int
    artifacts: tuple[_Artifact, ...]


def view_page(ask: ApiRequest) -> Response:
    """The repos that this client may read, what fits which host, hits and sizes, as one page."""
    ask.hub.metrics.save()
    with ask.hub.database.reading() as db:
        found = [repo for kind in KINDS.values() for repo in repos.list_repos(db, kind)]
        seen = [repo for repo in found if ask.may_read(repo) and repos.has_main(db, repo)]
        hits = dict(db.execute("select repo, count from hit"))
        rows = [_describe(ask, db, repo, hits.get(repo.row, 0)) for repo in seen[:_MOST_REPOS]]
    template, style = _load_page()
    through = ask.hub.through
    page = template.render(
        rows=rows,
        left_out=len(seen) - len(rows),
        upstream=through.upstream.url if through else "",
        free=format_size(ask.hub.objects.free()),
    )
    policy = f"default-src 'none'; style-src '{style}'; base-uri 'none'; form-action 'none'"
    return HTMLResponse(
        page,
        headers={
            "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        },
    )


def view_commit(ask: ApiRequest) -> Response:
    """Where a push says that its commit is: the page, at its repo; 404 where there is none."""
    with ask.hub.database.reading() as db:
        repo = ask.repo(db)
        repos.resolve(db, repo, ask.word("revision"))
    place = f"{ask.base}/#{repo.id.kind}/{repo.id.full_name}"
    return RedirectResponse(place, headers={"Cache-Control": "no-store"})


@cache
def _load_page() -> tuple[jinja2.Template, str]:
    """The page's template, in which all is escaped, and the digest of its style."""
    text = _PAGE.read_text()
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return made.from_string(text), f"sha256-{digest}"


def _describe(ask: ApiRequest, db: Connection, repo: Repo, hits: int) -> _Row:
    tree = ask.hub.history.tree(db, repo, repos.find_head(db, repo, "main"))
    through = ask.hub.through
    return _Row(
        id=repo.id.full_name,
        kind=repo.id.kind,
        origin=repo.origin,
        private=repo.private,
        hides=through is not None and repo.id in through.shadows,
        size=format_size(serializers.count_storage(tree)),
        hits=hits,
        artifacts=tuple(_list_artifacts(tree)),
    )


def _list_artifacts(tree: Tree) -> Iterator[_Artifact]:
    """What lies in a repo as `<recipe>/<variant>/hubaoti.json`, by its path alone."""
    for path in sorted(tree):
        recipe, _, rest = path.partition("/")
        variant, _, name = rest.partition("/")
        if name != _MANIFEST:
            continue
        folder = f"{recipe}/{variant}/"
        size = sum(entry.size for each, entry in tree.items() if each.startswith(folder))
        yield _Artifact(recipe, variant, _describe_host(variant), format_size(size))


def _describe_host(variant: str) -> str:
    """Which hosts a variant is for, in words; "" where it is none that we know."""
    try:
        parsed = Variant.parse(variant)
    except HubaotiError:
        return ""
    device = "a CPU" if parsed.sm is None else f"a GPU sm {parsed.sm} with CUDA {parsed.cuda}"
    return f"torch {parsed.torch} on {device}, {parsed.level}, {parsed.os}"


def view_metrics(ask: ApiRequest) -> Response:
    """What is counted, as Prometheus reads it."""
    ask.hub.metrics.save()
    return Response(format_metrics(_list_metrics(ask)), media_type=TEXT)


def _list_metrics(ask: ApiRequest) -> Iterator[tuple[str, str, str, float]]:
    hub = ask.hub
    for method, status, count in hub.metrics.list_requests():
        labels = f'{{method="{method}",status="{status}"}}'
        yield "requests_total", "counter", labels, count
    yield "received_bytes_total", "counter", "", hub.metrics.received
    yield "sent_bytes_total", "counter", "", hub.metrics.sent
    if hub.through is not None:
        for name in ("asked", "gone", "hits", "misses", "bytes"):
            yield f"upstream_{name}_total", "counter", "", hub.through.counts[name]
    with hub.database.reading() as db:
        counts = dict(db.execute("select kind, count(*) from repo group by kind"))
        hits = db.execute("select coalesce(sum(count), 0) from hit").fetchone()[0]
    for kind in KINDS.values():
        yield "repos", "gauge", f'{{kind="{kind}"}}', counts.get(kind, 0)
    yield "file_hits_total", "counter", "", hits
    yield "stored_bytes", "gauge", "", hub.objects.measure()
    yield "disk_free_bytes", "gauge", "", hub.objects.free()
    if hub.objects.limit is not None:
        yield "max_bytes", "gauge", "", hub.objects.limit
