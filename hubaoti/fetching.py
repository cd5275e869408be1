"""A model's folder: a local one as it is, else the files that are needed, of the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hubaoti.errors import BadRequest, ModelNotFound, RepoNotFound
from hubaoti.escape import one_line
from hubaoti.manifest import Source
from hubaoti.settings import Settings
from hubaoti.steps import Say, silent

# What the compiler reads of a model: config, tokenizer and code; no pattern matches weights.
COMPILE_FILES = ("*.json", "*.txt", "*.py", "*.model", "*/config.json", "tokenizer*")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# What the runtime reads of a model: what it says of itself, its tokenizer and its weights.
RUN_FILES = ("config.json", "modules.json", "*/config.json", "tokenizer.json", *WEIGHTS)
EAGER_FILES = (*COMPILE_FILES, "*.safetensors", "*.jinja")


def model_files(
    model: str | Path,
    revision: str | None,
    patterns: Sequence[str],
    settings: Settings,
    say: Say = silent,
) -> tuple[Path, Source]:
    """The folder of a model, and where it came from: a local one as it is, else of the Hub.

    A local path is not written into the source: it would end up in a published manifest.

    Raises:
        ModelNotFound: neither a folder nor a repo of the Hub.
    """
    if folder := local_folder(model):
        return folder, Source(model=folder.resolve().name)
    from hubaoti.hub.client import HubClient

    try:
        found, commit = HubClient(settings, say).model_folder(str(model), revision, patterns)
    except (BadRequest, RepoNotFound) as why:
        raise ModelNotFound(
            f"{one_line(str(model))} is neither a folder nor a model of {settings.endpoint}",
            hint="give a Hub id as owner/name, or the folder of a model",
        ) from why
    return found, Source(model=str(model), commit=commit)


def local_folder(model: str | Path) -> Path | None:
    """The folder of this name; None where there is none, or can be none."""
    try:
        folder = Path(model).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError):  # too long a name; the home of a user that there is not
        return None
