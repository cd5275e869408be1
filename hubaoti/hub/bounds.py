"""How much is taken of what an endpoint sends, where only the endpoint says how long it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from hubaoti.errors import HubUnreachable

MOST_ANSWERED = 32 << 20  # bytes of one answer: the tags of 200,000 commits, a page of a tree
_MOST_PACKED = 64 << 10  # bytes of one that is compressed, which nobody asked for
_PACKED = {"gzip", "deflate"}  # how, where at most a thousand bytes come of one
LONGEST_ANSWER = 300.0  # seconds, from its first byte to its last


class TooLong(Exception):
    """A file has more bytes than were wanted."""


def make_limit_bar(limit: int) -> type[Any]:
    """A progress bar that shows nothing, and ends a download that brings more than `limit` bytes.

    huggingface_hub tells its bar of every piece as it comes, and has no other bound. Of a file from
    Xet it tells also what came over the network, which may be more than the file: that apart.
    """
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            self.taken = int(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self.taken += int(n or 0)
            if self.taken > limit:
                raise TooLong
            return None

        def update_transfer(self, n: float | None = 1) -> None:
            """Else another bar of this class is made, and counts those bytes as the file's."""

        def set_transfer_postfix_str(self, postfix: str, refresh: bool = False) -> None:
            """huggingface_hub's name for a text beside the bar, which is not shown."""

    return Bar


def bound_answer(response: Any) -> Any:
    """The body of an answer that is not read yet, which ends with an error where it is too long.

    Raises:
        HubUnreachable: when it is read, and has too many bytes or takes too long.
    """
    body = response.stream
    how = response.headers.get("content-encoding", "identity").strip().lower()
    if how not in {"identity", *_PACKED}:
        raise describe_too_long(
            response, f"what is packed as {how!r:.80}, which may unfold without end,"
        )
    most = _MOST_PACKED if how in _PACKED else MOST_ANSWERED
    # The library that huggingface_hub asks with has two names, and takes only bodies of its own.
    library = import_module(type(response).__module__.partition(".")[0])

    class Bounded(library.SyncByteStream):  # type: ignore[name-defined,misc]
        def __iter__(self) -> Iterator[bytes]:
            taken, until = 0, time.monotonic() + LONGEST_ANSWER
            for piece in body:
                taken += len(piece)
                if taken > most:
                    raise describe_too_long(response, f"more than {most} bytes")
                if time.monotonic() > until:
                    raise describe_too_long(response, f"more than {LONGEST_ANSWER:.0f} s of bytes")
                yield piece

        def __getattr__(self, name: str) -> Any:
            return getattr(body, name)

        def close(self) -> None:
            body.close()

    return Bounded()


def describe_too_long(response: Any, how: str) -> HubUnreachable:
    return HubUnreachable(
        f"{response.request.url.host} sends {how} to {response.request.url.path:.200}",
        hint="that is no Hub's answer: see whether HF_ENDPOINT names the right host, and tell its "
        "operator",
    )
