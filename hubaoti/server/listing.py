"""The list of repos: which, in what order, how many at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.datastructures import QueryParams

from hubaoti.server import shapes, words
from hubaoti.server.problems import malformed

_PAGE = 1000
_SORTS = frozenset(
    {"createdAt", "downloads", "downloadsAllTime", "lastModified", "likes", "trendingScore"}
)
_UNSUPPORTED = frozenset({"apps", "inference", "inference_provider", "num_parameters"})
_UNSUPPORTED |= {"models", "datasets", "linked"}
"""Filters that the Hub has and we cannot answer: refused, for a wrong list would be worse."""


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked of the list."""

    tags: frozenset[str]
    author: str
    search: tuple[str, ...]
    gated: bool
    sort: str
    start: int
    limit: int
    full: bool
    card: bool
    expand: frozenset[str]

    @classmethod
    def parse(cls, query: QueryParams) -> Query:
        """Read a URL's query; 400 for what cannot be answered."""
        if refused := _UNSUPPORTED & query.keys():
            raise malformed(f"This endpoint cannot filter by {', '.join(sorted(refused))}")
        tags = [tag for said in query.getlist("filter") for tag in said.split(",")]
        sort = query.get("sort", "trendingScore")
        if sort not in _SORTS:
            raise malformed(f"This endpoint cannot sort by {sort!r}")
        return cls(
            tags=frozenset(filter(None, [*tags, query.get("pipeline_tag", "")])),
            author=query.get("author", ""),
            search=tuple(word.lower() for said in query.getlist("search") for word in said.split()),
            gated=_is_gated(query.get("gated", "")),
            sort=sort,
            start=_number(query, "cursor", 0),
            limit=min(_number(query, "limit", _PAGE), _PAGE),
            full=words.is_set(query.get("full", "")),
            card=words.is_set(query.get("cardData", "")),
            expand=frozenset(query.getlist("expand")),
        )

    @property
    def wants_files(self) -> bool:
        """Whether the repos' files are asked for."""
        return self.full or bool(self.expand & {"siblings", "usedStorage"})

    def wants(self, said: dict[str, Any]) -> bool:
        """Whether this repo is one of those asked for; ours are never gated."""
        name = said["id"].lower()
        return (
            self.tags <= set(said["tags"])
            and self.author in {"", said["author"]}
            and all(word in name for word in self.search)
            and not self.gated
        )

    def shown(self, said: dict[str, Any]) -> dict[str, Any]:
        """What of a repo is asked for."""
        shown = shapes.chosen(said, expand=set(self.expand), listed=True, full=self.full)
        return shown | ({"cardData": said["cardData"]} if self.card else {})


def page_of(repos: list[dict[str, Any]], query: Query) -> tuple[list[dict[str, Any]], int | None]:
    """A page of the repos asked for, and where the next one starts, if there is one."""
    found = sorted(filter(query.wants, repos), key=lambda said: str(said["id"]))
    found.sort(key=lambda said: said[query.sort], reverse=True)
    end = query.start + query.limit
    return found[query.start : end], end if query.limit and end < len(found) else None


def _is_gated(said: str) -> bool:
    return words.is_set(said) or said.lower() in {"auto", "manual"}


def _number(query: QueryParams, name: str, default: int) -> int:
    said = query.get(name, str(default))
    if not (said.isascii() and said.isdecimal() and len(said) < 10):
        raise malformed(f"{name} is not a number: {said[:100]!r}")
    return int(said)
