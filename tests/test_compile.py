"""Compile: real models, compiled once, and what their bundles promise."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from bundles import tree_of
from elftools.elf.elffile import ELFFile
from safetensors import safe_open

import hubaoti
from hubaoti.artifact.bundle import Bundle, write_bundle
from hubaoti.artifact.package import unpack_all
from hubaoti.compiler.from_config import load_source
from hubaoti.compiler.host_code import choose_vector_isas
from hubaoti.compiler.inductor import find_cause
from hubaoti.compiler.job import Job
from hubaoti.compiler.plan import make_plan
from hubaoti.compiler.request import CompileRequest, make_ranges
from hubaoti.compiler.targets import choose_level, choose_targets, derive_requirements
from hubaoti.errors import (
    BadDim,
    BadRequest,
    CompileFailed,
    DiskFull,
    HubaotiError,
    ModelNotFound,
    OutputExists,
    UnknownTask,
)
from hubaoti.host.match import MatchResult, judge
from hubaoti.host.probe import probe_host
from hubaoti.mirror import Mirror
from hubaoti.settings import Settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def library(minilm_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library of MiniLM."""
    folder = tmp_path_factory.mktemp("unpacked")
    unpack_all(minilm_bundle.path / minilm_bundle.manifest.graphs[0].file, folder)
    (found,) = folder.rglob("*.so")
    return found


def test_answers_have_the_names_of_their_task(
    minilm_bundle: Bundle, roberta_bundle: Bundle
) -> None:
    for bundle, name in ((minilm_bundle, "embedding"), (roberta_bundle, "logits")):
        (output,) = bundle.manifest.graphs[0].outputs.tensors
        assert output.name == name


def test_a_model_without_a_weight_file_compiles(minilm_bundle: Bundle) -> None:
    minilm_bundle.check()
    manifest = minilm_bundle.manifest
    assert (manifest.program.task, manifest.program.steps) == ("embed", ("mean", "normalize"))
    assert str(manifest.recipe) == "float32-sdpa"
    assert manifest.source.model == "all-MiniLM-L6-v2"
    (graph,) = manifest.graphs
    assert {item.name for item in graph.inputs} == {"input_ids", "attention_mask"}
    assert graph.bounds == {"batch": (1, 32), "seq": (2, 256)}
    assert [output.shape for output in graph.outputs.tensors] == [("batch", 384)]


def test_no_weight_is_in_the_bundle(minilm: Path, minilm_bundle: Bundle) -> None:
    weights = (minilm / "model.safetensors").stat().st_size
    assert minilm_bundle.manifest.size < weights / 20
    with safe_open(minilm_bundle.path / "buffers.safetensors", framework="pt") as file:
        assert set(file.keys()) <= {"embeddings.token_type_ids", "embeddings.position_ids"}
    with safe_open(minilm / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    (graph,) = minilm_bundle.manifest.graphs
    of_checkpoint = [c for c in graph.constants if not c.origin.file]
    assert len(of_checkpoint) > 90
    assert all(names & {*constant.origin.checkpoint} for constant in of_checkpoint)


def test_every_corner_of_the_dims_was_checked_against_eager(minilm_bundle: Bundle) -> None:
    checks = minilm_bundle.manifest.checks
    corners = [{"batch": 1, "seq": 2}, {"batch": 32, "seq": 2}, {"batch": 1, "seq": 256}]
    assert all(corner in [check.dims for check in checks] for corner in corners)
    assert any(check.dims["batch"] % 2 and check.dims["seq"] % 2 for check in checks)
    assert all(check.max_relative <= check.tolerance for check in checks)
    assert all(0 < check.max_absolute < 1e-5 for check in checks)


def test_no_path_of_the_building_machine_is_published(
    minilm_bundle: Bundle, library: Path, built_at: Settings
) -> None:
    secret = [str(Path.home()) + "/", sys.prefix, str(Path(torch.__file__).parent), str(Path.cwd())]
    secret += ["hubaoti-build", str(built_at.home.parent)]
    texts = [(minilm_bundle.path / "hubaoti.json").read_bytes()]
    texts += [file.read_bytes() for file in library.parents[4].rglob("*") if file.is_file()]
    found = [word for word in secret for text in texts if word.encode() in text]
    assert found == []


def test_the_library_wants_no_executable_stack_and_no_python(library: Path) -> None:
    with library.open("rb") as file:
        (stack,) = ELFFile(file).iter_segments("PT_GNU_STACK")
        assert not stack["p_flags"] & 1
    assert b"libpython" not in library.read_bytes()


def test_the_needs_are_the_library_s_own(minilm_bundle: Bundle, library: Path) -> None:
    needs = minilm_bundle.manifest.requires
    said = subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True)
    wanted = {line.split()[1] for line in said.stdout.splitlines() if "NEEDED" in line}
    assert wanted == {*needs.libraries}
    assert f"GLIBC_{needs.glibc}" in said.stdout
    assert f"GLIBCXX_{needs.glibcxx}" in said.stdout


