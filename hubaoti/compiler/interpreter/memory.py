"""The stand-in's device memory as the host sees it: tensors of the device as the CPU's."""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

import torch

_UNWRITTEN = 0xFF  # of each byte: nan in every floating dtype, -1 in every signed one


@functools.cache
def find_stand_in() -> Any:
    """The functions of the stand-in that this process runs under.

    Raises:
        AttributeError: it does not run under it.
    """
    library = ctypes.CDLL(None)
    library.stand_in_host.restype, library.stand_in_left.restype = ctypes.c_void_p, ctypes.c_size_t
    library.stand_in_host.argtypes = library.stand_in_left.argtypes = [ctypes.c_void_p]
    return library


def find_on_host(address: int) -> int:
    """Where the host finds what lies at an address of the device."""
    return int(find_stand_in().stand_in_host(address) or 0)


def see_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the device as one of the CPU: the same memory, of the same sizes and strides."""
    count = _count_spanned(tensor)
    if not count or not tensor.data_ptr():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    spanned = (ctypes.c_byte * (count * tensor.itemsize)).from_address(
        find_on_host(tensor.data_ptr())
    )
    plain = torch.frombuffer(spanned, dtype=torch.uint8).view(tensor.dtype)
    return plain.as_strided(tensor.shape, tensor.stride())


def _count_spanned(tensor: torch.Tensor) -> int:
    """The elements from its first to its last, those between its rows included."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def mark_unwritten(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a new tensor of the device with what nobody means, so that a use of it is seen."""
    if (count := _count_spanned(tensor)) and tensor.data_ptr():
        ctypes.memset(find_on_host(tensor.data_ptr()), _UNWRITTEN, count * tensor.itemsize)
    return tensor


def forbid_writes(tensor: torch.Tensor) -> None:
    """Let no one write into a tensor that has pages of its own: who does ends the process."""
    if (count := _count_spanned(tensor)) and tensor.data_ptr():
        address, size = find_on_host(tensor.data_ptr()), count * tensor.itemsize
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if protect(address, size, mmap.PROT_READ):
            raise OSError(ctypes.get_errno(), "mprotect")


def carry_over(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device, of the same sizes and strides."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        see_on_host(made).copy_(tensor)
    return made
