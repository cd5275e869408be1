"""The machine that the other checks run on."""

from __future__ import annotations

import huggingface_hub
import torch
import transformers

from gpu.conftest import Found
from gpu.place import Place
from hubaoti.host.probe import probe_host


def test_host(device: torch.device, place: Place, found: Found) -> None:
    """It is described as `hubaoti doctor` does, with the libraries that are used here."""
    host = probe_host(place.settings)
    versions = {module.__name__: module.__version__ for module in (transformers, huggingface_hub)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else host.cpu
    said = f"{name}, torch {torch.__version__}, Python {host.python}"
    facts = host.to_dict()
    found(said, host=facts, torch=str(torch.__version__), **versions)
    assert facts["torch"]["version"] == torch.__version__
