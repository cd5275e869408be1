"""Which repos of an endpoint say that they hold graphs, of a program or of any.

They say it by the tags of their cards, which anybody may write into theirs: what a repo holds is
known when its manifests are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from hubaoti.artifact.repo_name import is_repo
from hubaoti.hub.card import OUR_TAG, TAG
from hubaoti.hub.door import Door
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.records import Text

MOST_LISTED = 1000  # repos of one list, as many as the Hub has on a page
_MOST_TAGS = 100  # of a repo

_Listed = list[tuple[Text, datetime | None, list[str] | None]]


@dataclass(frozen=True, slots=True)
class FoundRepo:
    """A repo, when it last changed, and our tags of its card."""

    ref: RepoRef
    updated: datetime | None
    tags: tuple[str, ...]


class RepoFinder(Door):
    """The list of an endpoint's repos; what is asked for may raise what `HubClient` does."""

    def find(
        self, program: str | None = None, words: Iterable[str] = (), owner: str | None = None
    ) -> tuple[FoundRepo, ...]:
        """The repos with our tag, the last changed first, at most `MOST_LISTED` of them.

        Those with the tag of a program, with words in their names, or of one owner, where that is
        asked for. One whose name is none is left out.
        """

        def list_models(_: bool) -> _Listed:
            found = self._api.list_models(
                filter=[TAG] if program is None else [TAG, program],
                search=" ".join(words) or None,
                author=owner,
                sort="last_modified",
                limit=MOST_LISTED,
                expand=["lastModified", "tags"],
            )
            listed = [(each.id, each.last_modified, each.tags) for each in found]
            how = "lists repos in no way of the Hub's"
            return self._convert(listed, _Listed, how)  # type: ignore[no-any-return]

        listed = self._ask("the list of repos", list_models)
        repos = {name: (at, tags) for name, at, tags in listed if is_repo(name)}
        found = [_make_found(name, at, tags or ()) for name, (at, tags) in repos.items()]
        return tuple(sorted(found, key=_rank_age))


def _make_found(name: str, updated: datetime | None, tags: Iterable[str]) -> FoundRepo:
    ours = [tag for tag in tags if OUR_TAG.fullmatch(tag) and tag != TAG]
    return FoundRepo(RepoRef(name), updated, tuple(ours[:_MOST_TAGS]))


def _rank_age(found: FoundRepo) -> tuple[float, str]:
    """The last changed first, whatever the endpoint's order was."""
    at = found.updated
    known = at if at is None or at.tzinfo else at.replace(tzinfo=UTC)
    return (-known.timestamp() if known else 0.0, str(found.ref))


# msgspec learns a type when it is first used, and two threads that meet there end the process.
msgspec.json.Decoder(_Listed)
