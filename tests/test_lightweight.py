"""LightweightEngine in this process: which graphs, which models in memory, what is refused."""

from __future__ import annotations

import gc
import inspect
import re
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from commands import inside
from huggingface_hub import HfApi
from signals import struck

import hubaoti
from hubaoti import LightweightEngine
from hubaoti.artifact.bundle import Bundle
from hubaoti.engines.batch_file import answer_file
from hubaoti.engines.local import Resident, count_module_bytes
from hubaoti.engines.messages import Sampling
from hubaoti.engines.pool import ModelStatus, NoGraphs
from hubaoti.engines.resolve import choose_task, estimate_weight_bytes
from hubaoti.errors import (
    BadDim,
    BadInput,
    BadRequest,
    DigestMismatch,
    HubaotiError,
    ModelNotFound,
    NoArtifact,
    NotEnoughMemory,
    OtherProgram,
    OutOfBounds,
    UnknownTask,
    Untrusted,
)
from hubaoti.host.memory import parse_size
from hubaoti.mirror import Mirror
from hubaoti.mirror.trust import Trust
from hubaoti.settings import Settings

WORDS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def engine(decoder_bundle: Bundle, built_at: Settings) -> Iterator[LightweightEngine]:
    """An engine whose mirror has the decoder's graphs."""
    with LightweightEngine(built_at) as found:
        yield found


@pytest.fixture
def alone(tmp_path: Path) -> Settings:
    """A home with nothing in it, and no Hub."""
    return Settings(tmp_path / "home", "http://127.0.0.1:9")


@pytest.fixture
def three(tiny_decoder: Path, tmp_path: Path) -> list[Path]:
    """Three models of one program."""
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        shutil.copytree(tiny_decoder, folder)
    return folders


@pytest.fixture
def size(tiny_decoder: Path) -> int:
    """The bytes of one of them."""
    return estimate_weight_bytes(tiny_decoder, None)


def test_a_model_is_answered_by_the_graphs_that_the_mirror_has(
    engine: LightweightEngine, tiny_decoder: Path, decoder_bundle: Bundle, alone: Settings
) -> None:
    standing = engine.load(tiny_decoder)
    assert (standing.state, standing.artifact) == ("compiled", decoder_bundle.manifest.digest)
    (found,) = engine.generate(tiny_decoder, "A cat sits", **WORDS)
    with LightweightEngine(alone) as plain:
        assert plain.load(tiny_decoder).state == "eager"
        assert plain.generate(tiny_decoder, ["A cat sits"], **WORDS) == [found]
        assert "no artifact" in plain.models()[0].why
    state = engine.state(tiny_decoder)
    assert (state.compiled, state.eager) == (8, 0)
    assert engine.models()[0].requests == 1


@pytest.mark.slow
def test_quantized_graphs_answer_where_they_are_asked_for(
    tiny_decoder: Path, decoder_bundle: Bundle, quantized_bundle: Bundle, built_at: Settings
) -> None:
    with LightweightEngine(built_at) as plain, LightweightEngine(built_at) as engine:
        assert plain.load(tiny_decoder).artifact == decoder_bundle.manifest.digest
        standing = engine.load(tiny_decoder, quantize="int8wo")
        assert standing.artifact == quantized_bundle.manifest.digest
        assert standing.bytes < plain.models()[0].bytes, "the weights themselves are gone"
        assert engine.generate(tiny_decoder, "hello", **WORDS)
        assert engine.state(tiny_decoder).eager == 0


def test_a_dtype_that_is_asked_for_is_that_of_the_model(
    tiny_decoder: Path, decoder_bundle: Bundle, built_at: Settings
) -> None:
    with LightweightEngine(built_at) as engine:
        standing = engine.load(tiny_decoder, dtype="bfloat16")
        assert (standing.state, standing.artifact) == ("eager", None)
        module = engine._room.get(str(tiny_decoder)).holder.module  # type: ignore[union-attr]
        assert module.dtype == torch.bfloat16
        with pytest.raises(BadRequest, match="computes in float32, not in bfloat16"):
            LightweightEngine(built_at).load(tiny_decoder, decoder_bundle, dtype="bfloat16")


