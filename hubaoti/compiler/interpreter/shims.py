"""Calls of torch's C shims for the device, read as calls of ATen's ops.

A shim's arguments follow from its op's schema: their C types and names tell what each is (see
torchgen/aoti of torch). Private, checked on torch 2.11 to 2.15: tensors of `torch._C._aoti` by
pointers, and `_disable_current_modes`.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch._C import _aoti
from torch.utils._python_dispatch import _disable_current_modes

from hubaoti.compiler.interpreter import NotInterpreted
from hubaoti.compiler.interpreter.ops import compute_on_host
from hubaoti.compiler.stand_in.aten import Parameter, Shim, read_shims

_POINTER = ctypes.POINTER(ctypes.c_void_p)
_RESULT = re.compile(r"ret\d+")
_VERSION = re.compile(r"_v\d+$")
_LENGTH, _INDEX = "_len_", "_index_"  # how names of parameters end that belong to the one before
_UNNEEDED = {"layout", "pin_memory"}  # as the CPU has it


@functools.cache
def list_shims() -> Mapping[str, Shim]:
    """Torch's C shims by their names."""
    include = Path(torch.__file__).parent / "include"
    return {shim.name: shim for shim in read_shims(include)}


@functools.cache
def _list_ops() -> Mapping[str, Any]:
    """ATen's ops by the names that their shims have."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space == "aten":
            overload = schema.overload_name
            key = f"{name}_{overload}" if overload else name
            found[key] = (name, overload or "default")
    return found


def answer_shim(name: str, arguments: Any) -> None:
    """Compute a call of a shim; `arguments` points to the places of its arguments.

    Raises:
        NotInterpreted: there is no such op, or the CPU cannot compute it.
    """
    shim, found = list_shims()[name], _list_ops().get(_VERSION.sub("", name))
    if found is None:
        raise NotInterpreted(f"{name}: it is no op of this torch")
    op = getattr(getattr(torch.ops.aten, found[0]), found[1])
    places = {each.name: (each, arguments[i]) for i, each in enumerate(shim.parameters)}
    types = {each.name: str(each.type) for each in op._schema.arguments}
    values = {
        n: _read_argument(parameter, place, places, types[n])
        for n, (parameter, place) in places.items()
        if n in types and n not in _UNNEEDED
    }
    _drop_defaults(op, values)
    # By position as far as nothing is left out before.
    given = takewhile(
        lambda each: each.name in values and not each.kwarg_only, op._schema.arguments
    )
    positional = [values.pop(each.name) for each in [*given]]
    with _disable_current_modes():  # `OnHost` sees the caller
        made = compute_on_host(op, positional, values)
    results = [place for n, (_, place) in places.items() if _RESULT.fullmatch(n)]
    kinds = [parameter.kind for n, (parameter, _) in places.items() if _RESULT.fullmatch(n)]
    answers = made if isinstance(made, list | tuple) else (made,)
    for kind, place, value in zip(kinds, results, answers, strict=False):
        _write_result(kind, place, value)


def _drop_defaults(op: Any, values: dict[str, Any]) -> None:
    """Leave out what an older shim does not know, and options that are not given."""
    for argument in op._schema.arguments:
        if argument.has_default_value() and values.get(argument.name, 0) is None:
            del values[argument.name]


def _read_argument(
    parameter: Parameter, place: int, places: Mapping[str, tuple[Parameter, int]], kind: str
) -> Any:
    """The value of an argument, by its C type and its type in the op's schema."""
    if parameter.name == "device":
        return _read_device(place, places)
    length = places.get(f"{parameter.name}{_LENGTH}")
    if length is not None:
        count = _at(length[1], ctypes.c_int64)
        return _read_list(parameter.kind, _at(place, ctypes.c_void_p), count, kind)
    return _READERS[parameter.kind](place, parameter.name, kind)


def _at(place: int | None, kind: Any) -> Any:
    """The number of a C type at a place."""
    return ctypes.cast(place, ctypes.POINTER(kind))[0] if place else None


def _read_device(place: int, places: Mapping[str, tuple[Parameter, int]]) -> torch.device | None:
    """A device, whose number stands in the next parameter."""
    given = _at(place, ctypes.c_void_p)
    index = _at(places[f"device{_INDEX}"][1], ctypes.c_int32)
    if not given:
        return None
    return torch.device("cuda", index) if _at(given, ctypes.c_int32) else torch.device("cpu")


