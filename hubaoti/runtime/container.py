"""A compiled library by its own C interface: calls record no events, and let the GIL go.

Every library of AOTInductor exports `torch/csrc/inductor/aoti_runtime/interface.h`; what stands
here of it is alike in torch 2.11 to 2.15. Its single-threaded run neither records nor asks events,
so that a CUDA graph can capture it; and it locks nothing, so a lock is here. What a library calls
beside it are ops with a C shim: others need torch's proxy executor, which its own runners make.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Mapping
from itertools import repeat
from threading import Lock
from typing import Any

import torch

from hubaoti.runtime.library import Library
from hubaoti.runtime.locks import renew_in_children

_POINTER, _SIZE, _FLAG = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool
_PREFIX = "AOTInductorModelContainer"
_FUNCTIONS = {
    "CreateWithDevice": (_POINTER, _SIZE, ctypes.c_char_p, ctypes.c_char_p),
    "Delete": (_POINTER,),
    "GetCallSpec": (_POINTER, _POINTER, _POINTER),
    "GetConstantDtype": (_POINTER, _SIZE, _POINTER),
    "GetConstantName": (_POINTER, _SIZE, _POINTER),
    "GetConstantOriginalFQN": (_POINTER, _SIZE, _POINTER),
    "GetNumConstants": (_POINTER, _POINTER),
    "GetNumInputs": (_POINTER, _POINTER),
    "GetNumOutputs": (_POINTER, _POINTER),
    "RunSingleThreaded": (_POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER),
    "UpdateUserManagedConstantBufferPairs": (_POINTER, _POINTER, _SIZE, _FLAG, _FLAG),
}

# A tensor's handle is the address of a tensor object of its own, which torch gives in a capsule.
_read_pointer = ctypes.PYFUNCTYPE(_POINTER, ctypes.py_object, _POINTER)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_make_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, _POINTER, _POINTER, _POINTER)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class _Pair(ctypes.Structure):
    """A constant by its inner name: `AOTInductorConstantMapEntry`."""

    _fields_ = [("name", ctypes.c_char_p), ("handle", _POINTER)]


_Tensors = list[torch.Tensor]


def call_on_device(
    device: torch.device, run: Callable[[_Tensors], _Tensors], inputs: _Tensors
) -> _Tensors:
    """Call with a GPU as the current one, of whose pool and stream is what is allocated."""
    index = device.index or 0
    if torch.cuda.current_device() == index:
        return run(inputs)
    with torch.cuda.device(index):
        return run(inputs)


class Container:
    """An open library with constants of its own, called by one thread at a time.

    Private, checked on torch 2.11 to 2.15: the functions of `torch._C._aoti` that make handles of
    tensors, and tensors of handles (torch/csrc/inductor/aoti_runner/pybind.cpp).

    Raises:
        OSError: the system refuses to load the library.
        RuntimeError: the library refuses to make a container.
    """

    def __init__(self, library: Library, device: torch.device) -> None:
        from torch._C import _aoti

        self._library = ctypes.CDLL(str(library.file))
        for name, types in _FUNCTIONS.items():
            getattr(self._library, _PREFIX + name).argtypes = types
        self._steal: Any = _aoti.alloc_tensors_by_stealing_from_void_ptrs
        self._make_handles: Any = _aoti.unsafe_alloc_void_ptrs_from_tensors
        self._device = device if device.type == "cuda" else None
        handle, folder = _POINTER(), os.fsencode(library.place.parent)
        self._handle: Any = handle
        self._call("CreateWithDevice", ctypes.byref(handle), 1, str(device).encode(), folder)
        self.renew_lock()
        renew_in_children(self)
        self._kept: list[Any] = []  # handles of the constants, which it does not own
        delete = getattr(self._library, _PREFIX + "Delete")
        weakref.finalize(self, _close, delete, handle, self._steal, self._kept).atexit = False
        inputs, outputs = self._count("GetNumInputs"), self._count("GetNumOutputs")
        self._given, self._found = (_POINTER * inputs)(), (_POINTER * outputs)()
        self._run = getattr(self._library, _PREFIX + "RunSingleThreaded")
        given, found = ctypes.addressof(self._given), ctypes.addressof(self._found)
        self._arguments = handle, given, inputs, found, outputs

    def renew_lock(self) -> None:
        """Have nobody call it."""
        self._lock = Lock()

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Have the library compute, on a GPU in the stream that is current there.

        Raises:
            RuntimeError: it refuses, or there are more or fewer inputs than it has.
        """
        if len(inputs) != len(self._given):
            raise RuntimeError(f"it takes {len(self._given)} inputs, not {len(inputs)}")
        if self._device is None:
            return self._run_in(None, inputs)
        return call_on_device(self._device, self._run_in_current_stream, inputs)

    def _run_in_current_stream(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return self._run_in(torch.cuda.current_stream().cuda_stream, inputs)

    def _run_in(self, stream: int | None, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        handles = [*map(_read_pointer, self._make_handles(inputs), repeat(None))]
        with self._lock:
            self._given[:] = handles  # which are the library's from here on
            status = self._run(*self._arguments, stream, None)
            if status:
                raise RuntimeError(self._explain())
            capsules = [*map(_make_capsule, self._found, repeat(None), repeat(None))]
        tensors: list[torch.Tensor] = self._steal(capsules)
        return tensors

    def get_call_spec(self) -> list[str]:
        """How torch's own loader flattens a call, and what it makes of the answer."""
        specs = ctypes.c_char_p(), ctypes.c_char_p()
        self._call("GetCallSpec", self._handle, *map(ctypes.byref, specs))
        return [(spec.value or b"").decode() for spec in specs]

    def get_constant_names_to_original_fqns(self) -> dict[str, str]:
        """The constants by their inner names."""
        read, places = self._read_name, range(self._count("GetNumConstants"))
        return {read("GetConstantName", n): read("GetConstantOriginalFQN", n) for n in places}

    def get_constant_names_to_dtypes(self) -> dict[str, int]:
        """Their dtypes, in torch's numbers."""
        dtypes: dict[str, int] = {}
        for place in range(self._count("GetNumConstants")):
            number = ctypes.c_int32()
            self._call("GetConstantDtype", self._handle, place, ctypes.byref(number))
            dtypes[self._read_name("GetConstantName", place)] = number.value
        return dtypes

    def update_constant_buffer(
        self, tensors: Mapping[str, torch.Tensor], inactive: bool, validate: bool, managed: bool
    ) -> None:
        """Have it read these tensors; whoever calls keeps them.

        Raises:
            RuntimeError: one is missing, or the library refuses.
        """
        assert managed, "a container that copies its constants is never wanted"
        kept = self._make_handles([*tensors.values()])
        pairs = (_Pair * len(kept))(
            *(
                _Pair(name.encode(), _read_pointer(capsule, None))
                for name, capsule in zip(tensors, kept, strict=True)
            )
        )
        with self._lock:
            given = self._handle, pairs, len(kept), inactive, validate
            self._call("UpdateUserManagedConstantBufferPairs", *given)
            before, self._kept[:] = [*self._kept], kept
        self._steal(before)

    def _call(self, function: str, *given: Any) -> None:
        if getattr(self._library, _PREFIX + function)(*given):
            raise RuntimeError(self._explain())

    def _count(self, function: str) -> int:
        count = _SIZE()
        self._call(function, self._handle, ctypes.byref(count))
        return count.value

    def _read_name(self, function: str, place: int) -> str:
        name = ctypes.c_char_p()
        self._call(function, self._handle, place, ctypes.byref(name))
        return (name.value or b"").decode()

    def _explain(self) -> str:
        """What a newer torch says of the last error of this thread; an older one printed it."""
        said = ctypes.c_char_p()
        ask = getattr(self._library, "AOTInductorGetLastError", None)
        known = ask is not None and not ask(ctypes.byref(said)) and said.value
        return known.decode(errors="replace") if known else "the library refuses"


def _close(delete: Any, handle: Any, steal: Any, kept: list[Any]) -> None:
    """Delete a container, and its handles of constants: they become tensors, which nobody keeps."""
    delete(handle)
    steal(kept)


def has_interface(library: Library) -> bool:
    """Whether a library may be called without torch's proxy executor, and this torch knows how."""
    try:
        from torch._C import _aoti
    except ImportError:
        return False
    return library.notes is None and hasattr(_aoti, "alloc_tensors_by_stealing_from_void_ptrs")
