"""An endpoint whose JSON is of other types than the Hub's: an error of ours, whatever it says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle, make_host
from huggingface_hub import HfApi
from proxies import Proxy

from hubaoti.errors import HubaotiError, HubUnreachable
from hubaoti.hub.client import HubClient
from hubaoti.hub.errors import StaleParent
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import pull_artifact
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

VALUES: tuple[Any, ...] = (None, 7, -1, 1e300, True, "x", "\ud800\x1b[2J", [], [7], {}, {"x": 7})
GONE = object()
Path_ = tuple[str | int, ...]


def places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Where something stands in JSON; of equal neighbours, the first and the last."""
    yield path
    if isinstance(value, dict):
        for key, held in value.items():
            yield from places(held, (*path, key))
    elif isinstance(value, list):
        for at in {0, len(value) - 1} if value else ():
            yield from places(value[at], (*path, at))


def mutated(value: Any, path: Path_, to: Any) -> Any:
    """JSON with something else at a place."""
    if not path:
        return {} if to is GONE else to
    found = value = copy.deepcopy(value)
    for step in path[:-1]:
        found = found[step]
    if to is GONE:
        del found[path[-1]]
    else:
        found[path[-1]] = to
    return value


def seen(proxy: Proxy, ask: Callable[[], object]) -> Any:
    """The JSON that is answered to a request."""
    answers: list[Any] = []

    def keep(value: Any) -> Any:
        answers.append(value)
        return value

    proxy.mutate = keep
    ask()
    proxy.mutate = None
    return answers[0]


def mutants(proxy: Proxy, ask: Callable[[], object]) -> Iterator[tuple[Path_, Any]]:
    """Every mutant of an answer, as it is answered; what is asked may fail in our words only."""
    answer = seen(proxy, ask)
    for path in places(answer):
        for to in (*VALUES, GONE):
            proxy.mutate = lambda _, path=path, to=to: mutated(answer, path, to)
            yield path, to
    proxy.mutate = None


@pytest.fixture
def held(settings: Settings, repo: str, endpoint: Endpoint, tmp_path: Path) -> str:
    """A repo with an artifact, a tag and a branch; its commit."""
    bundle = make_bundle(tmp_path / "bundle")
    return push_bundles([bundle], Destination(RepoRef(repo), tag="v1"), settings).commit


READS: dict[str, tuple[str, Callable[[HubClient, str, str], object]]] = {
    "resolve": ("/api/models/", lambda client, repo, commit: client.resolve(repo)),
    "files": ("/tree/", lambda client, repo, commit: client.files(repo, commit)),
    "tags": ("/refs", lambda client, repo, commit: client.tags(repo)),
    "branches": ("/refs", lambda client, repo, commit: client.branches(repo)),
    "create": ("/create", lambda client, repo, commit: client.create(repo, private=False)),
    "private": ("/api/models/", lambda client, repo, commit: client.create(repo, private=False)),
}


@pytest.mark.parametrize("name", READS)
def test_an_answer_of_another_shape_is_right_or_refused_in_our_words(
    settings: Settings, repo: str, held: str, proxy: Proxy, name: str
) -> None:
    client, count = HubClient(settings), 0
    proxy.matching, read = READS[name]
    right = read(client, repo, held)
    for path, to in mutants(proxy, lambda: read(client, repo, held)):
        count += 1
        try:
            found = read(client, repo, held)
        except HubaotiError as why:
            assert "\x1b" not in str(why) and why.hint, (path, to)
        else:
            assert type(found) is type(right), (path, to)
    assert count > 30


@pytest.mark.parametrize("sha", [7, 1.5, True, [], {}, "", "x", "../../etc", f"{'a' * 40}\n"])
def test_a_commit_that_is_none_is_said_to_be_none(
    settings: Settings, repo: str, held: str, proxy: Proxy, sha: object
) -> None:
    proxy.mutate = lambda answer: {**answer, "sha": sha}
    with pytest.raises(HubUnreachable, match=f"names no commit of {repo}"):
        HubClient(settings).resolve(repo)
    proxy.matching = "/api/models/"
    proxy.mutate = lambda answer: {**answer, "sha": sha} if "sha" in answer else answer
    with pytest.raises(HubaotiError, match=repo):
        HubClient(settings).model_folder(repo, None, ("*.json",))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("/tree/", lambda tree: [{**file, "size": "7"} for file in tree]),
        ("/tree/", lambda tree: [{**file, "size": -7} for file in tree]),
        ("/tree/", lambda tree: [{**file, "path": 7} for file in tree]),
        ("/tree/", lambda tree: [{**file, "oid": None} for file in tree]),
        ("/refs", lambda refs: {**refs, "tags": [{"name": "v1", "ref": "", "targetCommit": 7}]}),
        ("/refs", lambda refs: {**refs, "tags": [{"name": [], "ref": "", "targetCommit": "7"}]}),
    ],
)
def test_files_and_refs_of_other_types_are_no_hub_s(
    settings: Settings, repo: str, held: str, proxy: Proxy, part: str, change: Any
) -> None:
    proxy.matching, proxy.mutate = part, change
    client = HubClient(settings)
    with pytest.raises(HubUnreachable):
        client.files(repo, held) if part == "/tree/" else client.tags(repo)


@pytest.mark.parametrize("part", ["/commit/", "/preupload/", "validate-yaml"])
def test_no_answer_to_a_push_ends_in_an_error_that_is_not_ours(
    settings: Settings, repo: str, proxy: Proxy, endpoint: Endpoint, part: str
) -> None:
    client, api, count = HubClient(settings), HfApi(endpoint.url, token=endpoint.token), 0
    api.create_repo(repo)
    proxy.matching = part

    def commit() -> object:
        nonlocal count
        count += 1
        head = str(api.repo_info(repo).sha)
        files = {"a.txt": f"{count}".encode(), "README.md": b"---\nlicense: mit\n---\n"}
        return client.commit(repo, files, (), "title", head)

    for path, to in mutants(proxy, commit):
        try:
            commit()
        except (HubaotiError, StaleParent) as why:
            assert not isinstance(why, HubaotiError) or why.hint, (path, to)
    assert count > 10


PULLED: dict[str, tuple[Path_, ...]] = {
    "/revision/": ((), ("sha",), ("siblings",)),
    "/refs": ((), ("tags",), ("tags", 0), ("tags", 0, "name"), ("tags", 0, "targetCommit")),
    "/tree/": ((), (0,), (0, "path"), (0, "size"), (0, "oid")),
}


@pytest.mark.parametrize("part", PULLED)
def test_no_answer_to_a_pull_ends_in_an_error_that_is_not_ours(
    settings: Settings, repo: str, held: str, proxy: Proxy, part: str
) -> None:
    refused, proxy.matching = 0, part
    for path in PULLED[part]:
        for to in VALUES:
            proxy.mutate = lambda answer, path=path, to=to: changed(answer, path, to)
            empty = replace(settings, home=settings.home / f"{path}{to!r:.9}".replace("/", ""))
            try:
                ref = RepoRef(repo, "main" if part == "/revision/" else "v1")
                pull_artifact(ref, empty, make_host(), trust=True)
            except HubaotiError:
                refused += 1
    assert refused > 10


def changed(answer: Any, path: Path_, to: Any) -> Any:
    """A mutant, where the answer has such a place."""
    try:
        return mutated(answer, path, to)
    except (KeyError, IndexError, TypeError):
        return answer