def test_an_encoder_is_answered_by_its_graph_without_the_model(
    minilm: Path, minilm_bundle: Bundle, built_at: Settings, alone: Settings
) -> None:
    texts = ["A cat sits on the mat.", "hello"]
    with LightweightEngine(built_at) as engine, LightweightEngine(alone) as plain:
        assert engine.load(minilm).state == "compiled"
        assert plain.load(minilm).state == "eager"
        ours, theirs = engine.embed(minilm, texts), plain.embed(minilm, texts)
        assert ours.shape == (2, 384)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        with pytest.raises(BadRequest, match="embeds texts; it cannot generate"):
            engine.generate(minilm, "hello")
        for each in (engine, plain):
            with pytest.raises(OutOfBounds, match="602 tokens"):
                each.embed(minilm, "word " * 600)


def test_graphs_of_a_repo_are_pulled_where_the_mirror_has_none(
    tiny_decoder: Path, decoder_bundle: Bundle, settings: Settings, repo: str, tmp_path: Path
) -> None:
    hubaoti.push(
        decoder_bundle, repo, as_is=True, settings=replace(settings, home=tmp_path / "publisher")
    )
    with LightweightEngine(settings, repos=["acme/nothing", repo]) as engine:
        standing = engine.load(tiny_decoder)
        assert standing.state == "eager"
        assert f"{repo}: acme publishes" in standing.why
        assert "acme/nothing: " in standing.why
    with LightweightEngine(settings, repos=[repo], trust=True) as engine:
        assert engine.load(tiny_decoder).state == "compiled"
    with LightweightEngine(settings) as engine:  # it is in the mirror by now
        assert engine.load(tiny_decoder).state == "compiled"
    settings.trust.unlink()
    with LightweightEngine(settings) as engine:
        assert engine.load(tiny_decoder).state == "eager", "nobody trusts its publisher any more"


def test_a_repo_that_has_nothing_for_this_host_is_refused_unless_it_is_to_be_compiled(
    tiny_decoder: Path, built_at: Settings, decoder_bundle: Bundle, settings: Settings, repo: str
) -> None:
    HfApi(settings.endpoint, token=settings.token).create_repo(repo)
    shutil.copytree(built_at.home, settings.home)  # which has what a compile would make
    with LightweightEngine(settings) as engine:
        with pytest.raises(NoArtifact):
            engine.load(tiny_decoder, repo)
        standing = engine.load(tiny_decoder, repo, compile="now")
        assert (standing.state, standing.artifact) == ("compiled", decoder_bundle.manifest.digest)
        assert engine.load(tiny_decoder, repo, compile="now").state == "compiled"


def test_graphs_that_were_kept_from_answering_answer_once_they_are_asked_for_again(
    tiny_decoder: Path, decoder_bundle: Bundle, settings: Settings, repo: str, tmp_path: Path
) -> None:
    hubaoti.push(
        decoder_bundle, repo, as_is=True, settings=replace(settings, home=tmp_path / "publisher")
    )
    with LightweightEngine(settings, repos=[repo], trust=True) as engine:
        with struck(signal.SIGTERM), pytest.warns(NoGraphs, match="SIGTERM"):
            assert engine.load(tiny_decoder).state == "eager"
        expected = engine.generate(tiny_decoder, "hello", **WORDS)
        standing = engine.load(tiny_decoder)
        assert (standing.state, standing.why) == ("compiled", "")
        assert engine.generate(tiny_decoder, "hello", **WORDS) == expected
        assert engine.state(tiny_decoder).compiled > 0


