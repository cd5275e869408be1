"""What hubaoti needs beyond its own packages, by extra, and the versions of it that are supported.

`pip install hubaoti` brings none of it: listing, publishing, checking and fetching need no torch.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from urllib.request import url2pathname

from hubaoti.artifact.requirements import read_version, series
from hubaoti.errors import MissingDependency

EXTRAS = {
    "compile": ("torch", "transformers"),
    "run": ("torch", "tokenizers"),
    "quantize": ("torchao",),
    "sign": ("model-signing", "pyopenssl"),
    "serve": ("blake3", "lz4", "starlette", "uvicorn"),
}
# The first and the last series that scripts/matrix tries; pyproject.toml says the same to pip.
SUPPORTED = {"torch": ("2.11", "2.15"), "transformers": ("5.15", "5.24")}
# What a shell reads in double quotes, and how it is kept from it.
_SPECIAL, _ESCAPED = re.compile(r'[\\"$`]'), r"\\\g<0>"


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
            hint=format_install(*extras),
        )
    for package, version in found.items():
        if version is not None and not is_supported(package, version):
            first, last = SUPPORTED[package]
            major, minor = map(int, last.split("."))
            raise MissingDependency(
                f"{what} needs {package} {first} to {last}, and {package} {version} is installed",
                hint=f'pip install "{package}>={first},<{major}.{minor + 1}"',
            )


def format_install(*extras: str) -> str:
    """The command that brings extras, from where hubaoti itself was installed.

    An index may not have what came from a folder or a URL: PEP 610's record says which that was.
    """
    wanted, origin = f"hubaoti[{','.join(extras)}]", _read_origin()
    url, flag = str(origin.get("url", "")), ""
    if "dir_info" in origin and url.startswith("file:"):
        folder = Path(url2pathname(urlsplit(url).path), str(origin.get("subdirectory", "")))
        flag = "-e " * bool(origin["dir_info"].get("editable"))
        wanted = wanted.replace("hubaoti", str(folder), 1)
    elif url:
        wanted = f"{wanted} @ {_format_url(origin, url)}"
    return f'pip install {flag}"{_SPECIAL.sub(_ESCAPED, wanted)}"'


def _read_origin() -> dict[str, Any]:
    """What pip wrote of where hubaoti came from; nothing, if from an index, or in another form."""
    from importlib.metadata import PackageNotFoundError, distribution  # which is slow to import

    with suppress(PackageNotFoundError, OSError, ValueError, AttributeError):
        origin = json.loads(distribution("hubaoti").read_text("direct_url.json") or "{}")
        kinds = [origin.get(kind, {}) for kind in ("dir_info", "vcs_info", "archive_info")]
        if all(isinstance(each, dict) for each in kinds):
            return dict(origin)
    return {}


def _format_url(origin: dict[str, Any], url: str) -> str:
    """A URL as pip takes it, at the commit that was installed, without what may be a secret."""
    parts, vcs = urlsplit(url), origin.get("vcs_info", {})
    user = "git@" * parts.netloc.startswith("git@")  # is no secret, and ssh needs it
    place = user + parts.netloc.rpartition("@")[2]
    found = urlunsplit((parts.scheme, place, parts.path, "", ""))
    if vcs:
        found = f"{vcs.get('vcs')}+{found}@{vcs.get('commit_id')}"
    folder = origin.get("subdirectory")
    return f"{found}#subdirectory={folder}" if folder else found


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
