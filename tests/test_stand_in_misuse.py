"""The stand-in's functions, called as no library should call them: an error, and never a crash."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import under_stand_in
from under_stand_in import make_stand_in

from hubaoti.compiler.stand_in import StandIn

pytestmark = pytest.mark.cuda

# C's functions by name, with sizes as they are; what they give, or their error in words.
_HELPERS = """
import os, threading
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
lib = ctypes.CDLL(None)
lib.cudaGetErrorString.restype = c_char_p
def size(number): return c_size_t(number)
def at(pointer, offset): return c_void_p(pointer.value + offset)
def make(name, *arguments):
    made = c_void_p()
    error = getattr(lib, name)(byref(made), *arguments)
    assert not error, (name, error)
    return made
def words(error):
    text = c_char_p()
    lib.cuGetErrorString(error, byref(text))
    return text.value.decode()
def in_thread(function, *arguments):
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments)))
    thread.start(); thread.join()
    return found[0]
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return make_stand_in(tmp_path_factory.mktemp("stand-in") / "home")


def ask(stand_in: StandIn, code: str, *capabilities: int, **options: Any) -> dict[str, Any]:
    """The facts that code says last."""
    return under_stand_in.ask(
        stand_in, _HELPERS + textwrap.dedent(code), *(capabilities or (90,)), **options
    )


# Errors


def test_the_words_of_an_error_are_told_of_no_later_one(stand_in: StandIn) -> None:
    code = """
        class Dim(ctypes.Structure): _fields_ = [(name, ctypes.c_uint) for name in "xyz"]
        launch = lib.cudaLaunchKernel(None, Dim(0, 1, 1), Dim(1, 1, 1), None, size(0), None)
        said = [launch, words(launch), in_thread(words, launch), words(launch)]
        free = lib.cudaFree(c_void_p(4096))
        said += [free, words(free)]
        driver = lib.cuPointerGetAttribute(byref(c_int()), 99, make("cudaMalloc", size(8)))
        said += [driver, words(driver)]
        lib.cuPointerGetAttribute(byref(c_int()), 1, c_void_p(4096))
        lib.curandGetScrambleConstants32(byref(c_void_p()))
        say(said=said, forgotten=words(801), unknown=words(999))
    """
    found = ask(stand_in, code)
    sizes = "a grid of (0, 1, 1) and (1, 1, 1) threads"
    launch = f"invalid argument: a kernel of the runtime with {sizes}"
    plain = "an error of CUDA"  # whose runtime, which has the words, is not in this process
    attribute = "cuPointerGetAttribute: attribute 99"
    assert found["said"] == [1, launch, plain, launch, 1, plain, 801, attribute]
    assert found["forgotten"] == found["unknown"] == plain


def test_the_drivers_errors_are_none_of_the_runtimes(stand_in: StandIn) -> None:
    code = """
        lib.cudaFree(c_void_p(4096))
        before = lib.cudaGetLastError()
        errors = [
            lib.cuMemFree_v2(c_void_p(4096)), lib.cuCtxSetCurrent(c_void_p(9)),
            lib.cuMemAlloc_v2(byref(c_void_p()), size(1 << 50)), lib.cuDeviceGet(byref(c_int()), 7),
            lib.cuStreamDestroy_v2(None), lib.cuMemcpyHtoD_v2(
                make("cudaMalloc", size(8)), b"x" * 9, size(9)),
        ]
        say(before=before, errors=errors, after=lib.cudaGetLastError())
    """
    found = ask(stand_in, code)
    assert (found["before"], found["after"]) == (1, 0)
    assert found["errors"] == [1, 101, 2, 101, 400, 1]
