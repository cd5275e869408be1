"""A real proxy before an endpoint: it counts requests, and can be slow or cut the connection."""

from __future__ import annotations

import gzip
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

PIECE = 4096
DROPPED: tuple[int, dict[str, str]] = (0, {})  # an answer that is none: the connection is closed


class Proxy:
    """What a test reads (`requests`, `headers`) and sets.

    `matching`: a part of the paths of the requests that the rest is about.
    `cut_after`: bytes of an answer's body after which the connection is dropped.
    `stall_after`: bytes of an answer's body after which nothing comes, until the client leaves.
    `mute`: not even an answer's status comes.
    `pause`: seconds between the pieces of a body, 4 KiB each, of a request or an answer.
    `flip`: change the first byte of the body.
    `answers`: statuses and headers that the next requests get, and the endpoint never sees.
    `mutate`: what becomes of the JSON of an answer.
    `first`: what the first request of each method and path gets so.
    `redirect`: a status, and a repo's name that leads with it to another one.
    `lost`: how many requests the endpoint answers whose answers never arrive.
    `packed`: compress the body, with as many spaces behind it, `folds` times.
    `status`: answer with this one. `next_page`: name each page as its own next one.
    `endless`: go on with the body after its end, until the client leaves.
    `sent`: the bytes of bodies that did not end where they should.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.url = ""
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.matching = ""
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.mute = False
        self.pause = 0.0
        self.flip = self.endless = False
        self.sent = self.packed = self.status = 0
        self.folds, self.next_page = 1, False
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.mutate: Callable[[Any], Any] | None = None
        self.first: tuple[int, dict[str, str]] | None = None
        self.redirect: tuple[int, str, str] | None = None
        self.lost = 0

    def reset(self) -> None:
        """Forget the requests, and be an honest proxy again."""
        self.requests.clear()
        self.headers.clear()
        self.matching, self.cut_after, self.pause = "", None, 0.0
        self.stall_after, self.mute = None, False
        self.flip, self.endless, self.sent, self.packed = False, False, 0, 0
        self.folds, self.next_page, self.status = 1, False, 0
        self.answers, self.first, self.lost, self.mutate = [], None, 0, None
        self.redirect = None


def mutated(response: http.client.HTTPResponse, content: bytes, how: Proxy) -> bytes:
    """The JSON of an answer as something else, or packed, where that was asked for."""
    asked = how.mutate or how.packed
    if not asked or not content or "json" not in response.headers.get("Content-Type", ""):
        return content
    if how.mutate:
        content = json.dumps(how.mutate(json.loads(content))).encode()
    if how.packed:
        content += b" " * how.packed
        for _ in range(how.folds):
            content = gzip.compress(content)
        response.headers["Content-Encoding"] = ", ".join(["gzip"] * how.folds)
    response.headers.replace_header("Content-Length", str(len(content)))
    return content


class Server(ThreadingHTTPServer):
    """The proxy's listening side."""

    daemon_threads = True
    proxy: Proxy

    def handle_error(self, *_: Any) -> None:
        """Say nothing of clients that went away: tests kill some."""


class Handler(BaseHTTPRequestHandler):
    """Forwards each request of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each small answer waits 40 ms for an acknowledgement
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def forward(self) -> None:
        proxy = self.server.proxy
        asked = (self.command, self.path)
        is_first = asked not in proxy.requests
        proxy.requests.append(asked)
        proxy.headers.append({name.lower(): value for name, value in self.headers.items()})
        picked = proxy.matching in self.path
        body = self.read_body(proxy.pause if picked else 0)
        if picked and (proxy.answers or (is_first and proxy.first)):
            self.refuse(*(proxy.answers.pop(0) if proxy.answers else proxy.first))
            return
        if proxy.redirect is not None and f"/{proxy.redirect[1]}/" in f"{self.path}/":
            status, old, new = proxy.redirect
            self.refuse(status, {"Location": self.path.replace(old, new, 1)})
            return
        netloc = urlsplit(proxy.upstream).netloc
        with closing(http.client.HTTPConnection(netloc)) as upstream:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            if picked and proxy.mute:
                self.stall()
                return
            if picked and proxy.lost:
                proxy.lost -= 1
                self.close_connection = True
                return
            self.answer(response, response.read(), proxy if picked else Proxy(""))

    def refuse(self, status: int, headers: dict[str, str]) -> None:
        if status == DROPPED[0]:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = forward

    def read_body(self, pause: float) -> bytes:
        left, found = int(self.headers.get("Content-Length", 0)), b""
        while left > len(found):
            time.sleep(pause)
            found += self.rfile.read(min(PIECE, left - len(found)))
        return found

    def answer(self, response: http.client.HTTPResponse, content: bytes, how: Proxy) -> None:
        content = mutated(response, content, how)
        self.begin(how.status or response.status, how)
        kept_back = {"date", "server", "transfer-encoding", "connection"}
        if how.endless and content:
            kept_back.add("content-length")
        for name, value in response.headers.items():
            if name.lower() not in kept_back:
                self.send_header(name, value)
        self.end_headers()
        if how.endless and content:
            self.go_on(content, how)
            return
        if how.flip and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        if content and (how.cut_after, how.stall_after) != (None, None):
            self.break_off(content, how)
            return
        for start in range(0, len(content), PIECE):
            time.sleep(how.pause)
            self.wfile.write(content[start : start + PIECE])

    def break_off(self, content: bytes, how: Proxy) -> None:
        content = content[: how.cut_after if how.stall_after is None else how.stall_after]
        how.sent += self.wfile.write(content)
        self.close_connection = True
        if how.stall_after is not None:
            self.stall()

    def stall(self) -> None:
        """Say nothing more, until the client has had enough."""
        self.close_connection = True
        with suppress(OSError):
            self.rfile.read(1)

    def begin(self, status: int, how: Proxy) -> None:
        self.send_response(status)
        if how.next_page:
            self.send_header("Link", f'<{self.server.proxy.url}{self.path}>; rel="next"')

    def go_on(self, content: bytes, how: Proxy) -> None:
        self.close_connection = True
        with suppress(OSError):
            while how.sent < 1 << 30:
                how.sent += self.wfile.write(content)
                content = b" " * (1 << 16)


@contextmanager
def proxying(upstream: str) -> Iterator[Proxy]:
    """A proxy on 127.0.0.1, as long as the block runs."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.proxy = Proxy(upstream)
        server.proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.proxy
        finally:
            server.shutdown()
            thread.join()
