"""What a stranger's graph may do where it is first opened: real native code tries, and cannot."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

import msgspec
import pytest
import torch
from bundles import list_again, put_trusted
from safetensors.torch import save

import hubaoti
from hubaoti import LightweightEngine
from hubaoti.artifact.bundle import Bundle
from hubaoti.host import confinement, seccomp
from hubaoti.host.confinement import list_beside, list_gaps
from hubaoti.host.probe import probe_host
from hubaoti.host.processes import build_command
from hubaoti.host.wire import LENGTH
from hubaoti.mirror import Artifact, Mirror
from hubaoti.mirror.trust import Trust
from hubaoti.runtime import first_open
from hubaoti.runtime.first_open import require_sound
from hubaoti.runtime.open_child import OpenVerdict, open_in_child
from hubaoti.runtime.open_fork import Step
from hubaoti.settings import Settings, read_needed_environment

CPU = torch.device("cpu")
GOOD = [OpenVerdict("model.layers", opened=True, compared=True)]
# What this host cannot is skipped, test by test: the other guards are all the more needed there.
GAPS = "; ".join(list_gaps())
NO_FILES, NO_CALLS = "files are not guarded" in GAPS, "network and other processes" in GAPS
needs_files = pytest.mark.skipif(NO_FILES, reason=GAPS)
needs_calls = pytest.mark.skipif(NO_CALLS, reason=GAPS)

# What a library does as it is loaded: `tell` names what it could do, on the last line it prints.
NATIVE = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
static char told[4096] = "did:";
static void tell(const char *what, int could) {
    if (could) { strcat(told, " "); strcat(told, what); }
}
static int opens(const char *path, int flags) {
    int file = open(path, flags, 0600);
    if (file < 0) return 0;
    close(file);
    return 1;
}
static int holds(const char *path, const char *word) {
    static char text[1 << 16];
    int file = open(path, O_RDONLY);
    if (file < 0) return 0;
    ssize_t size = read(file, text, sizeof text);
    return size > 0 && memmem(text, size, word, strlen(word)) != NULL;
}
static int connects(int port) {
    int one = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return one >= 0 && !connect(one, (struct sockaddr *)&to, sizeof to);
}
static int peeks(pid_t other) {
    char byte;
    struct iovec here = {&byte, 1}, there = {environ[0], 1};
    return process_vm_readv(other, &here, 1, &there, 1, 0) == 1 || errno == EFAULT;
}
static int reaches_memory(pid_t other) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/mem", other);
    return opens(path, O_RDWR);
}
static int knows_environment(pid_t other) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/environ", other);
    return opens(path, O_RDONLY);
}
static int grows(long size) {
    if (chdir(getenv("TMPDIR"))) return 0;
    return !ftruncate(open("large", O_RDWR | O_CREAT, 0600), size);
}
__attribute__((constructor)) static void begin(void) { BODY }
"""
END = 'dprintf(2, "%s\\n", told); _exit(9);'


@dataclass(frozen=True)
class Scene:
    """A machine with secrets, a listening socket, and an artifact in its mirror."""

    settings: Settings
    artifact: Artifact
    port: int

    def open(self, *ops: str, patience: float = 120.0) -> list[OpenVerdict]:
        found = self.artifact
        return open_in_child(
            found.path, found.graphs, found.manifest.graphs, CPU, ops, patience=patience
        )

    def tell(self, body: str, *ops: str, patience: float = 120.0) -> str:
        """What comes of a graph whose library does this as it is loaded."""
        library(self.artifact, body)
        (verdict,) = self.open(*ops, patience=patience)
        assert not verdict.lasting
        return verdict.problem


def library(artifact: Artifact, body: str) -> None:
    """A library in the place of the graph's, which does something when it is loaded."""
    found = next(artifact.graph_folder(artifact.manifest.graphs[0]).rglob("*.wrapper.so"))
    found.unlink()
    build(found.with_suffix(".c"), body)
    list_again(artifact)


