"""The layout of other loaders: a branch that holds what answers without hubaoti, or nothing."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any
from zipfile import ZipFile

import msgspec
import pytest
import torch
import transformers
from bundles import CUDA, changed, make_bundle, tree_of
from commands import hubaoti, inside
from huggingface_hub import HfApi
from loaders import patched
from proxies import Proxy

from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import Manifest, parse_manifest
from hubaoti.artifact.schema import Cache, Direct, Input, compute_key
from hubaoti.compiler.callspec import make_call_spec
from hubaoti.compiler.signature import CallSignature
from hubaoti.errors import BadRequest, Conflict, HubaotiError, NoArtifact
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import artifact_path
from hubaoti.hub.zerogpu import artifact_branch, lay_out_packages
from hubaoti.settings import Settings

PLACE = "float32-sdpa/torch2.13-cpu-x86_64_v3-linux"
BRANCH = f"zerogpu/{PLACE}"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A whole module's graph that answers by itself."""
    return direct(make_bundle(tmp_path / "bundle"))


def direct(bundle: Bundle, task: str = "forward", **fields: Any) -> Bundle:
    """The bundle of a module's own task, whose graphs were compiled for this layout."""
    manifest = bundle.manifest
    program = msgspec.structs.replace(manifest.program, task=task)
    build = msgspec.structs.replace(manifest.build, layout="zerogpu")
    key = compute_key(program, build, manifest.target)
    fields = {"direct": Direct(), **fields}
    graphs = tuple(msgspec.structs.replace(graph, **fields) for graph in manifest.graphs)
    return changed(bundle, program=program, build=build, key=key, graphs=graphs)


def push(bundle: Bundle, repo: str, settings: Settings, **how: Any) -> Any:
    return api.push(bundle, repo, layout="zerogpu", as_is=True, settings=settings, **how)


def test_the_branch_holds_the_packages_and_the_artifact_and_nothing_else(
    bundle: Bundle, repo: str, settings: Settings, hub: HfApi
) -> None:
    made = push(bundle, repo, settings, tag="v1")
    assert (made.branch, made.path, made.created) == (BRANCH, PLACE, True)
    files = {f for f in hub.list_repo_files(repo, revision=BRANCH) if not f.startswith(".")}
    artifact = {f"{PLACE}/{name}" for name in tree_of(bundle.path)}
    assert files == {"README.md", "package/root/package.pt2", *artifact}
    package = hub.hf_hub_download(repo, "package/root/package.pt2", revision=BRANCH)
    assert Path(package).read_bytes() == (bundle.path / "graphs/root.pt2").read_bytes()
    card = Path(hub.hf_hub_download(repo, "README.md", revision=BRANCH)).read_text()
    assert f'spaces.aoti_load(module, "{repo}", revision="{BRANCH}")' in card
    titles = [commit.title for commit in hub.list_repo_commits(repo, revision=BRANCH)]
    assert titles == [f"Add {PLACE}", "initial commit"]
    assert {f for f in hub.list_repo_files(repo) if not f.startswith(".")} == set()
    assert [tag.target_commit for tag in hub.list_repo_refs(repo).tags] == [made.commit]


def test_the_same_again_makes_no_commit_and_what_lay_on_the_default_branch_stays_there(
    bundle: Bundle, repo: str, settings: Settings, hub: HfApi
) -> None:
    beside = api.push(bundle, repo, as_is=True, settings=settings)
    first = push(bundle, repo, settings)
    again = push(bundle, repo, settings)
    assert (again.commit, again.created) == (first.commit, False)
    assert hub.repo_info(repo).sha == beside.commit
    # The other branch began with all that was there, of which only the artifact's own is left.
    assert f"{PLACE}/hubaoti.json" in hub.list_repo_files(repo)
    pulled = api.pull(f"{repo}@{BRANCH}", settings=settings, trust=True)
    assert pulled.artifact.digest == bundle.manifest.digest


