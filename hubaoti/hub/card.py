"""A repo's README: what the user wrote stays, one marked section and our tags are rendered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubaoti.hub.client import join_card, split_card
from hubaoti.hub.layout import Place
from hubaoti.manifest import Manifest

START = "<!-- hubaoti: what stands up to the end mark is rendered by each push -->"
END = "<!-- hubaoti: end -->"
TEMPLATE = "template.md"

# A local folder can look like an id: only a model that has a commit came from the Hub.
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_OUR_TAG = re.compile(r"hubaoti(-program-[0-9a-f]{12})?|torch-\d+\.\d+|cuda-\d+\.\d+|sm-\d+")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the card's table."""

    recipe: str
    variant: str
    graphs: int
    size: str
    error: str
    digest: str


def render(
    repo: str,
    readme: str,
    artifacts: Mapping[Place, Manifest],
    newest: Manifest,
    unreadable: tuple[str, ...] = (),
) -> str:
    """The README of a repo that holds these artifacts; `readme` is the one that is there, or "".

    Raises:
        Conflict: the metadata of the present one is not readable.
    """
    metadata, text = split_card(readme)
    rows = [row_of(place, artifacts[place]) for place in sorted(artifacts, key=str)]
    program: dict[str, Any] = {
        "base_model": base_model(newest),
        "tag": newest.program.tag,
        "task": newest.program.task,
        "answers": newest.is_whole,
    }
    section = template().render(repo=repo, rows=rows, program=program, unreadable=unreadable)
    merged = merge_metadata(metadata, artifacts.values(), program["base_model"])
    return join_card(merged, merge_text(text, repo, section.strip()))


def template() -> Any:
    """The card's template: in the installed package, or beside it in a checkout."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    package = Path(__file__).parents[1]
    folders = (package / "model_cards", package.parent / "model_cards")
    return Environment(
        loader=FileSystemLoader(folders),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, and every value in it is of a grammar of ours
        keep_trailing_newline=True,
    ).get_template(TEMPLATE)


def row_of(place: Place, manifest: Manifest) -> Row:
    """An artifact's line."""
    errors = [check.max_absolute for check in manifest.checks]
    return Row(
        recipe=str(place.recipe),
        variant=str(place.variant),
        graphs=len(manifest.graphs),
        size=f"{manifest.size / 1e6:.1f} MB",
        error=f"{max(errors):.1e}" if errors else "not checked",
        digest=manifest.digest[:12],
    )


def base_model(manifest: Manifest) -> str | None:
    """The Hub id of the model that was compiled; None for a local one, whose path is private."""
    source = manifest.source
    known = source.commit is not None and _HUB_ID.fullmatch(source.model)
    return source.model if known else None


def tags_of(manifest: Manifest) -> list[str]:
    """The tags by which an artifact is found."""
    variant = manifest.variant
    tags = ["hubaoti", manifest.program.tag, f"torch-{variant.torch}"]
    if variant.cuda is not None:
        tags += [f"cuda-{variant.cuda}", f"sm-{variant.sm}"]
    return [*tags, variant.level]


def merge_metadata(metadata: dict[str, Any], manifests: Any, base: str | None) -> dict[str, Any]:
    """The user's metadata with ours: our tags name what is there now, everything else stays."""
    before = metadata.get("tags") or []
    before = before if isinstance(before, list) else [before]  # yaml's `tags: mine` is one word
    theirs = [tag for tag in before if not _OUR_TAG.fullmatch(str(tag))]
    ours = sorted({tag for manifest in manifests for tag in tags_of(manifest)})
    merged = {"library_name": "hubaoti", **metadata}
    if base is not None:
        merged.setdefault("base_model", base)
    return {**merged, "tags": list(dict.fromkeys([*theirs, *ours]))}


def merge_text(text: str, repo: str, section: str) -> str:
    """The user's text with our section in its place, or at the end."""
    block = f"{START}\n{section}\n{END}"
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if start and end:
        return f"{head}{block}{tail}"
    above = text.strip() or f"# {repo.partition('/')[2]}"
    return f"{above}\n\n{block}\n"