def test_the_host_that_compiled_it_runs_it_exactly(
    minilm_bundle: Bundle, built_at: Settings
) -> None:
    host = probe_host(built_at)
    fit = judge(minilm_bundle.manifest.requires, host).fit
    assert (
        fit is MatchResult.EXACT
        if host.level == "x86_64_v3"
        else fit is not MatchResult.INCOMPATIBLE
    )


def test_host_code_is_for_the_level_and_not_for_this_cpu(library: Path) -> None:
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True)
    assert "%ymm" in code.stdout
    assert "%zmm" not in code.stdout


def test_no_source_of_the_graph_is_published(minilm_bundle: Bundle) -> None:
    (graph,) = minilm_bundle.manifest.graphs
    kinds = {Path(member.path).suffix for member in graph.members}
    assert ".so" in kinds
    assert not kinds & {".cpp", ".py", ".o", ".h", ".pt", ".bin"}


def test_this_machine_remembers_what_it_built(minilm_bundle: Bundle, built_at: Settings) -> None:
    with Mirror.open(built_at.mirror) as mirror:
        assert mirror.index.is_built(minilm_bundle.manifest.digest)


def test_the_key_is_the_one_of_an_equal_request(
    minilm: Path, minilm_bundle: Bundle, built_at: Settings
) -> None:
    """Without compiling again: an equal request has an equal key, another dtype another."""

    def key(dtype: str | None, dims: list[str]) -> str:
        request = CompileRequest(dtype=dtype, dims=make_ranges(dims))
        (target,) = choose_targets(probe_host(built_at), request)
        return Job.of(
            make_plan(load_source(minilm, request, CPU), request, CPU), request, target
        ).key

    assert key(None, []) == key("float32", ["seq=2:256"]) == minilm_bundle.manifest.key
    others = [key("bfloat16", []), key("float16", []), key(None, ["seq=2:128"])]
    assert len({minilm_bundle.manifest.key, *others}) == 4


def test_a_classifier_gives_a_score_for_each_label(roberta_bundle: Bundle) -> None:
    manifest = roberta_bundle.manifest
    assert manifest.program.task == "classify"
    (output,) = manifest.graphs[0].outputs.tensors
    assert output.shape == ("batch", 3)


def test_the_default_seq_ends_where_the_model_s_positions_end(roberta_bundle: Bundle) -> None:
    """RoBERTa's 66 positions begin after its padding id 1, so that texts have 64."""
    assert roberta_bundle.manifest.graphs[0].bounds["seq"] == (2, 64)


def test_a_language_model_compiles_in_the_dtype_of_its_config(llama_bundle: Bundle) -> None:
    manifest = llama_bundle.manifest
    assert str(manifest.recipe) == "bfloat16-sdpa"
    (output,) = manifest.graphs[0].outputs.tensors
    assert (output.dtype, output.shape) == ("bfloat16", (1, "seq", 30522))


def test_a_dim_of_one_size_is_that_size(llama_bundle: Bundle) -> None:
    assert llama_bundle.manifest.graphs[0].bounds == {"batch": (1, 1), "seq": (1, 40)}
    assert {check.dims["batch"] for check in llama_bundle.manifest.checks} == {1}


def test_a_tied_weight_is_looked_for_by_each_of_its_names(llama_bundle: Bundle) -> None:
    constants = llama_bundle.manifest.graphs[0].constants
    (tied,) = [c for c in constants if c.aliases]
    assert {tied.fqn, *tied.aliases} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert {tied.fqn, *tied.aliases} <= {*tied.origin.checkpoint}


