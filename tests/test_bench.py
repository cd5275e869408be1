"""The benchmarks run with the product as it is, each section at a tiny size; figures are kept."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.machinery import SourceFileLoader
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from click.testing import CliRunner

from hubaoti.artifact.bundle import Bundle
from hubaoti.mirror import Mirror
from hubaoti.settings import Settings

SCRIPTS = Path(__file__).parent.parent / "scripts"
MINUTES = 10 * 60.0  # a section that hangs is ended
# Figures of what two sides answer, not of how long they take: they must reach their goals.
ANSWERS = ("equal to", "with the same", "that are eager's", "that are torchao's", "share of")
ANSWERS += ("most of the budget", "wrong after", "kinds done", "more than", "did not pull")


def sources() -> list[Path]:
    """Every Python file of scripts, those without an ending among them."""
    found = [path for path in SCRIPTS.rglob("*") if path.is_file() and path.suffix in {"", ".py"}]
    return sorted(path for path in found if path.suffix or b"python" in path.read_bytes()[:40])


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """What a file imports from the product, and from the packages beside it, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        module = node.module if isinstance(node, ast.ImportFrom) else None
        if module and module.partition(".")[0] in {"hubaoti", "benchmarks", "gpu"}:
            yield from ((module, alias.name) for alias in node.names)  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_what_a_script_imports_is_there(path: Path) -> None:
    for module, name in imports(path):
        loaded = importlib.import_module(module)
        there = hasattr(loaded, name) or f"{module}.{name}" in sys.modules
        if not there:
            importlib.import_module(f"{module}.{name}")


# Each section, in other processes: some fork, which must be before torch's threads have run


@dataclass(frozen=True)
class Place:
    """Where a section runs: a folder, a mirror that has the decoder's graphs, and the decoder."""

    scratch: Path
    settings: Settings
    decoder: Path
    bundles: Mapping[str, Path]

    def find_case(self, name: str) -> Any:
        """What one of the bundles was compiled from; it is found in the mirror."""
        from benchmarks.models import ModelCase

        build = Bundle.read(self.bundles[name]).manifest.build
        task = "forward" if name == "forward" else "generate"
        options: dict[str, Any] = {"task": task, "quantize": build.quantization}
        options["dims"] = {dim: (low, high) for dim, (low, high, _) in build.dims.items()}
        return ModelCase(transformers.AutoConfig.from_pretrained(self.decoder), options)


@contextmanager
def in_haste() -> Iterator[None]:
    """Torch asks for no proof that g++ builds for each kind of vectors: half of a first compile."""
    from torch._inductor import config

    with pytest.MonkeyPatch.context() as patch, config.patch("cpp.vec_isa_ok", True):
        patch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
        yield


def figures_of(section: Callable[[Any], list[Any]], given: Any) -> list[Any]:
    """What a section measures; of one that ends the process, as where sides differ, the reason."""
    try:
        return section(given)
    except SystemExit as error:
        raise AssertionError(f"it ended: {error}") from error


def breadth(place: Place) -> list[Any]:
    from architectures import Architecture

    from benchmarks.breadth import Case, Outcome, measure_cases

    decoder, outcomes = place.find_case("generate"), list[Outcome]()
    llama = Architecture("Llama", decoder.config.to_diff_dict(), generates=True)
    case = Case("decoder", "generate", llama, decoder.options["dims"], place.settings)
    return measure_cases([case], outcomes)


def block(place: Place) -> list[Any]:
    from benchmarks.block_lowering import bench_block

    with in_haste():
        return bench_block(place.scratch, place.settings, 0, place.find_case("generate"))


def large(place: Place) -> list[Any]:
    from benchmarks.large_model import bench_large

    return bench_large(place.scratch, place.settings, 1, place.find_case("generate"))


def regional(place: Place) -> list[Any]:
    from benchmarks.regional import Layers, bench_regional

    case = place.find_case("forward")
    layers = Layers(case, case, case, shapes=((2, 8),))
    with in_haste():
        return bench_regional(place.scratch, place.settings, 1, layers)


def cache(place: Place) -> list[Any]:
    from benchmarks.decode_step import bench_cache

    case = place.find_case("generate")
    return [*bench_cache(place.scratch, place.settings, 1, case, {64: 1.0})]


def attach(place: Place) -> list[Any]:
    from benchmarks.attached_model import Sizes, bench_attach

    forward, decoder = place.find_case("forward"), place.find_case("generate")
    sizes = Sizes(forward, forward, decoder, place.find_case("quantized"), 10, 64, 1, 1)
    with in_haste():
        return [*bench_attach(place.scratch, place.settings, 1, sizes)]


