"""The stand-in's functions, called as no library should call them: an error, and never a crash."""

from __future__ import annotations

import subprocess
import textwrap
from importlib.util import find_spec
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


def test_bytes_that_lie_under_others_now_are_not_unread(stand_in: StandIn) -> None:
    before = "host = ctypes.create_string_buffer(4096)"
    said = """
        whole=tried(read, lambda: copy(pinned, host, 4096), wait),
        part=tried(read, lambda: copy(at(pinned, 96), host, 1000), wait),
    """
    assert ask_reads(stand_in, said, before) == {"whole": "nothing", "part": _READ.format(3096)}


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


# Images of kernels

_KERNEL = """.version 8.3
.target sm_90
.address_size 64
.visible .entry fill(.param .u64 p) .reqntid 16, 8, 1
{ .shared .align 4 .b8 kept[1024]; ret; }
"""
_LOAD = """
import mmap, random, struct
from pathlib import Path
image = Path(os.environ["CUBIN"]).read_bytes()
# What is tried lies before a page that nobody may read.
space = mmap.mmap(-1, 1 << 20)
start = ctypes.addressof(c_int.from_buffer(space))
lib.mprotect(c_void_p(start + len(space) - 4096), size(4096), 0)
def load(content):
    place = start + len(space) - 4096 - len(content)
    ctypes.memmove(place, content, len(content))
    made, found = c_void_p(), c_void_p()
    error = lib.cuModuleLoadData(byref(made), c_void_p(place))
    if not error:
        lib.cuModuleGetFunction(byref(found), made, b"fill")
        lib.cuModuleUnload(made)
    return error
def change(place, content): return image[:place] + content + image[place + len(content):]
shoff, = struct.unpack_from("<Q", image, 40)
count, = struct.unpack_from("<H", image, 60)
"""


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel that does nothing, by the assembler that triton has."""
    source = tmp_path_factory.mktemp("cubin") / "fill.ptx"
    source.write_text(_KERNEL)
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    ptxas = Path(spec.origin).parent / "backends/nvidia/bin/ptxas"
    target = source.with_suffix(".cubin")
    subprocess.run([ptxas, "-arch=sm_90", source, "-o", target], check=True)
    return target


def ask_loads(stand_in: StandIn, cubin: Path, code: str) -> dict[str, Any]:
    return ask(stand_in, _LOAD + textwrap.dedent(code), env={"CUBIN": str(cubin)})


def test_an_image_that_ends_early_is_refused(stand_in: StandIn, cubin: Path) -> None:
    code = """
        path, files = Path(os.environ["CUBIN"]).with_suffix(".cut"), set()
        end = shoff + 64 * count
        for length in (0, 1, 63, 64, end - 1):
            path.write_bytes(image[:length])
            files.add(lib.cuModuleLoad(byref(c_void_p()), str(path).encode()))
        say(whole=load(image), files=sorted(files), live=count_live()["module"],
            cut=sorted({load(image[:length]) for length in range(64, end)}))
    """
    assert ask_loads(stand_in, cubin, code) == {
        "whole": 0,
        "cut": [200],
        "files": [200, 301],
        "live": 0,
    }


def test_an_image_with_any_other_number_in_it_is_no_crash(stand_in: StandIn, cubin: Path) -> None:
    code = """
        errors = set()
        extremes = [0, 1, 2, 7, 0x7f, 0xff, 0x7fff, 0xffff, (1 << 31) - 1, (1 << 32) - 1,
                    (1 << 63) - 1, (1 << 63), (1 << 64) - 1, (1 << 64) - 64, len(image) - 1]
        places = [*range(64), *range(shoff, shoff + 64 * count)]
        for place in range(0, len(places), 2):
            for value in extremes:
                for kind in "HIQ":
                    number = struct.pack("<" + kind, value % (1 << 8 * struct.calcsize(kind)))
                    errors.add(load(change(places[place], number)))
        chance = random.Random(0)
        for _ in range(3000):
            changed = bytearray(image)
            for _ in range(chance.choice((1, 4, 64))):
                changed[chance.randrange(len(image))] = chance.choice((0, 1, 127, 128, 255))
            errors.add(load(bytes(changed)))
        say(errors=sorted(errors), live=count_live()["module"])
    """
    found = ask_loads(stand_in, cubin, code)
    assert found == {"errors": [0, 200, 209], "live": 0}


def test_an_image_is_refused_by_what_is_wrong_with_it(stand_in: StandIn, cubin: Path) -> None:
    code = """
        def say_why(place, kind, value):
            return words(load(change(place, struct.pack("<" + kind, value))))
        names = shoff + 64 * struct.unpack_from("<H", image, 62)[0]
        say(class_=say_why(4, "B", 1), many=say_why(60, "H", 65535), far=say_why(40, "Q", 1 << 62),
            kind=say_why(names + 4, "I", 1), beyond=say_why(shoff + 64 * 3 + 24, "Q", 1 << 40),
            none=lib.cuModuleLoadData(byref(c_void_p()), None))
    """
    found = ask_loads(stand_in, cubin, code)
    assert found.pop("none") == 1
    assert {name: text.rpartition(": ")[2] for name, text in found.items()} == {
        "class_": "it is no cubin",
        "many": "it ends before its sections do",
        "far": "it has no table of sections",
        "kind": "a section has no name",
        "beyond": "it ends before its sections do",
    }


# Handles, sizes, and processes that are forked


def test_a_handle_that_is_given_back_twice_or_was_never_made_is_an_error(
    stand_in: StandIn, cubin: Path
) -> None:
    code = """
        path, none = os.environ["CUBIN"].encode(), c_void_p(4096)
        U, ms, value = [ctypes.c_uint(1)] * 7, ctypes.c_float(), size(0)
        stream, event = make("cudaStreamCreate"), make("cudaEventCreate")
        handle, graph = make("cublasCreate_v2"), c_void_p()
        module = make("cuModuleLoad", path)
        function = make("cuModuleGetFunction", module, b"fill")
        lib.cudaStreamBeginCapture(stream, 2)
        lib.cudaStreamEndCapture(stream, byref(graph))
        run = make("cudaGraphInstantiateWithFlags", graph, ctypes.c_ulonglong())
        gone = {
            "stream": [lib.cudaStreamDestroy(stream) for _ in range(2)][1],
            "event": [lib.cudaEventDestroy(event) for _ in range(2)][1],
            "graph": [lib.cudaGraphDestroy(graph) for _ in range(2)][1],
            "run": [lib.cudaGraphExecDestroy(run) for _ in range(2)][1],
            "module": [lib.cuModuleUnload(module) for _ in range(2)][1],
            "handle": [lib.cublasDestroy_v2(handle) for _ in range(2)][1],
        }
        for each in (none, None):
            gone |= {
                f"sync {each}": each and lib.cudaStreamSynchronize(each),
                f"begin {each}": lib.cudaStreamBeginCapture(each, 0),
                f"end {each}": lib.cudaStreamEndCapture(each, byref(c_void_p())),
                f"record {each}": lib.cudaEventRecord(each, None),
                f"wait {each}": lib.cudaStreamWaitEvent(None, each, 0),
                f"query {each}": lib.cudaEventQuery(each),
                f"ms {each}": lib.cudaEventElapsedTime(byref(ms), each, each),
                f"nodes {each}": lib.cudaGraphGetNodes(each, None, byref(value)),
                f"made {each}": lib.cudaGraphInstantiateWithFlags(byref(c_void_p()), each, size(0)),
                f"replay {each}": lib.cudaGraphLaunch(each, None),
                f"name {each}": lib.cuModuleGetFunction(byref(c_void_p()), each, b"fill"),
            }
        for each in (function, none, None):
            gone |= {
                f"launch {each}": lib.cuLaunchKernel(each, *U, None, None, None),
                f"get {each}": lib.cuFuncGetAttribute(byref(c_int()), 0, each),
                f"set {each}": lib.cuFuncSetAttribute(each, 8, 1),
                f"blocks {each}": lib.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    byref(c_int()), each, 1, size(0)),
            }
        say(gone=gone, live=count_live(), others=lib.stand_in_live(b"function"),
            handles=lib.stand_in_live(b"handle"))
    """
    found = ask(stand_in, code, env={"CUBIN": str(cubin)})
    assert found["gone"].pop("handle") == 0  # as of a library's: nobody looks for it
    assert found["gone"].pop("sync None") is None  # the legacy stream
    assert all(error in (1, 400, 401, 900) for error in found["gone"].values()), found["gone"]
    assert {*found["live"].values(), found["others"], found["handles"]} == {0}


def test_a_capture_ends_with_its_stream_and_its_graph_stays_while_it_goes_on(
    stand_in: StandIn,
) -> None:
    code = """
        stream, other, graph = make("cudaStreamCreate"), make("cudaStreamCreate"), c_void_p()
        status = c_int()
        lib.cudaStreamBeginCapture(stream, 0)
        name = "cudaStreamGetCaptureInfo"
        ask = getattr(lib, name) if hasattr(lib, name) else getattr(lib, name + "_v2")
        ask(stream, byref(status), None, byref(graph), None, None, None)
        kept = lib.cudaGraphDestroy(graph)
        lib.cudaMemcpyAsync(None, None, size(0), 4, stream)
        refused = lib.cudaMalloc(byref(c_void_p()), size(8))
        lib.cudaStreamDestroy(stream)
        say(kept=kept, refused=refused, after=lib.cudaMalloc(byref(c_void_p()), size(8)),
            graphs=count_live()["graph"], again=lib.cudaStreamBeginCapture(other, 0))
    """
    found = ask(stand_in, code)
    assert found == {"kept": 1, "refused": 900, "after": 0, "graphs": 0, "again": 0}


def test_in_a_capture_no_module_is_loaded_and_only_who_began_it_ends_it(
    stand_in: StandIn, cubin: Path
) -> None:
    code = """
        import threading
        stream, found = make("cudaStreamCreate"), {}
        load = lambda: lib.cuModuleLoad(byref(c_void_p()), os.environ["CUBIN"].encode())
        end = lambda: lib.cudaStreamEndCapture(stream, byref(c_void_p()))
        def elsewhere(name, call):
            thread = threading.Thread(target=lambda: found.update({name: call()}))
            thread.start(); thread.join()
        lib.cudaStreamBeginCapture(stream, 1)  # thread-local: another thread may load
        elsewhere("others", load)
        elsewhere("foreign", end)
        found["whole"] = end()
        lib.cudaStreamBeginCapture(stream, 1)
        found |= dict(ours=load(), invalid=end(), after=load())
        say(**found)
    """
    found = ask(stand_in, code, env={"CUBIN": str(cubin)})
    assert found == {
        "others": 0, "foreign": 908, "whole": 0, "ours": 900, "invalid": 901, "after": 0,
    }  # fmt: skip


def test_sizes_that_no_number_holds_are_refused(stand_in: StandIn, cubin: Path) -> None:
    code = """
        most, blocks = size((1 << 64) - 1), c_int(7)
        block, host = make("cudaMalloc", size(4096)), ctypes.create_string_buffer(64)
        module = make("cuModuleLoad", os.environ["CUBIN"].encode())
        function = make("cuModuleGetFunction", module, b"fill")
        def count(threads, shared):
            lib.cudaOccupancyMaxActiveBlocksPerMultiprocessor(byref(blocks), None, threads, shared)
            return blocks.value
        threads = c_int()
        lib.cuFuncGetAttribute(byref(threads), 0, function)
        errors = {
            "fill": lib.cuMemsetD32_v2(block, 1, size(1 << 62)),
            "malloc": lib.cudaMalloc(byref(c_void_p()), most),
            "copy": lib.cudaMemcpy(block, host, most, 1),
            "nothing": lib.cudaMemcpy(block, None, size(8), 1),
            "rows": lib.cudaMemcpy2D(block, size(4), host, size(4), size(8), size(2), 1),
            "pin": lib.cudaHostRegister(host, most, 0),
            "pin none": lib.cudaHostRegister(host, size(0), 0),
            "shared": lib.cuFuncSetAttribute(function, 8, 0x7fffffff),
            "name": lib.cuDeviceGetName(host, -1, 0),
            "bus": lib.cudaDeviceGetPCIBusId(host, -1, 0),
            "nowhere": lib.cudaMalloc(None, size(8)),
        }
        pinned = lib.cudaHostRegister(at(c_void_p(ctypes.addressof(host)), 32), size(8), 0)
        over = lib.cudaHostRegister(host, size(64), 0)
        say(errors=errors, threads=threads.value, pinned=pinned, over=over, counts=[
            count(0x7fffffff, size(0)), count(1 << 27, size(0)), count(0, size(0)),
            count(1, most), count(1, size((1 << 64) - 1024)), count(128, size(1024))])
    """
    found = ask(stand_in, code, memory=(1 << 64) - 1, env={"CUBIN": str(cubin)})
    errors = found["errors"]
    assert (errors.pop("malloc"), errors.pop("rows")) == (2, 12)
    assert {*errors.values()} == {1}
    assert (found["pinned"], found["over"], found["threads"]) == (0, 712, 128)
    assert found["counts"] == [0, 0, 32, 0, 0, 16]


def test_a_process_that_is_forked_has_no_device_and_does_not_hang(stand_in: StandIn) -> None:
    code = """
        import signal
        def fork(child):
            read, write = os.pipe()
            if not (pid := os.fork()):
                signal.alarm(20)
                os.write(write, json.dumps(child()).encode())
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
            return json.loads(os.read(read, 4096)) if not status else status
        def use():
            host = ctypes.create_string_buffer(8)
            return [lib.cudaMalloc(byref(c_void_p()), size(8)), lib.cudaStreamSynchronize(None)]
        fresh = fork(use)
        block, host = make("cudaMalloc", size(8)), ctypes.create_string_buffer(b"theirs!", 8)
        lib.cudaMemcpy(block, host, size(8), 1)
        def misuse():
            ours = ctypes.create_string_buffer(b"child's", 8)
            return [lib.cudaMalloc(byref(c_void_p()), size(8)), lib.cudaFree(block),
                    lib.cudaMemcpy(block, ours, size(8), 1), lib.cudaMemset(block, 0, size(8))]
        stop = threading.Event()
        def spin():
            while not stop.is_set():
                made = make("cudaMalloc", size(4096))
                lib.cudaEventDestroy(make("cudaEventCreate"))
                lib.cudaStreamDestroy(make("cudaStreamCreate"))
                lib.cudaFree(made)
        threads = [threading.Thread(target=spin) for _ in range(3)]
        for thread in threads: thread.start()
        forks = [fork(misuse) for _ in range(50)]
        stop.set()
        for thread in threads: thread.join()
        back = ctypes.create_string_buffer(8)
        lib.cudaMemcpy(back, block, size(8), 2)
        say(fresh=fresh, forks=forks, back=back.value.decode())
    """
    found = ask(stand_in, code)
    assert found["fresh"] == [0, 0]
    assert found["forks"] == [[3, 3, 3, 3]] * 50
    assert found["back"] == "theirs!"
