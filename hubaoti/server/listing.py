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
        sort, gated = query.get("sort", "trendingScore"), query.get("gated", "").lower()
        if sort not in _SORTS:
            raise malformed_request(f"This endpoint cannot sort by {sort!r}")
        return cls(
            tags=frozenset(filter(None, [*tags, query.get("pipeline_tag", "")])),
            author=query.get("author", ""),
            search=tuple(
                word.lower() for value in query.getlist("search") for word in value.split()
            ),
            gated=validation.is_set(gated) or gated in {"auto", "manual"},
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

    def wants(self, facts: dict[str, Any]) -> bool:
        """Whether this repo is one of those asked for; ours are never gated."""
        name = facts["id"].lower()
        return (
            self.tags <= set(facts["tags"])
            and self.author in {"", facts["author"]}
            and all(word in name for word in self.search)
            and not self.gated
        )

    def choose(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What of a repo is asked for."""
        expand, full = self.expand, self.full
        chosen = serializers.choose_properties(facts, expand=expand, listed=True, full=full)
        return chosen | ({"cardData": facts["cardData"]} if self.card else {})


def list_page(repos: list[dict[str, Any]], query: Query) -> tuple[list[dict[str, Any]], int | None]:
    """A page of the repos asked for, and where the next one starts, if there is one."""
    found = sorted(filter(query.wants, repos), key=lambda facts: str(facts["id"]))
    found.sort(key=lambda facts: facts[query.sort], reverse=True)
    end = query.start + query.limit
    return found[query.start : end], end if query.limit and end < len(found) else None


def _read_number(query: QueryParams, name: str, default: int) -> int:
    value = query.get(name, str(default))
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise malformed_request(f"{name} is not a number: {value[:100]!r}")
    return int(value)
