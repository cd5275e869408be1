"""Packages that a machine with a GPU and no network lacks: from a folder of wheels, and into it."""

from __future__ import annotations

import email
import importlib
import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# What a machine for this has, or it is not one: never installed, never replaced.
GIVEN = {"torch", "transformers", "numpy", "tokenizers", "safetensors", "huggingface-hub"}
EXTRAS = ("compile", "run", "serve", "quantize")
SPARED = {"torchao", "diffusers"}  # the checks that want them say that they are not there


def list_requirements() -> list[Any]:
    """What hubaoti needs, its endpoint, its recipes and its tests, as pyproject.toml says."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    words = [*project["dependencies"], *(word for name in EXTRAS for word in extras[name])]
    words += [word for word in extras["dev"] if word.startswith(("pytest>=", "diffusers>="))]
    return [Requirement(word) for word in words]


def find_unmet(
    here: Callable[[Any], bool], wheels: Path, python: str
) -> tuple[list[str], list[str]]:
    """The packages to take from a folder for what is not here, and what the folder lacks too."""
    from packaging.utils import canonicalize_name, parse_wheel_filename

    found = {parse_wheel_filename(file.name)[0]: file for file in sorted(wheels.glob("*.whl"))}
    waiting, seen, taken, lacking = list_requirements(), set(), [], []
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        if (name, *sorted(need.extras)) in seen or here(need):
            continue
        seen.add((name, *sorted(need.extras)))
        if name in found and name not in GIVEN:
            taken.append(name)
            waiting += read_requirements(found[name], need.extras, python)
        else:
            lacking.append(str(need))
    return sorted({*taken}), sorted({*lacking})


def read_requirements(wheel: Path, extras: set[str], python: str) -> Iterator[Any]:
    """What a wheel says that it needs on a Python, with some of its extras."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        words = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    version = {"python_version": python, "python_full_version": f"{python}.0"}
    for need in map(Requirement, words):
        markers = [version | {"extra": extra} for extra in ("", *extras)]
        if need.marker is None or any(map(need.marker.evaluate, markers)):
            need.marker = None  # it was answered, and pip would answer it again for this Python
            yield need


def is_installed(need: Any) -> bool:
    """Whether this Python has a package, in a version that will do."""
    try:
        version = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(need.specifier.contains(version, prereleases=True))


def install(wheels: Path, target: Path) -> None:
    """Put what is missing into a folder of its own, which this process then looks at first.

    Raises:
        SystemExit: something is missing, and no wheel of it is there.
    """
    from packaging.requirements import Requirement

    python = "{}.{}".format(*sys.version_info)
    taken, lacking = find_unmet(is_installed, wheels, python)
    lost = [word for word in lacking if Requirement(word).name not in SPARED]
    if lost:
        lacks = f"{sys.executable} lacks {', '.join(lost)}"
        sys.exit(f"{lacks}: take another Python, or wheels of them (--collect, --wheels)")
    if taken:
        where = ["--no-index", "--no-deps", "--find-links", str(wheels), "--target", str(target)]
        run_pip("install", *where, *taken)
        sys.path.insert(0, str(target))
        importlib.invalidate_caches()


def collect(wheels: Path, python: str) -> None:
    """Download wheels until the folder has all that a machine with torch and transformers lacks."""
    from packaging.utils import canonicalize_name

    kinds = [f"manylinux_2_{minor}_x86_64" for minor in (17, 27, 28)]
    platforms = [f"--platform={kind}" for kind in ("manylinux2014_x86_64", *kinds)]
    where = [f"--dest={wheels}", f"--python-version={python}", *platforms]
    wheels.mkdir(parents=True, exist_ok=True)
    while lacking := find_unmet(lambda n: canonicalize_name(n.name) in GIVEN, wheels, python)[1]:
        run_pip("download", "--no-deps", "--only-binary=:all:", *where, *lacking)


def run_pip(*words: str) -> None:
    """Run this Python's pip."""
    subprocess.run([sys.executable, "-m", "pip", words[0], "--quiet", *words[1:]], check=True)
