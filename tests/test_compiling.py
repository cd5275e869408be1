"""The verb compile: what is built is found, what fails reported, what would be done explained."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
import torch
import transformers
from bundles import make_bundle, tree_of
from torch import nn

import hubaoti
from hubaoti import __version__
from hubaoti.api.attaching import put
from hubaoti.api.building import refuse_tuning
from hubaoti.api.compiling import CompileOptions
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.schema import Target
from hubaoti.compiler.built import BuiltGraph, BuiltUnit
from hubaoti.compiler.elf import Needs
from hubaoti.compiler.graph_build import build_unit
from hubaoti.compiler.job import Job
from hubaoti.compiler.request import CompileRequest
from hubaoti.errors import (
    BadDim,
    BadRequest,
    CheckFailed,
    CompileFailed,
    DiskFull,
    HubaotiError,
    NotEnoughMemory,
    OutputExists,
    UnknownTask,
)
from hubaoti.host.wire import ErrorRecord
from hubaoti.mirror import BUILT_HERE, Mirror, PullOrigin
from hubaoti.mirror.trust import Trust
from hubaoti.settings import Settings

# What the session's decoder was compiled with.
ASKED: dict[str, Any] = {
    "task": "generate",
    "dims": {"batch": (1, 4), "seq": (1, 40), "cache": (16, 64)},
}


class Building(Exception):
    """What was asked for is built."""


def build(*_: object) -> NoReturn:
    raise Building


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that would take its time ends as it begins."""
    monkeypatch.setattr("hubaoti.compiler.build.build_unit", build)


@pytest.fixture
def bare(tmp_path: Path) -> Settings:
    """A machine that has nothing."""
    return Settings(home=tmp_path / "home", endpoint="http://127.0.0.1:9")


@pytest.fixture
def stocked(bare: Settings, decoder_bundle: Bundle) -> Settings:
    """A machine whose mirror has the decoder."""
    files = {f.path: decoder_bundle.path / f.path for f in decoder_bundle.manifest.all_files()}
    with Mirror.open(bare.mirror) as mirror:
        mirror.put(decoder_bundle.manifest, files)
        mirror.index.record_built(decoder_bundle.manifest)
    return bare


@pytest.fixture
def output(tmp_path: Path, decoder_bundle: Bundle) -> Path:
    """The decoder's bundle, where it was written to."""
    return Path(shutil.copytree(decoder_bundle.path, tmp_path / "out" / "bundle"))


