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

from hubaoti.server.auth import Hosts
from hubaoti.server.errors import ServerError, disk_full, says_full
from hubaoti.server.hub import Hub, open_hub
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
        InUse: another process serves it.
    """
    hosts = Hosts(allow_hosts)
    return make_app(open_hub(root, token, user), hosts)


def make_app(hub: Hub, hosts: Hosts) -> ASGIApp:
    """Route requests to the views of an open root, which the app closes at its end."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        hub.close()

    app = Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        exception_handlers={
            **dict.fromkeys((ServerError, HTTPException, ClientDisconnect), _handle_refusal),
            **dict.fromkeys((OSError, sqlite3.OperationalError), _handle_disk_error),
            Exception: _handle_failure,
        },
    )
    app.router.redirect_slashes = False
    app.state.hub = hub
    return hub.metrics.count(_refuse_other_hosts(_route_quoted_paths(app), hosts))


def _refuse_other_hosts(app: ASGIApp, hosts: Hosts) -> ASGIApp:
    """Let the app answer what was sent to this endpoint by one of its names, or by none at all."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        chosen = app
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host")
            if host is not None and not hosts.hold(host):
                message = f"This endpoint is not called {host[:100]!r}: see serve --allow-host"
                chosen = ServerError(421, message).response()
        await chosen(scope, receive, send)

    return answer


def _route_quoted_paths(app: ASGIApp) -> ASGIApp:
    """Let the app route on paths as they were sent: unquoted, `%2F` could not be told from `/`."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["raw_path"].partition(b"?")[0].decode("latin-1")
            scope = {**scope, "path": path, "root_path": ""}
        await app(scope, receive, send)

    return answer


def _handle_refusal(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = ServerError(error.status_code, error.detail, headers=error.headers)
    elif not isinstance(error, ServerError):
        error = ServerError(400, "The client left")  # which nobody is there to read
    return error.response()


def _handle_disk_error(request: Request, error: Exception) -> Response:
    if says_full(error):
        return disk_full().response()
    raise error


def _handle_failure(request: Request, error: Exception) -> Response:
    return ServerError(500, "The endpoint failed; its log says why").response()