def test_graphs_of_another_model_are_refused_and_never_taken(
    roberta_bundle: Bundle, decoder_bundle: Bundle, built_at: Settings, three: list[Path]
) -> None:
    other = three[0] / "config.json"
    other.write_text(other.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with LightweightEngine(built_at) as engine:
        with pytest.raises(OtherProgram, match="rms_norm_eps"):
            engine.load(three[0], decoder_bundle)
        with pytest.raises(BadRequest, match="not for classify"):
            engine.load(three[0], roberta_bundle)
        assert engine.models() == []
        assert engine.load(three[0]).state == "eager"
        with pytest.raises(OtherProgram, match="rms_norm_eps"):
            engine.load(three[0], decoder_bundle)
        assert engine.load(three[1], decoder_bundle).state == "compiled"


def test_an_artifact_of_another_task_says_what_it_is_for(
    tiny_decoder: Path,
    minilm: Path,
    decoder_bundle: Bundle,
    minilm_bundle: Bundle,
    built_at: Settings,
) -> None:
    with LightweightEngine(built_at) as engine:
        with pytest.raises(BadRequest, match="was built for embed, .* to generate") as caught:
            engine.load(tiny_decoder, minilm_bundle, task="generate")
        assert "makes vectors of texts: hubaoti run --text" in caught.value.hint
        assert caught.value.hint.endswith("--task generate")
        with pytest.raises(BadRequest, match="was built for generate, .* to embed") as caught:
            engine.load(minilm, decoder_bundle, task="embed")
        assert "goes on with prompts: hubaoti run --prompt" in caught.value.hint
        engine.load(minilm)
        with pytest.raises(BadRequest, match="it cannot score") as caught:
            engine.score(minilm, [("a", "b")])
        assert "--text" in caught.value.hint


def test_texts_for_graphs_that_go_on_with_prompts_are_told_where_to_go(
    tiny_decoder: Path, decoder_bundle: Bundle, built_at: Settings
) -> None:
    with Mirror.open(built_at.mirror) as mirror:
        artifact = mirror.artifact(decoder_bundle.manifest.digest)
    assert artifact is not None
    with pytest.raises(BadRequest, match="built for generate, its graphs serve 2 blocks") as caught:
        hubaoti.load(artifact, tiny_decoder, settings=built_at)
    assert "hubaoti.attach(model, artifact)" in caught.value.hint
    assert "LightweightEngine().load" in caught.value.hint and "--prompt" not in caught.value.hint


def test_a_loaded_model_gets_the_graphs_that_are_given_later(
    tiny_decoder: Path, decoder_bundle: Bundle, alone: Settings
) -> None:
    with LightweightEngine(alone) as engine:
        assert repr(engine) == "LightweightEngine(no model; 0 B)"
        engine.load(tiny_decoder)
        before = engine.generate(tiny_decoder, "hello", **WORDS)
        assert engine.load(tiny_decoder).state == "eager"
        assert re.search(rf"^LightweightEngine\({tiny_decoder} eager; [0-9.]+ MB\)$", repr(engine))
        with pytest.raises(Untrusted, match="not built on this machine"):
            engine.load(tiny_decoder, decoder_bundle)
        Trust(alone.trust).add_artifact(decoder_bundle.manifest.digest)
        assert engine.load(tiny_decoder, decoder_bundle).state == "compiled"
        assert engine.generate(tiny_decoder, "hello", **WORDS) == before
        assert engine.state(tiny_decoder).compiled == 8


def test_a_loaded_model_is_asked_for_nothing_else(
    tiny_decoder: Path, decoder_bundle: Bundle, built_at: Settings
) -> None:
    with LightweightEngine(built_at) as engine:
        engine.load(tiny_decoder)
        for words in ({"task": "embed"}, {"revision": "v2"}):
            with pytest.raises(BadRequest, match="loaded already, to generate"):
                engine.load(tiny_decoder, **words)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="colour"):
            engine.load(tiny_decoder, colour="red")  # type: ignore[call-arg]
        assert engine.load(tiny_decoder, compile="now").state == "compiled"


