"""A host as a file describes it, such as `hubaoti doctor --json` printed on that machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from hubaoti.errors import BadRequest
from hubaoti.host.probe import Host

_LARGEST = 4 << 20  # bytes; the libraries of a machine are 100 kB
# What says nothing of whether an artifact runs there: it is fetched from here.
_OF_HERE = ("endpoint", "mirror", "offline", "kernels", "disk_free", "notes")
_HINT = "write it as hubaoti doctor --json prints it on that machine, or a part of that"


def read_host(path: Path, here: Host) -> Host:
    """The host that a file describes: all that `doctor --json` says of it, or a part.

    What the file does not say is as it is `here`; but where it says what kind of torch or GPU there
    is and nothing of libraries, they are not judged, and the driver serves the CUDA of that torch.

    Raises:
        BadRequest: it cannot be read, or does not describe a host.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST >> 20} MiB")
        facts = msgspec.json.decode(content, type=dict[str, Any])
        if unknown := facts.keys() - {*Host.__dataclass_fields__}:
            raise ValueError(f"it has unknown facts: {', '.join(sorted(unknown)):.200}")
        return _describe(facts, here)
    except (OSError, ValueError, TypeError) as error:
        raise BadRequest(f"{path} describes no host: {error}", hint=_HINT) from error


def _describe(facts: dict[str, Any], here: Host) -> Host:
    """The host of some facts; ValueError or TypeError where they are none."""
    said = {name: fact for name, fact in facts.items() if name not in _OF_HERE}
    if not isinstance(said.get("torch") or {}, dict):
        raise ValueError('its torch is no object, as {"version": "2.13.0+cpu"}')
    if not isinstance(said.get("gpus") or [], list):
        raise ValueError("its gpus are no list")
    if not all(isinstance(gpu, dict) for gpu in said.get("gpus") or []):
        raise ValueError('one of its gpus is no object, as {"sm": 90}')
    if said.get("torch"):
        said["torch"] = {"cuda": None, "git": None, "path": "", **said["torch"]}
    if said.get("gpus"):
        said["gpus"] = [{"name": "a GPU", "memory": None, **gpu} for gpu in said["gpus"]]
    if not said.keys().isdisjoint({"torch", "gpus", "os"}):
        said.setdefault("libraries", None)
    found: Host = msgspec.convert(here.to_dict() | said, Host, dec_hook=_convert_path)
    if found.gpus and "driver_cuda" not in said and found.torch:
        return replace(found, driver_cuda=found.torch.cuda)
    return found


def _convert_path(kind: type, value: Any) -> Any:
    """A path from a text; nothing else is converted."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"{value!r:.80} is no {kind.__name__}")
