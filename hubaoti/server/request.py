"""One request, and the ways to answer it: views that read, that write, that take a stream.

All but the last are plain functions, run in a thread: they may use files and SQLite as they like.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import cached_property, wraps
from sqlite3 import Connection
from typing import Any
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hubaoti.server import repos, validation
from hubaoti.server.auth import read_bearer
from hubaoti.server.errors import (
    BAD_TOKEN,
    NO_TOKEN,
    ServerError,
    malformed_request,
    repo_not_found,
    too_large,
    upstream_gone,
)
from hubaoti.server.hub import Hub
from hubaoti.server.pull_through import Moved, NotHere
from hubaoti.server.repos import Repo
from hubaoti.server.tokens import WRITE, Grant, find_grant
from hubaoti.server.upstream import UpstreamMissing
from hubaoti.server.validation import RepoId

_SMALL = 2**19
"""The bytes of most bodies at most: some names, and a text of 65536 characters."""

LIST = 4 * 2**20
"""The bytes at most of a body that lists files, or holds a card; files come on other roads."""

_SILENCE = 60.0
"""Seconds without a byte of a body, after which nobody waits for the rest; of one that fits into
memory, all of it has to be here by then."""

_DRAINED, _DRAIN_SECONDS = 64 * 2**20, 2.0
"""The bytes at most, and the seconds, of a body that is refused, which are read and dropped."""


class ApiRequest:
    """A request; each word of it is checked when it is read."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.hub: Hub = request.app.state.hub

    def word(self, name: str) -> str:
        """A part of the URL's path, unquoted."""
        return validation.unquote_segment(self.request.path_params[name])

    def flag(self, name: str) -> bool:
        """Whether the URL's query sets this flag: to 1, true or yes."""
        return validation.is_set(self.request.query_params.get(name, ""))

    @cached_property
    def repo_id(self) -> RepoId:
        """The repo that the path names; 400 where that is no name of one."""
        parts = self.request.path_params
        kind = validation.KINDS.get(parts.get("kind", "models"))
        name = "/".join(self.word(part) for part in ("owner", "name") if part in parts)
        return validation.parse_repo_id(kind, name, self.hub.user)

    @cached_property
    def grant(self) -> Grant | None:
        """What the request's token allows: all, where it is the one that this was started with."""
        authorization = self.request.headers.get("authorization")
        if self.hub.guard.knows(authorization):
            return Grant(self.hub.user, WRITE)
        token = read_bearer(authorization)
        if not token:
            return None
        with self.hub.database.reading() as db:
            return find_grant(db, token)

    def may_read(self, repo: Repo) -> bool:
        """Whether the request is shown this repo."""
        return not repo.private or (self.grant is not None and self.grant.may_read(repo.id.owner))

    def demand_token(self) -> Grant:
        """What the request's token allows; 401 where it carries none that is known."""
        if self.grant is None:
            given = self.request.headers.get("authorization")
            raise ServerError(401, BAD_TOKEN if given else NO_TOKEN)
        return self.grant

    def demand_write(self) -> None:
        """401 without a token, 403 unless it may write, and of the owner whom the path names."""
        grant = self.demand_token()
        owner = self.repo_id.owner if "name" in self.request.path_params else None
        self._require_write(grant, owner)

    def _require_write(self, grant: Grant, owner: str | None) -> None:
        if grant.role != WRITE:
            raise ServerError(403, f"The token {grant.name} may read, and not write")
        if owner is not None and not grant.may_write(owner):
            raise ServerError(403, f"The token {grant.name} may not write repos of {owner}")

    def require_owner(self, name: RepoId) -> None:
        """403 unless the request's token may write repos of this one's owner."""
        self._require_write(self.demand_token(), name.owner)

    def refuse_pr(self) -> None:
        """400 to whoever asks for a pull request."""
        if self.flag("create_pr"):
            raise malformed_request("Pull requests are not supported by this endpoint")

    async def bring(self, what: str) -> None:
        """See that the repo is as upstream has it, where there is one: `PullThrough.bring`."""
        through = self.hub.through
        if through is None:
            return
        await run_in_threadpool(self._require_visible)
        revision = self.word("revision") if "revision" in self.request.path_params else "main"
        try:
            bringing = through.bring(self.repo_id, revision, what)
            await asyncio.shield(asyncio.wrap_future(bringing))
        except Moved as moved:
            raise self._redirect(moved.to) from None
        except UpstreamMissing:
            raise repo_not_found(self.repo_id, trusted=self.grant is not None) from None
        except NotHere as error:
            message = f"{self.repo_id} is not here, and upstream cannot be asked: {error}"
            raise upstream_gone(message) from None

    def _require_visible(self) -> None:
        """404 or 401 for a repo that is here, and hidden from this client; 307 for one renamed."""
        with self.hub.database.reading() as db:
            if repos.find(db, self.repo_id) or repos.find_renamed(db, self.repo_id):
                self.repo(db)

    def _redirect(self, to: str) -> ServerError:
        """307 to the name that the repo has now, here or upstream."""
        name = validation.parse_repo_id(self.repo_id.kind, to, self.hub.user)
        path = self.request.scope["path"]
        there = path.replace(f"/{self.repo_id.full_name}", f"/{name.full_name}", 1)
        if there == path:
            raise repo_not_found(self.repo_id, trusted=self.grant is not None)
        query = self.request.url.query
        location = f"{self.base}{there}" + (f"?{query}" if query else "")
        headers = {"Location": location}
        return ServerError(307, f"{self.repo_id} is {name.full_name} now", headers=headers)

    def own_repo(self, db: Connection, repo_id: RepoId | None = None) -> Repo:
        """The repo, to be changed; 403 for a copy of upstream's."""
        repo = self.repo(db, repo_id)
        self.require_owner(repo.id)
        if repo.origin:
            message = f"{repo.id} is a copy of {repo.origin}'s: change it there"
            raise ServerError(403, message)
        return repo

    def repo(self, db: Connection, repo_id: RepoId | None = None) -> Repo:
        """The repo that the path (or the caller) names; a private one only for the trusted.

        307 where a path names one that is called otherwise.
        """
        name = repo_id or self.repo_id
        repo = repos.find(db, name)
        if repo is None and repo_id is None:
            renamed = repos.find_renamed(db, name)
            if renamed is not None and self.may_read(renamed):
                raise self._redirect(renamed.id.full_name)
        if repo is None or not self.may_read(repo):
            raise repo_not_found(name, trusted=self.grant is not None)
        return repo

    @property
    def base(self) -> str:
        """The endpoint's URL, as this client knows it."""
        host, port = self.request.scope.get("server") or ("127.0.0.1", 80)
        name = self.request.headers.get("host", f"{host}:{port}")
        return f"{self.request.scope['scheme']}://{name}"

    def next_page(self, path: str, **changed: object) -> dict[str, str]:
        """The `Link` header to a list's next page: this query, changed."""
        query = [(k, v) for k, v in self.request.query_params.multi_items() if k not in changed]
        url = f"{self.base}{path}?{urlencode(query + list(changed.items()))}"
        return {"Link": f'<{url}>; rel="next"'}