def test_graphs_that_cannot_be_used_leave_those_that_answer(
    tiny_decoder: Path,
    decoder_bundle: Bundle,
    quantized_bundle: Bundle,
    built_at: Settings,
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    shutil.copytree(built_at.home, home)
    settings = replace(built_at, home=home)
    with LightweightEngine(settings) as engine:
        engine.load(tiny_decoder)
        with Mirror.open(settings.mirror) as mirror:
            other = mirror.artifact(quantized_bundle.manifest.digest)
        assert other is not None
        (library,) = other.graph_folder(other.manifest.graphs[0]).rglob("*.so")
        library.chmod(0o644)
        library.write_bytes(b"\0" * library.stat().st_size)
        with pytest.raises(DigestMismatch):
            engine.load(tiny_decoder, other)
        assert engine.models()[0].artifact == decoder_bundle.manifest.digest
        engine.generate(tiny_decoder, "hello", **WORDS)
        assert engine.state(tiny_decoder).compiled == 8


def test_saying_how_an_unloaded_model_stands_does_not_load_it(
    three: list[Path], size: int, alone: Settings
) -> None:
    with LightweightEngine(alone, memory=int(1.5 * size)) as engine:
        for folder in three[:2]:
            engine.load(folder)
        assert engine.state(three[0]).bytes == 0
        assert [standing.state for standing in engine.models()] == ["unloaded", "eager"]


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu", "cpu:0", ""])
def test_a_device_that_is_not_here_is_refused(device: str, alone: Settings) -> None:
    with pytest.raises(BadRequest, match="no device"):
        LightweightEngine(alone, device=device)


def test_without_graphs_everything_is_eager(
    tiny_decoder: Path, decoder_bundle: Bundle, built_at: Settings
) -> None:
    with LightweightEngine(replace(built_at, graphs=False)) as engine:
        assert engine.load(tiny_decoder, decoder_bundle, compile="now").state == "eager"
        assert engine.state(tiny_decoder).compiled == 0


def test_the_least_valuable_model_makes_room(three: list[Path], size: int, alone: Settings) -> None:
    with LightweightEngine(alone, memory=int(2.5 * size)) as engine:
        for folder in three[:2]:
            engine.load(folder)
        for place in engine._room:
            place.seconds = 1.0  # a noisy machine says otherwise
        for _ in range(5):
            engine.generate(three[0], "hello", **WORDS)
        expected = engine.generate(three[1], "hello", **WORDS)
        engine.load(three[2])
        states = {standing.model: standing.state for standing in engine.models()}
        assert states == {
            str(three[0]): "eager",
            str(three[1]): "unloaded",
            str(three[2]): "eager",
        }
        assert sum(standing.bytes for standing in engine.models()) == pytest.approx(
            2 * size, rel=0.01
        )
        assert engine.generate(three[1], "hello", **WORDS) == expected, "it is loaded again"


def test_a_model_in_use_never_leaves(three: list[Path], size: int, alone: Settings) -> None:
    with LightweightEngine(alone, memory=int(1.5 * size)) as engine:
        engine.load(three[0])
        entered, leave = threading.Event(), threading.Event()
        module = engine._room.get(str(three[0])).holder.module  # type: ignore[union-attr]

        def held(*_: Any) -> None:
            entered.set()
            assert leave.wait(30)

        module.register_forward_pre_hook(held)
        answers: list[Any] = []

        def ask(model: Path) -> None:
            answers.append(engine.generate(model, "hello", **WORDS))

        first = threading.Thread(target=ask, args=(three[0],))
        first.start()
        assert entered.wait(30)
        second = threading.Thread(target=lambda: engine.load(three[1]))
        second.start()
        second.join(1)
        assert second.is_alive(), "there is no room before the first is answered"
        assert engine.models()[0].state == "eager"
        leave.set()
        first.join(30)
        second.join(30)
        assert len(answers) == 1
        assert [standing.state for standing in engine.models()] == ["unloaded", "eager"]


def test_a_model_that_can_never_fit_is_refused_before_it_is_loaded(
    three: list[Path], size: int, alone: Settings
) -> None:
    with LightweightEngine(alone, memory=size - 1) as engine:
        with pytest.raises(
            NotEnoughMemory, match=r"takes 7\.5 MiB of memory; 7\.5 MiB may be held"
        ):
            engine.load(three[0])
        assert engine.models() == []
    with LightweightEngine(alone, memory=int(1.5 * size)) as engine:
        engine.load(three[0])
        with torch.no_grad():
            engine.load(three[1])
        assert [standing.state for standing in engine.models()] == ["unloaded", "eager"]


def test_unloading_gives_everything_back(engine: LightweightEngine, tiny_decoder: Path) -> None:
    engine.load(tiny_decoder)
    engine.generate(tiny_decoder, "hello", **WORDS)
    holder = engine._room.get(str(tiny_decoder)).holder
    assert isinstance(holder, Resident)
    module = holder.module
    assert module is not None
    assert count_module_bytes(module) == engine.models()[0].bytes
    gone = weakref.ref(next(module.parameters()))
    del module
    engine.unload(tiny_decoder)
    gc.collect()
    assert gone() is None
    assert engine.models() == []
    for request in (
        lambda: engine.generate(tiny_decoder, "hello"),
        lambda: engine.score(tiny_decoder, [("hello", " you")]),
        lambda: engine.embed(tiny_decoder, "hello"),
        lambda: engine.unload(tiny_decoder),
    ):
        with pytest.raises(BadRequest, match="is not loaded"):
            request()


def test_requests_of_many_threads_are_all_answered(
    engine: LightweightEngine, tiny_decoder: Path
) -> None:
    engine.load(tiny_decoder)
    expected = engine.generate(tiny_decoder, "A cat sits", **WORDS)
    found: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(engine.generate(tiny_decoder, "A cat sits", **WORDS))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


def wait_until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something that comes by itself."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_a_child_compiled_answers_between_two_requests_and_is_pushed(
    tiny_decoder: Path, decoder_bundle: Bundle, built_at: Settings, settings: Settings, repo: str
) -> None:
    """What nobody says was built here is not loaded, and no build: a child makes one."""
    shutil.copytree(built_at.home, settings.home)
    with Mirror.open(settings.mirror) as mirror:
        mirror.index._db.execute("delete from built")
    dims = {"batch": (1, 4), "seq": (1, 40), "cache": (16, 64)}
    with LightweightEngine(settings) as engine:
        standing = engine.load(tiny_decoder, compile="background", push=repo, dims=dims)
        assert (standing.state, standing.is_building) == ("eager", True)
        expected = engine.generate(tiny_decoder, "hello", **WORDS)
        building = engine._room.get(str(tiny_decoder)).building
        assert building is not None
        wait_until(building.is_done)
        assert engine.generate(tiny_decoder, "hello", **WORDS) == expected
        (standing,) = engine.models()
        assert (standing.state, standing.is_building) == ("compiled", False)
        assert engine.state(tiny_decoder).compiled == 8
    stranger = replace(settings, home=settings.home.with_name("other"), token=None)
    pulled = hubaoti.pull(repo, trust=True, settings=stranger)
    assert pulled.artifact.digest == standing.artifact
    assert pulled.artifact.manifest.key == decoder_bundle.manifest.key


