"""How much of a download is taken, where only its publisher says how long it is."""

from __future__ import annotations

from typing import Any


class TooLong(Exception):
    """A file has more bytes than were wanted."""


def bar_to(limit: int) -> type[Any]:
    """A progress bar that shows nothing, and ends a download that brings more than `limit` bytes.

    huggingface_hub tells its bar of every piece as it comes, and has no other bound.
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

    return Bar
