"""What Triton's interpreter lacks for inductor's kernels, or does too slowly.

It has no libdevice, computes with bfloat16 and float8 as if they were whole numbers and rounds to
them wrongly, and reduces and scans with other operators than a sum one element at a time.

Private, checked on triton 3.6 and 3.9: names of `triton.runtime.interpreter`. They are put there
once, in a process that does nothing else; where one is missing, `prepare` says so.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch

from hubaoti.compiler.interpreter import NotInterpreted
from hubaoti.compiler.interpreter.libdevice import compute_external
from hubaoti.compiler.interpreter.reductions import replace_reductions

_NARROW = {
    "bf16": torch.bfloat16,
    "fp8e5": torch.float8_e5m2,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5b16": torch.float8_e5m2fnuz,
    "fp8e4b8": torch.float8_e4m3fnuz,
}
_PLAIN = {"fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def prepare() -> None:
    """Make the interpreter of this process one for inductor's kernels.

    Raises:
        NotInterpreted: this triton's interpreter is none that is known.
    """
    interpreter: Any = import_module("triton.runtime.interpreter")
    language: Any = import_module("triton.language")
    helpers: Any = import_module("torch._inductor.runtime.triton_helpers")
    device: Any = import_module("triton.language.extra.cuda.libdevice")
    try:
        _replace_arithmetic(interpreter)
        _replace_calls(interpreter)
        plain = types.SimpleNamespace(__globals__={"tl": language, "core": language.core})
        scope = interpreter._patch_lang(plain)
        interpreter._patch_builtin(device, interpreter.interpreter_builder, scope)
        # Numpy takes only an array without axes for a number.
        language.core.tensor.__index__ = lambda self: int(self.handle.data.reshape(()))
        replace_reductions(interpreter)
    except AttributeError as error:
        raise NotInterpreted(f"triton's interpreter is another than ours: {error}") from error
    helpers.libdevice = device


def _replace_arithmetic(interpreter: Any) -> None:
    """Conversions of dtypes, operators on narrow ones, and libdevice."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    numpy_dtype = interpreter._get_np_dtype

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        return _convert(data, source.scalar.name, target.scalar.name)

    def cast(self: Any, source: Any, target: Any) -> Any:
        narrow = {source.dtype.scalar.name, target.scalar.name} & _NARROW.keys()
        if narrow:
            data = _convert(_widen(source), None, target.scalar.name)
            return handle(data.view(numpy_dtype(target.scalar)), target.scalar)
        return handle(source.data.astype(numpy_dtype(target)), target.scalar)

    def external(
        self: Any, name: Any, path: Any, symbol: str, values: Any, kind: Any, _: Any
    ) -> Any:
        found = compute_external(symbol, [_widen(each) for each in values])
        return handle(found.astype(numpy_dtype(kind.scalar)), kind.scalar)

    interpreter._convert_float = convert
    for kind in (np.float32, np.float64):
        bits = np.dtype(kind).itemsize * 8
        setattr(interpreter, f"np_erf_fp{bits}", lambda data: compute_external("__nv_erf", [data]))
    builder.cast_impl = cast
    builder.create_extern_elementwise = external
    builder.binary_op = _widened(builder.binary_op, handle, numpy_dtype)
    builder.unary_op = _widened(builder.unary_op, handle, numpy_dtype)
    builder.create_dot = _widened(builder.create_dot, handle, numpy_dtype)
    options = interpreter.interpreter_builder.options
    # Else each sum of whole numbers is done twice; a GPU does not look at it either.
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _widened(compute: Callable[..., Any], handle: Any, numpy_dtype: Any) -> Callable[..., Any]:
    """An operator of the builder, which sees narrow numbers in float32."""

    def computed(self: Any, *values: Any) -> Any:
        names = {v.dtype.scalar.name: v.dtype.scalar for v in values if isinstance(v, handle)}
        narrow = names.keys() & _NARROW.keys()
        if not narrow:
            return compute(self, *values)
        kind = names[next(iter(narrow))]
        float32 = _find_float32()
        wide = [
            handle(_widen(v), float32)
            if isinstance(v, handle) and v.dtype.scalar.name in _NARROW
            else v
            for v in values
        ]
        found = compute(self, *wide)
        if "fp32" in names or found.data.dtype != np.float32:
            return found
        return handle(_convert(found.data, None, kind.name).view(numpy_dtype(kind)), kind)

    return computed


def _find_float32() -> Any:
    """Triton's float32."""
    language: Any = import_module("triton.language")
    return language.float32


def _widen(handle: Any) -> Any:
    """The numbers of a handle, narrow ones in float32."""
    name = handle.dtype.scalar.name
    if name not in _NARROW:
        return handle.data
    return _to_torch(handle.data).view(_NARROW[name]).float().numpy().reshape(handle.data.shape)


def _to_torch(data: Any) -> torch.Tensor:
    """A contiguous copy of an array, unsigned words as signed ones: torch has not all of them."""
    copied = np.array(data, order="C", ndmin=1)
    if copied.dtype.kind == "u" and copied.itemsize > 1:
        copied = copied.view(f"i{copied.itemsize}")
    return torch.from_numpy(copied)


def _convert(data: Any, source: str | None, target: str) -> Any:
    """Numbers in another dtype, as unsigned words of its bits; to the nearest, then to the even.

    Without a `source` the array's own dtype says what they are. What is too large for float8
    becomes its largest number, as on a GPU.
    """
    value = _to_torch(data)
    if source is not None:
        value = value.view(_find_dtype(source))
    if target in ("fp8e5", "fp8e4nv"):
        most = torch.finfo(_NARROW[target]).max
        value = value.to(torch.float32).clamp(-most, most)
    if target not in _NARROW and target not in _PLAIN:
        return value.to(torch.float64).numpy().reshape(np.shape(data)).astype(_whole(target))
    made = value.to(_find_dtype(target)).view(_WORDS[_find_dtype(target).itemsize])
    return made.numpy().view(f"u{made.itemsize}").reshape(np.shape(data))


def _whole(target: str) -> str:
    """The name of numpy for Triton's dtype of whole numbers."""
    return "bool" if target == "int1" else target


def _find_dtype(name: str) -> torch.dtype:
    """Torch's dtype for Triton's floating one.

    Raises:
        NotInterpreted: torch has none.
    """
    found = _NARROW.get(name) or _PLAIN.get(name)
    if found is None:
        raise NotInterpreted(f"numbers of dtype {name}")
    return found


def _replace_calls(interpreter: Any) -> None:
    """Let one kernel's function call another without making the language anew for each call."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