def test_a_compile_that_fails_leaves_the_model_as_it_is(
    tiny_decoder: Path, alone: Settings
) -> None:
    with LightweightEngine(alone) as engine:
        with pytest.warns(NoGraphs, match=r"answers without graphs: .*\bnot_a_dim\b"):
            engine.load(tiny_decoder, compile="now", dims={"not_a_dim": (1, 4)})
        assert engine.generate(tiny_decoder, "hello", **WORDS)
        assert "not_a_dim" in engine.models()[0].why


@pytest.mark.parametrize(
    ("words", "kind", "told"),
    [
        ({"compile": "later"}, BadRequest, "compile='later'"),
        ({"compile": "now", "dims": {"seq": (4, 1)}}, BadDim, "seq"),
        ({"task": "sing"}, BadRequest, "sing"),
        ({"task": "classify"}, BadRequest, "classify"),
    ],
)
def test_what_cannot_be_asked_of_load_is_said_at_once(
    words: dict[str, Any], kind: type[HubaotiError], told: str, tiny_decoder: Path, alone: Settings
) -> None:
    with LightweightEngine(alone) as engine:
        with pytest.raises(kind, match=told):
            engine.load(tiny_decoder, **words)
        assert engine.models() == []


def test_a_model_that_is_nowhere_is_said_so(alone: Settings, tmp_path: Path) -> None:
    with LightweightEngine(replace(alone, offline=True)) as engine:
        with pytest.raises(ModelNotFound):
            engine.load(tmp_path / "nothing")
        (tmp_path / "empty").mkdir()
        with pytest.raises((ModelNotFound, UnknownTask)):
            engine.load(tmp_path / "empty")
        assert engine.models() == []