BAD = {
    "unknown task": ({"task": "translate"}, UnknownTask, "translate"),
    "min > max": ({"dims": ["seq=9:8"]}, BadDim, "from 9 to 8"),
    "a dim the model does not have": ({"dims": ["depth=1:2"]}, BadDim, "depth"),
    "a malformed dim": ({"dims": ["seq"]}, BadDim, "malformed"),
    "a dim twice": ({"dims": ["seq=2:3", "seq=2:4"]}, BadDim, "twice"),
    "a dim of nothing": ({"dims": {"seq": (0, 4)}}, BadDim, "from 0 to 4"),
    "a dim beyond the positions": ({"dims": ["seq=600:700"]}, BadDim, "512 positions"),
    "an unknown dtype": ({"dtype": "float8"}, BadRequest, "float8"),
    "an unknown level": ({"level": "pentium"}, BadRequest, "pentium"),
    "an unknown device": ({"device": "tpu"}, BadRequest, "tpu"),
    "a device that is not here": ({"device": "cuda:9"}, BadRequest, "cuda:9"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_refused_and_leaves_nothing(
    case: str, minilm: Path, tmp_path: Path
) -> None:
    asked, kind, word = BAD[case]
    settings = Settings(home=tmp_path / "home")
    with pytest.raises(kind) as caught:
        hubaoti.compile(minilm, tmp_path / "out" / "bundle", settings=settings, **asked)
    assert word in str(caught.value)
    assert caught.value.hint
    assert [*(tmp_path / "out").rglob("*")] == []


def test_a_level_above_this_host_is_refused(built_at: Settings) -> None:
    host = probe_host(built_at)
    with pytest.raises(BadRequest, match="cannot be checked here"):
        choose_targets(replace(host, level="x86_64_v2"), CompileRequest(level="x86_64_v3"))


def test_the_default_level_is_the_fleet_s_or_this_host_s_where_that_is_lower(
    built_at: Settings,
) -> None:
    host = replace(probe_host(built_at), machine="x86_64")
    levels = {have: choose_level(replace(host, level=have)) for have in ("x86_64_v2", "x86_64_v4")}
    assert levels == {"x86_64_v2": "x86_64_v2", "x86_64_v4": "x86_64_v3"}
    assert choose_level(replace(host, machine="aarch64")) == "aarch64"


def test_a_cuda_target_wants_the_driver_of_its_major_version(minilm_bundle: Bundle) -> None:
    target = msgspec.structs.replace(
        minilm_bundle.manifest.target, device="cuda", cuda="13.1", sm=90
    )
    needs = derive_requirements(target)
    assert (needs.cuda, needs.driver, needs.sm) == ("13.1", "13.0", 90)


@pytest.mark.parametrize("content", ["file", "folder"])
def test_a_foreign_output_is_not_replaced(
    content: str, minilm: Path, built_at: Settings, tmp_path: Path
) -> None:
    output = tmp_path / "mine"
    if content == "folder":
        output.mkdir()
        (output / "thesis.txt").write_text("years of work")
    else:
        output.write_text("years of work")
    before = tree_of(tmp_path)
    with pytest.raises(OutputExists) as caught:
        hubaoti.compile(minilm, output, settings=built_at)
    assert caught.value.hint
    assert tree_of(tmp_path) == before


def test_an_output_below_a_file_is_refused_in_words(minilm: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HubaotiError, match="cannot write") as caught:
        hubaoti.compile(minilm, tmp_path / "file" / "out", settings=Settings(home=tmp_path / "h"))
    assert "-o" in caught.value.hint


def test_a_disk_without_room_is_told_and_nothing_stays(tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(DiskFull) as caught, write_bundle(small_disk / "bundle") as folder:
        (folder / "graphs.pt2").write_bytes(bytes(4 << 20))
    assert caught.value.hint
    assert list(small_disk.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("config.json", "{", "config"),
        ("config.json", "[]", "config"),
        ("config.json", "{}", "config"),
        ("config.json", '{"model_type": "of-the-future"}', "of-the-future"),
        ("config.json", '{"model_type": "bert", "hidden_size": "wide"}', "config"),
        ("modules.json", "{", "modules.json"),
        ("modules.json", "7", "modules.json"),
        ("modules.json", '[{"kind": 1}, {}]', "modules.json"),
        ("tokenizer_config.json", "\x00", "tokenizer_config.json"),
    ],
)
def test_a_damaged_model_is_refused_by_the_file_s_name(
    name: str, content: str, word: str, minilm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / name).write_text(content)
    with pytest.raises(ModelNotFound) as caught:
        load_source(folder, CompileRequest(), CPU)
    assert word in str(caught.value)
    assert len(str(caught.value)) < 800
    assert caught.value.hint


def test_a_config_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "bert", "architectures": ["BertModel"], "vocab_size": -4}'
    )
    with pytest.raises((CompileFailed, ModelNotFound)) as caught:
        load_source(tmp_path, CompileRequest(), CPU)
    assert caught.value.hint


def test_of_the_pages_that_a_compiler_writes_the_cause_is_told() -> None:
    page = "C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\na.cpp:1: error: no such header\n"
    told = find_cause(RuntimeError(page), Path("/tmp/build"))
    assert type(told) is CompileFailed
    assert "a.cpp:1: error: no such header" in str(told)
    assert type(find_cause(OSError("No space left on device"), Path("/tmp"))) is DiskFull
    assert len(str(find_cause(RuntimeError("x" * 9999), Path("/tmp")))) < 500


@pytest.mark.parametrize(
    ("level", "count"), [("x86_64_v2", 0), ("x86_64_v3", 1), ("x86_64_v4", 1), ("aarch64", 1)]
)
def test_a_level_has_one_vector_isa_or_none(level: str, count: int) -> None:
    from torch._inductor import cpu_vec_isa

    isas = choose_vector_isas(cpu_vec_isa, level)
    assert len(isas) == count
    assert all(isas)