def test_who_pulls_a_repo_that_holds_only_this_layout_is_told_how(
    bundle: Bundle, repo: str, settings: Settings, hub: HfApi
) -> None:
    push(bundle, repo, settings)
    with pytest.raises(NoArtifact) as caught:
        api.pull(repo, settings=settings)
    pull = f"hubaoti pull {repo}@{BRANCH}"
    load = f'hubaoti.spaces.load(module, "{repo}"'
    assert caught.value.hint == f"its graphs are on branches: {pull}; or in Python, {load})"
    package = {"path_in_repo": "package/root/package.pt2", "path_or_fileobj": b"a package"}
    hub.create_branch(repo, branch="theirs")
    hub.upload_file(repo_id=repo, revision="theirs", **package)
    with pytest.raises(NoArtifact) as caught:
        api.pull(f"{repo}@theirs", settings=settings)
    assert caught.value.hint.endswith(f'for other loaders: in Python, {load}, revision="theirs")')


def test_other_artifacts_do_not_come_along(
    bundle: Bundle, repo: str, settings: Settings, hub: HfApi, tmp_path: Path
) -> None:
    api.push(make_bundle(tmp_path / "other", CUDA), repo, as_is=True, settings=settings)
    push(bundle, repo, settings)
    files = hub.list_repo_files(repo, revision=BRANCH)
    assert not [path for path in files if "cu130" in path]


def test_another_artifact_on_the_branch_is_not_replaced(
    bundle: Bundle, repo: str, settings: Settings, tmp_path: Path
) -> None:
    push(bundle, repo, settings)
    other = direct(make_bundle(tmp_path / "other", mode="max-autotune"))
    with pytest.raises(Conflict, match="holds another artifact") as caught:
        push(other, repo, settings)
    assert "--label" in caught.value.hint
    assert push(other, repo, settings, label="fast").branch == artifact_branch(
        artifact_path(other.manifest, "fast")
    )