Body = dict[str, Any]
Permit = Callable[[ApiRequest], object]
"""Raises unless a request may do what it asks for."""

View = Callable[[Request], Awaitable[Response]]


def _allow_anybody(ask: ApiRequest) -> None:
    """Let every request pass: what is private the view itself hides."""


def reads(view: Callable[[ApiRequest], Response], permit: Permit = _allow_anybody) -> View:
    """Make an endpoint of a view that needs no body; `permit` is asked first."""

    @wraps(view)
    async def answer(ask: ApiRequest) -> Response:
        return await run_in_threadpool(view, ask)

    return streams(answer, permit)


def writes(view: Callable[[ApiRequest, Body], Response], limit: int = _SMALL) -> View:
    """Make an endpoint of a view that needs a token to write, asked before the body is read."""

    @wraps(view)
    async def answer(ask: ApiRequest) -> Response:
        content = await _wait_for_body(read_whole_body(ask.request, limit))
        return await run_in_threadpool(view, ask, validation.parse_json_object(content))

    return streams(answer, ApiRequest.demand_write)


def pulls(view: Callable[[ApiRequest], Response], what: str) -> View:
    """Make an endpoint of a view of a repo, after what it needs was brought from upstream."""

    @wraps(view)
    async def answer(ask: ApiRequest) -> Response:
        await ask.bring(what)
        return await run_in_threadpool(view, ask)

    return streams(answer, _allow_anybody)


def reads_body(view: Callable[[ApiRequest, bytes], Response], what: str = "") -> View:
    """Make an endpoint of a view that anybody may call, and whose question is its body.

    `what` is brought from upstream first.
    """

    @wraps(view)
    async def answer(ask: ApiRequest) -> Response:
        if what:
            await ask.bring(what)
        content = await _wait_for_body(read_whole_body(ask.request, LIST))
        return await run_in_threadpool(view, ask, content)

    return streams(answer, _allow_anybody)


def streams(
    view: Callable[[ApiRequest], Awaitable[Response]], permit: Permit = _allow_anybody
) -> View:
    """A view that reads its body itself, once it may; work that blocks goes to threads."""

    @wraps(view)
    async def answer(request: Request) -> Response:
        ask = ApiRequest(request)
        permit(ask)
        return await view(ask)

    return answer


async def read_whole_body(request: Request, limit: int) -> bytes:
    """The request's body; 413 as soon as it is too long."""
    body = bytearray()
    async for chunk in read_bounded(request, limit):
        body += chunk
    return bytes(body)


async def _wait_for_body(body: Awaitable[bytes]) -> bytes:
    """A body that does not take long; 408 when it does."""
    try:
        async with asyncio.timeout(_SILENCE):
            return await body
    except TimeoutError:
        headers = {"Connection": "close"}
        raise ServerError(408, "The body took too long to come", headers=headers) from None


async def read_bounded(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The request's body in pieces of about 1 MiB; 413 as soon as it is too long."""
    stream = request.stream()
    received, piece = _read_content_length(request), bytearray()
    if received <= limit:
        received = 0
        while chunk := await _wait_for_body(anext(stream, b"")):
            received += len(chunk)
            if received > limit:
                break
            piece += chunk
            if len(piece) >= 2**20:
                yield bytes(piece)
                piece.clear()
    if received > limit:
        await _drain(stream)
        raise too_large("The body", limit)
    if piece:
        yield bytes(piece)


async def _drain(stream: AsyncIterator[bytes]) -> None:
    """Take and drop what is on its way: else its sender meets a broken pipe, and not our answer."""
    left = _DRAINED
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for chunk in stream:
                left -= len(chunk)
                if left < 0:
                    return


def _read_content_length(request: Request) -> int:
    """The body's length as its sender names it, 0 when it does not."""
    value = request.headers.get("content-length", "0")
    if not value.isdecimal() or len(value) > 20:
        raise malformed_request("Content-Length is not a number")
    return int(value)