def _read_list(kind: str, start: int | None, count: int, typed: str) -> list[Any] | None:
    """The elements of an array; None for an option that is not given."""
    element = kind.removeprefix("const").removesuffix("*")
    if start is None:
        return None if typed.startswith("Optional") else []
    if element == "AtenTensorHandle":
        return [_read_tensor(_at(start + 8 * i, ctypes.c_void_p)) for i in range(count)]
    if element == "AtenTensorHandle*":  # of tensors that may be absent
        handles = [_at(start + 8 * i, ctypes.c_void_p) for i in range(count)]
        return [_read_tensor(_at(each, ctypes.c_void_p)) if each else None for each in handles]
    if element == "int64_t*":  # an array that may be absent
        return _read_list("int64_t*", _at(start, ctypes.c_void_p), count, typed)
    size, number = (8, ctypes.c_int64) if element == "int64_t" else (4, ctypes.c_int32)
    found = [_at(start + size * i, number) for i in range(count)]
    return [bool(each) for each in found] if "bool" in typed else found


def _read_optional(read: Callable[[int, str, str], Any]) -> Callable[[int, str, str], Any]:
    """A reader of what may be absent, of one of what is there."""

    def read_optional(place: int, name: str, kind: str) -> Any:
        given = _at(place, ctypes.c_void_p)
        return read(given, name, kind) if given else None

    return read_optional


def _read_word(place: int, name: str, kind: str) -> Any:
    """A flag, or one of torch's codes: the name says which."""
    code = _at(place, ctypes.c_int32)
    if name in ("dtype", "out_dtype"):
        return _list_dtypes()[code]
    if name == "memory_format":
        return _list_formats()[code]
    return bool(code)


def _read_double(place: int, name: str, kind: str) -> Any:
    """A number; a scalar that is whole as such, for tensors of whole numbers."""
    value = _at(place, ctypes.c_double)
    return int(value) if "number" in kind.lower() and float(value).is_integer() else value


def _read_text(place: int, name: str, kind: str) -> str:
    """A word."""
    return bytes(_at(place, ctypes.c_char_p)).decode()


def _read_generator(place: int, name: str, kind: str) -> None:
    """A generator of random numbers.

    Raises:
        NotInterpreted: one is given.
    """
    if _at(place, ctypes.c_void_p):
        raise NotInterpreted("a generator of random numbers")


def _read_handle(place: int, name: str, kind: str) -> torch.Tensor:
    """A tensor."""
    return _read_tensor(_at(place, ctypes.c_void_p))


_READERS: Mapping[str, Callable[[int, str, str], Any]] = {
    "AtenTensorHandle": _read_handle,
    "AtenTensorHandle*": _read_optional(_read_handle),
    "AtenGeneratorHandle*": _read_generator,
    "int64_t": lambda place, name, kind: _at(place, ctypes.c_int64),
    "int64_t*": _read_optional(lambda place, name, kind: _at(place, ctypes.c_int64)),
    "int32_t": _read_word,
    "int32_t*": _read_optional(_read_word),
    "double": _read_double,
    "double*": _read_optional(_read_double),
    "constchar*": _read_text,
    "constchar**": _read_optional(_read_text),
}


@functools.cache
def _list_dtypes() -> Mapping[int, torch.dtype]:
    """Torch's dtypes by the codes that its C functions have for them."""
    dtypes = {str(each).partition(".")[2]: each for each in vars(torch).values() if _is_dtype(each)}
    functions = {n: getattr(_torch_cpu(), f"aoti_torch_dtype_{n}", None) for n in dtypes}
    return {int(code()): dtypes[name] for name, code in functions.items() if code is not None}


def _is_dtype(value: Any) -> bool:
    """Whether it is one of torch's dtypes."""
    return isinstance(value, torch.dtype)


@functools.cache
def _list_formats() -> Mapping[int, torch.memory_format]:
    """Torch's memory formats by their codes."""
    names = ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
    library = _torch_cpu()
    return {
        int(getattr(library, f"aoti_torch_memory_format_{name}")()): getattr(torch, name)
        for name in names
    }


@functools.cache
def _torch_cpu() -> Any:
    """The library whose C functions make and read tensors."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _read_tensor(handle: int) -> torch.Tensor:
    """The tensor of a handle, which stays its owner's."""
    mine = ctypes.c_void_p()
    if _torch_cpu().aoti_torch_new_tensor_handle(ctypes.c_void_p(handle), ctypes.byref(mine)):
        raise NotInterpreted("a tensor that torch cannot read")
    capsule = _capsules().PyCapsule_New(mine, None, None)
    found = _aoti.alloc_tensor_by_stealing_from_void_ptr(capsule)
    assert isinstance(found, torch.Tensor)
    return found


def _write_result(kind: str, place: int, value: Any) -> None:
    """Give a shim's caller a new tensor, or a number, at the place that it named."""
    target = _at(place, ctypes.c_void_p)
    if not target:
        return
    if kind == "int64_t*":
        ctypes.cast(target, ctypes.POINTER(ctypes.c_int64))[0] = int(value)
        return
    (capsule,) = _aoti.unsafe_alloc_void_ptrs_from_tensors([value])
    ctypes.cast(target, _POINTER)[0] = _capsules().PyCapsule_GetPointer(capsule, None)


@functools.cache
def _capsules() -> Any:
    """Python's functions that put pointers into objects, typed."""
    api = ctypes.pythonapi
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return api
