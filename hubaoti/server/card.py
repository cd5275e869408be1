"""What a README's front matter says: the YAML that the Hub shows, filters and tags by.

It comes from outside, so it is read small, and made plain: only what JSON can write.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from hubaoti import front_matter

CARD_LIMIT, BadCard = front_matter.LIMIT, front_matter.BadFrontMatter

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


def parse_card(readme: str) -> dict[str, Any]:
    """The front matter of a README, plain; {} when it has none.

    Raises:
        BadCard: it is not a YAML mapping.
    """
    found, _ = front_matter.split(readme)
    try:
        return {_to_word(key): _make_plain(held) for key, held in found.items()}
    except Exception as error:  # of values that Python cannot write
        raise BadCard(f"the metadata is not valid YAML: {error}"[:500]) from None


def derive_tags(kind: str, card: dict[str, Any]) -> list[str]:
    """What the repo can be filtered by, as the Hub derives it from a card."""
    keys = _TAG_KEYS
    if kind == "dataset":
        keys = {"tags": ""} | {key: f"{key}:" for key in _DATASET_TAG_KEYS}
    found = [f"{mark}{word}" for key, mark in keys.items() for word in _list_words(card.get(key))]
    if relation := card.get("base_model_relation"):
        found += [f"base_model:{relation}:{word}" for word in _list_words(card.get("base_model"))]
    return list(dict.fromkeys(found))


def _list_words(value: object) -> Iterable[str]:
    if isinstance(value, list):
        return [str(word) for word in value if isinstance(word, str | int | float)]
    return [str(value)] if isinstance(value, str | int | float) and value != "" else []


def _make_plain(value: object) -> Any:
    if isinstance(value, dict):
        return {_to_word(key): _make_plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple | set):
        return [_make_plain(held) for held in value]
    exact = isinstance(value, bool | None) or (isinstance(value, int) and abs(value) < 2**53)
    if exact or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _to_word(value)


def _to_word(value: object) -> str:
    return str(value).encode("utf-8", "replace").decode()
