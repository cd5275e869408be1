"""The ASGI app: routes, the one boundary that turns errors into answers, opening and closing."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hubaoti.server.access import Hosts
from hubaoti.server.hub import Hub, open_hub
from hubaoti.server.problems import Problem, disk_full, other_host, says_full
from hubaoti.server.routes import ROUTES


def create_app(
    root: Path, token: str | None = None, user: str = "local", allow_hosts: Iterable[str] = ()
) -> ASGIApp:
    """An endpoint over a root folder; its lifespan's end closes the folder.

    It answers to loopback names and to the hosts that are allowed.

    Raises:
        BadRequest: what is allowed is no host's name.
        UnsafeFolder: others own or may enter the folder, or it holds something else.
        DiskFull: there is no room.
        HubaotiError: another process serves it.
    """
    hosts = Hosts(allow_hosts)
    return app_of(open_hub(root, token, user), hosts)


def app_of(hub: Hub, hosts: Hosts) -> ASGIApp:
    """The app over an open root."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        hub.close()

    app = Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        exception_handlers={
            Problem: _refused,
            HTTPException: _no_route,
            ClientDisconnect: _gone,
            OSError: _disk,
            sqlite3.OperationalError: _disk,
            Exception: _broken,
        },
    )
    app.router.redirect_slashes = False
    app.state.hub = hub
    return _of_our_names(_quoted_paths(app), hosts)


def _of_our_names(app: ASGIApp, hosts: Hosts) -> ASGIApp:
    """Let the app answer what was sent to this endpoint by one of its names, or by none at all."""

    async def judged(scope: Scope, receive: Receive, send: Send) -> None:
        answer = app
        if scope["type"] == "http":
            said = Headers(scope=scope).get("host")
            if said is not None and not hosts.hold(said):
                answer = other_host(said).response()
        await answer(scope, receive, send)

    return judged


def _quoted_paths(app: ASGIApp) -> ASGIApp:
    """Let the app route on paths as they were sent: unquoted, `%2F` could not be told from `/`."""

    async def quoted(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["raw_path"].partition(b"?")[0].decode("latin-1")
            scope = {**scope, "path": path, "root_path": ""}
        await app(scope, receive, send)

    return quoted


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Problem(error.status_code, error.detail, headers=error.headers).response()


def _gone(request: Request, error: Exception) -> Response:
    """Nobody is there to read it."""
    return Problem(400, "The client left").response()


def _disk(request: Request, error: Exception) -> Response:
    if says_full(error):
        return disk_full().response()
    raise error


def _broken(request: Request, error: Exception) -> Response:
    return Problem(500, "The endpoint failed; its log says why").response()
