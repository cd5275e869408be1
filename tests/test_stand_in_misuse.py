"""The stand-in's functions, called as no library should call them: an error, and never a crash."""

from __future__ import annotations

import textwrap
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


# Copies back to the host, where nothing may be read

_PINNED = """
block, pinned = make("cudaMalloc", size(4096)), make("cudaHostAlloc", size(4096), 0)
other = make("cudaHostAlloc", size(4096), 0)
def copy(target, source, count): return lib.cudaMemcpyAsync(target, source, size(count), 4, None)
def wait(): return lib.cudaStreamSynchronize(None)
def read(): copy(pinned, block, 4096)
def tried(*calls):
    # The last error, after which nothing is left.
    error = [call() for call in calls][-1]
    found = words(error) if error else "nothing"
    lib.cudaDeviceSynchronize()
    return found
"""
_READ = "{} bytes are read back from a device that computes nothing (stand-in)"


def ask_reads(stand_in: StandIn, said: str, before: str = "") -> dict[str, Any]:
    code = f"{_PINNED}\n{textwrap.dedent(before)}\nsay({textwrap.dedent(said)})"
    return ask(stand_in, code, reads=False)


def test_what_went_back_in_part_is_unread_in_part(stand_in: StandIn) -> None:
    said = """
        whole=tried(read, lambda: copy(block, pinned, 4096), wait),
        begin=tried(read, lambda: copy(block, pinned, 1), wait),
        end=tried(read, lambda: copy(block, at(pinned, 4095), 1), wait),
        middle=tried(read, lambda: copy(block, at(pinned, 1), 1000), wait),
        pieces=tried(read, *[
            lambda i=i: copy(at(block, i), at(pinned, i), 512) for i in range(0, 4096, 512)], wait),
        twice=tried(read, read, lambda: copy(block, pinned, 4096), wait),
        many=tried(*[
            lambda i=i: copy(at(pinned, 2 * i), block, 1) for i in range(200)], wait),
    """
    found = ask_reads(stand_in, said)
    left = {"begin": 4095, "end": 4095, "middle": 3096, "many": 200}
    nothing = dict.fromkeys(("whole", "pieces", "twice"), "nothing")
    assert found == {name: _READ.format(count) for name, count in left.items()} | nothing


def test_whichever_thread_waits_is_told(stand_in: StandIn) -> None:
    said = """
        waits=in_thread(tried, read() or wait),
        reads=tried(lambda: in_thread(read), wait),
        back=tried(read, lambda: in_thread(copy, block, pinned, 4096), wait),
    """
    refused = _READ.format(4096)
    assert ask_reads(stand_in, said) == {"waits": refused, "reads": refused, "back": "nothing"}


def test_whatever_waits_for_a_copy_is_refused(stand_in: StandIn) -> None:
    before = """
        calls, event = [], make("cudaEventCreate")
        called = ctypes.CFUNCTYPE(None, c_void_p)(lambda argument: calls.append(1))
        added = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_void_p)(lambda *each: calls.append(2))
        lib.cudaEventRecord(event, None)
        host = ctypes.create_string_buffer(4096)
    """
    said = """
        event=tried(read, lambda: lib.cudaEventSynchronize(event)),
        query=tried(read, lambda: lib.cudaEventQuery(event)),
        blocking=tried(read, lambda: lib.cudaMemcpy(block, host, size(8), 1)),
        function=tried(read, lambda: lib.cudaLaunchHostFunc(None, called, None)),
        callback=tried(read, lambda: lib.cudaStreamAddCallback(None, added, None, 0)),
        driver=tried(read, lambda: lib.cuCtxSynchronize()),
        calls=calls, last=lib.cudaGetLastError() * 0
    """
    found = ask_reads(stand_in, said, before)
    assert (found.pop("calls"), found.pop("last")) == ([], 0)
    assert {*found.values()} == {_READ.format(4096)}


def test_a_copy_of_an_unread_copy_is_unread(stand_in: StandIn) -> None:
    before = "host = ctypes.create_string_buffer(4096)"
    said = """
        pinned=tried(read, lambda: copy(other, pinned, 4096), lambda: copy(block, pinned, 4096),
                     wait),
        host=tried(read, lambda: copy(host, at(pinned, 4088), 8)),
        beyond=tried(lambda: copy(at(pinned, 4095), block, 2)),
        theirs=tried(read, lambda: copy(host, other, 8), lambda: copy(block, pinned, 4096), wait),
    """
    found = ask_reads(stand_in, said, before)
    assert found == {
        "pinned": _READ.format(4096),
        "host": _READ.format(8),
        "beyond": _READ.format(2),
        "theirs": "nothing",
    }


def test_memory_that_is_given_back_has_nothing_unread(stand_in: StandIn) -> None:
    before = """
        host = ctypes.create_string_buffer(4096)
        def pin(): return lib.cudaHostRegister(host, size(4096), 0)
    """
    said = """
        registered=tried(pin, lambda: copy(host, block, 4096),
                         lambda: lib.cudaHostUnregister(host)),
        again=tried(pin, lambda: copy(block, host, 4096), lambda: lib.cudaHostUnregister(host)),
        freed=tried(read, lambda: lib.cudaFreeHost(pinned), wait),
    """
    found = ask_reads(stand_in, said, before)
    assert found == {"registered": _READ.format(4096), "again": "nothing", "freed": "nothing"}


def test_a_program_cannot_let_itself_read(stand_in: StandIn) -> None:
    code = """
        os.environ["STAND_IN_READS"] = ""
        host, block = ctypes.create_string_buffer(8), make("cudaMalloc", size(8))
        say(error=lib.cudaMemcpy(host, block, size(8), 2))
    """
    assert ask(stand_in, code, reads=False) == {"error": 800}