def campaign(place: Place) -> list[Any]:
    from benchmarks.campaign import Sizes, bench_campaign

    case = place.find_case("generate")
    sizes = Sizes([case, case], case, tasks=2, questions=2, times=1)
    return [*bench_campaign(place.scratch, place.settings, 1, sizes)]


def eviction(place: Place) -> list[Any]:
    from benchmarks.eviction import TraceShape, bench_eviction

    tiny = TraceShape(keys=50, requests=3000)
    return [*bench_eviction(place.scratch, place.settings, 1, (tiny, tiny))]


def mirror(place: Place) -> list[Any]:
    from benchmarks.mirror_scale import bench_mirror

    bundle = Bundle.read(place.bundles["forward"])
    settings = replace(place.settings, home=place.scratch / "home")
    return [*bench_mirror(place.scratch, settings, 1, bundle, artifacts=60, opened=5)]


def mixed(place: Place) -> list[Any]:
    from benchmarks.mixed import bench_mixed

    settings = replace(place.settings, home=place.scratch / "home")
    return [*bench_mixed(place.scratch, settings, 1, operations=600, processes=3)]


def fleet(place: Place) -> list[Any]:
    from benchmarks.fleet import Fleet, Flight, bench_fleet

    sizes = Fleet(hosts=40, keys=14), Flight(processes=4, times=2)
    return [*bench_fleet(place.scratch, place.settings, 1, *sizes)]


def pulling(place: Place) -> list[Any]:
    from benchmarks.pulling import bench_pull

    return [*bench_pull(place.scratch, place.settings, 1, size=100_000)]


def mutants(place: Place) -> list[Any]:
    from benchmarks.mutants import bench_mutants

    return [*bench_mutants(place.scratch, place.settings, 1, mutants=2000)]


def opening(bench: Any) -> list[Any]:
    from benchmarks.published import bench_open

    with in_haste():
        return bench_open(bench, 1)


def start(bench: Any) -> list[Any]:
    from benchmarks.published import bench_start

    with in_haste():
        return bench_start(bench, 1)


def steady(bench: Any) -> list[Any]:
    from benchmarks.published import bench_steady

    with in_haste():
        return [*bench_steady(bench, 1, {"x86_64_v3": 256}, ((1, 8),))]


def compiling(bench: Any) -> list[Any]:
    from benchmarks.published import bench_compile

    return bench_compile(bench, 1)


def cli(bench: Any) -> list[Any]:
    from benchmarks.published import bench_cli

    return bench_cli(bench, 1)


# Those that fork come first, so that nothing has run in their process before.
COMPILER: dict[str, Callable[[Place], list[Any]]] = {
    "breadth": breadth,
    "block": block,
    "attach": attach,
    "regional": regional,
    "large": large,
    "cache": cache,
    "campaign": campaign,
    "eviction": eviction,
    "mirror": mirror,
    "mixed": mixed,
    "fleet": fleet,
    "mutants": mutants,
    "pull": pulling,
}
PUBLISHED: dict[str, Callable[[Any], list[Any]]] = {
    "open": opening,
    "start": start,
    "steady": steady,
    "compile": compiling,
    "cli": cli,
}
FIGURES = {
    "breadth": ("share of 1 that pass", "architectures wrong or failed"),
    "block": ("lower", "aoti_compile_and_package over lower, of processors"),
    "large": ("72B, the whole command", "72B, peak memory of all processes"),
    "regional": ("regions to whole", "2 layers to 2", "(2, 8) a call by regions to whole"),
    "cache": ("cache 64 full, over eager", "generate, tokens equal to eager's"),
    "attach": (
        "AOTICompiledModel to the attached",
        "blocks, 2 of width 32, (1, 2), eager to attached",
        "attach, 2 blocks, graphs in the mirror, first in a process",
        "decode, 2 blocks, 10 of 64 filled, eager over attached",
        "1 times attached and detached, memory more",
        "memory, 2 blocks, attached to plain",
        "int8wo, 2 M parameters, greedy words that are torchao's eager",
    ),
    "campaign": (
        "2 tasks over 2 models, by an engine",
        "a switch, loaded each time to held",
        "choices by score of 2 items that are eager's",
        "1 times loaded and unloaded, files and threads more",
    ),
    "eviction": (
        "default trace, 20% of its bytes, ours, hit rate",
        "default trace, 20% of its bytes, Belady, seconds saved",
        "hard trace, 2% of its bytes, ours, seconds saved",
    ),
    "mirror": (
        "mirror ls of 60 artifacts",
        "one of 60 found and opened, its signature asked for, p99",
    ),
    "mixed": (
        "600 operations of 3 processes, most of the budget",
        "600 operations of 3 processes, wrong after",
    ),
    "fleet": (
        "40 hosts of 12 kinds over 14 keys, compiles more than keys",
        "4 processes on one key, 2 times, downloads more than one",
    ),
    "mutants": ("2000 manifests changed in one place, wrong after",),
    "pull": ("a pull of 0 MB, to hf download", "a pull of a pin that is here, the endpoint gone"),
    "open": ("a graph in the mirror, verified", "aoti_load_package, empty inductor folder"),
    "start": ("hubaoti run", "transformers eager", "torch.compile cold", "torch.compile warm"),
    "steady": ("(1, 8) x86_64_v3 over eager", "(1, 8) x86_64_v3 over torch.compile static 256"),
    "compile": ("peak memory, no weight file there", "time"),
    "cli": ("warm pull of a commit", "hubaoti mirror ls to hf --help"),
}


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_decoder: Path,
    decoder_bundle: Bundle,
    forward_bundle: Bundle,
    quantized_bundle: Bundle,
) -> Place:
    """A machine that has built the decoder's graphs."""
    bundles = {"generate": decoder_bundle, "forward": forward_bundle, "quantized": quantized_bundle}
    scratch = tmp_path_factory.mktemp("bench")
    settings = Settings(home=scratch / "home", endpoint="http://127.0.0.1:9")
    with Mirror.open(settings.mirror) as mirror:
        for bundle in bundles.values():
            files = {each.path: bundle.path / each.path for each in bundle.manifest.all_files()}
            mirror.put(bundle.manifest, files)
            mirror.index.record_built(bundle.manifest)
    paths = {name: bundle.path for name, bundle in bundles.items()}
    return Place(scratch, settings, tiny_decoder, paths)


