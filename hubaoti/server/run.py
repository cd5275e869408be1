"""Running the endpoint: in the foreground until a signal, or in a thread of this process."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from hubaoti.errors import BadRequest, HubaotiError, InUse
from hubaoti.server.app import make_app
from hubaoti.server.auth import Hosts
from hubaoti.server.connections import AT_ONCE, QUEUE, Connection, limit_log_lines
from hubaoti.server.hub import Hub, Service, open_hub

_LAST_PORT = 65535
_GRACE = 5
"""How many seconds running requests have to end, once we stop."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a running endpoint is, and the token for it."""

    url: str
    token: str = field(repr=False)


def serve(
    root: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    ready: Callable[[str, str], None] | None = None,
    service: Service | None = None,
) -> None:
    """Serve a root folder until SIGINT or SIGTERM; port 0 takes a free one.

    Once it listens, `ready` is called with the URL and the token, which is made up when none is
    given. It answers to loopback names, `host`, and the other names that the service allows.

    Raises:
        BadRequest: what is allowed is no host's name, or the address is none.
        InUse: the address is another process's, or another process serves the folder.
        UnsafeFolder: the folder is not ours alone.
        DiskFull: there is no room in it.
    """
    with _listen(host, port) as listener:
        hosts = Hosts((host, *(service.allow_hosts if service else ())))
        with closing(open_hub(root, token, service=service)) as hub:
            endpoint = Endpoint(_format_url(listener), hub.guard.token)
            announce = (lambda: ready(endpoint.url, endpoint.token)) if ready else (lambda: None)
            server = _Server(hub, hosts, announce)
            with _handle_signals(), limit_log_lines():
                server.run(sockets=[listener])


@contextmanager
def serve_in_thread(
    root: Path, token: str | None = None, port: int = 0, service: Service | None = None
) -> Iterator[Endpoint]:
    """Serve a root folder on 127.0.0.1 from a thread of this process, as long as the block runs."""
    with (
        _listen("127.0.0.1", port) as listener,
        closing(open_hub(root, token, service=service)) as hub,
        limit_log_lines(),
    ):
        started = threading.Event()
        server = _Server(hub, Hosts(), started.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not started.wait(0.1):
                if not thread.is_alive():
                    raise HubaotiError("the endpoint did not start")
            yield Endpoint(_format_url(listener), hub.guard.token)
        finally:
            server.should_exit = True
            thread.join()


class _Server(uvicorn.Server):
    """uvicorn, which calls `ready` once connections are taken."""

    def __init__(self, hub: Hub, hosts: Hosts, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            _suppress_cancellation(make_app(hub, hosts)),
            http=Connection,
            backlog=AT_ONCE,
            log_level="error",
            access_log=False,
            log_config=None,  # how a process logs is its own affair
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=_GRACE,
        )
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, then call `ready`, unless the start failed."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUE)
        if self.started:
            self._ready()


def _suppress_cancellation(app: ASGIApp) -> ASGIApp:
    """The app; uvicorn, which cancels what outlasts the grace, would print each one's traceback."""

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return quiet


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    if not 0 <= port <= _LAST_PORT:  # else the system takes its last 16 bits
        hint = f"choose one from 1 to {_LAST_PORT}, or 0 for a free one"
        raise BadRequest(f"{port} is no port", hint=hint)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, ValueError) as error:
        raise BadRequest(f"{host}:{port} is no address: {error}", hint="see --host") from error
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            hint = "choose another --port, or 0 for a free one"
            if error.errno == errno.EADDRINUSE:
                raise InUse(f"{host}:{port} is in use", hint=hint) from error
            reason = f"cannot be used: {error.strerror}"
            raise HubaotiError(f"{host}:{port} {reason}", hint=hint) from error
        yield listener


def _format_url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _handle_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end in a return: uvicorn raises them once more when it has stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: None) for number in wanted]
    try:
        yield
    finally:
        for number, handler in zip(wanted, before, strict=True):
            signal.signal(number, handler)
