"""What graphs could not answer: counted by region and reason, and said once for each reason."""

from __future__ import annotations

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
from hubaoti.runtime.locks import ForkSafeLock

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
        self._warned: set[str] = set()
        self._lock = ForkSafeLock()

    def make_empty(self) -> CallStats:
        """The same without a count, for another process."""
        return CallStats(self._manifest, self.strict)

    def count_miss(self, path: str, error: CannotServe) -> None:
        """Count a call, and warn of the first one for each reason.

        Raises:
            NotServed: where that is wanted.
        """
        reason = error.reason
        message = f"{path or 'the module'} was not answered by a graph ({reason}): {error.detail}"
        with self._lock:
            self._calls[path, reason] += 1
            entry = (path, reason, tuple(sorted(error.sizes.items())))
            if error.sizes and (entry in self._sizes or len(self._sizes) < _SIZES):
                self._sizes[entry] += 1
            first = reason not in self._warned
            self._warned.add(reason)
        if self.strict:
            raise NotServed(message, hint=error.advice) from error
        if first:
            warnings.warn(f"{message}; {error.advice}", Fallback, stacklevel=4)

    def stats(
        self,
        compiled: Mapping[str, Mapping[str, int]],
        compared: Mapping[str, Mapping[str, int]] | None = None,
    ) -> dict[str, Any]:
        """All counts, with those of the graphs; plain JSON. What was not compared is not there."""
        beside = {path: _drop_zeros(counts) for path, counts in (compared or {}).items()}
        with self._lock:
            calls, sizes = dict(self._calls), dict(self._sizes)
        regions = {
            path: {
                "compiled": dict(counts),
                "eager": {reason: n for (p, reason), n in sorted(calls.items()) if p == path},
                **({"compared": beside[path]} if beside.get(path) else {}),
            }
            for path, counts in compiled.items()
        }
        return {
            "schema": 1,
            "artifact": self._manifest.digest if self._manifest else None,
            "compiled": _sum_all(compiled),
            "eager": sum(calls.values()),
            **({"compared": total} if (total := _sum_all(beside)) else {}),
            "regions": regions,
            "missed": [
                {"region": path, "reason": reason, "sizes": dict(dims), "calls": n}
                for (path, reason, dims), n in sorted(sizes.items())
            ],
        }

    def save(self, stats: Mapping[str, Any], path: Path) -> None:
        """Write counts to a file, with the dims that the artifact has."""
        manifest = self._manifest
        build: dict[str, Any] = {}
        if manifest is not None:
            build = {"dims": manifest.build.dims, "buckets": manifest.build.buckets}
            build |= {"model": manifest.source.model, "task": manifest.program.task}
        path.write_bytes(encode_canonical({**stats, "build": msgspec.to_builtins(build)}))


def _sum_all(counts: Mapping[str, Mapping[str, int]]) -> int:
    """The calls of all regions."""
    return sum(sum(each.values()) for each in counts.values())


def _drop_zeros(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}
