"""How long an endpoint may say nothing before nobody waits for it any longer.

What counts are seconds without a byte: a file that keeps coming may take hours. huggingface_hub
asks most of its questions without any end of waiting, and repeats some of them; what it asks for
within one call of ours has these seconds together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

SILENCE = 15.0  # seconds until the next byte of an answer
# Until the first one, where the endpoint has to do something: a commit of many files.
WRITING = 25.0
LONGEST_SILENCE = 30.0  # of one call of ours, however often it is asked again
_ENOUGH = 1 << 20  # bytes of a file after which it is no longer silent; as many come at a time


class Silent(TimeoutError):
    """An endpoint takes requests and has said nothing for as long as one call of ours waits."""


@dataclass(slots=True, eq=False)
class Silence:
    """How long one call has been without a byte, of all requests that are made for it in a thread.

    `seconds` are of requests that were given up; `since` is when this one was last heard of, if it
    is still waited for, which is for `patience` seconds at most.
    """

    seconds: float = 0.0
    since: float | None = None
    patience: float = 0.0
    taken: int = 0

    def begin(self, request: Any) -> None:
        """A request that goes out now: it waits no longer than there are seconds left.

        Raises:
            Silent: there are none.
        """
        now = time.monotonic()
        if self.since is not None:
            self.seconds += min(now - self.since, self.patience)
        left = LONGEST_SILENCE - self.seconds
        if left <= 0.001:
            raise Silent
        usual = SILENCE if request.method in {"GET", "HEAD"} else WRITING
        self.patience, self.since, self.taken = min(usual, left), now, 0
        waits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            what: min(self.patience, waits.get(what) or self.patience)
            for what in ("connect", "read", "write", "pool")
        }

    def answer(self, response: Any) -> Any:
        """The body of an answer that has begun, which tells of each byte as it comes."""
        self.since = None  # what is not read is not waited for
        body, silence = response.stream, self
        # As in bounds: a body of the library that huggingface_hub asks with, of either name.
        library = import_module(type(response).__module__.partition(".")[0])

        class Heard(library.SyncByteStream):  # type: ignore[name-defined,misc]
            def __iter__(self) -> Iterator[bytes]:
                silence._hear(0)
                for piece in body:
                    silence._hear(len(piece))
                    yield piece
                silence.seconds, silence.since = 0.0, None

            def __getattr__(self, name: str) -> Any:
                return getattr(body, name)

            def close(self) -> None:
                body.close()

        return Heard()

    def _hear(self, count: int) -> None:
        self.since = time.monotonic()
        self.taken += count
        if self.taken >= _ENOUGH:
            self.seconds = 0.0


def is_silence(error: BaseException) -> bool:
    """Whether an error says that something was waited for: ours, or one of huggingface_hub's."""
    names = {"ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout"}
    return isinstance(error, Silent) or type(error).__name__ in names