COMPILE_WORDS = ("dims", "buckets", "regions", "dtype", "quantize", "mode", "inductor", "level")
OWN_WORDS = ("self", "model", "artifact", "compile", "task", "push", "revision")


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (LightweightEngine.load, (*OWN_WORDS, *COMPILE_WORDS, "trust_remote_code")),
        (
            LightweightEngine.generate,
            ("self", "model", "prompts", *Sampling.__struct_fields__),
        ),
        (LightweightEngine.measure, ("self", "model", "prompts", "max_new_tokens")),
    ],
)
def test_a_signature_lists_every_keyword_and_says_what_it_is(
    method: Callable[..., Any], names: tuple[str, ...]
) -> None:
    parameters = inspect.signature(method).parameters
    assert tuple(parameters) == names
    assert all(
        each.annotation is not inspect.Parameter.empty for each in [*parameters.values()][1:]
    )
    if method is not LightweightEngine.measure:
        args = (method.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
        assert all(re.search(rf"\b{name}\b", args) for name in names[1:])


def test_the_words_of_a_compile_are_as_compile_has_them() -> None:
    """So a load without a word asks the child for what a compile without it builds."""
    ours = inspect.signature(LightweightEngine.load).parameters
    theirs = inspect.signature(hubaoti.compile).parameters
    for name in (*COMPILE_WORDS, "trust_remote_code", "task", "revision"):
        assert (ours[name].default, ours[name].annotation) == (
            theirs[name].default,
            theirs[name].annotation,
        )


def test_a_word_that_nothing_takes_is_refused(
    engine: LightweightEngine, tiny_decoder: Path
) -> None:
    anything: Any = engine
    with pytest.raises(TypeError, match="colour"):
        anything.load(tiny_decoder, compile="now", colour="red")
    assert engine.models() == []
    engine.load(tiny_decoder)
    with pytest.raises(TypeError, match="temprature"):
        anything.generate(tiny_decoder, "hello", temprature=1.0)
    with pytest.raises(TypeError, match="temprature"):
        anything.measure(tiny_decoder, "hello", temprature=1.0)


def test_a_temperature_of_zero_is_greedy(engine: LightweightEngine, tiny_decoder: Path) -> None:
    engine.load(tiny_decoder)
    greedy = engine.generate(tiny_decoder, "hello", **WORDS)
    assert engine.generate(tiny_decoder, "hello", temperature=0, max_new_tokens=4) == greedy
    stopped = engine.generate(tiny_decoder, "hello", stop=[greedy[0].text[1:]], **WORDS)
    assert stopped[0].finish == "stop"


def test_a_model_that_leaves_while_it_is_asked_for_comes_back_at_its_revision(
    tiny_decoder: Path, settings: Settings, repo: str
) -> None:
    """Another thread unloads it between the look for it and the lock on it."""
    hub = HfApi(settings.endpoint, token=settings.token)
    hub.create_repo(repo)
    first = hub.upload_folder(repo_id=repo, folder_path=tiny_decoder).oid
    card = hub.upload_file(path_or_fileobj=b"# new", path_in_repo="README.md", repo_id=repo).oid
    assert first != card
    statuses: list[ModelStatus] = []
    with LightweightEngine(settings) as engine:
        engine.load(repo, revision=first)
        with engine._room.hold(repo) as slot:
            thread = threading.Thread(
                target=lambda: statuses.append(engine.load(repo, revision=first))
            )
            thread.start()
            wait_until(lambda: slot.users == 2)
            engine.unload(repo)
        thread.join()
        assert [status.state for status in statuses] == ["eager"]
        again = engine._room.get(repo)
        assert again is not slot
        assert (again.revision, Path(again.begin.folder).name) == (first, first)
        with pytest.raises(BadRequest, match=f"loaded already, .* at {first}"):
            engine.load(repo, revision=card)


@pytest.mark.parametrize(
    "words",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": "x"},
        {"temperature": -1.0},
        {"num_beams": 0},
        {"seed": -1},
        {"top_p": 1.5},
        {"stop": [""]},
        {"stop": ["end", ""]},
        {"stop": "end"},
        {"stop": [1]},
        {"stop": None},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": 10**30},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": False},
        {"top_p": float("nan")},
        {"min_p": float("nan")},
        {"repetition_penalty": float("inf")},
        {"num_beams": True},
        {"do_sample": 1},
        {"unheard_of": 1},
    ],
)
def test_what_cannot_be_asked_of_generate_is_said_in_one_line_by_its_name(
    words: dict[str, Any],
) -> None:
    with pytest.raises(BadRequest) as caught:
        Sampling.of(**words)
    assert next(iter(words)) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(msgspec.ValidationError):  # as another process would say it
        msgspec.convert(words, Sampling)