def stamps(folder: Path) -> dict[str, int]:
    """When each file below a folder was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


# Found


def test_what_lies_at_the_output_is_returned_as_it_is(
    stocked: Settings, output: Path, tiny_decoder: Path
) -> None:
    before, said = stamps(output.parent), list[str]()
    found = hubaoti.compile(tiny_decoder, output, settings=stocked, progress=said.append, **ASKED)
    assert found.path == output
    assert stamps(output.parent) == before
    assert said[-1] == f"found {found.manifest.key[:12]} in {output}, built here"


def test_what_somebody_left_at_the_output_is_not_taken_for_a_build_of_ours(
    bare: Settings, output: Path, tiny_decoder: Path
) -> None:
    said = list[str]()
    assert hubaoti.explain(tiny_decoder, output, settings=bare, **ASKED).built is None
    with pytest.raises(Building):
        hubaoti.compile(tiny_decoder, output, settings=bare, progress=said.append, **ASKED)
    assert any(each.endswith("it is not taken") for each in said)


def test_what_lies_in_the_mirror_is_written_to_the_output_byte_for_byte(
    stocked: Settings, decoder_bundle: Bundle, tiny_decoder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    there = tmp_path / "elsewhere" / "bundle"
    found = hubaoti.compile(tiny_decoder, there, settings=stocked, progress=said.append, **ASKED)
    found.check()
    assert tree_of(there) == tree_of(decoder_bundle.path)
    assert said[-1] == f"found {found.manifest.key[:12]} in the mirror, built here"
    assert [path.name for path in there.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("origin", "trusted"),
    [
        (BUILT_HERE, False),  # opened from a folder once
        (PullOrigin("http://hub", "mallory/repo"), False),
        (PullOrigin("http://hub", "mallory/repo"), True),
    ],
)
def test_a_key_that_somebody_claims_is_no_build_of_ours(
    bare: Settings,
    decoder_bundle: Bundle,
    tiny_decoder: Path,
    tmp_path: Path,
    origin: PullOrigin,
    trusted: bool,
) -> None:
    files = {f.path: decoder_bundle.path / f.path for f in decoder_bundle.manifest.all_files()}
    with Mirror.open(bare.mirror) as mirror:
        mirror.put(decoder_bundle.manifest, files, origin)
    if trusted:
        Trust(bare.trust).add("http://hub", "mallory")
    found = hubaoti.explain(tiny_decoder, settings=bare, **ASKED).built
    assert found == ("the mirror" if trusted else None)
    with nullcontext() if trusted else pytest.raises(Building):
        hubaoti.compile(tiny_decoder, tmp_path / "bundle", settings=bare, **ASKED)


def test_what_lies_nowhere_is_built(bare: Settings, tiny_decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(Building):
        hubaoti.compile(tiny_decoder, tmp_path / "bundle", settings=bare, **ASKED)
    assert not (tmp_path / "bundle").exists()


def test_what_is_forced_is_built_again(stocked: Settings, output: Path, tiny_decoder: Path) -> None:
    before = tree_of(output.parent)
    with pytest.raises(Building):
        hubaoti.compile(tiny_decoder, output, force=True, settings=stocked, **ASKED)
    assert tree_of(output.parent) == before, "until the new one is whole, the old one stays"


def test_a_bundle_of_another_key_is_replaced(
    stocked: Settings, decoder_bundle: Bundle, tiny_decoder: Path, tmp_path: Path
) -> None:
    make_bundle(tmp_path / "bundle")
    hubaoti.compile(tiny_decoder, tmp_path / "bundle", settings=stocked, **ASKED)
    assert tree_of(tmp_path / "bundle") == tree_of(decoder_bundle.path)


@pytest.mark.parametrize("kept", [False, True])
def test_which_bundle_was_replaced_is_told(
    kept: bool, stocked: Settings, tiny_decoder: Path, tmp_path: Path
) -> None:
    place, steps = tmp_path / "bundle", list[str]()
    old = make_bundle(place)
    if kept:
        with Mirror.open(stocked.mirror) as mirror:
            put(old, mirror)
    for _ in range(2):
        hubaoti.compile(tiny_decoder, place, settings=stocked, progress=steps.append, **ASKED)
    said = f"replaced in {place}: the bundle of acme/tiny (key {old.manifest.key[:12]})"
    said += ", which stays in the mirror" * kept
    assert [each for each in steps if each.startswith("replaced")] == [said]


def test_what_was_not_replaced_is_not_told(
    bare: Settings, tiny_decoder: Path, tmp_path: Path
) -> None:
    make_bundle(tmp_path / "bundle")
    steps = list[str]()
    with pytest.raises(Building):
        hubaoti.compile(
            tiny_decoder, tmp_path / "bundle", settings=bare, progress=steps.append, **ASKED
        )
    assert steps and not any("replaced" in each for each in steps)


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o600)
    file.write_bytes(content)


def edit(manifest: Path) -> None:
    """Write another manifest that agrees with itself."""
    text = manifest.read_bytes()
    manifest.write_bytes(text.replace(b'"model":"tiny-decoder"', b'"model":"tiny-becoder"'))
    assert manifest.read_bytes() != text


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit in a graph": lambda folder: flip(next(folder.glob("graphs/*.pt2"))),
    "a flipped bit in a tensor": lambda folder: flip(folder / "golden.safetensors"),
    "a graph that is gone": lambda folder: next(folder.glob("graphs/*.pt2")).unlink(),
    "an edited manifest": lambda folder: edit(folder / "hubaoti.json"),
    "a truncated manifest": lambda folder: (folder / "hubaoti.json").write_bytes(b'{"build":'),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_bundle_is_replaced_by_the_mirror_s(
    case: str, stocked: Settings, output: Path, decoder_bundle: Bundle, tiny_decoder: Path
) -> None:
    DAMAGE[case](output)
    found = hubaoti.compile(tiny_decoder, output, settings=stocked, **ASKED)
    found.check()
    assert tree_of(output) == tree_of(decoder_bundle.path)


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_bundle_is_never_returned(
    case: str, bare: Settings, output: Path, tiny_decoder: Path
) -> None:
    DAMAGE[case](output)
    with pytest.raises(Building):
        hubaoti.compile(tiny_decoder, output, settings=bare, **ASKED)
    assert hubaoti.explain(tiny_decoder, output, settings=bare, **ASKED).built is None


def test_a_damaged_copy_in_the_mirror_is_never_returned(
    stocked: Settings, tiny_decoder: Path, tmp_path: Path
) -> None:
    flip(next(stocked.mirror.glob("graphs/*/**/*.so")))
    for _ in range(2):  # the second time it is not there at all
        with pytest.raises(Building):
            hubaoti.compile(tiny_decoder, tmp_path / "bundle", settings=stocked, **ASKED)
        assert not (tmp_path / "bundle").exists()


def test_what_changes_kernels_is_refused_for_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm80")
    refuse_tuning(CompileRequest(), Settings(Path("/h")))
    with pytest.raises(BadRequest, match="TRITON_OVERRIDE_ARCH is set"):
        refuse_tuning(CompileRequest(capabilities=(90,)), Settings(Path("/h")))


@pytest.mark.parametrize("machine", ["bare", "stocked"])
def test_a_folder_that_is_no_bundle_is_refused_before_anything_is_built(
    machine: str, request: pytest.FixtureRequest, tiny_decoder: Path, tmp_path: Path
) -> None:
    settings = request.getfixturevalue(machine)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExists, match="mine exists and is not a bundle") as caught:
        hubaoti.compile(tiny_decoder, tmp_path / "mine", settings=settings, **ASKED)
    assert "-o" in caught.value.hint
    assert tree_of(tmp_path / "mine").keys() == {"thesis.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"home", "mine"}


def test_bundles_are_not_written_into_a_bundle(
    bare: Settings, output: Path, tiny_decoder: Path
) -> None:
    before = tree_of(output)
    with pytest.raises(OutputExists, match="is a bundle, and --for makes a folder") as caught:
        hubaoti.compile_for(tiny_decoder, "sm90", output, settings=bare)
    assert "-o" in caught.value.hint
    assert tree_of(output) == before


# Explained


def test_what_would_be_compiled_is_told_and_nothing_is_written(
    bare: Settings, decoder_bundle: Bundle, tiny_decoder: Path, tmp_path: Path
) -> None:
    found = hubaoti.explain(tiny_decoder, tmp_path / "bundle", settings=bare, **ASKED)
    manifest = decoder_bundle.manifest
    assert (found.key, found.built) == (manifest.key, None)
    assert (found.recipe, found.variant) == (str(manifest.recipe), str(manifest.variant))
    assert (found.regions, found.left_out) == ("auto", ())
    assert found.dims == {"batch": "1:4", "seq": "1:40", "cache": "16:64"}
    (graph,), (entry,) = found.graphs, manifest.graphs
    assert (graph["id"], tuple(graph["modules"])) == (entry.id, entry.modules)
    assert (graph["cache"], graph["dims"]["filled"]) == ("static", "1:64")
    assert {name: tuple(shape) for name, shape in graph["inputs"].items()} == {
        item.name: item.shape for item in entry.inputs
    }
    assert not (tmp_path / "bundle").exists()
    with Mirror.open(bare.mirror) as mirror:
        assert mirror.ls() == []


def test_where_it_is_built_already_is_told(
    stocked: Settings, output: Path, tiny_decoder: Path, tmp_path: Path
) -> None:
    def built(place: Path | None) -> str | None:
        return hubaoti.explain(tiny_decoder, place, settings=stocked, **ASKED).built

    assert built(output) == str(output)
    assert built(tmp_path / "none") == built(None) == "the mirror"


def variation(tiny_decoder: Path, folder: Path, **changes: object) -> Path:
    """The decoder's folder with another config."""
    shutil.copytree(tiny_decoder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_fine_tune_is_found_by_the_key_of_its_base(
    stocked: Settings, decoder_bundle: Bundle, tiny_decoder: Path, tmp_path: Path
) -> None:
    names = {"_name_or_path": "acme/tuned", "eos_token_id": 7, "transformers_version": "4.1.0"}
    tuned = variation(tiny_decoder, tmp_path / "tuned", **names, id2label={"0": "no", "1": "yes"})
    found = hubaoti.compile(tuned, tmp_path / "bundle", settings=stocked, **ASKED)
    assert found.manifest.digest == decoder_bundle.manifest.digest


OTHERS: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "bfloat16"},
    "dims": {"dims": ASKED["dims"] | {"seq": (1, 39)}},
    "steps": {"dims": ASKED["dims"] | {"cache": (16, 64, 16)}},
    "buckets": {"buckets": [{"seq": (1, 1)}, {"seq": (2, 40)}]},
    "regions": {"regions": "model.layers.0"},
    "task": {"task": "forward", "dims": {}},
    "level": {"level": "x86_64_v2"},
    "mode": {"mode": "max-autotune"},
    "inductor": {"inductor": {"epilogue_fusion": False}},
    "quantization": {"quantize": "int8wo"},
}


