"""Selftest: a graph is first opened by a process of its own, which it may crash."""

from __future__ import annotations

import re
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from bundles import CUDA, list_again, make_bundle, put_trusted
from safetensors.torch import load_file, save_file
from signals import struck
from transformers import AutoModelForCausalLM

import hubaoti
from hubaoti.artifact.bundle import Bundle, make_file_entry
from hubaoti.attachment.attach import find_regions
from hubaoti.errors import (
    CannotOpen,
    HubaotiError,
    NoMatch,
    NotEnoughMemory,
    NotTried,
    Quarantined,
)
from hubaoti.host.probe import STAND_IN, Gpu
from hubaoti.host.processes import ChildOutput, build_command
from hubaoti.mirror import Artifact, Mirror, PullOrigin
from hubaoti.mirror.retry import retry
from hubaoti.mirror.steps import STEPS, TENTH
from hubaoti.runtime import first_open as testing
from hubaoti.runtime import gpus, open_child
from hubaoti.runtime.first_open import require_sound
from hubaoti.runtime.open_child import OpenReport, OpenVerdict, open_in_child, read_verdicts
from hubaoti.settings import Settings

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NATIVE = """
#include <signal.h>
#include <unistd.h>
__attribute__((constructor)) static void begin(void) {{ {body}; }}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", endpoint="http://127.0.0.1:9")


@pytest.fixture
def mirror(settings: Settings) -> Iterator[Mirror]:
    with Mirror.open(settings.mirror) as found:
        yield found


@pytest.fixture
def artifact(decoder_bundle: Bundle, mirror: Mirror) -> Artifact:
    """The decoder's artifact, in a mirror that does not know who built it."""
    return put_trusted(decoder_bundle, mirror)


def tried(artifact: Artifact, patience: float = 120.0) -> list[OpenVerdict]:
    graphs = artifact.manifest.graphs
    return open_in_child(artifact.path, artifact.graphs, graphs, CPU, patience=patience)


def library(artifact: Artifact, body: str) -> None:
    """A library in the place of the graph's, which does something when it is opened."""
    found = next(artifact.graph_folder(artifact.manifest.graphs[0]).rglob("*.wrapper.so"))
    found.unlink()
    source = found.with_suffix(".c")
    source.write_text(NATIVE.format(body=body))
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c", source, "-o", found], check=True)
    source.unlink()
    list_again(artifact)


def test_a_good_graph_answers_its_golden_questions(artifact: Artifact) -> None:
    assert tried(artifact) == [OpenVerdict("model.layers", opened=True, compared=True)]


@pytest.mark.slow
def test_whole_models_answer_theirs_tied_weights_among_them(
    roberta_bundle: Bundle, llama_bundle: Bundle, mirror: Mirror
) -> None:
    for bundle in (roberta_bundle, llama_bundle):
        assert tried(put_trusted(bundle, mirror)) == [
            OpenVerdict("root", opened=True, compared=True)
        ]


def test_a_graph_that_crashes_takes_nobody_along(artifact: Artifact) -> None:
    library(artifact, "raise(SIGSEGV)")
    assert tried(artifact) == [OpenVerdict("model.layers", "it crashed its process (SIGSEGV)")]


def test_a_graph_that_ends_its_process_without_a_word_is_told(artifact: Artifact) -> None:
    library(artifact, "_exit(0)")
    """And may be tried again: only crashes and wrong answers are held against a graph."""
    told = OpenVerdict("model.layers", "its process ended with code 0", lasting=False)
    assert tried(artifact) == [told]


LASTING = {"SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT"}


@pytest.mark.parametrize("name", sorted(signal.Signals.__members__))
def test_only_what_the_code_itself_can_be_blamed_for_lasts(name: str) -> None:
    number = signal.Signals[name]
    (verdict,) = read_verdicts(ChildOutput([OpenReport("a")], -number), ["a"])
    assert verdict.lasting == (number.name in LASTING)
    assert number.name in verdict.problem


