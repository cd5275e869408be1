"""Push: one commit of checked files with its card; never over another's work."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from bundles import CPU, CUDA, changed, make_bundle, make_host, tree_of
from huggingface_hub import HfApi, ModelCard
from proxies import DROPPED, Proxy

import hubaoti
from hubaoti.artifact.bundle import Bundle, make_file_entry
from hubaoti.artifact.manifest import FILENAME
from hubaoti.artifact.schema import ModelSource
from hubaoti.errors import (
    AuthFailed,
    BadManifest,
    BadPackage,
    BadRequest,
    Conflict,
    DigestMismatch,
    HubaotiError,
    HubUnreachable,
)
from hubaoti.hub import retry
from hubaoti.hub.card import render
from hubaoti.hub.client import HubClient
from hubaoti.hub.errors import StaleParent
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import pull_artifact
from hubaoti.hub.push import (
    LARGEST_README,
    PUSH_ATTEMPTS,
    Commit,
    Destination,
    decode_readme,
    push_bundles,
)
from hubaoti.hub.records import Pushed
from hubaoti.settings import Settings

PLACE = "float32-sdpa/torch2.13-cpu-x86_64_v3-linux"


@pytest.fixture
def api(settings: Settings) -> HfApi:
    return HfApi(settings.endpoint, token=settings.token)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def ship(bundle: Bundle, repo: str, settings: Settings, **to: str | bool) -> Commit:
    return push_bundles([bundle], Destination(RepoRef(repo), **to), settings)  # type: ignore[arg-type]


def group(folder: Path, sms: tuple[int, ...] = (80, 90, 120)) -> list[Bundle]:
    """A folder of bundles as one compile for several GPUs leaves it."""
    return [make_bundle(folder / f"sm{sm}", target={**CUDA, "sm": sm}) for sm in sms]


def titles(api: HfApi, repo: str) -> list[str]:
    return [commit.title for commit in api.list_repo_commits(repo)]


def card(api: HfApi, repo: str) -> str:
    return Path(api.hf_hub_download(repo, "README.md")).read_text()


def test_a_push_is_one_commit_in_the_design_s_layout(
    bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    made = ship(bundle, repo, settings)
    assert made.created
    assert made.path == PLACE
    assert made.digest == bundle.manifest.digest
    assert made.commit == api.repo_info(repo).sha
    assert made.commit in made.url
    files = {file for file in api.list_repo_files(repo) if not file.startswith(".")}
    assert files == {"README.md", *(f"{PLACE}/{name}" for name in tree_of(bundle.path))}
    assert titles(api, repo) == [f"Add {PLACE}", "initial commit"]


def test_the_same_bundle_again_makes_no_commit(
    bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    first = ship(bundle, repo, settings)
    again = ship(bundle, repo, settings, tag="v1")
    assert (again.commit, again.created, again.url) == (first.commit, False, first.url)
    assert len(titles(api, repo)) == 2
    assert [tag.target_commit for tag in api.list_repo_refs(repo).tags] == [first.commit]


def test_a_bundle_edited_after_compile_is_refused_before_any_request(
    bundle: Bundle, repo: str, settings: Settings, proxy: Proxy
) -> None:
    package = bundle.path / "graphs/root.pt2"
    content = bytearray(package.read_bytes())
    content[50] ^= 1
    package.write_bytes(content)
    with pytest.raises(DigestMismatch, match=r"root\.pt2 was changed") as caught:
        ship(bundle, repo, settings)
    assert caught.value.hint
    assert proxy.requests == []


def test_a_bundle_with_a_truncated_package_is_refused(
    bundle: Bundle, repo: str, settings: Settings
) -> None:
    from bundles import describe

    graph = bundle.manifest.graphs[0]
    package = bundle.path / graph.file
    package.write_bytes(package.read_bytes()[:-30])
    with pytest.raises(BadPackage):
        describe(bundle.path, "root")
    with pytest.raises(DigestMismatch):
        ship(bundle, repo, settings)


def test_rebuilding_the_same_key_replaces_the_artifact(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    first = ship(bundle, repo, settings)
    other = make_bundle(tmp_path / "other", members={"model/new.so": b"new"})
    assert other.manifest.key == bundle.manifest.key
    second = ship(other, repo, settings)
    assert second.created and second.digest != first.digest
    pulled = pull_artifact(RepoRef(repo), settings, make_host(), trust=True)
    assert pulled.artifact.digest == second.digest


def test_files_of_the_replaced_artifact_do_not_stay(
    tmp_path: Path, repo: str, settings: Settings, api: HfApi
) -> None:
    ship(make_bundle(tmp_path / "two", graphs=("root", "step")), repo, settings)
    ship(make_bundle(tmp_path / "one", graphs=("root",)), repo, settings)
    assert f"{PLACE}/graphs/step.pt2" not in api.list_repo_files(repo)
    assert f"{PLACE}/graphs/root.pt2" in api.list_repo_files(repo)


def test_an_artifact_that_lost_a_file_is_made_whole(
    bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    ship(bundle, repo, settings)
    api.delete_file(f"{PLACE}/golden.safetensors", repo)
    assert ship(bundle, repo, settings).created
    assert f"{PLACE}/golden.safetensors" in api.list_repo_files(repo)


def test_another_key_at_the_same_path_needs_a_label(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    first = ship(bundle, repo, settings)
    other = make_bundle(tmp_path / "other", mode="max-autotune")
    with pytest.raises(Conflict, match=PLACE.replace("+", r"\+")) as caught:
        ship(other, repo, settings)
    assert "--label" in caught.value.hint
    assert api.repo_info(repo).sha == first.commit
    made = ship(other, repo, settings, label="tuned")
    assert made.path == PLACE.replace("sdpa", "sdpa+tuned")


def test_an_unreadable_artifact_is_not_overwritten(
    bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    api.create_repo(repo)
    path = f"{PLACE}/{FILENAME}"
    api.upload_file(path_or_fileobj=b'{"schema":5}', path_in_repo=path, repo_id=repo)
    with pytest.raises(Conflict, match="schema 5"):
        ship(bundle, repo, settings)
    made = ship(bundle, repo, settings, label="mine")
    assert made.created
    assert f"cannot be read: `{PLACE}`" in card(api, repo)


def test_a_malformed_label_or_tag_or_a_revision_is_refused(
    bundle: Bundle, settings: Settings, proxy: Proxy
) -> None:
    with pytest.raises(BadRequest, match="label"):
        ship(bundle, "acme/x", settings, label="Not/good")
    with pytest.raises(BadRequest, match="tag"):
        Destination(RepoRef("acme/x"), tag="a..b")
    with pytest.raises(BadRequest, match="default branch"):
        Destination(RepoRef("acme/x", "dev"))
    assert proxy.requests == []


def test_a_tag_is_never_moved(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    first = ship(bundle, repo, settings, tag="v1")
    other = make_bundle(tmp_path / "other", target=CUDA)
    with pytest.raises(Conflict, match="v1") as caught:
        ship(other, repo, settings, tag="v1")
    assert caught.value.hint
    assert api.repo_info(repo).sha == first.commit  # and nothing was pushed
    assert (
        pull_artifact(RepoRef(repo, "v1"), settings, make_host(), trust=True).commit == first.commit
    )


def test_a_private_repo_is_made_private_and_a_public_one_left_alone(
    bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    said: list[str] = []
    assert ship(bundle, repo, settings, private=True).private
    assert api.repo_info(repo).private
    api.create_repo(f"{repo}-public", private=False)
    to = Destination(RepoRef(f"{repo}-public"), private=True)
    assert not push_bundles([bundle], to, settings, said.append).private
    assert any("public already" in line for line in said)


@pytest.mark.parametrize("token", [None, "hf_wrong_token"])
def test_without_a_good_token_nothing_is_pushed(
    bundle: Bundle, repo: str, settings: Settings, token: str | None
) -> None:
    with pytest.raises(AuthFailed) as caught:
        ship(bundle, repo, replace(settings, token=token))
    assert "HF_TOKEN" in caught.value.hint
    assert "hf_wrong_token" not in str(caught.value)
    assert caught.value.exit_code == 16


def test_an_endpoint_that_drops_the_upload_leaves_no_commit(
    repo: str,
    bundle: Bundle,
    settings: Settings,
    proxy: Proxy,
    api: HfApi,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    api.create_repo(repo)
    proxy.matching, proxy.answers = "/commit/", [DROPPED] * 100
    with pytest.raises(HubUnreachable, match=settings.endpoint):
        ship(bundle, repo, settings)
    assert titles(api, repo) == ["initial commit"]


def test_an_endpoint_that_drops_its_answer_has_the_commit_and_no_second(
    bundle: Bundle, repo: str, settings: Settings, proxy: Proxy, api: HfApi
) -> None:
    api.create_repo(repo)
    proxy.matching, proxy.cut_after = "/commit/", 0
    made = ship(bundle, repo, settings)
    proxy.reset()
    assert made.created and made.commit == api.repo_info(repo).sha
    assert titles(api, repo) == [f"Add {PLACE}", "initial commit"]


def push_one(folder: Path, repo: str, settings: Settings) -> str:
    return ship(Bundle.read(folder), repo, settings).commit


def test_two_machines_push_two_variants_at_once(
    tmp_path: Path, repo: str, settings: Settings, api: HfApi
) -> None:
    levels = ("x86_64_v2", "x86_64_v3", "x86_64_v4")
    for level in levels:
        make_bundle(tmp_path / level, target={**CPU, "level": level})
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        work = [(tmp_path / level, repo, settings) for level in levels]
        commits = pool.starmap(push_one, work)
        pool.close()
        pool.join()
    assert len(set(commits)) == 3
    found = [file for file in api.list_repo_files(repo) if file.endswith(FILENAME)]
    assert len(found) == 3
    assert all(level in card(api, repo) for level in levels)


def test_a_head_that_moves_under_a_push_is_read_again(
    bundle: Bundle, repo: str, settings: Settings, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.create_repo(repo)
    commit, moves = HubClient.commit, iter(range(2))

    def move_first(self: HubClient, *args: object) -> Pushed:
        for move in moves:
            api.upload_file(path_or_fileobj=b"x", path_in_repo=f"{move}.txt", repo_id=repo)
            break
        return commit(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(HubClient, "commit", move_first)
    assert ship(bundle, repo, settings).created
    assert {"0.txt", "1.txt", f"{PLACE}/{FILENAME}"} <= {*api.list_repo_files(repo)}


def test_a_head_that_never_rests_gives_up(
    bundle: Bundle, repo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object) -> None:
        raise StaleParent

    monkeypatch.setattr(HubClient, "commit", stale)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(Conflict, match=f"changed {PUSH_ATTEMPTS} times"):
        ship(bundle, repo, settings)


def test_the_card_has_the_tags_and_the_table(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    ship(bundle, repo, settings)
    ship(make_bundle(tmp_path / "cuda", target=CUDA), repo, settings)
    found = ModelCard(card(api, repo))
    data = found.data.to_dict()
    assert {*data["tags"]} == {
        "hubaoti",
        bundle.manifest.program.tag,
        "torch-2.13",
        "cuda-13.0",
        "sm-90",
        "x86_64_v3",
    }
    assert data["library_name"] == "hubaoti"
    assert data["base_model"] == "acme/tiny"
    assert f"hubaoti pull {repo}" in found.text
    assert f"hubaoti run {repo} --model acme/tiny --text" in found.text
    assert found.text.count("| `float32-sdpa` |") == 2
    assert "| 1.0e-06 |" in found.text
    assert [model.id for model in api.list_models(filter=bundle.manifest.program.tag, search=repo)]


def test_a_card_that_is_too_large_is_not_even_fetched(
    bundle: Bundle,
    repo: str,
    settings: Settings,
    api: HfApi,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on an endpoint that takes such a card, which ours would not check."""
    api.create_repo(repo)
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None)
    card = b"# Words\n" + b"x" * LARGEST_README
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
    with pytest.raises(Conflict, match=r"README\.md has 4\.2 MB"):
        ship(bundle, repo, settings)
    assert not [path for _, path in proxy.requests if path.endswith("/README.md")]


