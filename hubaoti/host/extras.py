"""What hubaoti needs beyond its own packages, by extra, and the versions of it that are supported.

`pip install hubaoti` brings none of it: listing, publishing, checking and fetching need no torch.
"""

from __future__ import annotations

import sys
from contextlib import suppress

from hubaoti.artifact.requirements import read_version, series
from hubaoti.errors import MissingDependency

EXTRAS = {
    "compile": ("torch", "transformers"),
    "run": ("torch", "tokenizers"),
    "quantize": ("torchao",),
    "sign": ("model-signing", "pyopenssl"),
}
# The first and the last series that scripts/matrix tries; pyproject.toml says the same to pip.
SUPPORTED = {"torch": ("2.11", "2.15"), "transformers": ("5.15", "5.24")}


def require(what: str, *extras: str) -> None:
    """See that everything that some extras bring is here, in versions that are supported.

    `what` is what needs it, in words that begin a sentence. Nothing is imported for it.

    Raises:
        MissingDependency: a package is missing, or of another version; all are named.
    """
    packages = dict.fromkeys(package for extra in extras for package in EXTRAS[extra])
    found = {package: package_version(package) for package in packages}
    missing = [package for package, version in found.items() if version is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingDependency(
            f"{what} needs {join_names(missing)}, which {verb} not installed",
            hint=f'pip install "hubaoti[{",".join(extras)}]"',
        )
    for package, version in found.items():
        if version is not None and not is_supported(package, version):
            first, last = SUPPORTED[package]
            major, minor = map(int, last.split("."))
            raise MissingDependency(
                f"{what} needs {package} {first} to {last}, and {package} {version} is installed",
                hint=f'pip install "{package}>={first},<{major}.{minor + 1}"',
            )


def join_names(names: list[str]) -> str:
    """Names as a sentence has them: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def package_version(package: str) -> str | None:
    """The version of a package: of the one that is loaded, else of the one that is installed."""
    from importlib.metadata import PackageNotFoundError, version  # which is slow to import

    loaded = getattr(sys.modules.get(package), "__version__", None)
    if loaded is not None:
        return str(loaded)
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def is_supported(package: str, version: str) -> bool:
    """Whether a version is of a series that is supported; all are, of a package that has none."""
    if package not in SUPPORTED:
        return True
    found = read_version(version)
    first, last = (tuple(map(int, each.split("."))) for each in SUPPORTED[package])
    return found is not None and first <= tuple(map(int, series(found).split("."))) <= last
