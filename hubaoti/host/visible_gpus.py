"""Which of the driver's GPUs CUDA shows this process, as its environment says.

NVML lists all of them by their places on the bus. CUDA shows those that `CUDA_VISIBLE_DEVICES`
names, by their numbers or by the beginning of their UUIDs, up to the first that is neither; one
that is named twice hides all. Its numbers count the fastest first, unless `CUDA_DEVICE_ORDER` is
`PCI_BUS_ID`. Which that is of GPUs of several kinds only CUDA knows, and a process that asked it
could fork none that uses a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from hubaoti.settings import Settings

_Gpu = TypeVar("_Gpu")
_NUMBER, _UUID = re.compile("[0-9]{1,6}"), "GPU-"


def hide_gpus(
    gpus: Sequence[_Gpu], settings: Settings, read_uuid: Callable[[int], str], notes: list[str]
) -> tuple[_Gpu, ...]:
    """Those of NVML's GPUs that CUDA shows, in CUDA's order; equal ones are of one kind.

    `read_uuid` says the UUID of one by its place. Where it cannot be told which are meant, all are
    kept; what is hidden, and what cannot be told, is noted.
    """
    visible = settings.visible_gpus
    if visible is None or not gpus:
        return tuple(gpus)
    names = [name.strip() for name in visible.split(",")]
    found = _list_places(names, len(gpus), read_uuid)
    is_counted = any(map(_NUMBER.fullmatch, names))
    by_the_bus = settings.gpu_order == "PCI_BUS_ID" or len({*gpus}) == 1
    if found is None or (is_counted and not by_the_bus and 0 < len(found) < len(gpus)):
        notes.append(
            f"CUDA_VISIBLE_DEVICES={visible}: which of the {len(gpus)} GPUs are meant only CUDA "
            "knows, so all are listed; CUDA_DEVICE_ORDER=PCI_BUS_ID counts them as they are here"
        )
        return tuple(gpus)
    if len(found) < len(gpus):
        hidden = f"{len(gpus) - len(found)} of {len(gpus)} GPUs"
        notes.append(f"CUDA_VISIBLE_DEVICES={visible} hides {hidden}")
    return tuple(gpus[place] for place in found)


def _list_places(
    names: Sequence[str], count: int, read_uuid: Callable[[int], str]
) -> list[int] | None:
    """The places of the GPUs that are named; None where a part of one is, which has no place."""
    found: list[int] = []
    for name in names:
        if name.startswith("MIG-"):
            return None
        places = [int(name)] if _NUMBER.fullmatch(name) else []
        if name.startswith(_UUID):
            places = [place for place in range(count) if read_uuid(place).startswith(name)]
        if len(places) != 1 or places[0] >= count:
            break
        if places[0] in found:
            return []
        found.append(places[0])
    return found
