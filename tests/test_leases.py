"""Who holds what in a mirror: by locks, which hold in every container and end with their holder."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bundles import make_bundle
from test_mirror_store import is_empty, start_slow_put

from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import ArtifactHeld
from hubaoti.mirror import Mirror

NAME = "a" * 64
OPEN = "import sys; from pathlib import Path; from hubaoti.mirror import Mirror\n"
OPEN += "mirror = Mirror.open(Path(sys.argv[1]))\n"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "home/mirror"


@contextmanager
def running(root: Path, code: str, *before: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has opened the mirror, and then done what `code` says, until it is ended."""
    text = f"{OPEN}{code}\nprint('ready', flush=True)\nsys.stdin.read()\n"
    command = [*before, sys.executable, "-c", text, str(root)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        if process.poll() is None:
            process.kill()


def in_own_namespace() -> list[str]:
    """The command that runs another one as in a container: it sees no process but its own."""
    command = ["unshare", "--pid", "--fork", "--kill-child"]
    try:
        done = subprocess.run([*command, "true"], capture_output=True)
    except FileNotFoundError:
        done = None
    if done is None or done.returncode:
        pytest.skip("no namespace of processes can be made here")
    return command


def test_what_a_living_process_writes_stays_where_another_container_opens_the_mirror(
    root: Path, bundle: Bundle
) -> None:
    with start_slow_put(root, bundle) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        with running(root, "pass", *in_own_namespace()):
            assert not is_empty(root / "tmp")
        process.send_signal(signal.SIGCONT)
        process.communicate()
    assert process.returncode == 0
    with Mirror.open(root) as mirror:
        assert len(mirror.ls()) == 1 and is_empty(root / "tmp")


def test_what_a_killed_container_wrote_is_swept(root: Path) -> None:
    code = "from hubaoti.mirror.folders import make_workspace\n"
    code += "work = make_workspace(mirror.root / 'tmp')\nwork.__enter__()"
    with running(root, code, *in_own_namespace()) as process:
        with Mirror.open(root):
            assert not is_empty(root / "tmp")
        process.kill()
        assert process.stdout is not None
        process.stdout.read()  # until its child has ended, too
        with Mirror.open(root):
            assert is_empty(root / "tmp")


def test_what_is_open_is_held_until_its_process_ends(root: Path) -> None:
    with Mirror.open(root) as mirror:
        assert not mirror.leases.is_held(NAME)
        with running(root, f"mirror.leases.hold('{NAME}')") as process:
            assert mirror.leases.is_held(NAME)
            with pytest.raises(ArtifactHeld, match="open in a process"):
                mirror.leases.removing(NAME).__enter__()
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not mirror.leases.is_held(NAME)


def test_what_is_open_in_another_container_is_held(root: Path) -> None:
    with (
        Mirror.open(root) as mirror,
        running(root, f"mirror.leases.hold('{NAME}')", *in_own_namespace()),
    ):
        assert mirror.leases.is_held(NAME)


def test_a_fork_keeps_what_its_parent_has_open(root: Path) -> None:
    """As a ZeroGPU worker does; the parent ends, and the child goes on."""
    code = f"mirror.leases.hold('{NAME}')\nimport os\n"
    code += (
        "if os.fork() == 0:\n    sys.stdin.read()\n    os._exit(0)\nsys.stdin = open('/dev/null')"
    )
    with Mirror.open(root) as mirror:
        with running(root, code) as process:
            assert process.wait() == 0  # the parent
            assert mirror.leases.is_held(NAME)
            assert process.stdin is not None
            process.stdin.close()  # and so ends the child
            assert process.stdout is not None
            process.stdout.read()
        assert not mirror.leases.is_held(NAME)


def test_who_holds_a_mirror_that_may_not_be_written_holds_nothing(tmp_path: Path) -> None:
    from hubaoti.mirror.leases import Leases

    leases = Leases(tmp_path / "absent")
    leases.hold(NAME)
    assert leases.is_held(NAME)  # and nobody can remove it