def build(source: Path, body: str) -> Path:
    """A library with a body, beside what was its source."""
    found = source.with_suffix(".so")
    source.write_text(NATIVE.replace("BODY", body))
    command = ["gcc", "-shared", "-fPIC", "-Wno-unused-function", source, "-o", found]
    subprocess.run(command, check=True)
    source.unlink()
    return found


@pytest.fixture(scope="module")
def place(
    decoder_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Scene]]:
    """Machines, each in a folder of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_0123456789")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "hf_0123456789")
        patch.setenv("TORCH_HUB_TOKEN", "hf_0123456789")
        patch.setattr(tempfile, "tempdir", f"{tmp_path_factory.mktemp('temporary')}")

        def make(name: str) -> Scene:
            root = tmp_path_factory.mktemp(name)
            settings = Settings(home=root / "home", endpoint="http://127.0.0.1:9")
            with Mirror.open(settings.mirror) as mirror:
                artifact = put_trusted(decoder_bundle, mirror)
            Trust(settings.trust).add(settings.endpoint, "acme")
            (root / "secret").write_text("hf_0123456789")
            return Scene(settings, artifact, server.getsockname()[1])

        yield make


@pytest.fixture
def scene(place: Callable[[str], Scene]) -> Scene:
    return place("machine")


# What a stranger would like to do, and how C says whether it could.
ATTEMPTS = {
    "has-a-token": 'getenv("HF_TOKEN") != NULL',
    "has-a-cloud-key": 'getenv("AWS_SECRET_ACCESS_KEY") != NULL',
    "has-a-token-of-torch": 'getenv("TORCH_HUB_TOKEN") != NULL',
    "began-with-a-token": 'holds("/proc/self/environ", "hf_0123456789")',
    "knows-who-began-it": "knows_environment(getppid()) || knows_environment($test)",
    "reads-a-secret": 'holds("$root/secret", "hf_")',
    "lists-the-home": 'opens("$user", O_RDONLY | O_DIRECTORY)',
    "writes-trust": 'opens("$home/trust.toml", O_WRONLY | O_APPEND)',
    "replaces-trust": 'opens("$home/new", O_WRONLY | O_CREAT) || !unlink("$home/trust.toml")',
    "ages-trust": '!utimensat(AT_FDCWD, "$home/trust.toml", NULL, 0)',
    "cuts-trust": '!truncate("$home/trust.toml", 0)',
    "opens-trust-to-all": '!chmod("$home/trust.toml", 0666)',
    "writes-the-index": 'opens("$home/mirror/index.sqlite3", O_RDWR)',
    "writes-a-graph": 'opens("$graph/planted", O_WRONLY | O_CREAT)',
    "writes-beside-its-folder": 'opens("$root/planted", O_WRONLY | O_CREAT)',
    "connects": "connects($port)",
    "has-sockets": "socket(AF_UNIX, SOCK_STREAM, 0) >= 0 || socket(AF_INET6, SOCK_DGRAM, 0) >= 0",
    "has-rings": "syscall(SYS_io_uring_setup, 1, told) >= 0 || errno != EPERM",
    "traces": "!ptrace(PTRACE_SEIZE, getppid(), 0, 0) || !ptrace(PTRACE_SEIZE, $test, 0, 0)",
    "reads-memory": "peeks(getppid()) || peeks($test)",
    "opens-memory": "reaches_memory(getppid()) || reaches_memory($test)",
    "signals": "!kill(getppid(), 0) || !kill($test, 0) || !kill(0, 0)",
    "has-signals-sent": "!fcntl(0, F_SETOWN, $test) || !fcntl(0, F_SETSIG, SIGKILL)",
    "knows-limits": "!prlimit($test, RLIMIT_NOFILE, NULL, &(struct rlimit){0})",
    "shares-memory": "shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600) >= 0",
    "forks": "fork() >= 0",
    "forks-by-number": "syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) >= 0",
    "runs-a-program": 'execl("/bin/true", "true", NULL) >= 0 || errno != EPERM',
    "leaves-its-group": "setsid() >= 0 || !setpgid(0, 0)",
    "has-namespaces": "!unshare(CLONE_NEWUSER) || !unshare(CLONE_NEWNET)",
    "mounts": '!mount("none", "/tmp", "tmpfs", 0, NULL)',
    "writes-a-large-file": "grows(1L << 30)",
    "goes-first": "!setpriority(PRIO_PROCESS, 0, -20)",
    "raises-limits": "!setrlimit(RLIMIT_AS, &(struct rlimit){RLIM_INFINITY, RLIM_INFINITY})",
}
# Which guard refuses them wherever it is; limits and the environment refuse the others. Some are
# refused twice on some hosts: by a newer landlock, or because root's process has more to lose.
FILES = {"knows-who-began-it", "reads-a-secret", "lists-the-home", "writes-trust", "replaces-trust"}
FILES |= {"writes-the-index", "writes-a-graph", "writes-beside-its-folder", "opens-memory"}
NEW_FILES = {"cuts-trust"}
CALLS = {
    "opens-trust-to-all",
    "ages-trust",
    "has-signals-sent",
    "connects",
    "has-sockets",
    "has-rings",
    "traces",
    "reads-memory",
}
CALLS |= {"signals", "knows-limits", "shares-memory", "forks", "forks-by-number"}
CALLS |= {"runs-a-program", "leaves-its-group", "has-namespaces"}
GUARDS = ((FILES, NO_FILES), (NEW_FILES, "files" in GAPS), (CALLS, NO_CALLS))
UNGUARDED = {attempt for attempts, is_missing in GUARDS if is_missing for attempt in attempts}
MAY = {"keeps-a-file": "grows(1 << 20)", "reads-its-graph": 'opens("$graph", O_RDONLY)'}


@pytest.fixture(scope="module")
def tried(place: Callable[[str], Scene]) -> tuple[set[str], Scene]:
    """What one library could do of all that it tried."""
    scene = place("tried")
    names = {
        "test": os.getpid(),
        "root": scene.settings.home.parent,
        "home": scene.settings.home,
        "user": Path.home(),
        "graph": scene.artifact.graph_folder(scene.artifact.manifest.graphs[0]),
        "port": scene.port,
    }
    refused = {name: test for name, test in ATTEMPTS.items() if name not in UNGUARDED}
    tests = (f'tell("{name}", {test});' for name, test in (refused | MAY).items())
    before = scene.settings.trust.read_text()
    problem = scene.tell(Template(" ".join(tests) + END).substitute(names))
    told = re.search(r"code 9: did:(.*)", problem)
    assert told, problem
    assert scene.settings.trust.read_text() == before
    return {*told[1].split()}, scene


def test_without_a_guard_the_same_code_can(place: Callable[[str], Scene], tmp_path: Path) -> None:
    """So that what is refused above would not fail anyway."""
    scene = place("free")
    names = {
        "test": os.getpid(),
        "root": scene.settings.home.parent,
        "home": scene.settings.home,
        "port": scene.port,
    }
    harmless = (
        *("has-a-token", "began-with-a-token", "knows-who-began-it", "reads-a-secret"),
        *("writes-trust", "writes-the-index", "connects", "has-sockets", "reads-memory"),
        *("opens-memory", "signals", "knows-limits"),
    )
    tests = "".join(f'tell("{name}", {ATTEMPTS[name]});' for name in harmless)
    found = build(tmp_path / "free.c", Template(tests + END).substitute(names))
    load = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(found)!r})"]
    done = subprocess.run(load, capture_output=True, text=True, timeout=60)
    assert done.stderr.split() == ["did:", *harmless]


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_stranger_s_library_is_refused(attempt: str, tried: tuple[set[str], Scene]) -> None:
    if attempt in UNGUARDED:
        pytest.skip(GAPS)
    assert attempt not in tried[0]


def test_a_library_may_keep_files_for_as_long_as_it_is_tried(
    tried: tuple[set[str], Scene],
) -> None:
    assert {*MAY} <= tried[0]
    assert not [*Path(tempfile.gettempdir()).glob("hubaoti-open-*")]


def test_an_honest_graph_answers_all_the_same(scene: Scene) -> None:
    assert scene.open() == GOOD


def test_an_honest_graph_answers_with_the_ops_of_its_caller(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's modules are its own: they are imported before anything is refused."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "compiled_ops.py").write_text(
        "import pathlib, subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', ''], check=True)\n"
        f"pathlib.Path({str(tmp_path / 'built')!r}).write_text('built')\n"
    )
    assert scene.open("compiled_ops") == GOOD
    assert (tmp_path / "built").read_text() == "built"


OLD_KERNEL = """
import os, sys
sys.path[:0] = [{home!r}]
from hubaoti.host import confinement, seccomp
confinement.gain_no_privileges()
assert seccomp._load([*seccomp._refuse([(444, 444), (317, 277)])])
assert len(confinement.list_gaps()) == 2
os.execv(sys.argv[1], sys.argv[1:])
"""


@needs_calls  # by which a kernel can be made to look older
def test_where_the_system_guards_nothing_a_first_open_goes_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a kernel that has neither landlock nor seccomp."""
    home = str(Path(hubaoti.__file__).parent.parent)
    begin = [sys.executable, "-P", "-c", OLD_KERNEL.format(home=home)]
    monkeypatch.setattr(
        "hubaoti.host.processes.build_command", lambda module: [*begin, *build_command(module)]
    )
    assert scene.open() == GOOD


