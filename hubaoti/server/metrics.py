"""What the endpoint counts, as Prometheus reads it; no name of a repo or of a token is in it."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from threading import Lock

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hubaoti.server.database import Database

TEXT = "text/plain; version=0.0.4; charset=utf-8"
MEANINGS = {
    "requests_total": "Requests since the start, by method and status; 0 is a client that left.",
    "received_bytes_total": "Bytes of requests since the start.",
    "sent_bytes_total": "Bytes of answers since the start.",
    "upstream_asked_total": "Questions to upstream since the start.",
    "upstream_gone_total": "Questions to upstream that it did not answer.",
    "upstream_hits_total": "Files of copies that were here when they were asked for.",
    "upstream_misses_total": "Files that were fetched from upstream.",
    "upstream_bytes_total": "Bytes of the files that were fetched from upstream.",
    "repos": "Repos that are here, by kind.",
    "file_hits_total": "Files that were asked for, ever.",
    "stored_bytes": "Bytes of all files that are stored.",
    "disk_free_bytes": "Bytes that the disk has left.",
    "max_bytes": "The most bytes of files, as serve --max-bytes says.",
}
"""What is counted, in words."""

_METHODS = frozenset({"DELETE", "GET", "HEAD", "POST", "PUT"})


class Metrics:
    """Counts requests and bytes since the start, and files asked for, of each repo, for good."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._hits: Counter[int] = Counter()
        self.received = self.sent = 0

    def count(self, app: ASGIApp) -> ASGIApp:
        """The app, whose requests are counted."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            status = 0

            async def counted_receive() -> Message:
                message = await receive()
                self.received += len(message.get("body", b""))
                return message

            async def counted_send(message: Message) -> None:
                nonlocal status
                status = message.get("status", status)
                self.sent += len(message.get("body", b""))
                await send(message)

            try:
                await app(scope, counted_receive, counted_send)
            finally:
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._requests[method, status] += 1

        return answer

    def hit(self, repo: int) -> None:
        """A file of this repo was asked for."""
        with self._lock:
            self._hits[repo] += 1

    def save(self) -> None:
        """Write down the hits that were counted since the last time; or later, on a full disk."""
        with self._lock:
            hits, self._hits = self._hits, Counter()
        if not hits:
            return
        try:
            with self._database.writing() as db:
                db.executemany(
                    "insert into hit select id, ?2 from repo where id = ?1 "
                    "on conflict (repo) do update set count = count + excluded.count",
                    hits.items(),
                )
        except sqlite3.OperationalError:
            with self._lock:
                self._hits += hits

    def list_requests(self) -> list[tuple[str, int, int]]:
        """Methods and statuses, and how often; the status is 0 where nobody waited for one."""
        return [(*key, count) for key, count in sorted(self._requests.items())]


def format_metrics(values: Iterator[tuple[str, str, str, float]]) -> str:
    """Names, kinds, labels and values, as Prometheus reads them."""
    lines, last = [], ""
    for name, kind, labels, value in values:
        if name != last:
            lines.append(f"# HELP hubaoti_{name} {MEANINGS[name]}")
            lines.append(f"# TYPE hubaoti_{name} {kind}")
        lines.append(f"hubaoti_{name}{labels} {value:.17g}")
        last = name
    return "\n".join(lines) + "\n"
