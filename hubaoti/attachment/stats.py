"""What graphs could not answer: counted by region and reason, and said once for each reason."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from hubaoti.artifact.canonical import encode_canonical
from hubaoti.artifact.manifest import Manifest
from hubaoti.errors import NotServed
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.locks import ForkSafeLock

_SIZES = 512  # different sizes of calls that are kept, for a program that runs for months
# Through whose frames a call comes to a module: none of them is the caller's.
_LIBRARIES = "hubaoti torch transformers transformers_modules diffusers accelerate peft"
_BETWEEN = frozenset(_LIBRARIES.split())
_Sizes = tuple[str, str, tuple[tuple[str, int], ...]]  # of which graphs' regions, why, which


class Fallback(UserWarning):
    """A call was answered by the module itself, and not by a graph."""


@dataclass(slots=True)
class _MissedCalls:
    """Calls of the same sizes that the same graphs could not serve, by whichever region."""

    region: str  # the first of them
    calls: int = 0
    filled: int = 0  # of a cache, at most
    regions: set[str] = field(default_factory=set)

    def count(self, path: str, filled: int) -> None:
        self.calls += 1
        self.filled = max(self.filled, filled)
        self.regions.add(path)

    def describe(self, reason: str, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The row of `stats`, which names one region for all that share its graphs."""
        filled = {"filled": self.filled} if self.filled else {}
        return {
            "region": self.region,
            "regions": len(self.regions),
            "reason": reason,
            "sizes": {**sizes, **filled},
            "calls": self.calls,
        }


class CallStats:
    """The calls that no graph answered, by region and reason.

    A decoder misses the same sizes in each of its blocks and at each of its steps, but for how much
    of its cache is filled: that is kept as the most there was, which is what new dims follow from.
    """

    def __init__(self, manifest: Manifest | None, strict: bool) -> None:
        self.strict = strict
        self._manifest = manifest
        self._calls: Counter[tuple[str, str]] = Counter()
        self._missed: dict[_Sizes, _MissedCalls] = {}
        self._shared = {} if manifest is None else _find_shared_graphs(manifest)
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
            if error.sizes:
                self._keep_sizes(path, reason, dict(error.sizes))
            first = reason not in self._warned
            self._warned.add(reason)
        if self.strict:
            raise NotServed(message, hint=error.advice) from error
        if first:
            text = f"{message}; {error.advice}"
            warnings.warn(text, Fallback, stacklevel=1 + _count_frames_to_caller())

    def _keep_sizes(self, path: str, reason: str, sizes: dict[str, int]) -> None:
        """Keep the sizes of a call, unless there are too many; under the lock."""
        filled = sizes.pop("filled", 0)
        entry = (self._shared.get(path, path), reason, tuple(sorted(sizes.items())))
        if entry in self._missed or len(self._missed) < _SIZES:
            self._missed.setdefault(entry, _MissedCalls(path)).count(path, filled)

    def stats(
        self,
        compiled: Mapping[str, Mapping[str, int]],
        compared: Mapping[str, Mapping[str, int]] | None = None,
    ) -> dict[str, Any]:
        """All counts, with those of the graphs; plain JSON. What was not compared is not there."""
        beside = {path: _drop_zeros(counts) for path, counts in (compared or {}).items()}
        with self._lock:
            calls = dict(self._calls)
            missed = [
                each.describe(reason, dict(sizes))
                for (_, reason, sizes), each in sorted(self._missed.items(), key=itemgetter(0))
            ]
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
            "missed": missed,
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


def _find_shared_graphs(manifest: Manifest) -> dict[str, str]:
    """For each region the first one that has the same graphs."""
    graphs: dict[str, list[str]] = {}
    for graph in manifest.graphs:
        for path in graph.modules:
            graphs.setdefault(path, []).append(graph.id)
    first: dict[tuple[str, ...], str] = {}
    return {path: first.setdefault(tuple(ids), path) for path, ids in graphs.items()}


def _count_frames_to_caller() -> int:
    """How many frames up from whoever asks the one is that called the model.

    Where all are between, as in a worker that was started by a library, the outermost one.
    """
    frame, count = sys._getframe(1), 0
    while frame.f_back is not None and _is_between(frame):
        frame, count = frame.f_back, count + 1
    return count


def _is_between(frame: FrameType) -> bool:
    """Whether a frame is of a library that hands calls on, or of a decorator of the language's."""
    name = frame.f_globals.get("__name__") or ""
    return name.partition(".")[0] in _BETWEEN or name == "contextlib"
