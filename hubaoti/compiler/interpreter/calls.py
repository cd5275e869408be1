"""What a package's host code calls, as the stand-in tells of it: kernels, and ops of ATen."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from hubaoti.compiler.interpreter import NotInterpreted
from hubaoti.compiler.interpreter.kernels import Kernel
from hubaoti.compiler.interpreter.launches import run_launch
from hubaoti.compiler.interpreter.memory import find_stand_in
from hubaoti.compiler.interpreter.ops import OnHost
from hubaoti.compiler.interpreter.shims import answer_shim
from hubaoti.errors import BadInput, CheckFailed, first_line

_STDERR = 2
_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, *[ctypes.c_uint] * 3, ctypes.POINTER(ctypes.c_void_p)
)
_SHIM = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p))
_STAYS = "this model cannot be compiled with these dims; it stays eager"


class OutOfTime(Exception):
    """The time that a point has is over; with the call before which it was."""


class Calls:
    """The calls of one package: each is computed as it comes, until one fails."""

    def __init__(self, kernels: Mapping[str, Kernel | NotInterpreted]) -> None:
        self._kernels = kernels
        self._failure: Exception | None = None
        self._name, self._deadline = "", 0.0
        # C holds their addresses only.
        self._launched = _LAUNCH(self._compute_launch)
        self._asked = _SHIM(self._compute_shim)

    def listen(self) -> None:
        """Have the stand-in tell this of each call from now on."""
        stand_in = find_stand_in()
        stand_in.stand_in_compute(self._launched)
        stand_in.stand_in_answer(self._asked)

    @contextmanager
    def compute(self, graph: str, deadline: float) -> Iterator[None]:
        """Inside, a package is called; what fails in a call of it is raised when it has returned.

        After the `deadline`, by `time.monotonic`, nothing more is computed.

        Raises:
            OutOfTime: this came to pass.
            NotInterpreted: a kernel or an op cannot be computed.
            CheckFailed: host code, a kernel or an op refuses what it was given.
        """
        self._failure, self._deadline = None, deadline
        refused: BadInput | None = None
        try:
            with OnHost(), np.errstate(all="ignore"):  # type: ignore[no-untyped-call]
                yield
        except (BadInput, NotInterpreted) as error:
            refused = error if isinstance(error, BadInput) else None
            self._failure = self._failure or (None if refused else error)
        if isinstance(self._failure, OutOfTime):
            raise self._failure
        if self._failure is not None:
            raise explain_failure(graph, self._name, self._failure) from self._failure
        if refused is not None:
            raise CheckFailed(f"check, interpreted: {refused}", hint=_STAYS) from refused

    def _compute_launch(self, name: bytes, x: int, y: int, z: int, params: Any) -> None:
        """A launch of a kernel."""

        def launch() -> None:
            kernel = self._kernels.get(name.decode())
            if kernel is None:
                raise NotInterpreted(f"{name.decode()}: a kernel that inductor did not make")
            if isinstance(kernel, NotInterpreted):
                raise kernel
            run_launch(kernel, (x, y, z), params)

        self._try(name.decode(), launch)

    def _compute_shim(self, name: bytes, arguments: Any) -> int:
        """A call of ATen: 0, or 1 where it failed."""
        return self._try(name.decode(), lambda: answer_shim(name.decode(), arguments))

    def _try(self, name: str, compute: Callable[[], None]) -> int:
        """Compute a call, unless one before it failed; no exception may leave for C."""
        if self._failure is not None:
            return 1
        self._name = name
        os.write(_STDERR, f"{name}\n".encode())  # should it end this process
        try:
            if time.monotonic() > self._deadline:
                raise OutOfTime(name)
            compute()
        except Exception as error:  # of ours, numpy, torch and Triton
            self._failure = error
            return 1
        return 0


def explain_failure(graph: str, name: str, error: Exception) -> CheckFailed | NotInterpreted:
    """Whether a call that failed says something of the package, or of the interpreter."""
    if isinstance(error, NotInterpreted):
        return NotInterpreted(str(error) if name in str(error) else f"{name}: {error}")
    text = first_line(error)
    if isinstance(error, AssertionError):
        what = f"an assert of {name} fails: {text}"
    elif isinstance(error, RuntimeError) and "not implemented for" not in text:
        what = f"{name} refuses: {text}"
    else:
        return NotInterpreted(f"{name}: {type(error).__name__}: {text}")
    return CheckFailed(f"check, interpreted: graph {graph}: {what}", hint=_STAYS)
