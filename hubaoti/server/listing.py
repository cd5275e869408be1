"""The list of repos: which, in what order, how many at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.datastructures import QueryParams

from hubaoti.server import serializers, validation
from hubaoti.server.errors import malformed_request

_PAGE = 1000
_SORTS = frozenset(
    {"createdAt", "downloads", "downloadsAllTime", "lastModified", "likes", "trendingScore"}
)
_UNSUPPORTED = frozenset({"apps", "inference", "inference_provider", "num_parameters"})
_UNSUPPORTED |= {"models", "datasets", "linked"}
"""Filters that the Hub has and we cannot answer: refused, for a wrong list would be worse."""


@dataclass(frozen=True, slots=True)
class Query:
    """What a URL's query asks of the list: filters, order, page, and which properties."""

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
            raise malformed_request(f"This endpoint cannot filter by {', '.join(sorted(refused))}")
        tags = [tag for value in query.getlist("filter") for tag in value.split(",")]
        sort = query.get("sort", "trendingScore")
        if sort not in _SORTS:
            raise malformed_request(f"This endpoint cannot sort by {sort!r}")
        return cls(
            tags=frozenset(filter(None, [*tags, query.get("pipeline_tag", "")])),
            author=query.get("author", ""),
            search=tuple(
                word.lower() for value in query.getlist("search") for word in value.split()
            ),
            gated=_is_gated(query.get("gated", "")),
            sort=sort,
            start=_read_number(query, "cursor", 0),
            limit=min(_read_number(query, "limit", _PAGE), _PAGE),
            full=validation.is_set(query.get("full", "")),
            card=validation.is_set(query.get("cardData", "")),
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
        shown = serializers.choose_properties(
            said, expand=set(self.expand), listed=True, full=self.full
        )
        return shown | ({"cardData": said["cardData"]} if self.card else {})


def list_page(repos: list[dict[str, Any]], query: Query) -> tuple[list[dict[str, Any]], int | None]:
    """A page of the repos asked for, and where the next one starts, if there is one."""
    found = sorted(filter(query.wants, repos), key=lambda said: str(said["id"]))
    found.sort(key=lambda said: said[query.sort], reverse=True)
    end = query.start + query.limit
    return found[query.start : end], end if query.limit and end < len(found) else None


def _is_gated(said: str) -> bool:
    return validation.is_set(said) or said.lower() in {"auto", "manual"}


def _read_number(query: QueryParams, name: str, default: int) -> int:
    value = query.get(name, str(default))
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise malformed_request(f"{name} is not a number: {value[:100]!r}")
    return int(value)
