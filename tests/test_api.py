"""The verbs: what each gives, and what it says when it cannot."""

from __future__ import annotations

import copy
import inspect
import operator
import pickle
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import make_bundle, tree_of
from huggingface_hub import HfApi

import hubaoti
from hubaoti import api
from hubaoti.artifact.bundle import Bundle, write_bundle
from hubaoti.engines import lightweight
from hubaoti.errors import (
    BadInput,
    BadManifest,
    BadRequest,
    HubaotiError,
    HubUnreachable,
    MissingConstant,
    ModelNotFound,
    NoArtifact,
    NoMatch,
    OtherProgram,
    OutOfBounds,
    Untrusted,
)
from hubaoti.hub.choice import Pulled
from hubaoti.hub.model_download import COMPILE_FILES, RUN_FILES, fetch_model_files
from hubaoti.mirror import Mirror
from hubaoti.program.model_files import padding_id
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

TEXTS = ("The cat sits on the windowsill.", "Interest rates rose.", "cat")


@pytest.fixture(scope="module")
def reader(
    tmp_path_factory: pytest.TempPathFactory, endpoint: Endpoint, roberta_bundle: Bundle
) -> Settings:
    """A machine that pulled the tiny classifier, trusting its publisher."""
    home = tmp_path_factory.mktemp("api") / "home"
    settings = Settings(home, endpoint.url, endpoint.token)
    hubaoti.push(roberta_bundle, "acme/api-roberta", tag="v1", as_is=True, settings=settings)
    hubaoti.pull("acme/api-roberta", trust=True, settings=settings)
    return settings


@pytest.fixture(scope="module")
def pulled(reader: Settings) -> Pulled:
    return hubaoti.pull("acme/api-roberta", settings=reader)


FACES = {
    "attach": (torch.nn.Linear(2, 2), "acme/x"),
    "capture": (torch.nn.Linear(2, 2),),
    "compile": ("acme/tiny",),
    "compile_for": ("acme/tiny", "sm90"),
    "compile_matrix": ("matrix.toml",),
    "explain": ("acme/tiny",),
    "load": ("acme/x", "acme/tiny"),
    "lock": ("acme/x",),
    "pull": ("acme/x",),
    "push": ("bundle", "acme/x"),
    "run": ("acme/x", "acme/tiny", ["a text"]),
    "search": (),
    "verify": (),
    "spaces.load": (torch.nn.Linear(2, 2), "acme/x"),
    "LightweightEngine": (),
    "LightweightEngine.load": (None, "acme/tiny"),
}


def list_flags() -> list[tuple[str, str]]:
    """The keywords of every public verb that are True or False."""
    verbs = {name: operator.attrgetter(name)(hubaoti) for name in FACES}
    parameters = ((verb, inspect.signature(face).parameters) for verb, face in verbs.items())
    flags = [
        (v, name) for v, found in parameters for name in found if found[name].annotation == "bool"
    ]
    return [*flags, ("compile_for", "trust_remote_code"), ("explain", "trust_remote_code")]


def test_every_verb_that_has_a_flag_is_looked_at() -> None:
    verbs = {name: getattr(hubaoti, name) for name in hubaoti.__all__}
    flagged = {
        name
        for name, verb in verbs.items()
        if any(each.annotation == "bool" for each in inspect.signature(verb).parameters.values())
    }
    assert {*FACES} >= flagged - {"Attachment", "Artifact", "Bundle"}


@pytest.mark.parametrize(("verb", "flag"), list_flags())
def test_a_text_is_no_flag(verb: str, flag: str) -> None:
    """Every text but "" would switch it on: also trust="no"."""
    face: Any = operator.attrgetter(verb)(hubaoti)
    with pytest.raises(BadRequest, match=f"{flag}='no' is no bool") as caught:
        face(*FACES[verb], **{flag: "no"})
    assert caught.value.hint == "say True or False"


def test_a_traceback_says_what_to_do_next() -> None:
    """Who calls from Python sees no more of an error than Python prints of it."""
    error = NoMatch("none fits", hint="first")
    error.add_note("a note")
    error.hint += ", then second"
    for each in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        *_, message, hint, note = "".join(traceback.format_exception(each)).splitlines()
        assert message.endswith("NoMatch: none fits")
        assert (hint, note) == ("hint: first, then second", "a note")
        assert (str(each), each.hint, each.notes) == ("none fits", "first, then second", ["a note"])
    error.hint = ""
    assert error.__notes__ == ["a note"] and not HubaotiError("x").__notes__


def test_the_face_has_what_it_names_and_nothing_else() -> None:
    verbs = {name for name in hubaoti.__all__ if name.islower()}
    assert all(getattr(hubaoti, name) is getattr(api, name) for name in verbs)
    assert hubaoti.LightweightEngine is lightweight.LightweightEngine
    with pytest.raises(AttributeError, match="no attribute 'install'"):
        _ = hubaoti.install