@pytest.fixture(scope="module")
def texts(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The least model that answers texts: embeddings without a layer over them."""
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=0, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("texts") / "model"
    transformers.BertModel(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, folder)
    return folder


@pytest.fixture(scope="module")
def run(
    place: Place, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], list[Any]]]:
    """A section's figures, measured in a process that no test has."""
    from benchmarks.published import publish_model

    with get_context("spawn").Pool(1) as pool, ExitStack() as stack:

        @functools.cache
        def publish() -> Any:
            folder = tmp_path_factory.mktemp("published")
            return stack.enter_context(publish_model(folder, texts))

        def measure(name: str) -> list[Any]:
            if name in PUBLISHED:
                return pool.apply_async(figures_of, (PUBLISHED[name], publish())).get(MINUTES)
            own = replace(place, scratch=place.scratch / name)
            own.scratch.mkdir()
            if name in PARENTS:
                return figures_of(COMPILER[name], own)
            return pool.apply_async(figures_of, (COMPILER[name], own)).get(MINUTES)

        yield measure


# They start processes of their own, which one of a pool may not.
PARENTS = {"mixed", "fleet"}
# All others compile, again and again.
QUICK = {"pull", "eviction", "mixed", "fleet", "mirror", "mutants"}


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in (*COMPILER, *PUBLISHED)
    ],
)
def test_a_section_measures(section: str, run: Callable[[str], list[Any]]) -> None:
    figures = run(section)
    assert {each.section for each in figures} == {section}
    assert {*FIGURES[section]} <= {each.name for each in figures}
    for each in figures:
        values = (each.low, each.median, each.high)
        assert all(map(math.isfinite, values)), each
        if each.unit in {"s", "ms", "GB"} or each.name.endswith(("to attached", "over eager")):
            assert min(values) > 0, each
        if any(words in each.name for words in ANSWERS):
            assert each.reached in {True, None}, each


# The command


@pytest.fixture
def bench() -> ModuleType:
    """The command's own module."""
    loader = SourceFileLoader("bench", str(SCRIPTS / "bench"))
    spec = importlib.util.spec_from_loader("bench", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def test_every_section_is_measured_here(bench: ModuleType) -> None:
    assert {*COMPILER} == {*bench.COMPILER}
    assert {*PUBLISHED} == {*bench.PUBLISHED}


def test_figures_are_printed_and_written_as_they_come(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import published
    from benchmarks.figures import Figure

    def fails(*_: object) -> Iterator[Any]:
        yield Figure("cli", "first", 1.0, 1.0, 1.0, "s")
        written = json.loads((tmp_path / "figures.json").read_text())["figures"]
        assert [each["name"] for each in written] == ["first"]
        yield Figure("cli", "second", 2.0, 2.0, 2.0, "s")
        raise OSError("later")

    monkeypatch.setattr(published, "bench_cli", fails)
    monkeypatch.setattr(published, "publish_model", nullcontext)
    done = CliRunner().invoke(bench.main, ["cli", "--json", str(tmp_path / "figures.json")])
    assert isinstance(done.exception, OSError)
    assert "first: 1 (1 to 1) s" in done.output and "second: 2 (2 to 2) s" in done.output
    written = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert [each["name"] for each in written] == ["first", "second"]
