"""A repo's README: what the user wrote stays, one marked section and our tags are rendered."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.sizes import format_size
from hubaoti.errors import Conflict, first_line
from hubaoti.hub.layout import ArtifactPath

if TYPE_CHECKING:
    from hubaoti.hub.catalog import Catalog
    from hubaoti.hub.client import HubClient

_README = "README.md"
_START = "<!-- hubaoti: what stands up to the end mark is rendered by each push -->"
_END = "<!-- hubaoti: end -->"
_TEMPLATE = "template.md"
_WHOLE = ("embed", "classify", "logits")  # tasks that a graph alone can do
_ODD = re.compile(r"[^A-Za-z0-9@._:/+ -]")
_LONGEST_NAME = 80  # characters of a signer
TAG = "hubaoti"  # of every repo that holds graphs

# A local folder can look like an id: only a model that has a commit came from the Hub.
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
OUR_TAG = re.compile(
    r"hubaoti(-program-[0-9a-f]{12})?|torch-\d+\.\d+|cuda-\d+\.\d+|sm-\d+|x86_64(_v\d)?|aarch64"
)


def render(
    repo: str,
    readme: str,
    artifacts: Mapping[ArtifactPath, Manifest],
    newest: Manifest,
    unreadable: tuple[str, ...] = (),
    signers: Mapping[ArtifactPath, str] = MappingProxyType({}),
) -> str:
    """The README of a repo that holds these artifacts; `readme` is the one that is there, or "".

    `repo` is with its branch, if that is not the default one, as `owner/name@branch`. `signers` are
    who says to have signed them, whom nobody verified for it.

    Raises:
        Conflict: the metadata of the present one cannot be read, or not be written again.
    """
    from hubaoti import front_matter  # and yaml, which pulls do not need

    base_model, (name, _, revision) = find_base_model(newest), repo.partition("@")
    section = _load_template().render(
        repo=repo,
        name=name,
        revision=revision,
        base_model=base_model,
        task=newest.program.task,
        rows=[_make_row(place, artifacts[place], signers) for place in sorted(artifacts, key=str)],
        programs=_list_programs([*artifacts.values(), newest]),
        uses=_list_uses([*artifacts.values(), newest]),
        kernels=sorted({str(k) for each in artifacts.values() for k in each.requires.kernels}),
        unreadable=unreadable,
    )
    try:
        metadata, text = front_matter.split(readme)
        merged = _merge_metadata(metadata, artifacts.values(), base_model)
        return front_matter.join(merged, _merge_text(text, name, section.strip()))
    except front_matter.BadFrontMatter as error:
        raise Conflict(
            f"the repo's README.md has unreadable metadata: {first_line(error)}",
            hint="correct the block between the --- lines of README.md, then push again",
        ) from error


def _load_template() -> Any:
    """The card's template: in the installed package, or beside it in a checkout."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    package = Path(__file__).parents[1]
    folders = (package / "model_cards", package.parent / "model_cards")
    return Environment(
        loader=FileSystemLoader(folders),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, and every value in it is of a grammar of ours, or `_plain`
        keep_trailing_newline=True,
    ).get_template(_TEMPLATE)


def _make_row(
    place: ArtifactPath, manifest: Manifest, signers: Mapping[ArtifactPath, str]
) -> dict[str, Any]:
    """One line of the card's table, each cell as it is shown."""
    # As `compile` prints it: what kernels computed when they were interpreted is told there, too.
    errors = [each.max_relative for each in manifest.checks if each.where != "interpreted"]
    return {
        "path": str(place),
        "recipe": place.recipe,
        "variant": place.variant,
        "graphs": len(manifest.graphs),
        "size": format_size(manifest.size),
        "error": f"{max(errors):.1e}" if errors else "not checked",
        "signer": _plain(signers.get(place, "")),
        "digest": manifest.digest,
    }


def _plain(text: str) -> str:
    """Somebody else's words, which neither end a cell of a table nor begin anything of Markdown."""
    return _ODD.sub("?", text[:_LONGEST_NAME])


def _list_programs(manifests: Iterable[Manifest]) -> list[dict[str, str]]:
    """The programs of some artifacts, each once: its tag, and the task that it does."""
    tasks = {each.program.tag: each.program.task for each in manifests}
    return [{"tag": tag, "task": task} for tag, task in sorted(tasks.items())]


def _list_uses(manifests: Iterable[Manifest]) -> set[str]:
    """How artifacts are used: for texts, for prompts, or attached to a module."""
    return {
        ("texts" if each.is_whole else "modules")
        if each.program.task in _WHOLE
        else {"generate": "prompts"}.get(each.program.task, "modules")
        for each in manifests
    }


def find_base_model(manifest: Manifest) -> str | None:
    """The Hub id of the model that was compiled; None for a local one, whose path is private."""
    source = manifest.source
    known = source.commit is not None and _HUB_ID.fullmatch(source.model)
    return source.model if known else None


def read_base_model(client: HubClient, catalog: Catalog) -> str | None:
    """The model that a repo's card names, as its author wrote it; None where it names none."""
    from hubaoti import front_matter

    entry = catalog.files.get(_README)
    if entry is None or entry.size > front_matter.LIMIT:
        return None
    try:
        text = client.read(catalog.repo, catalog.commit, entry).decode("utf-8-sig")
        named = front_matter.split(text)[0].get("base_model")
    except ValueError:  # no text, no front matter
        return None
    first = named[0] if isinstance(named, list) and len(named) == 1 else named
    return first if isinstance(first, str) and _HUB_ID.fullmatch(first) else None


def _make_tags(manifest: Manifest) -> list[str]:
    """The tags by which an artifact is found."""
    variant = manifest.variant
    tags = [TAG, manifest.program.tag, f"torch-{variant.torch}"]
    if variant.cuda is not None:
        tags += [f"cuda-{variant.cuda}", f"sm-{variant.sm}"]
    return [*tags, variant.level]


def _merge_metadata(metadata: dict[str, Any], manifests: Any, base: str | None) -> dict[str, Any]:
    """The user's metadata with ours: our tags name what is there now, everything else stays."""
    before = metadata.get("tags") or []
    before = before if isinstance(before, list) else [before]  # yaml's `tags: mine` is one word
    theirs = [tag for tag in before if not OUR_TAG.fullmatch(str(tag))]
    ours = sorted({tag for manifest in manifests for tag in _make_tags(manifest)})
    merged = {"library_name": "hubaoti", **metadata}
    if base is not None:
        merged.setdefault("base_model", base)
    return {**merged, "tags": list(dict.fromkeys([*theirs, *ours]))}


def _merge_text(text: str, repo: str, section: str) -> str:
    """The user's text with our section in its place, or at the end."""
    block = f"{_START}\n{section}\n{_END}"
    head, start, rest = text.partition(_START)
    _, end, tail = rest.partition(_END)
    if start and end:
        return f"{head}{block}{tail}"
    above = text.strip() or f"# {repo.partition('/')[2]}"
    return f"{above}\n\n{block}\n"
