"""A README's front matter: the YAML between its `---` lines, and the text below.

It comes from outside, so it is read small and without aliases, which could unfold without end.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

LIMIT = 128 * 1024
"""How much of a README is looked at for its front matter."""
DEEPEST = 100
"""How deep what it says may be nested; each level costs a reader more than the one before."""

_START = re.compile(r"\ufeff?\s*---[ \t]*\r?\n")
_END = re.compile(r"^---[ \t]*\r?(?:\n|\Z)", re.MULTILINE)


class BadFrontMatter(ValueError):
    """Front matter that cannot be read, in words for its author."""


class _Loader(yaml.SafeLoader):
    """YAML without aliases, and not nested without end."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise BadFrontMatter(
                "aliases are not allowed: write what *name stands for in its place"
            )
        self.depth += 1
        if self.depth > DEEPEST:
            raise BadFrontMatter(f"it is nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """YAML without aliases, which we would not read again."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def split(readme: str) -> tuple[dict[Any, Any], str]:
    """A README's metadata, as YAML reads it, and its text; {} and all of it where it has none.

    Raises:
        BadFrontMatter: it is no YAML mapping, or larger than `LIMIT`.
    """
    start = _START.match(readme, 0, LIMIT)
    end = start and _END.search(readme, start.end())
    if start is None or end is None:
        return {}, readme
    if end.start() > LIMIT:
        raise BadFrontMatter(f"the metadata is larger than {LIMIT >> 10} KiB")
    return _parse_mapping(readme[start.end() : end.start()]), readme[end.end() :]


def _parse_mapping(text: str) -> dict[Any, Any]:
    try:
        found = yaml.load(text, _Loader) or {}
    except BadFrontMatter:
        raise
    # PyYAML lets through whatever Python raises at a scalar that is not what its tag says.
    except Exception as error:
        raise BadFrontMatter(f"the metadata is not valid YAML: {error}"[:500]) from None
    if not isinstance(found, dict):
        raise BadFrontMatter("the metadata is not a YAML mapping")
    return found


def join(metadata: dict[str, Any], text: str) -> str:
    """A README of metadata, in its order, and text; what is None is left out.

    Raises:
        BadFrontMatter: it holds what YAML cannot say.
    """
    said = {key: value for key, value in metadata.items() if value is not None}
    try:
        dumped = yaml.dump(said, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    except Exception as error:  # as of a number of more digits than Python writes
        raise BadFrontMatter(f"the metadata cannot be written: {error}"[:500]) from None
    return f"---\n{dumped.strip()}\n---\n{text}"