def test_what_a_host_cannot_do_is_said(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a line of progress, and by doctor."""
    monkeypatch.setattr(confinement, "probe_landlock", lambda: 0)
    monkeypatch.setattr(confinement, "probe_seccomp", lambda: True)
    (gap,) = list_gaps()
    assert gap == "first opens: files are not guarded: this kernel lets nobody use landlock"
    monkeypatch.setattr(first_open, "open_in_child", lambda *_: GOOD)
    said: list[str] = []
    with Mirror.open(scene.settings.mirror) as mirror:
        require_sound(scene.artifact, mirror, CPU, said.append)
    assert said == ["first open", gap]
    assert gap in probe_host(scene.settings).notes


def test_what_takes_memory_without_end_gets_none(scene: Scene) -> None:
    """Nothing is touched, so that a machine that does not refuse it goes on."""
    told = scene.tell(
        "long count = 0; while (count < 256 && mmap(0, 1L << 30, PROT_READ | PROT_WRITE,"
        " MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) != MAP_FAILED) count++;"
        f' tell("gigabytes", count > 40); {END}'
    )
    assert told.endswith("did:")


def test_what_computes_for_ever_is_ended(scene: Scene) -> None:
    assert "or too long" in scene.tell("for (;;);", patience=15.0)


@needs_calls
def test_what_a_library_leaves_behind_ends_with_it(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ops of a caller, who may need a compiler, processes can be started; none is left."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_ops.py").write_text("")
    told = scene.tell(
        "pid_t left = fork(); if (!left) { setsid(); for (;;) pause(); }"
        ' dprintf(2, "left %d\\n", left); _exit(9);',
        "some_ops",
    )
    found = re.search(r"left (\d+)", told)
    assert found, told
    until = time.monotonic() + 5.0
    while Path(f"/proc/{found[1]}/cmdline").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{found[1]}/cmdline").exists()


def test_what_a_library_says_makes_no_verdict(scene: Scene) -> None:
    """Not even in our own words: it has no descriptor of the one that is asked for a verdict."""
    record = msgspec.msgpack.encode(Step("model.layers", opened=True, answers=b""))
    words = ", ".join(map(str, LENGTH.pack(len(record)) + record))
    told = scene.tell(
        f"static unsigned char words[] = {{{words}}};"
        " for (int to = 3; to < 1024; to++) if (write(to, words, sizeof words) < 0) continue;"
        " _exit(0);"
    )
    assert "is no tensors" in told


def test_answers_of_another_look_are_not_believed(scene: Scene) -> None:
    """Which are those of a library that says it answered, and did not."""
    record = msgspec.msgpack.encode(Step("model.layers", opened=True, answers=save({})))
    words = ", ".join(map(str, LENGTH.pack(len(record)) + record))
    library(
        scene.artifact,
        f"static unsigned char words[] = {{{words}}};"
        " for (int to = 3; to < 1024; to++) if (write(to, words, sizeof words) < 0) continue;"
        " _exit(0);",
    )
    (verdict,) = scene.open()
    assert "output is missing" in verdict.problem


NOSY = """
import ctypes, json, os, pathlib, socket
trust, port = {trust!r}, {port}
def may(what):
    try:
        what()
    except OSError:
        return False
    return True
trace = ctypes.CDLL(None).ptrace
found = {{
    "has a token": "HF_TOKEN" in os.environ,
    "connects": may(lambda: socket.create_connection(("127.0.0.1", port)).close()),
    "writes trust": may(lambda: open(trust, "a").close()),
    "replaces trust": may(lambda: open(trust + ".new", "w").close()),
    "reads memory": may(lambda: open(f"/proc/{{os.getppid()}}/mem", "rb").close()),
    "traces": trace(0x4206, os.getppid(), 0, 0) == 0,
    "keeps verdicts": may(lambda: open(trust.replace("trust.toml", "mirror/x"), "w").close()),
}}
pathlib.Path({told!r}, str(os.getpid())).write_text(json.dumps(found))
"""


@needs_files
@needs_calls
def test_a_model_s_own_process_has_no_token_no_network_and_no_hand_in_trust(
    place: Callable[[str], Scene],
    tiny_decoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a module that tells what it could do: in the worker, and in the engine's process."""
    scene = place("worker")
    told = tmp_path / "told"
    told.mkdir()
    words = {"trust": str(scene.settings.trust), "port": scene.port, "told": str(told)}
    (tmp_path / "nosy_ops.py").write_text(NOSY.format(**words))
    monkeypatch.syspath_prepend(tmp_path)
    settings = replace(scene.settings, token="hf_0123456789")
    with LightweightEngine(settings, isolate=True, ops=["nosy_ops"]) as engine:
        engine.load(tiny_decoder, artifact=scene.artifact)
        (answer,) = engine.generate(tiny_decoder, ["one two"], max_new_tokens=2, do_sample=False)
        state = engine.state(tiny_decoder)
        worker = engine.models()[0].pid
    assert answer.text is not None and state.compiled > 0
    assert json.loads((told / str(worker)).read_text()) == {
        "has a token": False,
        "connects": False,
        "writes trust": False,
        "replaces trust": False,
        "reads memory": False,
        "traces": False,
        "keeps verdicts": True,
    }


# As under a landlock that knows nothing of signals; what it could do is on its last line.
OLDER = """
import ctypes, fcntl, json, os, pathlib, signal, socket, struct, sys, threading
how, victim, trust, scratch = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
from hubaoti.host import confinement, landlock
landlock.probe_landlock = confinement.probe_landlock = lambda: 5
def may(what):
    try:
        return what() is None or True
    except OSError:
        return False
here, there = socket.socketpair()
def ask(number, *words):
    return ctypes.CDLL(None, use_errno=True).syscall(number, *words) == 0
def end():
    here.setblocking(False)
    fcntl.fcntl(here, fcntl.F_SETOWN, victim)
    fcntl.fcntl(here, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(here, fcntl.F_SETFL, os.O_ASYNC)
    there.send(b"x")
if how == "worker":
    confinement.guard_worker(pathlib.Path(trust), network=False)
else:
    confinement.Confinement((), pathlib.Path(scratch), processes=how == "ops").enter()
found = {
    "ends it by a pipe": may(end),
    "ends it by a number": may(lambda: fcntl.ioctl(here, 0x8901, struct.pack("i", victim))),
    "types into a terminal": may(lambda: fcntl.ioctl(here, 0x5412, b"x")),
    "places its own threads": may(lambda: os.sched_setaffinity(threading.get_native_id(), {0})),
    "places itself": may(lambda: os.sched_setaffinity(0, {0})),
}
param = os.sched_param(0)
may(lambda: os.sched_setscheduler(victim, os.SCHED_IDLE, param))
may(lambda: os.sched_setaffinity(victim, {0}))
found["ages trust"] = may(lambda: os.utime(trust, (1, 1)))
found["signals it"] = may(lambda: os.kill(victim, 0))
print(json.dumps([name for name, could in found.items() if could]))
"""
OWN = ["places its own threads", "places itself"]


@needs_files
@needs_calls
@pytest.mark.parametrize(
    ("how", "could"),
    [("graph", OWN), ("ops", OWN), ("worker", [*OWN, "ages trust", "signals it"])],
)
def test_no_other_process_is_ended_or_moved_under_an_older_landlock(
    how: str, could: list[str], tmp_path: Path
) -> None:
    """An engine's process may signal what it started, and others there: doctor says so."""
    (tmp_path / "trust.toml").write_text("")
    (tmp_path / "scratch").mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
        cores = os.sched_getaffinity(victim.pid)
        words = [how, str(victim.pid), str(tmp_path / "trust.toml"), str(tmp_path / "scratch")]
        done = subprocess.run(
            [sys.executable, "-c", OLDER, *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == could
        assert victim.poll() is None
        assert os.sched_getaffinity(victim.pid) == cores
        assert os.sched_getscheduler(victim.pid) == os.SCHED_OTHER
        victim.communicate(b"\n", timeout=60)


@pytest.mark.parametrize(
    ("version", "can"), [(0, "can write trust.toml, and "), (5, "can "), (6, "")]
)
def test_what_an_engine_s_process_may_do_there_is_said_by_doctor(
    version: int, can: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confinement, "probe_landlock", lambda: version)
    said = [note for note in probe_host(scene.settings).notes if note.startswith("engines: ")]
    assert said == [
        f"engines: a model's own process {can}signal others: landlock is of version {version}, "
        "not 6"
    ] * bool(can)


def test_only_what_a_list_allows_is_told_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = {"PYTHONPATH": "a", "LD_LIBRARY_PATH": "b", "CUDA_VISIBLE_DEVICES": "0", "OMP_N": "1"}
    kept = {"HF_TOKEN": "c", "AWS_PROFILE": "d", "TORCH_TOKEN": "e", "SSH_AUTH_SOCK": "f"}
    for name, value in (told | kept).items():
        monkeypatch.setenv(name, value)
    found = read_needed_environment()
    assert found.items() >= told.items()
    assert not found.keys() & kept.keys()


def test_what_lies_beside_a_file_is_not_what_holds_it(tmp_path: Path) -> None:
    home = tmp_path / "cache" / "home"
    (home / "mirror").mkdir(parents=True)
    (home / "trust.toml").write_text("")
    (tmp_path / "models").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    found = list_beside(home / "trust.toml")
    assert {home / "mirror", tmp_path / "models"} <= {*found}
    assert not {home, tmp_path / "cache", tmp_path / "link", tmp_path, Path("/")} & {*found}


def test_calls_have_the_numbers_that_the_system_has() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.is_file():
        pytest.skip("the system's headers are not here")
    known = dict(re.findall(r"__NR_(\w+) (\d+)", header.read_text()))
    tables = (seccomp._OTHERS, seccomp._SYSTEM, seccomp._ATTRIBUTES, seccomp._SHARED)
    calls = {name: each for table in tables for name, each in table.items()}
    calls |= seccomp._LEAVING | seccomp._SOCKETS | seccomp._STARTS | seccomp._PLACED
    calls |= {"fcntl": seccomp._FCNTL, "ioctl": seccomp._IOCTL, "move_pages": seccomp._MOVE_PAGES}
    ours = {name: str(number) for name, (number, _) in calls.items() if name in known}
    assert ours == {name: known[name] for name in ours}
    assert len(ours) > 60
