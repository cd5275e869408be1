"""What came of calls by their look, in memory that a process shares with all forked from it.

A worker may be ended at any moment, also while it tries a call: who tried is remembered, and only
what ended several of them is not tried again.
"""

from __future__ import annotations

import hashlib
import mmap
import os

from hubaoti.attachment.first_call import DIFFERS, UNTRIED
from hubaoti.mirror.folders import is_process_alive

PLACES = 1 << 17
_PROBES = 32  # places that a look may have
OUTCOME_ATTEMPTS = 3  # that may end without a word
_STATES = 16  # the low bits of a word; all others are the look's fingerprint
IS_BUSY, IS_FULL = range(3, 5)
_AT_IT = 5  # and the attempts that were begun


class CallOutcomes:
    """Verdicts by look; each is one word with its fingerprint, so that no look has another's."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, 8 * PLACES)).cast("Q")
        self._pids = memoryview(mmap.mmap(-1, 4 * PLACES)).cast("I")

    def __getitem__(self, look: object) -> int:
        """UNTRIED, AGREES, DIFFERS; BUSY while somebody tries it, FULL where no place is left."""
        place, _ = self._place(look)
        if place is None:
            return IS_FULL
        state = self._words[place] % _STATES
        if state < _AT_IT:
            return state
        if _is_still_trying(self._pids[place]):
            return IS_BUSY
        return UNTRIED if state < _AT_IT + OUTCOME_ATTEMPTS else DIFFERS

    def __setitem__(self, look: object, verdict: int) -> None:
        """Remember what came of a look: AGREES or DIFFERS; nothing where no place is left."""
        self._write(look, verdict)

    def begin(self, look: object) -> None:
        """This process tries it; should that end it, the attempt stays counted."""
        self._write(look, self._attempts(look) + _AT_IT + 1, os.getpid())

    def count_failure(self, look: object) -> None:
        """The package gave no answer: it may next time, for want of memory is one reason."""
        self._write(look, max(1, self._attempts(look)) + _AT_IT)

    def undo(self, look: object) -> None:
        """The attempt said nothing of the package."""
        self._write(look, max(0, self._attempts(look) - 1) + _AT_IT)

    def _attempts(self, look: object) -> int:
        """The attempts that were begun and came to nothing, and the one that is made."""
        place, _ = self._place(look)
        return 0 if place is None else max(0, self._words[place] % _STATES - _AT_IT)

    def _write(self, look: object, state: int, pid: int = 0) -> None:
        place, fingerprint = self._place(look)
        if place is not None:
            self._pids[place] = pid
            self._words[place] = fingerprint + state  # one store: nobody sees half of it

    def _place(self, look: object) -> tuple[int | None, int]:
        """Where a look is, or the first free place for it; and its fingerprint."""
        digest = hashlib.blake2b(repr(look).encode(), digest_size=16).digest()
        start = int.from_bytes(digest[:8])
        fingerprint = max(1, int.from_bytes(digest[8:]) // _STATES) * _STATES
        for index in range(start, start + _PROBES):
            word = self._words[index % PLACES]
            if not word or word - word % _STATES == fingerprint:
                return index % PLACES, fingerprint
        return None, fingerprint


def _is_still_trying(pid: int) -> bool:
    """Whether a process is there that tries a call."""
    return pid > 0 and is_process_alive(pid)
