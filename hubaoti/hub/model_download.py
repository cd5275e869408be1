"""A model's folder: a local one as it is, else the files that are needed, of the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hubaoti.artifact.schema import ModelSource
from hubaoti.errors import BadRequest, HubUnreachable, ModelNotFound, RepoNotFound
from hubaoti.escape import escape_line
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import Settings

# What the compiler reads of a model: config, tokenizer and code; no pattern matches weights.
COMPILE_FILES = ("*.json", "*.txt", "*.py", "*.model", "*/config.json", "tokenizer*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# What the runtime reads of a model: what it says of itself, its tokenizer and its weights.
RUN_FILES = (
    *("config.json", "modules.json", "*/config.json", "tokenizer.json", "tokenizer_config.json"),
    *("config_sentence_transformers.json", "sentence_*_config.json", "*/sentence_*_config.json"),
    *_WEIGHTS,
)
EAGER_FILES = (*COMPILE_FILES, "*.safetensors", "*.jinja")


def fetch_model_files(
    model: str | Path,
    revision: str | None,
    patterns: Sequence[str],
    settings: Settings,
    progress: Progress = report_nothing,
) -> tuple[Path, ModelSource]:
    """The folder of a model, and where it came from: a local one as it is, else of the Hub.

    A local path is not written into the source: it would end up in a published manifest.

    Raises:
        ModelNotFound: neither a folder nor a repo of the Hub.
    """
    if folder := find_local_folder(model):
        return folder, ModelSource(model=folder.resolve().name)
    from hubaoti.hub.client import HubClient

    try:
        found, commit = HubClient(settings, progress).model_folder(str(model), revision, patterns)
    except (BadRequest, RepoNotFound) as error:
        raise ModelNotFound(
            f"{escape_line(str(model))} is neither a folder nor a model of {settings.endpoint}",
            hint="give a Hub id as owner/name, or the folder of a model",
        ) from error
    except HubUnreachable as error:
        hint = f"there is no folder {model} here, either; {error.hint}"
        raise HubUnreachable(str(error), hint=hint) from error
    return found, ModelSource(model=str(model), commit=commit)


def find_local_folder(model: str | Path) -> Path | None:
    """The folder of this name; None where there is none, or can be none."""
    try:
        folder = Path(model).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, TypeError):  # too long a name, no name; nobody's home
        return None
