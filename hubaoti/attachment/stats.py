"""What graphs could not answer: counted by region and reason, and said once for each reason."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from hubaoti.artifact.canonical import encode_canonical
from hubaoti.artifact.manifest import Manifest
from hubaoti.errors import NotServed
from hubaoti.runtime.fallback import CannotServe

_SIZES = 512  # different sizes of calls that are kept, for a program that runs for months


class Fallback(UserWarning):
    """A call was answered by the module itself, and not by a graph."""


class CallStats:
    """The calls that no graph answered, by region and reason."""

    def __init__(self, manifest: Manifest | None, strict: bool) -> None:
        self.strict = strict
        self._manifest = manifest
        self._calls: Counter[tuple[str, str]] = Counter()
        self._sizes: Counter[tuple[str, str, tuple[tuple[str, int], ...]]] = Counter()
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def anew(self) -> CallStats:
        """The same without a count, for another process."""
        return CallStats(self._manifest, self.strict)

    def missed(self, path: str, why: CannotServe) -> None:
        """Count a call, and warn of the first one for each reason.

        Raises:
            NotServed: where that is wanted.
        """
        told = f"{path or 'the module'} was not answered by a graph ({why.reason}): {why.detail}"
        with self._lock:
            self._calls[path, why.reason] += 1
            entry = (path, why.reason, tuple(sorted(why.sizes.items())))
            if why.sizes and (entry in self._sizes or len(self._sizes) < _SIZES):
                self._sizes[entry] += 1
            first = why.reason not in self._said
            self._said.add(why.reason)
        if self.strict:
            raise NotServed(told, hint=why.advice) from why
        if first:
            warnings.warn(f"{told}; {why.advice}", Fallback, stacklevel=4)

    def stats(self, compiled: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        """All counts, with those of the graphs; plain JSON."""
        with self._lock:
            calls, sizes = dict(self._calls), dict(self._sizes)
        regions = {
            path: {
                "compiled": dict(counts),
                "eager": {why: n for (at, why), n in sorted(calls.items()) if at == path},
            }
            for path, counts in compiled.items()
        }
        return {
            "schema": 1,
            "artifact": self._manifest.digest if self._manifest else None,
            "compiled": sum(sum(counts.values()) for counts in compiled.values()),
            "eager": sum(calls.values()),
            "regions": regions,
            "missed": [
                {"region": path, "reason": why, "sizes": dict(dims), "calls": n}
                for (path, why, dims), n in sorted(sizes.items())
            ],
        }

    def save(self, stats: Mapping[str, Any], path: Path) -> None:
        """Write counts to a file, with the dims that the artifact has."""
        manifest = self._manifest
        asked: dict[str, Any] = {}
        if manifest is not None:
            asked = {"dims": manifest.build.dims, "buckets": manifest.build.buckets}
            asked |= {"model": manifest.source.model, "task": manifest.program.task}
        path.write_bytes(encode_canonical({**stats, "build": msgspec.to_builtins(asked)}))
