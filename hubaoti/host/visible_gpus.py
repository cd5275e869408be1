"""Which of the driver's GPUs CUDA shows this process, as its environment says.

NVML lists all of them by their places on the bus. CUDA shows those that `CUDA_VISIBLE_DEVICES`
names, all by their numbers or all by the beginning of their UUIDs, up to the first that is neither;
one that is named twice hides all. It is read as torch counts GPUs, down to `1gpu`, which is 1
(`torch.cuda._parse_visible_devices` and `_device_count_nvml`, 2.11 to 2.15). Numbers count the
fastest first, unless `CUDA_DEVICE_ORDER` is `PCI_BUS_ID`. Which that is of GPUs of several kinds
only CUDA knows, and a process that asked it could fork none that uses a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import TypeVar

from hubaoti.settings import Settings

_Gpu = TypeVar("_Gpu")
_Name = TypeVar("_Name")
_NUMBER = re.compile("[+-]?[0-9]{1,4000}")  # as many digits as Python reads at once
_UUID, _PART = "GPU-", "MIG-"


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
    found = _list_places(visible, len(gpus), read_uuid)
    is_counted = not visible.startswith(_UUID)
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


def _list_places(visible: str, count: int, read_uuid: Callable[[int], str]) -> list[int] | None:
    """The places of the GPUs that are named; None where a part of one is, which has no place."""
    if visible.startswith(_PART):
        return None
    names = visible.split(",")
    if visible.startswith(_UUID):
        found = _take_unique(name if name.startswith(_UUID) else None for name in names)
        uuids = [read_uuid(place) for place in range(count)]
        return _take_unique(_find_only(name, uuids) for name in found)
    numbers = _take_unique(_read_number(name.strip()) for name in names)
    return [*takewhile(lambda number: number < count, numbers)]


def _take_unique(names: Iterable[_Name | None]) -> list[_Name]:
    """Those before the first that is None; none at all where one of them is there twice."""
    found: list[_Name] = []
    for name in names:
        if name is None:
            break
        if name in found:
            return []
        found.append(name)
    return found


def _find_only(name: str, uuids: Sequence[str]) -> int | None:
    """The place of the one UUID that begins so."""
    places = [place for place, uuid in enumerate(uuids) if uuid.startswith(name)]
    return places[0] if len(places) == 1 else None


def _read_number(name: str) -> int | None:
    """The number that a name begins with, as C reads one."""
    match = _NUMBER.match(name)
    return int(match[0]) if match and int(match[0]) >= 0 else None
