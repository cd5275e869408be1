"""What a build of a kernel says of itself, in its `metadata.json`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from hubaoti.errors import BadManifest, first_line

METADATA = "metadata.json"
LARGEST_METADATA = 1 << 20  # bytes


class Backend(msgspec.Struct, frozen=True):
    """What it computes on, `cpu` or `cuda`, and the capabilities that it was built for."""

    type: str
    archs: list[str] | None = None


class KernelMetadata(msgspec.Struct, frozen=True, rename="kebab"):
    """The namespace of its ops (`id`), its version, and the kernels that it loads itself."""

    id: str
    backend: Backend
    version: Annotated[int, msgspec.Meta(ge=0)] | None = None
    kernel_depends: list[Any] = []


# msgspec learns a type when it is first used, and two threads that meet there end the process.
_DECODER = msgspec.json.Decoder(KernelMetadata)


def parse_metadata(text: bytes, where: str) -> KernelMetadata:
    """Read a build's metadata, which came from `where`.

    Raises:
        BadManifest: they are none, or name other kernels: those nobody pins.
    """
    hint = "ask its publisher for a build of today's kernel-builder"
    try:
        found = _DECODER.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadManifest(
            f"{where} does not say which ops it has: {first_line(error)}", hint=hint
        ) from error
    if found.kernel_depends:
        raise BadManifest(
            f"{where} loads other kernels, which nothing pins",
            hint="use a kernel that needs no other",
        )
    return found