def test_what_the_user_wrote_in_the_card_stays(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    text = "---\nlicense: mit\ntags:\n- mine\n- torch-2.1\n---\n# My title\n\nMy words.\n"
    api.create_repo(repo)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo)
    ship(bundle, repo, settings)
    below = card(api, repo) + "\nMore words below.\n"
    api.upload_file(path_or_fileobj=below.encode(), path_in_repo="README.md", repo_id=repo)
    ship(make_bundle(tmp_path / "cuda", target=CUDA), repo, settings)
    found = ModelCard(card(api, repo))
    for words in ("# My title", "My words.", "More words below."):
        assert found.text.count(words) == 1
    assert found.text.count("## Compiled graphs") == 1
    assert found.data.to_dict()["license"] == "mit"
    tags = found.data.to_dict()["tags"]
    assert tags[0] == "mine" and "torch-2.1" not in tags and len(tags) == len(set(tags))


def test_a_card_with_unreadable_metadata_is_not_overwritten(
    bundle: Bundle, repo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Conflict, match="unreadable metadata"):
        render(repo, "---\n[: bad\n---\nText", {}, bundle.manifest)


def test_a_card_that_is_no_text_is_not_overwritten() -> None:
    with pytest.raises(Conflict, match="not UTF-8"):
        decode_readme("# café".encode("latin-1"))
    assert decode_readme(b"\xef\xbb\xbf---\nlicense: mit\n---\n").startswith("---")