def test_another_option_is_another_key_and_so_is_another_program(
    bare: Settings, decoder_bundle: Bundle, tiny_decoder: Path, tmp_path: Path
) -> None:
    other = variation(tiny_decoder, tmp_path / "other", rms_norm_eps=1e-3)
    keys = {
        name: hubaoti.explain(tiny_decoder, settings=bare, **ASKED | asked).key
        for name, asked in OTHERS.items()
    }
    keys["program"] = hubaoti.explain(other, settings=bare, **ASKED).key
    keys["none"] = hubaoti.explain(tiny_decoder, settings=bare, **ASKED).key
    assert len({*keys.values()}) == len(keys), keys
    assert keys["none"] == decoder_bundle.manifest.key


def test_another_spelling_of_an_option_is_the_same_key(
    bare: Settings, decoder_bundle: Bundle, tiny_decoder: Path
) -> None:
    spoken = {
        "dims": ["seq=1:40", "cache=16:64:1", "batch=1:4"],
        "inductor": ["epilogue_fusion=true"],  # torch's default
        "dtype": "float32",
        "level": "x86_64_v3",
        "regions": "auto",
        "device": "cpu",
    }
    found = hubaoti.explain(tiny_decoder, settings=bare, **ASKED | spoken)
    assert found.key == decoder_bundle.manifest.key