def test_texts_to_stop_at_are_unicode() -> None:
    with pytest.raises(BadInput, match="is not UTF-8"):
        Sampling.of(stop=["\ud800"])


def test_how_to_generate_is_refused_before_a_model_is_loaded(
    tmp_path: Path, alone: Settings
) -> None:
    engine = LightweightEngine(alone)
    with pytest.raises(BadRequest, match="stop"):
        engine.generate("nobody/nothing", "hello", stop=[""])
    with pytest.raises(BadRequest, match="stop"):
        answer_file(engine, "m", tmp_path / "in", tmp_path / "out", {"stop": [""]}, lambda _: None)
    assert not (tmp_path / "out").exists()
    words = ("run", "--model", "nobody/nothing", "--prompt", "hello", "--temperature", "nan")
    assert "generate: Expected `float` > 0.0 - at `$.temperature`" in inside(alone, *words).err


def test_items_that_are_no_pairs_are_refused(engine: LightweightEngine, tiny_decoder: Path) -> None:
    engine.load(tiny_decoder)
    for items in (["hello"], [("hello",)], [("hello", 3)], [3], [None], None):
        with pytest.raises(BadRequest, match="item"):
            engine.score(tiny_decoder, items)  # type: ignore[arg-type]


def test_too_little_memory_for_a_request_is_said_and_the_model_goes_on(
    engine: LightweightEngine, tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load(tiny_decoder)
    holder: Any = engine._room.get(str(tiny_decoder)).holder

    def full(*_: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    hook = holder.module.register_forward_pre_hook(full)
    with pytest.raises(NotEnoughMemory, match="ran out of memory"):
        engine.generate(tiny_decoder, "hello", **WORDS)
    hook.remove()
    assert engine.generate(tiny_decoder, "hello", **WORDS)


def test_the_size_of_weights_is_known_from_their_headers(tiny_llama: Path) -> None:
    own = estimate_weight_bytes(tiny_llama, None)
    (file,) = tiny_llama.glob("*.safetensors")
    assert own == file.stat().st_size - header_bytes(tiny_llama)
    assert estimate_weight_bytes(tiny_llama, "float32") == 2 * own
    assert estimate_weight_bytes(tiny_llama, "bfloat16") == own


def header_bytes(folder: Path) -> int:
    """What is not weights in a model's file."""
    (file,) = folder.glob("*.safetensors")
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("8GB", 8 * 10**9), ("512 MiB", 1 << 29), ("1.5kb", 1500), (7, 7), ("12", 12), ("1T", 10**12)],
)
def test_sizes_of_memory_are_read_as_people_write_them(text: str | int, bytes_: int) -> None:
    assert parse_size(text) == bytes_


@pytest.mark.parametrize("text", ["", "many", "-1GB", "8 G B", True])
def test_what_is_no_size_of_memory_is_refused(text: Any, alone: Settings) -> None:
    with pytest.raises(BadRequest, match="no size of memory"):
        LightweightEngine(alone, memory=text)


def test_a_model_is_for_what_its_files_say(
    tiny_decoder: Path, tiny_roberta: Path, minilm: Path
) -> None:
    assert [choose_task(each) for each in (tiny_decoder, tiny_roberta, minilm)] == [
        "generate",
        "embed",
        "embed",
    ]
