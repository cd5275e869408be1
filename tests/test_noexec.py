"""Disks that are mounted noexec, for real: what has to be loaded is refused before it is built."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hubaoti import errors
from hubaoti.disk import allows_code, require_code

_MOUNT = 'mount -t tmpfs -o noexec,mode=700 tmpfs "$0" && exec "$@"'


def run_beside(disk: Path, code: str, **environment: str) -> list[str]:
    """Run code where `disk` is mounted noexec, which nobody else sees; the lines that it prints."""
    disk.mkdir(exist_ok=True)
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c", _MOUNT, str(disk)]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("mounting a noexec disk is not permitted here")
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [*alone, sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "DISK": str(disk), "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_folder_is_refused_by_its_name_with_a_remedy(tmp_path: Path) -> None:
    code = """
        import os
        from pathlib import Path
        from hubaoti.disk import require_code
        try: require_code(Path(os.environ["DISK"], "not", "yet"), "set HUBAOTI_HOME to")
        except Exception as error: print(type(error).__name__, error, error.hint, sep="\\n")
    """
    assert run_beside(tmp_path / "disk", code) == [
        "CannotOpen",
        f"{tmp_path}/disk/not/yet is on a disk that is mounted noexec, and what is built there is "
        "loaded",
        "set HUBAOTI_HOME to a folder on a disk that allows code",
    ]


def test_other_disks_allow_code(tmp_path: Path) -> None:
    assert allows_code(tmp_path) and allows_code(tmp_path / "not" / "yet")
    require_code(tmp_path, "")


@pytest.mark.parametrize(
    ("tmp", "temporary", "chosen"),
    [(True, True, 0), (True, False, 0), (False, True, 1), (False, False, 0)],
)
def test_builds_lie_where_code_may_be_loaded(
    tmp: bool, temporary: bool, chosen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubaoti.compiler import build_folder

    places = (Path("/tmp"), tmp_path)
    allowed = {place for place, yes in zip(places, (tmp, temporary), strict=True) if yes}
    monkeypatch.setattr(build_folder, "allows_code", allowed.__contains__)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert build_folder.find_build_disk() == places[chosen]


@pytest.mark.slow
def test_a_compile_into_such_a_folder_is_refused_before_anything_is_built(
    tmp_path: Path, tiny_roberta: Path
) -> None:
    code = f"""
        import os, sys
        from hubaoti.cli import dispatch
        sys.stderr = sys.stdout
        print(dispatch(["compile", {str(tiny_roberta)!r}, "-o", os.environ["DISK"] + "/bundle"]))
        print(os.listdir(os.environ["DISK"]))
    """
    lines = run_beside(tmp_path / "disk", code)
    assert lines[-2:] == [str(errors.CannotOpen.exit_code), "[]"]
    (message, hint) = lines[-4:-2]
    assert message.startswith(f"error: {tmp_path}/disk/") and "noexec" in message
    assert hint.startswith("hint: set -o, or TMPDIR")
    assert not [line for line in lines if "lower" in line]


@pytest.mark.cuda
def test_a_home_on_such_a_disk_is_refused_also_where_the_stand_in_is_built_already(
    tmp_path: Path,
) -> None:
    code = """
        import os, shutil
        from pathlib import Path
        from hubaoti.compiler.stand_in import build_stand_in
        from hubaoti.host.probe import find_torch
        try: build_stand_in(find_torch([]), Path(os.environ["DISK"], "home"))
        except Exception as error: print(type(error).__name__, error, error.hint, sep="\\n")
        print(os.listdir(os.environ["DISK"]))
    """
    kind, message, hint, left = run_beside(tmp_path / "disk", code)
    assert (kind, left) == ("CannotOpen", "[]")
    assert message.startswith(f"{tmp_path}/disk/home is on a disk that is mounted noexec")
    assert hint.startswith("set HUBAOTI_HOME")