def test_a_card_s_only_tag_stays_one_word(bundle: Bundle, repo: str) -> None:
    found = ModelCard(render(repo, "---\ntags: mine\n---\nText", {}, bundle.manifest))
    assert found.data.to_dict()["tags"] == ["mine"]


def test_a_local_model_s_name_and_path_do_not_leak(
    tmp_path: Path, repo: str, settings: Settings, api: HfApi
) -> None:
    source = ModelSource(model="home/secret-project")  # a folder can look like an id
    ship(make_bundle(tmp_path / "bundle", source=source), repo, settings)
    assert "secret-project" not in card(api, repo)
    assert str(tmp_path) not in card(api, repo)


def test_an_unchecked_artifact_says_so(
    bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    ship(changed(bundle, checks=()), repo, settings)
    assert "not checked" in card(api, repo)


def test_a_bundle_of_a_damaged_package_is_to_be_compiled_again(
    bundle: Bundle, repo: str, settings: Settings
) -> None:
    graph = bundle.manifest.graphs[0]
    package = bundle.path / graph.file
    package.write_bytes(package.read_bytes()[:-30])
    entry = make_file_entry(bundle.path, graph.file)
    listed = msgspec.structs.replace(graph, sha256=entry.sha256, size=entry.size)
    with pytest.raises(BadPackage, match="root.pt2") as caught:
        ship(changed(bundle, graphs=(listed,)), repo, settings)
    assert "compile the bundle again" in caught.value.hint


# Several bundles


def test_several_bundles_are_one_commit_one_tag_and_one_table(
    tmp_path: Path, repo: str, settings: Settings, api: HfApi
) -> None:
    bundles = group(tmp_path / "bundles")
    made = hubaoti.push(
        [each.path for each in bundles], repo, tag="v1", as_is=True, settings=settings
    )
    places = [f"float32-sdpa/torch2.13-cu130-sm{sm}-x86_64_v3-linux" for sm in (80, 90, 120)]
    assert [(each.path, each.created) for each in made.artifacts] == [(p, True) for p in places]
    assert [each.digest for each in made.artifacts] == [each.manifest.digest for each in bundles]
    assert titles(api, repo) == [f"Add {places[0]} and 2 more", "initial commit"]
    assert [tag.target_commit for tag in api.list_repo_refs(repo).tags] == [made.commit]
    files = {file for file in api.list_repo_files(repo) if not file.startswith(".")}
    expected = {
        f"{place}/{name}"
        for place, each in zip(places, bundles, strict=True)
        for name in tree_of(each.path)
    }
    assert files == {"README.md", *expected}
    said = card(api, repo)
    assert said.count("| `float32-sdpa` |") == 3
    assert {"sm-80", "sm-90", "sm-120"} <= {*ModelCard(said).data.to_dict()["tags"]}


def test_a_folder_of_bundles_is_pushed_as_all_that_it_holds(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    bundles = group(tmp_path / "bundles")
    (tmp_path / "bundles" / ".sm75.hubaoti-0123").mkdir()  # another process writes there
    made = hubaoti.push(tmp_path / "bundles", repo, as_is=True, settings=settings)
    assert {each.digest for each in made.artifacts} == {each.manifest.digest for each in bundles}
    again = hubaoti.push(str(tmp_path / "bundles"), repo, tag="v1", as_is=True, settings=settings)
    assert (again.created, again.commit, again.tag) == (False, made.commit, "v1")


def test_what_the_repo_has_already_is_not_sent_again(
    tmp_path: Path, repo: str, settings: Settings, api: HfApi
) -> None:
    first, *others = group(tmp_path / "bundles")
    ship(first, repo, settings)
    made = push_bundles([*others, first], Destination(RepoRef(repo)), settings)
    assert [each.created for each in made.artifacts] == [True, True, False]
    assert made.created
    assert len(titles(api, repo)) == 3
    assert card(api, repo).count("| `float32-sdpa` |") == 3


def test_a_tag_of_a_commit_that_lacks_one_of_them_is_not_moved(
    tmp_path: Path, repo: str, settings: Settings, api: HfApi
) -> None:
    bundles = group(tmp_path / "bundles")
    first = ship(bundles[0], repo, settings, tag="v1")
    with pytest.raises(Conflict, match="v1"):
        push_bundles(bundles, Destination(RepoRef(repo), tag="v1"), settings)
    assert api.repo_info(repo).sha == first.commit


def test_one_that_cannot_be_pushed_keeps_all_of_them(
    tmp_path: Path, repo: str, settings: Settings, api: HfApi
) -> None:
    """Here its path is taken by another key, which only the repo knows."""
    bundles = group(tmp_path / "bundles")
    other = make_bundle(tmp_path / "other", target={**CUDA, "sm": 120}, mode="max-autotune")
    there = ship(other, repo, settings)
    with pytest.raises(Conflict, match="holds another artifact at .*sm120"):
        push_bundles(bundles, Destination(RepoRef(repo)), settings)
    assert api.repo_info(repo).sha == there.commit


def broken(folder: Path) -> None:
    (folder / "sm90" / "golden.safetensors").write_bytes(b"other")


def beside(folder: Path) -> None:
    (folder / "sm75.report.txt").write_text("a compile failed")


def twice(folder: Path) -> None:
    make_bundle(folder / "sm90-again", target=CUDA, members={"model/other.so": b"other"})


def of_another_layout(folder: Path) -> None:
    make_bundle(folder / "space", layout="zerogpu")


SPOILED: dict[Callable[[Path], None], tuple[type[HubaotiError], str]] = {
    broken: (DigestMismatch, r"sm90/golden\.safetensors"),
    beside: (BadManifest, r"sm75\.report\.txt is not a bundle"),
    twice: (BadRequest, r"only one artifact can be .*bundles/sm90, .*bundles/sm90-again"),
    of_another_layout: (BadRequest, r"two layouts .*bundles/space; .*bundles/sm120"),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_what_is_wrong_with_one_is_said_by_name_before_any_request(
    spoil: Callable[[Path], None], tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    group(tmp_path / "bundles")
    spoil(tmp_path / "bundles")
    kind, words = SPOILED[spoil]
    with pytest.raises(kind, match=words) as caught:
        hubaoti.push(tmp_path / "bundles", repo, as_is=True, settings=settings)
    assert caught.value.hint
    assert proxy.requests == []


def test_a_label_is_in_the_path_of_each(tmp_path: Path, repo: str, settings: Settings) -> None:
    made = hubaoti.push(
        group(tmp_path / "bundles"), repo, label="tuned", as_is=True, settings=settings
    )
    assert all(each.path.startswith("float32-sdpa+tuned/") for each in made.artifacts)


def test_several_are_not_on_one_branch_of_other_loaders(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy
) -> None:
    with pytest.raises(BadRequest, match="a branch for each") as caught:
        hubaoti.push(
            group(tmp_path / "bundles"), repo, layout="zerogpu", as_is=True, settings=settings
        )
    assert "one by one" in caught.value.hint
    assert proxy.requests == []


def test_no_bundle_at_all_is_refused(tmp_path: Path, repo: str, settings: Settings) -> None:
    with pytest.raises(BadRequest, match="no bundle"):
        hubaoti.push([], repo, as_is=True, settings=settings)
    with pytest.raises(BadManifest, match="is not a bundle"):
        hubaoti.push(tmp_path, repo, as_is=True, settings=settings)


def test_several_whose_answer_was_lost_are_one_commit_and_done(
    tmp_path: Path, repo: str, settings: Settings, proxy: Proxy, api: HfApi
) -> None:
    first, *others = group(tmp_path / "bundles")
    ship(first, repo, settings)
    proxy.matching, proxy.lost = "/commit/", 1
    made = push_bundles([first, *others], Destination(RepoRef(repo)), settings)
    proxy.reset()
    assert [each.created for each in made.artifacts] == [False, True, True]
    assert made.commit == api.repo_info(repo).sha
    assert len(titles(api, repo)) == 3
