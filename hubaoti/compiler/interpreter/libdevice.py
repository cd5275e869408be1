"""CUDA's libdevice, by torch on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hubaoti.compiler.interpreter import NotInterpreted

_PREFIX = "__nv_"
# Where torch has another name for it, or none.
_OTHERS: dict[str, Callable[..., torch.Tensor]] = {
    "cbrt": lambda x: x.sign() * x.abs().pow(1 / 3),
    "cyl_bessel_i0": torch.special.i0,
    "cyl_bessel_i1": torch.special.i1,
    "erfcx": torch.special.erfcx,
    "exp10": lambda x: torch.pow(10.0, x),
    "fabs": torch.abs,
    **{f"fast_{n}": getattr(torch, n) for n in ("cos", "exp", "log", "log10", "log2", "pow")},
    **{f"fast_{n}": getattr(torch, n) for n in ("sin", "tan", "tanh")},
    "fast_fdivide": torch.div,
    "fdim": lambda x, y: (x - y).clamp(min=0),
    "finite": lambda x: x.isfinite().int(),
    "fma": lambda x, y, z: (x.double() * y.double() + z.double()).to(x.dtype),
    "ilogb": lambda x: torch.frexp(x)[1] - 1,
    "isfinited": lambda x: x.isfinite().int(),
    "isinf": lambda x: x.isinf().int(),
    "isinfd": lambda x: x.isinf().int(),
    "isnan": lambda x: x.isnan().int(),
    "isnand": lambda x: x.isnan().int(),
    "j0": torch.special.bessel_j0,
    "j1": torch.special.bessel_j1,
    "llrint": lambda x: x.round().long(),
    "llround": lambda x: (x.abs() + 0.5).floor().mul(x.sign()).long(),
    "nearbyint": torch.round,
    "normcdf": torch.special.ndtr,
    "normcdfinv": torch.special.ndtri,
    "powi": torch.pow,
    "rcbrt": lambda x: 1 / (x.sign() * x.abs().pow(1 / 3)),
    "rint": torch.round,
    "round": lambda x: (x.abs() + 0.5).floor() * x.sign(),
    "signbit": lambda x: x.signbit().int(),
    "signbitd": lambda x: x.signbit().int(),
    "saturate": lambda x: x.clamp(0, 1),
    "scalbn": torch.ldexp,
    "float_as_int": lambda x: x.view(torch.int32),
    "int_as_float": lambda x: x.view(torch.float32),
    "llabs": torch.abs,
    **{
        f"{kind}{name}_rn": function
        for kind in "fd"
        for name, function in (
            ("add", torch.add),
            ("sub", torch.sub),
            ("mul", torch.mul),
            ("div", torch.div),
            ("sqrt", torch.sqrt),
            ("rcp", torch.reciprocal),
            ("rsqrt", torch.rsqrt),
        )
    },
    "tgamma": lambda x: x.lgamma().exp(),
    "y0": torch.special.bessel_y0,
    "y1": torch.special.bessel_y1,
}


def compute_external(symbol: str, values: Sequence[Any]) -> Any:
    """What a function of libdevice makes of arrays of one shape, as an array.

    Raises:
        NotInterpreted: torch has no such function.
    """
    name = symbol.removeprefix(_PREFIX)
    function = _find(name) or _find(name.removesuffix("f"))
    if function is None:
        raise NotInterpreted(f"the function {symbol} of libdevice")
    # Of their own: an array that repeats one number may not be written, of which torch warns.
    tensors = [torch.from_numpy(np.array(each, order="C")) for each in values]
    return function(*tensors).numpy()


def _find(name: str) -> Callable[..., torch.Tensor] | None:
    """Torch's function of a name of libdevice, if it is one of numbers."""
    if name in _OTHERS:
        return _OTHERS[name]
    found = getattr(torch, name, None) if name in _SAME else None
    return found if callable(found) else None


_SAME = {
    *("abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "copysign", "cos"),
    *("cosh", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "floor", "fmax", "fmin", "fmod"),
    *("hypot", "ldexp", "lgamma", "log", "log10", "log1p", "log2", "nextafter", "pow", "rsqrt"),
    *("sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
}