def test_a_push_that_fails_leaves_no_branch(
    bundle: Bundle, repo: str, settings: Settings, hub: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> Any:
        raise HubaotiError("no", hint="again")

    hub.create_repo(repo)  # else it goes, too
    with monkeypatch.context() as patched:
        patched.setattr(HubClient, "commit", fails)
        with pytest.raises(HubaotiError, match="no"):
            push(bundle, repo, settings)
    assert [branch.name for branch in hub.list_repo_refs(repo).branches] == ["main"]
    push(bundle, repo, settings)


def test_a_list_whose_children_are_all_served_has_one_package(tmp_path: Path) -> None:
    modules = tuple(f"net.blocks.{at}" for at in range(3))
    bundle = make_bundle(tmp_path / "bundle")
    every = direct(bundle, modules=modules, direct=Direct(every="net.blocks"))
    assert lay_out_packages(every.manifest) == {
        "package/submodules/net.blocks/package.pt2": "graphs/root.pt2"
    }
    some = direct(bundle, modules=modules[:2])
    assert [*lay_out_packages(some.manifest)] == [
        f"package/submodules/net.blocks.{at}/package.pt2" for at in range(2)
    ]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a task that answers texts": ({"task": "embed"}, "answers texts"),
    "a KV cache": ({"cache": Cache(kind="static", keys=0, values=0)}, "KV cache"),
    "a flat call": ({"direct": msgspec.UNSET}, "not called as its module is"),
    "constants that are not saved": ({"direct": Direct(absent=("rope",))}, "reads rope"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_graphs_that_need_hubaoti_are_refused_before_any_request(
    case: str, repo: str, settings: Settings, proxy: Proxy, tmp_path: Path
) -> None:
    fields, why = REFUSED[case]
    inputs = (Input(name="k", dtype="float32", shape=(1,), values="real", mutated=True),)
    if "cache" in fields:
        fields = {**fields, "inputs": inputs, "bounds": {}}
    refused = direct(make_bundle(tmp_path / "bundle"), **fields)
    assert parse_manifest(refused.manifest.to_json(), "x") == refused.manifest
    with pytest.raises(BadRequest, match=why) as caught:
        push(refused, repo, settings)
    assert "compile it with --layout zerogpu" in caught.value.hint
    assert proxy.requests == []


def test_several_graphs_of_one_module_are_refused(tmp_path: Path) -> None:
    both = direct(make_bundle(tmp_path / "bundle", graphs=("one", "two")))
    with pytest.raises(BadRequest, match="2 graphs, and only hubaoti chooses"):
        lay_out_packages(both.manifest)


def test_what_was_compiled_for_our_own_runtime_is_refused(tmp_path: Path) -> None:
    """Its calls are made whole before, with masks and rows that those loaders do not add."""
    bundle = direct(make_bundle(tmp_path / "bundle"), modules=("layers.0",))
    lay_out_packages(bundle.manifest)
    build = msgspec.structs.replace(bundle.manifest.build, layout=msgspec.UNSET)
    manifest: Manifest = msgspec.structs.replace(bundle.manifest, build=build)
    with pytest.raises(BadRequest, match="compiled without --layout zerogpu") as caught:
        lay_out_packages(manifest)
    assert "compile it with --layout zerogpu" in caught.value.hint


def test_the_layout_is_in_the_key_and_in_no_other_manifest(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path / "bundle").manifest
    assert b"layout" not in msgspec.json.encode(msgspec.to_builtins(plain.build))
    build = msgspec.structs.replace(plain.build, layout="zerogpu")
    assert compute_key(plain.program, build, plain.target) != plain.key
    other = msgspec.structs.replace(
        plain, build=build, key=compute_key(plain.program, build, plain.target)
    )
    assert parse_manifest(other.to_json(), "x").build.layout == "zerogpu"


def test_a_decoder_s_real_blocks_are_refused(decoder_bundle: Bundle) -> None:
    with pytest.raises(BadRequest, match="KV cache"):
        lay_out_packages(decoder_bundle.manifest)


def test_the_command_says_which_branch(bundle: Bundle, repo: str, settings: Settings) -> None:
    done = inside(settings, "push", "--as-is", bundle.path, repo, "--layout", "zerogpu")
    assert done.code == 0, done.err
    assert f"branch {BRANCH}" in done.out
    assert hubaoti(settings, "push", "--as-is", bundle.path, repo, "--layout", "other").code == 2


def test_an_unknown_layout_is_refused(bundle: Bundle, repo: str, settings: Settings) -> None:
    with pytest.raises(BadRequest, match="unknown layout"):
        api.push(bundle, repo, layout="hub", as_is=True, settings=settings)


# Models of transformers


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def compiled(folder: Path, settings: Settings, **how: Any) -> Bundle:
    dims = {"batch": (1, 4), "seq": (2, 40)}
    place = settings.home.parent / f"{folder.name}-zerogpu"
    return api.compile(folder, place, layout="zerogpu", dims=dims, settings=settings, **how)


@pytest.mark.slow
def test_bert_whole_answers_by_the_loaders_that_know_no_manifest(
    tiny_bert: Path, built_at: Settings, repo: str, settings: Settings, hub: HfApi
) -> None:
    """Its positions are in no state_dict; it is called with what its tokenizer gives."""
    bundle = compiled(tiny_bert, built_at, regions="none")
    made = push(bundle, repo, settings)
    package = hub.hf_hub_download(repo, "package/root/package.pt2", revision=made.branch)
    model = transformers.BertModel.from_pretrained(tiny_bert).eval()
    ids, mask = torch.arange(5, 19).view(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    words = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 1 - mask}
    with torch.no_grad():
        expected = model(**words)
        with patched(model, Path(package)):
            answers = [model(**each) for each in (words, views_of(words))]
        for found in answers:
            assert type(found) is type(expected)
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor)


def views_of(words: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors as views: of wider ones, and one whose places lie apart."""
    views = {name: torch.cat([each, each], 1)[:, : each.shape[1]] for name, each in words.items()}
    views["input_ids"] = words["input_ids"].t().contiguous().t()
    assert not any(each.is_contiguous() for each in views.values())
    return views


@pytest.mark.slow
def test_packages_lie_in_the_folder_by_which_those_loaders_clean_up(
    tiny_bert: Path, built_at: Settings
) -> None:
    """Both look for `/tmp/*/archive/data/aotinductor/*/*.so` in workers that are killed."""
    bundle = compiled(tiny_bert, built_at, regions="none")
    (graph,) = bundle.manifest.graphs
    libraries = [member.path for member in graph.members if member.path.endswith(".so")]
    assert [PurePath(path).match("archive/data/aotinductor/*/*.so") for path in libraries] == [True]
    with ZipFile(bundle.path / graph.file) as package:
        assert {name.split("/")[0] for name in package.namelist()} == {"archive"}


@pytest.mark.slow
def test_llama_s_blocks_answer_by_the_loaders_that_know_no_manifest_and_by_our_own(
    tiny_decoder: Path, built_at: Settings
) -> None:
    """transformers give them no mask where nobody pads, and one row of positions for all."""
    bundle = compiled(tiny_decoder, built_at)
    ((path, file),) = lay_out_packages(bundle.manifest).items()
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_decoder).eval()
    holder = model if "model.layers" in path else model.model
    for rows, tokens in ((1, 33), (3, 9)):
        ids = torch.randint(5, 90, (rows, tokens))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, use_cache=False).logits
            with patched(model.model.layers, bundle.path / file) as calls:
                found = model(ids, attention_mask=mask, use_cache=False).logits
            assert calls == [2]
            torch.testing.assert_close(found, expected)
            with api.attach(holder, bundle, settings=built_at) as attachment:
                torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
                stats = attachment.stats()["regions"].values()
                assert [sum(each["compiled"].values()) for each in stats] == [1, 1]


# Call specs


def face(args: list[Any], kwargs: dict[str, Any], count: int) -> CallSignature:
    inputs = tuple(
        Input(name=f"x{at}", dtype="float32", shape=(2,), values="real") for at in range(count)
    )
    return CallSignature({"args": args, "kwargs": kwargs}, inputs)


ONE: dict[str, Any] = {"tensor": 0}
TWO: dict[str, Any] = {"tensor": 1}


@pytest.mark.parametrize(
    ("args", "kwargs", "count", "answer"),
    [
        ([ONE], {}, 1, {"tensor": 0}),
        ([ONE, None, 0.5], {"mask": TWO, "size": {"size": "seq"}}, 2, {"tuple": [ONE, TWO]}),
        ([{"tuple": [ONE, TWO]}], {"names": ["a"]}, 2, {"dict": {"y": ONE}}),
        ([ONE], {"cache": None, "any": TWO}, 2, [ONE]),
    ],
)
def test_a_call_and_an_answer_of_tensors_have_a_spec(
    args: list[Any], kwargs: dict[str, Any], count: int, answer: Any
) -> None:
    assert make_call_spec(face(args, kwargs, count), answer) is not None


@pytest.mark.parametrize(
    ("args", "count", "answer"),
    [
        ([ONE, {"any": {"dtype": "float32", "shape": [2]}}], 1, ONE),
        ([ONE, ONE], 1, ONE),
        ([TWO, ONE], 2, ONE),
        ([ONE, {"cache": True}], 1, ONE),
        ([ONE], 1, {"tuple": [ONE, None]}),
        ([ONE], 1, {"tuple": [ONE, ONE]}),
        ([ONE], 1, {"fields": {"y": ONE}, "class": "nowhere.Output"}),
    ],
)
def test_what_torch_s_loader_would_call_otherwise_has_none(
    args: list[Any], count: int, answer: Any
) -> None:
    assert make_call_spec(face(args, {}, count), answer) is None
