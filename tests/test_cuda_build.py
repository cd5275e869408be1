"""Building for GPUs that are not here: what is in a bundle, what a key depends on, what is left."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bundles import make_bundle
from commands import Done, inside
from cuda_models import call_flux, make_bert, make_flux
from signals import command
from torch import nn
from under_stand_in import make_stand_in

import hubaoti
from hubaoti.artifact.bundle import tidy
from hubaoti.compiler import gpu_build
from hubaoti.compiler.built import BuiltGraph
from hubaoti.compiler.elf import Needs
from hubaoti.compiler.gpu_lowering import Lowered, LowerRequest
from hubaoti.errors import BadRequest, CheckFailed, CompileFailed
from hubaoti.host.probe import find_torch
from hubaoti.host.wire import ErrorRecord
from hubaoti.runtime.weights import load_shipped_tensors
from hubaoti.settings import Settings, merge_environment

TORCH = find_torch([])
IS_CUDA = TORCH is not None and TORCH.cuda is not None
LOWERING = "hubaoti.compiler.gpu_lowering"


class Tabled(nn.Module):
    """A block that computes a table when it is made, which no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        table = torch.where(torch.arange(64) % 3 == 0, 1.0, -0.5).cumsum(0)
        self.register_buffer("table", table[:, None] / 7, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` is (rows, places, 16)."""
        ahead = torch.arange(x.shape[1], device=x.device)
        masked = torch.where(ahead[:, None] < 2, 0.0, -1.0)
        return self.linear(x + self.table[: x.shape[1]]) + masked


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An empty home without a Hub."""
    return Settings(home=tmp_path / "home", endpoint="http://127.0.0.1:9")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, with nothing but its config."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    make_bert().config.save_pretrained(folder)
    return folder


@pytest.mark.cuda
@pytest.mark.slow
def test_of_calls_with_one_row_and_with_two_a_graph_serves_both(
    settings: Settings, tmp_path: Path
) -> None:
    """Blocks that join two inputs and scale them by a third, all of one number of rows."""
    model = make_flux()
    with warnings.catch_warnings(action="ignore"):  # of its own
        with hubaoti.capture(model) as calls:
            for rows, places in ((1, 4), (2, 6), (1, 9)):
                call_flux(model, rows, places)
        how = {"regions": "single_transformer_blocks", "settings": settings}
        (made,) = hubaoti.compile_for(model, "sm90", tmp_path / "made", calls=calls, **how)
    (graph,) = made.manifest.graphs
    rows = {name for name, bounds in graph.bounds.items() if bounds == (1, 2)}
    interpreted = [check for check in made.manifest.checks if check.where == "interpreted"]
    assert {check.dims[name] for check in interpreted for name in rows} == {1, 2}


@pytest.mark.cuda
@pytest.mark.newest
def test_a_table_that_a_block_computes_is_in_the_bundle(settings: Settings, tmp_path: Path) -> None:
    """Where graphs are lowered nothing computes, so that it must come from where it was made."""
    torch.manual_seed(0)
    block = Tabled().eval()
    with torch.no_grad(), hubaoti.capture(block) as calls:
        for rows, places in ((1, 4), (2, 9), (3, 30)):
            block(torch.randn(rows, places, 16))
    (bundle,) = hubaoti.compile_for(
        block, "sm90", tmp_path / "bundles", calls=calls, settings=settings
    )
    (entry,) = bundle.manifest.graphs
    shipped = dict(load_shipped_tensors(entry, bundle.path, torch.device("cpu")))
    assert torch.equal(shipped["table"], block.table)
    where = [check.where for check in bundle.manifest.checks]
    assert where.count("cpu") >= 3 and where.count("interpreted") >= 3


@pytest.mark.cuda
@pytest.mark.parametrize("jobs", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_gpu_for_which_lowering_fails_takes_no_other_along(
    jobs: int, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered, lower = tmp_path / "lowered", gpu_build.lower_elsewhere

    def lower_or_fail(request: LowerRequest, environment: Mapping[str, str]) -> Lowered:
        with lowered.open("a") as file:  # it may be another process
            file.write(f"sm{request.sm}\n")
        if request.sm == 90 and lowered.read_text().count("sm90") == 1:
            raise CompileFailed("lower: it cannot be", hint="try another")
        return lower(request, environment)

    monkeypatch.setattr(gpu_build, "lower_elsewhere", lower_or_fail)
    block = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).eval()
    with torch.no_grad(), hubaoti.capture(block) as calls:
        for rows in (2, 3, 9):
            block(torch.randn(rows, 16))
    words: Any = {"calls": calls, "settings": settings, "jobs": jobs}
    output = tmp_path / "bundles"
    with pytest.raises(
        CompileFailed, match="(?m)^lower root: it cannot be; built for sm90$"
    ) as caught:
        hubaoti.compile_for(block, "sm90,sm80", output, **words)
    (whole,) = output.iterdir()
    assert "sm80" in whole.name and f"{whole} is whole" in caught.value.hint
    report = (tmp_path / "bundles.report.txt").read_text()
    assert "lower_or_fail" in report and "sm=80" in report and "sm=90" in report
    bundles = hubaoti.compile_for(block, "sm90,sm80", output, **words)
    assert [bundle.manifest.target.sm for bundle in bundles] == [90, 80]
    assert sorted(lowered.read_text().split()) == ["sm80", "sm90", "sm90"]


def test_what_an_interpretation_finds_is_of_all_whose_sources_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of no other; what could not be lowered is not interpreted."""
    sources = {80: "same", 90: "same", 120: "other", 75: ""}
    builds: Any = [
        SimpleNamespace(id=f"root-sm{sm}", sm=sm, gpu=f"sm{sm}", folder=tmp_path) for sm in sources
    ]
    (entry,) = make_bundle(tmp_path / "bundle").manifest.graphs
    built = BuiltGraph(entry, Needs((), "2.34", None, None))
    unlowered = ErrorRecord("CompileFailed", "lower: no")
    digests, asked = [*sources.values()], list[int]()

    def interpret(build: Any, graph: BuiltGraph) -> BuiltGraph:
        asked.append(build.sm)
        if build.sm == 80:
            raise CheckFailed("check: it answers otherwise", hint="try")
        return graph

    monkeypatch.setattr(gpu_build, "digest_sources", lambda _: digests.pop(0))
    monkeypatch.setattr(gpu_build, "_interpret", interpret)
    found = gpu_build._interpret_all(builds, [built, built, built, unlowered], 1, tmp_path)
    errors = [each.message for each in found[:2] if isinstance(each, ErrorRecord)]
    assert errors == [f"check: it answers otherwise; built for sm{sm}" for sm in (80, 90)]
    assert found[2:] == [built, unlowered] and asked == [80, 120]


OWN_OP = """
import torch

@torch.library.custom_op("acme_gpu::shifted", mutates_args=())
def shifted(x: torch.Tensor) -> torch.Tensor:
    return x + 1.5

@shifted.register_fake
def _(x):
    return torch.empty_like(x)
"""


class Shifting(nn.Module):
    """A block over an op that a module registers, which nobody has installed."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.acme_gpu.shifted(self.mix(x))
        return torch.relu(found)


@pytest.mark.cuda
def test_an_op_that_only_a_module_registers_is_there_where_packages_are_interpreted(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme_gpu.py").write_text(OWN_OP)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("acme_gpu")
    block = Shifting().eval()
    with torch.no_grad(), hubaoti.capture(block) as calls:
        for rows in (2, 3, 9):
            block(torch.randn(rows, 16))
    (bundle,) = hubaoti.compile_for(
        block, "sm90", tmp_path / "bundles", calls=calls, settings=settings
    )
    assert [check.where for check in bundle.manifest.checks].count("interpreted") >= 3


def explain_key(model: Path, environment: dict[str, str], *before: str) -> str:
    """The key of a model for sm 90, in a process of its own."""
    words = ["-m", "hubaoti.cli", "compile", str(model), "--task", "forward", "--for", "sm90"]
    done = subprocess.run(
        [*before, sys.executable, *words, "--explain", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    (found,) = json.loads(done.stdout)
    return str(found["key"])


@pytest.mark.cuda
@pytest.mark.slow
def test_a_key_is_the_same_on_machines_that_are_set_up_otherwise(
    model: Path, tmp_path: Path
) -> None:
    stand_in = make_stand_in(tmp_path / "home")
    for name in ("tmp", "elsewhere"):
        (tmp_path / name).mkdir()
    other = {"TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path / "elsewhere")}
    other |= {"HUBAOTI_HOME": str(tmp_path / "another"), "CUDA_VISIBLE_DEVICES": ""}
    keys = {
        "as it is": explain_key(model, merge_environment({"HUBAOTI_HOME": str(tmp_path / "home")})),
        "one core": explain_key(model, merge_environment(other), "taskset", "-c", "0"),
        "another GPU": explain_key(model, merge_environment(stand_in.environment([120, 80]))),
    }
    assert len(set(keys.values())) == 1, keys


@pytest.fixture
def started(
    model: Path, settings: Settings, tmp_path: Path
) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A command that builds for two GPUs, as soon as a process of it is of some name."""
    (tmp_path / "tmp").mkdir()
    around = {"HUBAOTI_HOME": str(settings.home), "TMPDIR": str(tmp_path / "tmp")}
    words = ["compile", str(model), "--task", "forward", "--for", "sm80,sm90", "-q"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hubaoti.cli", *words, "-o", str(tmp_path / "bundles")],
        env=merge_environment(around),
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )

    def wait_for(name: str) -> subprocess.Popen[str]:
        end = time.monotonic() + 300
        while not any(name in each for each in list_commands(settings)):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.05)
        return process

    yield wait_for
    if process.poll() is None:
        process.kill()
    process.communicate()


def list_commands(settings: Settings) -> list[str]:
    """The command lines of all processes that have a home, whoever started them."""
    mark, found = os.fsencode(f"HUBAOTI_HOME={settings.home}\0"), list[str]()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in environment.read_bytes():
                found.append(command(environment.parent.name))
    return [each for each in found if each]


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGINT, LOWERING),
        pytest.param(signal.SIGTERM, LOWERING, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, LOWERING, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "cc1plus", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "cc1plus", marks=pytest.mark.slow),
    ],
)
def test_a_build_that_is_ended_in_the_middle_leaves_nothing(
    started: Callable[[str], subprocess.Popen[str]],
    number: signal.Signals,
    name: str,
    settings: Settings,
    tmp_path: Path,
) -> None:
    process = started(name)
    os.kill(process.pid, number)
    process.wait(60)
    end = time.monotonic() + 30
    while left := list_commands(settings):
        assert time.monotonic() < end, left
        time.sleep(0.1)
    bundles = tmp_path / "bundles"
    there = [each.name for each in bundles.iterdir()] if bundles.exists() else []
    assert not [each for each in there if not each.startswith(".")]
    kept = {"torchinductor_" + os.environ.get("USER", "root")}
    # Whoever comes next sweeps what one that was killed left, once its last process let go of it.
    while number == signal.SIGKILL and there and time.monotonic() < end:
        for each in there:
            tidy(bundles / each.removeprefix(".").partition(".hubaoti-")[0])
        there = [each.name for each in bundles.iterdir()]
    assert there == []
    assert {each.name for each in (tmp_path / "tmp").iterdir()} <= kept


REFUSED = {
    "sm37": ("--for", "sm37"),
    "sm9x": ("--for", "sm9x"),
    "": ("--for", ""),
    "nothing between": ("--for", "sm80,,sm90"),
    "H100": ("--for", "H100"),
    "99.9": ("--for", "99.9"),
}


def compile_inside(settings: Settings, model: Path, folder: Path, *words: str) -> Done:
    """The command, in this process."""
    return inside(settings, "compile", model, "--task", "forward", "-o", folder, *words)


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_what_is_no_gpu_is_refused_by_name(
    words: tuple[str, ...], settings: Settings, model: Path, tmp_path: Path
) -> None:
    done = compile_inside(settings, model, tmp_path / "bundles", *words)
    assert done.code == 2, done
    assert "sm80" in done.err and "sm120" in done.err, "it says which ones there are"
    assert not (tmp_path / "bundles").exists()


def test_tuning_for_a_gpu_that_is_not_here_is_refused(
    settings: Settings, model: Path, tmp_path: Path
) -> None:
    words = ("--for", "sm90", "--mode", "max-autotune")
    done = compile_inside(settings, model, tmp_path / "bundles", *words)
    assert done.code == 2 and "max-autotune" in done.err, done
    assert not (tmp_path / "bundles").exists()


@pytest.mark.parametrize("device", ["cuda:0", "cuda", "cpu"])
@pytest.mark.parametrize("more", [(), ("--explain",)], ids=["compiled", "explained"])
def test_a_device_beside_gpus_that_need_not_be_here_is_refused(
    more: tuple[str, ...], device: str, settings: Settings, model: Path, tmp_path: Path
) -> None:
    words = ("--for", "sm90", "--device", device, *more)
    done = compile_inside(settings, model, tmp_path / "bundles", *words)
    assert done.code == 2 and f"--device {device}" in done.err and "hint: leave one out" in done.err
    assert not (tmp_path / "bundles").exists()


def test_a_device_is_no_word_for_gpus_that_need_not_be_here(
    settings: Settings, model: Path
) -> None:
    one: Any = {"device": "cuda:0", "settings": settings}
    for verb in (hubaoti.compile_for, hubaoti.explain_for):
        with pytest.raises(BadRequest, match="--device cuda:0"):
            verb(model, "sm90", **one)
    with pytest.raises(BadRequest, match="--device cuda:0"):
        hubaoti.explain(model, capability="sm90", **one)


def test_one_explanation_is_of_one_gpu(settings: Settings, model: Path) -> None:
    with pytest.raises(BadRequest, match="(?m)several: sm80, sm90$") as caught:
        hubaoti.explain(model, capability="sm80,sm90", settings=settings)
    assert "explain_for" in caught.value.hint
    with pytest.raises(BadRequest, match="(?m)several: sm90 with fa3, sm90 with sdpa$"):
        hubaoti.explain(model, capability="sm90", attention="fa3,sdpa", settings=settings)


@pytest.mark.cuda
def test_what_would_be_built_for_several_gpus_is_planned_once(
    settings: Settings, model: Path, tmp_path: Path
) -> None:
    words = ("--for", "sm80,9.0", "--explain", "--json")
    done = compile_inside(settings, model, tmp_path / "bundles", *words)
    assert done.err.count("source") == 1, done.err
    found = json.loads(done.out)
    assert ["sm80" in each["variant"] for each in found] == [True, False]
    for each, sm in zip(found, ("sm80", "90"), strict=True):
        alone = hubaoti.explain(model, capability=sm, task="forward", settings=settings)
        assert (each["key"], each["variant"]) == (alone.key, alone.variant)
    assert len({each["key"] for each in found}) == 2


@pytest.mark.cuda
def test_fa3_is_left_out_in_words_for_a_gpu_that_has_sdpa_and_refused_where_it_is_all(
    settings: Settings, model: Path, tmp_path: Path
) -> None:
    words = ("--for", "sm80,sm90", "--dtype", "bfloat16", "--explain", "--json", "--attention")
    done = compile_inside(settings, model, tmp_path / "bundles", *words, "fa3,sdpa")
    assert done.code == 0 and "left out: --attention fa3 is asked for sm80" in done.err, done
    kernels = [each["kernel"] for each in json.loads(done.out)]
    assert kernels == [None, "kernels-community/flash-attn3", None]
    recipes = [(each["recipe"], "sm80" in each["variant"]) for each in json.loads(done.out)]
    assert recipes == [
        ("bfloat16-sdpa", True),
        ("bfloat16-fa3", False),
        ("bfloat16-sdpa", False),
    ]
    done = compile_inside(settings, model, tmp_path / "bundles", *words, "fa3")
    assert done.code == 2 and "fa3 is asked for sm80" in done.err, done


@pytest.mark.skipif(IS_CUDA, reason="torch is a CUDA build")
def test_a_cpu_build_of_torch_is_told_which_one_to_install(
    settings: Settings, model: Path, tmp_path: Path
) -> None:
    done = compile_inside(settings, model, tmp_path / "bundles", "--for", "sm90")
    assert done.code == 2 and "is a CPU build" in done.err, done
    assert "pip install --force-reinstall torch==" in done.err
    assert not (tmp_path / "bundles").exists()