def test_a_bundle_is_pushed_by_its_folder_or_as_it_is(
    roberta_bundle: Bundle, settings: Settings, tmp_path: Path
) -> None:
    repo = f"acme/{tmp_path.name}"
    first = hubaoti.push(roberta_bundle.path, repo, as_is=True, settings=settings)
    second = hubaoti.push(roberta_bundle, repo, as_is=True, settings=settings)
    assert (first.created, second.created) == (True, False)
    assert first.digest == second.digest == roberta_bundle.manifest.digest


def test_pull_open_and_call_gives_the_model_s_own_answer(
    reader: Settings, tiny_roberta: Path
) -> None:
    steps: list[str] = []
    answer = api.run(
        "acme/api-roberta@v1", tiny_roberta, TEXTS, settings=reader, progress=steps.append
    )
    eager = api.eager(tiny_roberta, TEXTS, repo="acme/api-roberta", settings=reader)
    assert answer.task == eager.task == "classify"
    assert answer.values.shape == (3, 3)
    assert repr(answer) == "Answer(classify, [3, 3])"
    torch.testing.assert_close(answer.values, eager.values, atol=1e-5, rtol=0)
    assert [step for step in steps if step != "first open"][-3:] == ["open", "bind", "run"]


def test_eager_takes_the_dtype_of_the_artifact_that_was_pulled(
    reader: Settings, llama_bundle: Bundle, tiny_llama: Path, tiny_roberta: Path
) -> None:
    assert api.recall_task_and_dtype("acme/api-roberta@v1", reader) == ("classify", "float32")
    assert api.recall_task_and_dtype("acme/never-pulled", reader) == (None, None)
    eager = api.eager(tiny_llama, TEXTS[:1], settings=reader)
    assert (eager.task, eager.values.dtype) == ("logits", torch.bfloat16)


def test_a_language_model_of_one_row_answers_each_text(
    settings: Settings, llama_bundle: Bundle, tiny_llama: Path, tmp_path: Path
) -> None:
    """Also: a checkpoint that holds a tied weight once, by one of its two names."""
    repo = f"acme/{tmp_path.name}"
    hubaoti.push(llama_bundle, repo, as_is=True, settings=settings)
    answer = api.run(repo, tiny_llama, TEXTS, trust=True, settings=settings)
    eager = api.eager(tiny_llama, TEXTS, repo=repo, settings=settings)
    assert answer.values.shape == eager.values.shape
    largest = eager.values.float().abs().max()
    real = (answer.values.float() - eager.values.float()).abs()[0]
    assert real.max() < 0.04 * largest


def test_a_text_beyond_the_graph_s_bounds_is_refused(
    pulled: Pulled, reader: Settings, tiny_roberta: Path
) -> None:
    opened = hubaoti.load(pulled.artifact, tiny_roberta, settings=reader)
    name, bounds = opened.graph.entry.id, opened.graph.entry.bounds
    sizes = ", ".join("{} {} to {}".format(dim, *bounds[dim]) for dim in bounds)
    assert repr(opened) == f"TextModel(classify, graph {name}, {sizes}, cpu)"
    with pytest.raises(OutOfBounds, match="70 tokens"):
        opened(["cat " * 68])


def test_the_weights_of_another_model_are_refused(
    pulled: Pulled, reader: Settings, minilm: Path, tmp_path: Path
) -> None:
    with pytest.raises(OtherProgram, match="model_type is 'bert', the graph has 'roberta'"):
        hubaoti.load(pulled.artifact, minilm, settings=reader)
    silent = tmp_path / "silent"  # a folder that says nothing of itself
    silent.mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        (silent / name).symlink_to(minilm / name)
    with pytest.raises(MissingConstant):
        hubaoti.load(pulled.artifact, silent, settings=reader)


def test_padding_is_with_the_id_that_the_program_computes_with(
    roberta_bundle: Bundle, llama_bundle: Bundle, minilm_bundle: Bundle
) -> None:
    bundles = (roberta_bundle, llama_bundle, minilm_bundle)
    assert [padding_id(bundle.manifest.program) for bundle in bundles] == [1, None, None]


def test_what_was_built_here_needs_no_trust(
    settings: Settings, roberta_bundle: Bundle, tmp_path: Path
) -> None:
    repo = f"acme/{tmp_path.name}"
    hubaoti.push(roberta_bundle, repo, as_is=True, settings=settings)
    with pytest.raises(Untrusted):
        hubaoti.pull(repo, settings=settings)
    with Mirror.open(settings.mirror) as mirror:
        mirror.index.record_built(roberta_bundle.manifest)
    assert hubaoti.pull(repo, settings=settings).artifact.digest == roberta_bundle.manifest.digest


def test_a_recipe_that_is_none_is_a_bad_request(settings: Settings) -> None:
    with pytest.raises(BadRequest, match="fast"):
        hubaoti.pull("acme/any", recipe="fast", settings=settings)


def test_no_recipe_and_an_empty_one_are_not_the_same(settings: Settings) -> None:
    with pytest.raises(BadRequest, match="recipe"):
        hubaoti.pull("acme/any", recipe="", settings=settings)