@pytest.mark.parametrize("verb", [hubaoti.compile_for, hubaoti.explain_for, hubaoti.explain])
def test_every_verb_takes_the_options_of_compile(verb: Callable[..., Any], bare: Settings) -> None:
    """Beside what each says itself; another one is none."""
    written = inspect.signature(hubaoti.compile).parameters
    parameters = inspect.signature(verb).parameters
    how = {"model", "output", "device", "force", "jobs", "settings", "progress"}
    assert {*written} - how == CompileOptions.__optional_keys__
    assert all(
        each in written for each in {*parameters} - {"capabilities", "capability", "options"}
    )
    with pytest.raises(TypeError, match="colour"):
        verb("acme/tiny", **dict.fromkeys({"capabilities"} & {*parameters}, "sm90"), colour="red")


# Refused and reported


class Counts(nn.Module):
    """What no graph can keep."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.linear(x) * self.count


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> tuple[Counts, Any]:
    """A module that cannot be built, which is tried, and its calls."""
    monkeypatch.setattr("hubaoti.compiler.build.build_unit", build_unit)
    monkeypatch.setattr("hubaoti.compiler.graph_build.lower", build)
    module = Counts()
    with hubaoti.capture(module) as calls, torch.no_grad():
        for size in (2, 5):
            module(torch.randn(size, 8))
    return module, calls


def test_the_whole_report_of_a_failure_lies_beside_the_output(
    failing: tuple[Counts, Any], bare: Settings, tmp_path: Path
) -> None:
    module, calls = failing
    with pytest.raises(CompileFailed) as caught:
        hubaoti.compile(module, tmp_path / "out" / "counts", calls=calls, settings=bare)
    (report,) = (tmp_path / "out").iterdir()
    assert caught.value.hint.endswith(f"; the whole report: {report}")
    text = report.read_text()
    assert text.splitlines()[0] == str(caught.value)
    for words in (
        f"hubaoti {__version__}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
        f"Python {sys.version.split()[0]}",
        "float32",
        "x86_64_v3",
        "root: {'x_0': ",
        "Traceback (most recent call last):",
        "refuse_state",
    ):
        assert words in text


def test_what_fails_before_anything_is_built_is_reported_too(
    bare: Settings, tiny_decoder: Path, tmp_path: Path
) -> None:
    method = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    quantized = variation(tiny_decoder, tmp_path / "quantized", quantization_config=method)
    with pytest.raises(CompileFailed, match=r"^source: .*awq") as caught:
        hubaoti.compile(quantized, tmp_path / "out" / "bundle", settings=bare, **ASKED)
    (report,) = (tmp_path / "out").iterdir()
    assert caught.value.hint.endswith(f"; the whole report: {report}")
    for words in (str(caught.value), "'task': 'generate'", "Traceback", "refuse_quantized"):
        assert words in report.read_text()


def test_a_report_that_cannot_be_written_hides_no_reason(
    failing: tuple[Counts, Any], bare: Settings, tmp_path: Path
) -> None:
    module, calls = failing
    (tmp_path / "counts.report.txt").mkdir()
    with pytest.raises(CompileFailed, match=".count") as caught:
        hubaoti.compile(module, tmp_path / "counts", calls=calls, settings=bare)
    assert "report" not in caught.value.hint


LEVELS = ("x86_64_v2", "x86_64_v3")


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch, decoder_bundle: Bundle) -> list[str]:
    """Two kinds of host are asked for, whose graphs are fake ones; of what is built, the levels.

    They stand for two GPUs, of which the second one's graphs fail.
    """
    fails, built = {"x86_64_v3"}, list[str]()
    (entry,) = decoder_bundle.manifest.graphs
    entry = msgspec.structs.replace(entry, golden=None)
    # It is of another build, which was asked for other sizes.
    monkeypatch.setattr("hubaoti.artifact.manifest.find_size_problems", lambda *_: [])

    def build_one(job: Job, scratch: Path) -> BuiltGraph | ErrorRecord:
        built.append(job.target.level)
        if job.target.level in fails:
            fails.remove(job.target.level)
            return ErrorRecord("CompileFailed", f"lower: no; built for {job.target.level}", "try")
        shutil.copy(decoder_bundle.path / entry.file, scratch / entry.file)
        return BuiltGraph(entry, Needs(("libc.so.6",), "2.34", None, "1.3"))

    def build_several(jobs: list[Job], _: object, scratches: list[Path], *__: object) -> BuiltUnit:
        each = zip(jobs, scratches, strict=True)
        return BuiltUnit(tuple(build_one(job, scratch) for job, scratch in each))

    def choose(*_: object) -> list[Target]:
        return [msgspec.structs.replace(decoder_bundle.manifest.target, level=x) for x in LEVELS]

    monkeypatch.setattr("hubaoti.compiler.build.build_unit", build_several)
    # There is one fake graph, and not one for causal masks beside it.
    monkeypatch.setattr("hubaoti.compiler.plan.add_causal", lambda unit: [unit])
    monkeypatch.setattr("hubaoti.compiler.targets.choose_targets", choose)
    return built


def test_one_that_fails_of_several_takes_no_other_along(
    several: list[str], bare: Settings, tiny_decoder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "bundles"

    def compile_several() -> tuple[Bundle, ...]:
        return hubaoti.compile_for(tiny_decoder, "sm80,sm90", output, task="forward", settings=bare)

    with pytest.raises(CompileFailed, match="(?m)^lower: no; built for x86_64_v3$") as caught:
        compile_several()
    (whole,) = output.iterdir()
    assert "x86_64_v2" in whole.name
    assert f"; {whole} is whole: the same command builds only the rest" in caught.value.hint
    bundle = Bundle.read(whole)
    bundle.check()
    with Mirror.open(bare.mirror) as mirror:
        rows = mirror.index.rows(bundle.manifest.key)
        assert [row.digest for row in rows if mirror.artifact(row.digest)]
    report = (tmp_path / "out" / "bundles.report.txt").read_text()
    assert "'cpp.simdlen': 1," in report and "'cpp.simdlen': 256," in report
    assert several == [*LEVELS]
    assert [each.manifest.target.level for each in compile_several()] == [*LEVELS]
    assert several == [*LEVELS, LEVELS[1]], "only what failed is built again"


def test_where_all_of_several_fail_each_is_named(
    several: list[str],
    bare: Settings,
    tiny_decoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = tuple(ErrorRecord("CheckFailed", f"check: no; built for {x}", "try") for x in LEVELS)
    monkeypatch.setattr("hubaoti.compiler.build.build_unit", lambda *_: BuiltUnit(errors))
    output = tmp_path / "bundles"
    with pytest.raises(CheckFailed, match="built for x86_64_v2; check: no; built for x86_64_v3"):
        hubaoti.compile_for(tiny_decoder, "sm80,sm90", output, task="forward", settings=bare)
    assert [*output.iterdir()] == []


UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "calls of a folder": ({"calls": [[]]}, "calls"),
    "shapes of a folder": ({"shapes": {"x": ("batch",)}}, "shapes"),
    "a revision of a folder": ({"revision": "v1"}, "revision v1"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_words_that_nothing_reads_are_refused(
    case: str, bare: Settings, tiny_decoder: Path, tmp_path: Path
) -> None:
    asked, word = UNREAD[case]
    with pytest.raises(BadRequest, match=f"(a folder|by its name) .*{word}") as caught:
        hubaoti.compile(tiny_decoder, tmp_path / "bundle", settings=bare, **ASKED | asked)
    assert "leave it out" in caught.value.hint


@pytest.mark.parametrize("asked", [{"task": "generate"}, {"revision": "v1"}], ids=str)
def test_of_a_module_a_task_and_a_revision_are_refused(
    asked: dict[str, Any], bare: Settings
) -> None:
    with pytest.raises(BadRequest, match=r"a module \(Counts\).*(generate|v1)") as caught:
        hubaoti.explain(Counts(), calls=[], settings=bare, **asked)
    assert "leave it out" in caught.value.hint


MISTAKES: dict[str, tuple[dict[str, Any], type[HubaotiError]]] = {
    "a dim": ({"dims": ["depth=1:2"]}, BadDim),
    "a bucket": ({"buckets": ["seq=2:40"]}, BadDim),
    "a task": ({"task": "fly"}, UnknownTask),
    "an option": ({"inductor": ["max_fusion=8"]}, BadRequest),
    "a region": ({"regions": "model.layer"}, BadRequest),
    "a number of jobs": ({"jobs": 0}, BadRequest),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_of_the_user_s_has_no_report(
    case: str, bare: Settings, tiny_decoder: Path, tmp_path: Path
) -> None:
    asked, kind = MISTAKES[case]
    with pytest.raises(kind) as caught:
        hubaoti.compile(tiny_decoder, tmp_path / "bundle", settings=bare, **ASKED | asked)
    assert caught.value.hint and "report" not in caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}


def test_too_little_memory_is_said_before_anything_is_built(
    bare: Settings, tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hubaoti.host.memory.read_available_memory", lambda: 700_000_000)
    with pytest.raises(NotEnoughMemory, match=r"1\.3 GB of memory; 0\.7 GB are free") as caught:
        hubaoti.compile(tiny_decoder, tmp_path / "bundle", settings=bare, **ASKED)
    assert "model.layers of tiny-decoder" in str(caught.value)
    assert caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


@pytest.mark.parametrize("small", ["out", "tmp"])
def test_too_little_room_is_said_before_anything_is_built(
    small: str, bare: Settings, tiny_decoder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """On the disk of the output, or on that where graphs are built."""

    def free(folder: Path) -> int:
        return 5 << 20 if (folder == Path("/tmp")) == (small == "tmp") else 1 << 40

    monkeypatch.setattr("hubaoti.disk.free_bytes", free)
    place = Path("/tmp") if small == "tmp" else tmp_path / "out"
    with pytest.raises(DiskFull, match=f"disk of {place}.*64.0 MiB needed, 5.0 MiB free") as caught:
        hubaoti.compile(tiny_decoder, tmp_path / "out" / "bundle", settings=bare, **ASKED)
    assert caught.value.hint
    assert list((tmp_path / "out").iterdir()) == []
