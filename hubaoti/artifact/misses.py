"""What graphs could not serve, as `Attachment.save_misses` wrote it, and the dims that would have.

Only sizes can be mended by compiling again. What else kept graphs from answering is told with what
to do about it.
"""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import msgspec

from hubaoti.artifact.schema import Dim, Size
from hubaoti.disk import read_small
from hubaoti.errors import BadRequest

_Bounds = tuple[int, int]


class Missed(msgspec.Struct, frozen=True):
    """Calls that no graph served, for one reason, at one size, of one region or its like."""

    region: str
    reason: str
    sizes: dict[Dim, Size]
    calls: int


class AskedDims(msgspec.Struct, frozen=True):
    """The dims, buckets, model and task that the graphs were compiled for."""

    dims: dict[Dim, tuple[int, int, int]] = {}
    buckets: tuple[dict[Dim, _Bounds], ...] = ()
    model: str = ""
    task: str = ""


class _RegionCalls(msgspec.Struct, frozen=True):
    """How calls of one region were answered: by which graph, and why by none."""

    compiled: dict[str, int] = {}
    eager: dict[str, int] = {}


class Misses(msgspec.Struct, frozen=True):
    """A file of misses, schema 1: what was asked for, and the calls that no graph served."""

    schema: int
    build: AskedDims
    missed: tuple[Missed, ...]
    regions: dict[str, _RegionCalls] = {}

    @property
    def reasons(self) -> dict[str, int]:
        """How many calls each reason kept from the graphs."""
        found: Counter[str] = Counter()
        for region in self.regions.values():
            found.update(region.eager)
        return dict(found)

    @property
    def sizes(self) -> list[dict[str, int]]:
        """The sizes that were not served, each once."""
        each = {tuple(sorted(m.sizes.items())) for m in self.missed if m.reason == "shape"}
        return [dict(sizes) for sizes in sorted(each)]


_LARGEST = 64 << 20  # bytes; a call that was missed takes some hundred
_DECODER = msgspec.json.Decoder(Misses)


@dataclass(frozen=True, slots=True)
class Proposal:
    """Dims and buckets that would have served what was missed, as `compile` takes them."""

    dims: dict[str, tuple[int, int, int]]
    buckets: tuple[dict[str, _Bounds], ...]

    def to_arguments(self) -> list[str]:
        """The `--dim` and `--bucket` options of `hubaoti compile`, as a list of arguments."""
        found = []
        for name, (low, high, step) in self.dims.items():
            found += ["--dim", f"{name}={low}:{high}" + (f":{step}" if step > 1 else "")]
        for bucket in self.buckets:
            bounds = ",".join(f"{name}={low}:{high}" for name, (low, high) in bucket.items())
            found += ["--bucket", bounds]
        return found


def propose_command(misses: Misses, proposal: Proposal, model: str | None = None) -> str:
    """The `hubaoti compile` for what is proposed; of a module from Python the call that makes it.

    `model` is what is compiled, where the user says so.
    """
    build = misses.build
    if model is None and _is_module(build):
        buckets = f", buckets={[*proposal.buckets]}" * bool(proposal.buckets)
        dims = f"shapes=shapes, dims={proposal.dims}{buckets}"
        return f"hubaoti.compile(module, 'bundle', calls=calls, {dims})"
    words = ["hubaoti", "compile", model or build.model or "MODEL"]
    words += ["--task", build.task] * bool(build.task)
    return shlex.join([*words, *proposal.to_arguments(), "-o", "bundle"])


def explain_shapes(misses: Misses, model: str | None = None) -> str | None:
    """What `shapes` has to be in a proposed call, which no file of misses knows; else None."""
    if model is not None or not _is_module(misses.build):
        return None
    names = ", ".join(misses.build.dims)
    return (
        f"shapes names the sizes {names} of the inputs of {misses.build.model}, as when it was "
        "compiled; leave it out if calls of different sizes gave them their names"
    )


def _is_module(build: AskedDims) -> bool:
    """Whether graphs were compiled of a module from Python, which is called by its class.

    A model of a folder is called by the folder, and that may be elsewhere: so one that is there.
    """
    named = "/" in build.model or Path(build.model).is_dir()
    return build.task == "forward" and bool(build.model) and not named


def read_misses(path: Path) -> Misses:
    """Read and check a file of misses.

    Raises:
        BadRequest: it cannot be read, or is none.
    """
    hint = "write one with attachment.save_misses(FILE)"
    try:
        found = _DECODER.decode(read_small(path, _LARGEST))
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    except msgspec.MsgspecError as error:
        raise BadRequest(f"{path} is no file of misses: {error!s:.200}", hint=hint) from error
    if found.schema != 1:
        raise BadRequest(f"{path} has schema {found.schema}, not 1", hint="upgrade hubaoti")
    return found


def propose_dims(misses: Misses) -> Proposal | None:
    """The dims and buckets that would have served every size; None where sizes were no reason."""
    if not misses.sizes:
        return None
    dims = dict(misses.build.dims)
    for sizes in misses.sizes:
        for name, size in sizes.items():
            if name in dims and size > 0:
                low, high, step = dims[name]
                dims[name] = (min(low, size), max(high, size), gcd(step, size))
        # A cache has to hold what is filled of it; how much that is, no one asks for.
        if "cache" in dims and sizes.get("filled", 0) > dims["cache"][1]:
            low, _, step = dims["cache"]
            dims["cache"] = (low, -(-sizes["filled"] // step) * step, step)
    buckets = misses.build.buckets
    for sizes in misses.sizes:
        buckets = _extend_nearest_bucket(buckets, sizes)
    return Proposal(dims, buckets)


def _extend_nearest_bucket(
    buckets: tuple[dict[str, _Bounds], ...], sizes: dict[str, int]
) -> tuple[dict[str, _Bounds], ...]:
    """Buckets of which one holds some sizes: the one that is nearest is stretched."""
    if not buckets or any(distance_to_bucket(bucket, sizes) == 0 for bucket in buckets):
        return buckets
    nearest = min(range(len(buckets)), key=lambda index: distance_to_bucket(buckets[index], sizes))
    mended = {
        name: (min(low, sizes.get(name, low)), max(high, sizes.get(name, high)))
        for name, (low, high) in buckets[nearest].items()
    }
    return (*buckets[:nearest], mended, *buckets[nearest + 1 :])


def distance_to_bucket(bucket: dict[str, _Bounds], sizes: dict[str, int]) -> int:
    """How far some sizes are outside of a bucket."""
    return sum(
        max(low - sizes[name], sizes[name] - high, 0)
        for name, (low, high) in bucket.items()
        if name in sizes
    )
