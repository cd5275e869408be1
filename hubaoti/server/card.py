"""What a README's front matter says: the YAML that the Hub shows, filters and tags by.

It comes from outside, so it is read small, without aliases (which could unfold without end), and
made plain: only what JSON can write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import yaml

LIMIT = 128 * 1024
"""How many bytes of a README are looked at."""

_FRONT_MATTER = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)

_TAG_KEYS = {
    "language": "",
    "library_name": "",
    "pipeline_tag": "",
    "tags": "",
    "base_model": "base_model:",
    "datasets": "dataset:",
    "license": "license:",
}
_DATASET_TAG_KEYS = (
    "annotations_creators",
    "language",
    "language_creators",
    "license",
    "multilinguality",
    "size_categories",
    "source_datasets",
    "task_categories",
    "task_ids",
)


class BadCard(ValueError):
    """Front matter that cannot be read, in words for its author."""


class _Loader(yaml.SafeLoader):
    """YAML without aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise BadCard("aliases are not allowed")
        return super().compose_node(parent, index)


def parse(readme: str) -> dict[str, Any]:
    """The front matter of a README, plain; {} when it has none.

    Raises:
        BadCard: it is not a YAML mapping.
    """
    match = _FRONT_MATTER.match(readme)
    if match is None:
        return {}
    try:
        found = _plain(yaml.load(match[1], _Loader) or {})
    # PyYAML lets through whatever Python raises at a scalar that is not what its tag says.
    except Exception as error:
        raise BadCard(f"the metadata is not valid YAML: {error}"[:500]) from None
    if not isinstance(found, dict):
        raise BadCard("the metadata is not a YAML mapping")
    return found


def tags(kind: str, card: dict[str, Any]) -> list[str]:
    """What the repo can be filtered by, as the Hub derives it from a card."""
    keys = _TAG_KEYS
    if kind == "dataset":
        keys = {"tags": ""} | {key: f"{key}:" for key in _DATASET_TAG_KEYS}
    found = [f"{mark}{word}" for key, mark in keys.items() for word in _words(card.get(key))]
    if relation := card.get("base_model_relation"):
        found += [f"base_model:{relation}:{word}" for word in _words(card.get("base_model"))]
    return list(dict.fromkeys(found))


def _words(value: object) -> Iterable[str]:
    if isinstance(value, list):
        return [str(word) for word in value if isinstance(word, str | int | float)]
    return [str(value)] if isinstance(value, str | int | float) and value != "" else []


def _plain(value: object) -> Any:
    if isinstance(value, dict):
        return {_word(key): _plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(held) for held in value]
    exact = isinstance(value, bool | None) or (isinstance(value, int) and abs(value) < 2**53)
    if exact or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _word(value)


def _word(value: object) -> str:
    return str(value).encode("utf-8", "replace").decode()