def test_a_signal_that_a_graph_s_process_gets_while_it_is_opened_says_nothing_of_it(
    artifact: Artifact,
) -> None:
    library(artifact, "raise(SIGTERM)")
    told = OpenVerdict("model.layers", "its process was ended (SIGTERM)", lasting=False)
    assert tried(artifact) == [told]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_from_outside_is_held_against_no_graph(
    number: int, artifact: Artifact, mirror: Mirror
) -> None:
    with struck(number), pytest.raises(NotTried, match=signal.Signals(number).name):
        require_sound(artifact, mirror, CPU, lambda step: None)
    assert mirror.artifact(artifact.digest) is not None
    assert not [*(mirror.root / "quarantine").iterdir()]
    require_sound(artifact, mirror, CPU, lambda step: None)


@pytest.mark.parametrize("kilobytes", [30_000, 300_000])
def test_too_little_address_space_is_held_against_no_graph(
    kilobytes: int, artifact: Artifact, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(kilobytes, monkeypatch)
    with pytest.raises((NotTried, NotEnoughMemory)):
        require_sound(artifact, mirror, CPU, lambda step: None)
    monkeypatch.undo()
    require_sound(artifact, mirror, CPU, lambda step: None)


def test_a_crash_where_memory_is_limited_may_be_for_want_of_it(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(artifact, "raise(SIGABRT)")
    limited(64_000_000, monkeypatch)
    (verdict,) = tried(artifact)
    assert not verdict.lasting
    assert "SIGABRT" in verdict.problem


def limited(kilobytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of ours may take no more address space than this."""
    begin = ["bash", "-c", f'ulimit -v {kilobytes}; exec "$@"', "-"]
    monkeypatch.setattr(
        "hubaoti.host.processes.build_command", lambda module: [*begin, *build_command(module)]
    )


def test_an_environment_in_which_no_process_begins_is_held_against_no_graph(
    artifact: Artifact, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it printed last is said."""
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(NotTried, match=r"before it was opened, .* code 1: .+"):
        require_sound(artifact, mirror, CPU, lambda step: None)
    monkeypatch.undo()
    require_sound(artifact, mirror, CPU, lambda step: None)


BEGUN, GOOD = OpenReport("a"), OpenReport("a", "")


@pytest.mark.parametrize(
    ("records", "is_garbled"),
    [
        ([], True),
        ([BEGUN], True),
        ([OpenReport("b", "")], False),
        ([OpenReport("b")], False),
        ([BEGUN, OpenReport("b"), GOOD], False),
    ],
)
def test_what_is_no_record_of_ours_says_nothing_of_a_graph(
    records: list[OpenReport], is_garbled: bool
) -> None:
    (verdict,) = read_verdicts(ChildOutput(records, 0, is_garbled=is_garbled), ["a"])
    assert (verdict.graph, verdict.lasting) == ("a", False)
    assert "no answer of ours" in verdict.problem


def test_what_comes_behind_all_answers_changes_none() -> None:
    output = ChildOutput([BEGUN, GOOD, BEGUN], -signal.SIGSEGV, is_garbled=True)
    assert [*read_verdicts(output, ["a"])] == [OpenVerdict("a")]


def test_a_crash_between_two_graphs_is_held_against_neither() -> None:
    first, second = read_verdicts(ChildOutput([BEGUN, GOOD], -signal.SIGSEGV), ["a", "b"])
    assert first == OpenVerdict("a")
    assert (second.graph, second.lasting) == ("b", False)


def test_what_native_code_says_of_other_graphs_is_not_believed(
    artifact: Artifact, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything held against its own: who wrote into the answers may have written all."""
    line = r'"{\"graph\":\"nobody\",\"problem\":\"\"}\n"'
    body = f"for (int to = 3; to < 1024; to++) if (write(to, {line}, 32) < 0) continue"
    library(artifact, f"{body}; raise(SIGSEGV)")
    (verdict,) = tried(artifact)
    assert (verdict.graph, verdict.lasting) == ("model.layers", False)
    assert "no answer of ours" in verdict.problem
    monkeypatch.setattr(Mirror, "verify", lambda *a: None)
    with pytest.raises(NotTried, match="no answer of ours"):
        require_sound(artifact, mirror, CPU, lambda step: None)


def test_a_verdict_on_another_graph_opens_none(
    artifact: Artifact, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testing, "open_in_child", lambda *a: [OpenVerdict("nobody")])
    with pytest.raises(HubaotiError, match="told of graph 'nobody', which was not tried") as why:
        require_sound(artifact, mirror, CPU, lambda step: None)
    assert why.value.hint


def test_a_graph_that_never_answers_is_ended_and_may_be_tried_again(artifact: Artifact) -> None:
    library(artifact, "for (;;) pause()")
    (verdict,) = tried(artifact, patience=15.0)
    assert not verdict.lasting
    assert "or too long" in verdict.problem


def test_what_cannot_even_be_loaded_is_not_held_against_a_graph_and_not_loaded_here(
    artifact: Artifact, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who would open it is told what the system said."""
    library(artifact, "")
    (verdict,) = tried(artifact)
    assert "cannot be opened" in verdict.problem
    assert not verdict.opened and not verdict.is_loadable
    monkeypatch.setattr(Mirror, "verify", lambda *a: None)
    for _ in range(2):
        said: list[str] = []
        with pytest.raises(CannotOpen, match="cannot be opened"):
            require_sound(artifact, mirror, CPU, said.append)
        assert said == ["first open"]
    assert mirror.index.row(artifact.digest) is not None
    assert not [*(mirror.root / "quarantine").iterdir()]


def test_other_answers_than_where_it_was_built_are_told(artifact: Artifact) -> None:
    file = artifact.path / "golden.safetensors"
    answers = {name: each + 1.0 for name, each in load_file(file).items()}
    file.unlink()
    save_file(answers, file)
    (verdict,) = tried(artifact)
    assert "model.layers/output is off by" in verdict.problem


def test_too_little_memory_is_said_before_anything_is_opened(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_child, "read_available_memory", lambda: 100 << 20)
    with pytest.raises(NotEnoughMemory, match=r"graph model\.layers takes 0\.\d GB .*0\.1 GB"):
        tried(artifact)


def test_it_is_done_once_for_a_graph_and_a_host(
    artifact: Artifact, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    require_sound(artifact, mirror, CPU, said.append)
    require_sound(artifact, mirror, CPU, said.append)
    assert said == ["first open"]
    monkeypatch.setattr(testing, "name_host_kind", lambda device: "another host")
    require_sound(artifact, mirror, CPU, said.append)
    assert said == ["first open"] * 2


def put_of_stranger(artifact: Artifact, folder: Path, mirror: Mirror) -> Artifact:
    """An artifact of the same packages, whose manifest says that they answer otherwise."""
    manifest = artifact.manifest
    golden = folder / "golden.safetensors"
    folder.mkdir()
    save_file(
        {name: each + 1.0 for name, each in load_file(artifact.file(golden.name)).items()}, golden
    )
    others = tuple(file for file in manifest.files if file.path != golden.name)
    files = (*others, make_file_entry(folder, golden.name))
    false = msgspec.structs.replace(manifest, files=files)
    paths = {file.path: artifact.file(file.path) for file in others} | {golden.name: golden}
    mirror.trust.add_artifact(false.digest)
    return mirror.put(false, paths, PullOrigin("https://hub", "stranger/same", "c" * 40, "path"))


def test_false_answers_of_a_stranger_are_held_against_nobody_else_s_artifact(
    artifact: Artifact, tmp_path: Path, mirror: Mirror
) -> None:
    """Though both have the same packages."""
    false = put_of_stranger(artifact, tmp_path / "false", mirror)
    with pytest.raises(Quarantined, match=r"model\.layers/output is off by"):
        require_sound(false, mirror, CPU, lambda step: None)
    assert mirror.artifact(false.digest) is None
    assert mirror.artifact(artifact.digest) is not None
    require_sound(artifact, mirror, CPU, lambda step: None)
    assert [row.digest for row in retry(mirror).artifacts] == [false.digest]


def test_what_answers_as_one_artifact_says_is_asked_again_for_another(
    artifact: Artifact, tmp_path: Path, mirror: Mirror
) -> None:
    require_sound(artifact, mirror, CPU, lambda step: None)
    false = put_of_stranger(artifact, tmp_path / "false", mirror)
    with pytest.raises(Quarantined, match=r"model\.layers/output is off by"):
        require_sound(false, mirror, CPU, lambda step: None)


def test_what_an_index_of_before_holds_against_packages_is_forgotten(
    artifact: Artifact, settings: Settings
) -> None:
    """It does not say for which artifact."""
    sha256 = artifact.manifest.graphs[0].sha256
    with Mirror.open(settings.mirror) as mirror:
        mirror.index.record_tested(sha256, "host", "model.layers/output is off by 1")
        with mirror.index.writing() as db:
            db.execute(f"pragma user_version = {STEPS.index(TENTH)}")
    with Mirror.open(settings.mirror) as mirror:
        assert mirror.index.problems() == []


def test_what_was_built_here_was_compared_when_it_was_built(
    artifact: Artifact, mirror: Mirror
) -> None:
    mirror.index.record_built(artifact.manifest)
    said: list[str] = []
    require_sound(artifact, mirror, CPU, said.append)
    assert said == []


def test_what_failed_is_apart_and_never_opened_in_this_process(
    artifact: Artifact, settings: Settings, decoder_bundle: Bundle, tiny_decoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def crashes(*args: Any) -> list[OpenVerdict]:
        return [OpenVerdict("model.layers", "it crashed its process (SIGILL)")]

    opened: list[Any] = []
    monkeypatch.setattr(testing, "open_in_child", crashes)
    monkeypatch.setattr("hubaoti.attachment.attach.open_graph", lambda *a: opened.append(a))
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    for _ in range(2):  # pulled again, it is known
        with pytest.raises(Quarantined, match=r"model\.layers: it crashed .*\(SIGILL\)"):
            hubaoti.attach(model, artifact, settings=settings)
        assert not opened
        assert not [*find_regions(model)]
        with Mirror.open(settings.mirror) as mirror:
            put_trusted(decoder_bundle, mirror)
        monkeypatch.setattr(testing, "open_in_child", lambda *a: pytest.fail("it was tried again"))
    assert [*(settings.mirror / "quarantine").iterdir()]


def test_what_may_have_been_this_moment_s_is_not_held_against_a_graph(
    artifact: Artifact, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = [OpenVerdict("model.layers", "its process was ended", lasting=False)]
    with monkeypatch.context() as patch:
        patch.setattr(testing, "open_in_child", lambda *a: ended)
        with pytest.raises(HubaotiError, match="its process was ended"):
            require_sound(artifact, mirror, CPU, lambda step: None)
    require_sound(artifact, mirror, CPU, lambda step: None)


def test_an_index_of_before_learns_to_remember(artifact: Artifact, settings: Settings) -> None:
    index = settings.mirror / "index.sqlite3"
    with Mirror.open(settings.mirror) as mirror:
        mirror.close()
    db = sqlite3.connect(index)
    later = re.findall(r"create table (?:if not exists )?(\w+)", "".join(STEPS[1:]))
    db.executescript(
        "drop index artifacts_whole" + "".join(f"; drop table if exists {name}" for name in later)
    )
    db.execute("pragma user_version = 1")
    db.commit()
    db.close()
    with Mirror.open(settings.mirror) as mirror:
        assert mirror.artifact(artifact.digest) is not None
        assert mirror.index.find_problem("0" * 64, "host") is None
        mirror.index.record_tested("0" * 64, "host", "it crashed")
        mirror.index.record_tested("0" * 64, "host", "")
        assert mirror.index.find_problem("0" * 64, "host") == "it crashed"


# GPUs, of which none is here: what torch would say of one, and what a child would, is made up


@pytest.fixture
def on_gpu(tmp_path: Path, mirror: Mirror) -> Artifact:
    """An artifact for a GPU, that this machine built."""
    found = put_trusted(make_bundle(tmp_path / "gpu", CUDA), mirror)
    mirror.index.record_built(found.manifest)
    return found


def fake_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, *said: OpenVerdict) -> list[str]:
    """A GPU, and children that would say this of its graphs; the list has what was tried."""
    verdicts, tried = iter(said), list[str]()

    def open_in_child(*_: Any) -> list[OpenVerdict]:
        tried.append(gpu.name)
        return [next(verdicts)]

    monkeypatch.setattr(gpus, "query_gpu", lambda _: gpu)
    monkeypatch.setattr(testing, "name_host_kind", lambda _: f"node {gpu.name}")
    monkeypatch.setattr(testing, "open_in_child", open_in_child)
    return tried


def test_what_was_built_here_for_a_gpu_is_opened_first_all_the_same(
    on_gpu: Artifact, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = OpenVerdict("root", opened=True, compared=True)
    tried = fake_gpu(monkeypatch, Gpu("NVIDIA H200", 90, 1 << 37), good)
    for _ in range(2):
        require_sound(on_gpu, mirror, GPU, lambda step: None)
    assert tried == ["NVIDIA H200"], "and it is remembered"


def test_a_crash_on_a_gpu_is_remembered_for_its_kind(
    on_gpu: Artifact, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = OpenVerdict("root", "it crashed its process (SIGSEGV)", opened=True)
    fake_gpu(monkeypatch, Gpu("NVIDIA H200", 90, 1 << 37), crash)
    with pytest.raises(Quarantined, match="SIGSEGV"):
        require_sound(on_gpu, mirror, GPU, lambda step: None)
    assert mirror.artifact(on_gpu.digest) is None
    assert mirror.index.problems()


@pytest.mark.parametrize("problem", ["", "it crashed its process (SIGSEGV)"])
def test_of_a_device_that_computes_nothing_nothing_is_remembered(
    problem: str, on_gpu: Artifact, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = OpenVerdict("root", problem, opened=True)
    name = f"NVIDIA H200 {STAND_IN}"
    tried = fake_gpu(monkeypatch, Gpu(name, 90, 1 << 37), verdict, verdict)
    for _ in range(2):
        with pytest.raises(Quarantined) if problem else nullcontext():
            require_sound(on_gpu, mirror, GPU, lambda step: None)
    assert tried == [name] * 2
    assert mirror.artifact(on_gpu.digest) is not None
    assert not mirror.index.problems()
    assert not [*(mirror.root / "quarantine").iterdir()]


def test_a_gpu_of_another_kind_is_refused_before_anything_is_opened(
    on_gpu: Artifact, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fake_gpu(monkeypatch, Gpu("NVIDIA A10", 86, 1 << 34))
    with pytest.raises(NoMatch, match=r"needs sm_90 .*, here is sm_86 \(NVIDIA A10\)") as caught:
        require_sound(on_gpu, mirror, GPU, lambda step: None)
    assert caught.value.hint and tried == []
    assert not mirror.index.problems()


def test_a_process_that_ends_by_itself_says_its_last_word() -> None:
    output = ChildOutput([OpenReport("a", opened=True)], 1, last="CUDA error: no kernel image")
    (verdict,) = read_verdicts(output, ["a"])
    assert verdict.problem == "its process ended with code 1: CUDA error: no kernel image"
    assert (verdict.opened, verdict.compared, verdict.lasting) == (True, False, False)
