"""The device that this very process was given, as torch sees it."""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from hubaoti.attachment.served_modules import find_device

LIBCUDA = "libcuda.so.1"


def choose_serving_device(module: nn.Module) -> torch.device:
    """Where a module would be served: on the device of its tensors, else on what there is."""
    if device := find_device(module):
        return device
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def query_driver_cuda() -> str | None:
    """The newest CUDA that the driver serves, in its own words; of use where NVML does not answer.

    torch has no word for it, in builds of 2.11 to 2.15. Asking makes no context.
    """
    number = ctypes.c_int()
    try:
        if ctypes.CDLL(LIBCUDA).cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):  # there is no driver, or another library of that name
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if number.value else None
