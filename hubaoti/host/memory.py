"""Memory of a build: what it took at most, and what there is before it starts."""

from __future__ import annotations

import re
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hubaoti.errors import BadRequest, NotEnoughMemory

INTERVAL = 0.2  # seconds between two looks
# What torch, inductor and two C++ compilers take beside a block's weights (measured: 1.2 GB).
OVERHEAD = 5 << 28
MEMINFO = "/proc/meminfo"
# Of both kinds of cgroups: the folder, the files of what may be used and is used, and what the
# second counts and the system gives back when somebody asks for memory: pages of files, read once.
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


@dataclass(slots=True)
class Peak:
    """The most memory that this process and its descendants held together, in bytes.

    Pages that processes share are counted once (PSS of `proc(5)`); between two looks only this
    process is seen.
    """

    seen: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    @property
    def bytes(self) -> int:
        """The most so far, in bytes; at least what the system says of this process."""
        return max(self.seen, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)

    @classmethod
    @contextmanager
    def watch(cls) -> Iterator[Peak]:
        """Look every INTERVAL seconds while the block runs."""
        peak = cls()
        watcher = threading.Thread(target=peak._look, name="hubaoti-memory", daemon=True)
        watcher.start()
        try:
            yield peak
        finally:
            peak._stop.set()
            watcher.join()

    def _look(self) -> None:
        own = Path("/proc/self").resolve().name if Path("/proc/self").exists() else ""
        while own and not self._stop.wait(INTERVAL):
            processes = list_descendants(own)
            if len(processes) > 1:
                self.seen = max(self.seen, sum(map(measure_process_memory, processes)))


def list_descendants(process: str) -> list[str]:
    """A process and all that it started, by pid."""
    found = [process]
    for each in found:
        with suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += (task / "children").read_text().split()
    return found


def measure_process_memory(process: str) -> int:
    """The bytes that a process holds, shared pages in parts; 0 where it is gone."""
    return (_read_amount(Path(f"/proc/{process}/smaps_rollup"), "Pss:") or 0) << 10


def read_available_memory() -> int:
    """The bytes that may still be taken here: of the machine, and of the container's limit."""
    free = _read_amount(Path(MEMINFO), "MemAvailable:")
    found = [] if free is None else [free << 10]
    for folder, limit, used, given_back in CGROUPS:
        with suppress(OSError, ValueError):  # "max" where there is none
            most, taken = (int(Path(folder, name).read_text()) for name in (limit, used))
            cached = _read_amount(Path(folder, "memory.stat"), given_back) or 0
            found.append(most - taken + cached)
    return max(0, min(found, default=1 << 62))


def is_limited(process: int = 0) -> bool:
    """Whether a process may take less memory than there is (`ulimit -v`); by default this one.

    What crashes there may have done so for want of memory alone.
    """
    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    with suppress(OSError, AttributeError):  # it is gone, or this system has no `prlimit`
        return any(resource.prlimit(process, kind)[0] != resource.RLIM_INFINITY for kind in kinds)
    return any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in kinds)


def _read_amount(file: Path, name: str) -> int | None:
    """A number of a file of names and numbers; None where it does not say."""
    with suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return None


def require_memory(needed: int, what: str) -> None:
    """See that so many bytes can be taken, before minutes are spent.

    Raises:
        NotEnoughMemory: they cannot.
    """
    if (have := read_available_memory()) < needed:
        raise NotEnoughMemory(
            f"compiling {what} takes about {needed / 1e9:.1f} GB of memory; {have / 1e9:.1f} GB "
            "are free",
            hint="free some, compile on a larger machine, or compile a smaller part: --regions",
        )


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def parse_size(text: int | str) -> int:
    """The bytes of a number, or of a size as people write it: "8GB", "512 MiB".

    Raises:
        BadRequest: it is none.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None or isinstance(text, bool):
        raise BadRequest(f"{text!r} is no size of memory", hint='write it as "8GB" or "512MiB"')
    number, unit, binary = match.groups()
    power = "KMGT".find(unit.upper()) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)
