"""What a process is told so that it runs under the stand-in."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hubaoti.errors import BadRequest, CannotOpen
from hubaoti.settings import read_library_paths

# Those of chips.h, which says what each of them has; a test holds the two equal.
CAPABILITIES = (75, 80, 86, 89, 90, 100, 103, 120)
MOST_DEVICES = 16


@dataclass(frozen=True, slots=True)
class StandIn:
    """A stand-in that is built: the folder of its libraries, and a CUDA_HOME of headers."""

    folder: Path
    cuda_home: Path

    @property
    def library(self) -> Path:
        """The driver's stand-in, which is also what packages are linked against."""
        return self.folder / "libcuda.so.1"

    def environment(
        self,
        capabilities: Sequence[int],
        *,
        memory: int | None = None,
        log: Path | None = None,
        reads: bool = True,
    ) -> dict[str, str]:
        """The variables of a process under it, over those that it has already.

        It has a device of each of the `capabilities`, in that order, and no other: a real GPU is
        not seen. Each has `memory` bytes, by default those of its data sheet. Without `reads`,
        whoever waits for a copy to the host gets an error of CUDA: nothing was computed there.
        `log` gets a line for each call that a test may want to see.
        What else was preloaded is not: it would stand before the stand-in.

        Raises:
            BadRequest: a capability is not one that the stand-in knows, or there are too many.
        """
        unknown = [sm for sm in capabilities if sm not in CAPABILITIES]
        if unknown or not 0 < len(capabilities) <= MOST_DEVICES:
            known = ", ".join(f"sm{sm}" for sm in CAPABILITIES)
            asked = ", ".join(f"sm{sm}" for sm in unknown) or f"{len(capabilities)} devices"
            raise BadRequest(
                f"there is no stand-in for {asked}", hint=f"it stands for {known}, up to 16 at once"
            )
        folder = str(self.folder)
        loaded, linked = read_library_paths()
        return {
            "STAND_IN_SM": ",".join(map(str, capabilities)),
            "STAND_IN_MEMORY": "" if memory is None else str(memory),
            "STAND_IN_LOG": "" if log is None else str(log),
            "STAND_IN_READS": "" if reads else "no",
            # A space ends a name there; by its own it is found in the first folder below.
            "LD_PRELOAD": self.library.name if " " in folder else str(self.library),
            "LD_LIBRARY_PATH": ":".join([folder, *loaded]),
            "LIBRARY_PATH": ":".join([folder, *linked]),
            "CUDA_HOME": str(self.cuda_home),
            "CUDA_PATH": str(self.cuda_home),
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(len(capabilities)))),
            # Else triton links what it compiles against the driver of this machine.
            "TRITON_LIBCUDA_PATH": folder,
            # Segments that grow are mapped by functions that the stand-in has not.
            "PYTORCH_ALLOC_CONF": "expandable_segments:False",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
        }

    def link_environment(self) -> dict[str, str]:
        """The variables of a process that runs on a real GPU, and links packages against this.

        A machine that has the driver need not have a library to link against, nor the headers.
        """
        _, linked = read_library_paths()
        return {
            "LIBRARY_PATH": ":".join([str(self.folder), *linked]),
            "CUDA_HOME": str(self.cuda_home),
            "CUDA_PATH": str(self.cuda_home),
        }


def require_stand_in() -> None:
    """See that this process runs under the stand-in: a loader that cannot preload it goes on.

    Raises:
        CannotOpen: it does not, and would see what GPU there is, or none.
    """
    if not hasattr(ctypes.CDLL(None), "stand_in_live"):
        raise CannotOpen(
            "the stand-in of a GPU was not loaded into the process that needs it",
            hint="is the disk of HUBAOTI_HOME mounted noexec, or is Python a static or setuid one?",
        )