@pytest.mark.parametrize("repo", ["acme", "a/b/c", "acme/", "acme/x@", "/acme/x"])
def test_a_repo_is_owner_and_name(repo: str, settings: Settings) -> None:
    with pytest.raises(BadRequest) as caught:
        hubaoti.pull(repo, settings=settings)
    assert caught.value.hint


def test_a_recipe_that_the_repo_does_not_have_is_no_match(reader: Settings) -> None:
    with pytest.raises(NoMatch, match="float16-sdpa"):
        hubaoti.pull("acme/api-roberta", recipe="float16-sdpa", settings=reader)


def test_a_repo_of_nothing_has_no_artifact(settings: Settings, tmp_path: Path) -> None:
    HfApi(settings.endpoint, token=settings.token).create_repo(f"acme/{tmp_path.name}")
    with pytest.raises(NoArtifact):
        hubaoti.pull(f"acme/{tmp_path.name}", settings=settings)


def test_a_folder_that_is_no_bundle_is_not_pushed(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(BadManifest, match="not a bundle"):
        hubaoti.push(tmp_path, "acme/any", as_is=True, settings=settings)


NOWHERE = ["acme/nowhere", "no folder", "./nowhere", "a/b/c", "~/nowhere", "~nobody-at-all/x"]


@pytest.mark.parametrize("model", [*NOWHERE, "a" * 300])
def test_a_model_that_is_nowhere_is_not_found(
    model: str, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(ModelNotFound) as caught:
        hubaoti.compile(model, tmp_path / "out", settings=settings)
    assert model in str(caught.value)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_an_endpoint_that_is_down_is_said_so(settings: Settings, tmp_path: Path) -> None:
    down = replace(settings, endpoint="http://127.0.0.1:9")
    with pytest.raises(HubUnreachable) as caught:
        hubaoti.compile("acme/never-fetched", tmp_path / "out", settings=down)
    assert caught.value.hint


def test_a_model_of_the_hub_is_compiled_from_its_config_without_its_weights(
    settings: Settings, tiny_roberta: Path, tmp_path: Path
) -> None:
    """Up to the compiler, which other tests run: the files, and where they came from."""
    hub = HfApi(settings.endpoint, token=settings.token)
    repo = f"acme/{tmp_path.name}"
    hub.create_repo(repo)
    commit = hub.upload_folder(repo_id=repo, folder_path=tiny_roberta).oid
    folder, source = fetch_model_files(repo, None, COMPILE_FILES, settings)
    assert (source.model, source.commit) == (repo, commit)
    names = tree_of(folder).keys()
    assert {"config.json", "tokenizer.json"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    runnable, _ = fetch_model_files(repo, commit, RUN_FILES, settings)
    assert "model.safetensors" in tree_of(runnable)


def test_a_local_path_is_not_written_into_the_source(tiny_roberta: Path) -> None:
    _, source = fetch_model_files(tiny_roberta, None, (), Settings(home=Path("/nowhere")))
    assert (source.model, source.commit) == ("tiny-roberta", None)


def test_a_bundle_is_replaced_by_a_newer_one_and_never_half(tmp_path: Path) -> None:
    old = make_bundle(tmp_path / "bundle")
    before = tree_of(tmp_path)
    with pytest.raises(ZeroDivisionError), write_bundle(old.path) as folder:
        (folder / "half").write_text("")
        _ = 1 / 0
    assert tree_of(tmp_path) == before
    with write_bundle(old.path) as folder:
        (folder / "whole").write_text("")
    assert tree_of(tmp_path).keys() == {"bundle/whole"}


def test_the_runtime_needs_no_transformers(reader: Settings, tiny_roberta: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from hubaoti import api;"
        "from hubaoti.settings import Settings;"
        f"s = Settings(Path({str(reader.home)!r}), {reader.endpoint!r});"
        f"api.run('acme/api-roberta@v1', {str(tiny_roberta)!r}, ['cat'], settings=s);"
        "assert 'torch' in sys.modules; assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_text_beyond_the_model_s_positions_is_refused_without_a_graph_too(
    reader: Settings, tiny_roberta: Path
) -> None:
    with pytest.raises(OutOfBounds, match="tokens; it takes seq up to"):
        api.eager(tiny_roberta, ["word " * 600], settings=reader)


def test_one_text_is_one_row_and_what_is_no_text_is_refused(
    pulled: Pulled, reader: Settings, tiny_roberta: Path
) -> None:
    opened = hubaoti.load(pulled, tiny_roberta, settings=reader)
    assert torch.equal(opened("cat on mat"), opened(["cat on mat"]))
    with pytest.raises(BadInput, match="None is no text"):
        opened([None])  # type: ignore[list-item]


def test_what_is_long_is_not_printed_whole(pulled: Pulled, roberta_bundle: Bundle) -> None:
    assert max(len(repr(each)) for each in (pulled, pulled.artifact, roberta_bundle)) < 2000


def test_the_public_names_are_listed() -> None:
    assert {*dir(hubaoti)} == {*hubaoti.__all__, "__version__", "errors", "spaces"}
