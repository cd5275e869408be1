"""A file on its way from upstream: fetched once, followed by whoever asked for it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from threading import Event
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool

from hubaoti.server.errors import ServerError, upstream_gone
from hubaoti.server.objects import Incoming, Objects
from hubaoti.server.trees import TreeEntry
from hubaoti.server.upstream import Upstream, UpstreamGone
from hubaoti.server.validation import RepoId

HOLD = 4.0
"""Seconds in which a file is whole and verified before its first byte is sent; of one that takes
longer, all but the last piece is sent while it comes."""

_HELD = 2**20
"""That piece's bytes: of a file that turns out wrong, nobody is given the end."""

_ATTEMPTS = 5
_POLL = 0.05  # seconds


class Fetch:
    """One file that is being fetched; `done` is its digest once it is stored."""

    def __init__(self, entry: TreeEntry, stopped: Event) -> None:
        """Of this entry of a tree; it ends early once it is `stopped`."""
        self.entry = entry
        self._stopped = stopped
        self.done: Future[str] = Future()
        self._received = 0
        self._open: Callable[[], BinaryIO] | None = None

    async def wait(self, seconds: float) -> str | None:
        """The file's digest, None where it is not here after so many seconds.

        Raises:
            ServerError: it cannot be had.
        """
        waiting = asyncio.wrap_future(self.done)
        with suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(waiting), seconds)
        return None

    async def follow(self) -> AsyncIterator[bytes]:
        """The file's bytes as they come, the last of them once all are verified.

        Raises:
            ServerError: it cannot be had, which cuts the answer off.
        """
        sent = 0
        while self._open is None and not self.done.done():
            await asyncio.sleep(_POLL)
        with await run_in_threadpool(self._reopen) as file:
            while sent < self.entry.size:
                ready = self._count_ready()
                piece = await run_in_threadpool(file.read, min(_HELD, ready - sent))
                sent += len(piece)
                if piece:
                    yield piece
                else:
                    await asyncio.sleep(_POLL)

    def _reopen(self) -> BinaryIO:
        """What is written of the file, to be read while more comes."""
        try:
            if self._open is not None:
                return self._open()
        except (OSError, ValueError):  # of a file that was moved, or closed
            pass
        self.done.result()
        raise ServerError(502, "The file came before it could be followed: ask again")

    def _count_ready(self) -> int:
        """How many bytes may be sent by now."""
        if self.done.done():
            self.done.result()
            return self.entry.size
        return max(0, self._received - _HELD)

    def run(
        self, upstream: Upstream, objects: Objects, where: tuple[RepoId, str, str]
    ) -> tuple[str, int]:
        """Fetch and store the file of a repo, commit and path; its digest, and the bytes fetched.

        Raises:
            ServerError: upstream is gone, or gives other bytes than it listed.
            UpstreamMissing: it has no such file any more.
        """
        entry = self.entry
        with objects.receive(entry.size) as incoming:
            self._open = incoming.reread
            blob = self._receive(upstream, incoming, where)
            if not entry.lfs and blob != entry.blob:
                raise _other_bytes(where)
            try:
                return incoming.keep(entry.sha256 or None), incoming.size
            except ServerError:
                raise _other_bytes(where) from None

    def _receive(
        self, upstream: Upstream, incoming: Incoming, where: tuple[RepoId, str, str]
    ) -> str:
        """Write all of the file; returns git's id of its bytes.

        A connection that drops is taken up again where it ended.
        """
        size = self.entry.size
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        for _ in range(_ATTEMPTS):
            with suppress(UpstreamGone), upstream.open_file(*where, incoming.size) as pieces:
                for piece in pieces:
                    blob.update(piece)
                    incoming.write(piece)
                    self._received = incoming.size
                    if incoming.size > size:
                        raise _other_bytes(where)
                    if self._stopped.is_set():
                        raise _cut_off(where)
            if incoming.size == size:
                return blob.hexdigest()
        raise _cut_off(where)


def _other_bytes(where: tuple[RepoId, str, str]) -> ServerError:
    repo, commit, path = where
    words = f"upstream gives other bytes of {path} than it lists, which are dropped"
    return ServerError(502, f"{repo}@{commit}: {words}")


def _cut_off(where: tuple[RepoId, str, str]) -> ServerError:
    repo, commit, path = where
    words = f"upstream cannot be asked for {path}, which is not here"
    return upstream_gone(f"{repo}@{commit}: {words}")
