"""Ops that only a caller has: named by it, registered where graphs are tried, or refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from bundles import put_trusted
from commands import environment_of
from torch import nn

import hubaoti
import hubaoti.spaces
from hubaoti import LightweightEngine, api
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.package import unpack_all
from hubaoti.attachment.attach import find_regions
from hubaoti.attachment.stats import Fallback
from hubaoti.cli import dispatch
from hubaoti.errors import BadRequest, KernelSchemaMismatch, MissingOps, NotTried
from hubaoti.mirror import Artifact, Mirror
from hubaoti.runtime.graph import open_graph
from hubaoti.settings import Settings

OPS = """
import torch

@torch.library.custom_op("acme_shift::shifted", mutates_args=())
def shifted(x: torch.Tensor, by: float) -> torch.Tensor:
    return x + by

@shifted.register_fake
def _(x, by):
    return torch.empty_like(x)
"""
MARK = """
import os
with open({file!r}, "a") as file:
    print(os.getpid(), file=file)
"""
X = torch.arange(16.0).view(2, 8)


class Shifting(nn.Module):
    """A module over an op that a module registers, which nobody has installed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.acme_shift.shifted(x * self.weight, 2.0)
        return found * 3


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of the caller's modules, which this process has on its path."""
    found = tmp_path_factory.mktemp("caller")
    (found / "acme_shift_ops.py").write_text(OPS)
    sys.path.insert(0, str(found))
    yield found
    sys.path.remove(str(found))


@pytest.fixture(scope="module")
def shifting_bundle(
    folder: Path, built_at: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    __import__("acme_shift_ops")
    module = Shifting().eval()
    with torch.no_grad(), hubaoti.capture(module) as calls:
        module(X)
        module(torch.ones(5, 8))
    return api.compile(
        module, tmp_path_factory.mktemp("shifting") / "bundle", calls=calls, settings=built_at
    )


@pytest.fixture
def artifact(shifting_bundle: Bundle, settings: Settings) -> Artifact:
    """As it is where it was pulled: nobody here has built it."""
    with Mirror.open(settings.mirror) as mirror:
        return put_trusted(shifting_bundle, mirror)


@pytest.fixture
def env(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """This process has the test's settings."""
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    return settings


@pytest.fixture
def attaching(artifact: Artifact, settings: Settings) -> Callable[..., list[str]]:
    """Attach it to a module that is called twice: the steps, once it has answered."""

    def attach(*ops: str) -> list[str]:
        said: list[str] = []
        module = Shifting().eval()
        words: dict[str, Any] = {"ops": ops, "settings": settings, "progress": said.append}
        with torch.no_grad(), hubaoti.attach(module, artifact, **words) as attachment:
            for _ in range(2):
                assert torch.equal(module(X), (X * 0.5 + 2.0) * 3)
            assert attachment.stats()["compiled"] == 1  # the first was compared
        return said

    return attach


def test_what_its_own_process_cannot_open_for_want_of_an_op_nobody_opens(
    artifact: Artifact, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although this process has the op; and that is found out once."""
    opened: list[Any] = []
    monkeypatch.setattr("hubaoti.attachment.attach.open_graph", lambda *a: opened.append(a))
    module, steps = Shifting().eval(), []
    for _ in range(2):
        with pytest.raises(MissingOps, match="acme_shift::shifted, an op that is not") as why:
            hubaoti.attach(module, artifact, settings=settings, progress=steps.append)
        assert 'ops=["my.ops"]' in why.value.hint
        assert "kernels" not in why.value.hint
    assert steps.count("first open") == 1
    assert not opened
    assert not [*find_regions(module)]


def test_with_the_module_that_registers_it_it_is_tried_once_and_answers(
    attaching: Callable[..., list[str]], folder: Path
) -> None:
    with pytest.raises(MissingOps):
        attaching()
    assert "first open" in attaching("acme_shift_ops")
    assert "first open" not in attaching("acme_shift_ops")
    os.utime(folder / "acme_shift_ops.py", (1, 1))
    assert "first open" in attaching("acme_shift_ops"), "the module was written again"
    with pytest.raises(MissingOps):  # what went well with it says nothing of others
        attaching()
    with pytest.raises(MissingOps, match="which json did not register"):
        attaching("json")


CHANGED = OPS.replace("by: float)", "by: float, twice: bool = False)").replace(
    "(x, by)", "(x, by, twice)"
)


def test_an_op_that_was_declared_otherwise_by_now_is_refused_where_its_graph_is_tried(
    attaching: Callable[..., list[str]], folder: Path
) -> None:
    (folder / "acme_changed_ops.py").write_text(CHANGED)
    sys.modules["acme_changed_ops"] = sys.modules["acme_shift_ops"]  # else this process has it, too
    with pytest.raises(KernelSchemaMismatch) as refused:
        attaching("acme_changed_ops")
    for schema in ("(Tensor x, float by)", "(Tensor x, float by, bool twice=False)"):
        assert f"acme_shift::shifted{schema} -> Tensor" in str(refused.value)
    assert "compile it again" in refused.value.hint
    assert "first open" in attaching("acme_shift_ops")  # nothing is held against the graph


def test_nothing_is_opened_where_an_op_has_another_schema_than_its_manifest_says(
    shifting_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (graph,) = shifting_bundle.manifest.graphs
    schema = "(Tensor x, float by) -> Tensor"
    assert graph.schemas == {"acme_shift::shifted": schema}
    assert shifting_bundle.manifest.schema == 4
    unpack_all(shifting_bundle.path / graph.file, tmp_path)
    opened: list[Any] = []
    monkeypatch.setattr("hubaoti.runtime.graph.hold_library", lambda *a: opened.append(a))
    for other in ("(float by, Tensor x) -> Tensor", "(Tensor x, float by) -> Tensor[]"):
        entry = msgspec.structs.replace(graph, schemas={"acme_shift::shifted": other})
        with pytest.raises(KernelSchemaMismatch, match=re.escape(f"{other}, and here")) as refused:
            open_graph(tmp_path, entry, torch.device("cpu"))
        assert str(refused.value).endswith(schema)
    assert not opened


def test_a_manifest_that_says_no_schemas_is_opened_as_before(
    shifting_bundle: Bundle, tmp_path: Path
) -> None:
    (graph,) = shifting_bundle.manifest.graphs
    unpack_all(shifting_bundle.path / graph.file, tmp_path)
    old = msgspec.structs.replace(graph, schemas=msgspec.UNSET)
    opened = open_graph(tmp_path, old, torch.device("cpu"))
    opened.bind({"weight": torch.full((8,), 0.5)})
    assert torch.equal(opened(X)[0], (X * 0.5 + 2.0) * 3)


CALLER = """
import sys
from pathlib import Path
import torch, hubaoti
from hubaoti.mirror import Mirror
from hubaoti.settings import Settings
from test_custom_ops import Shifting, X
home, digest = sys.argv[1:]
settings = Settings(Path(home), endpoint="http://127.0.0.1:9")
with Mirror.open(settings.mirror) as mirror:
    artifact = mirror.artifact(digest)
module = Shifting().eval()
with torch.no_grad(), hubaoti.attach(module, artifact, ops=["beside"], settings=settings) as found:
    module(X), module(X)
    print(found.stats()["compiled"])
"""


def test_a_module_beside_a_script_is_found_and_the_folder_somebody_is_in_is_not(
    artifact: Artifact, settings: Settings, tmp_path: Path
) -> None:
    script, here = tmp_path / "script", tmp_path / "here"
    for each in (script, here):
        each.mkdir()
    (script / "beside.py").write_text(OPS)
    (script / "caller.py").write_text(CALLER)
    (here / "beside.py").write_text("raise SystemExit('stolen')")
    words = [sys.executable, str(script / "caller.py"), str(settings.home), artifact.digest]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(words, cwd=here, env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr


@pytest.mark.parametrize("ops", ["my.ops", [7], ["__main__"], [".ops"], ["my ops"], [""]])
def test_what_is_no_list_of_modules_is_refused(
    ops: Any, artifact: Artifact, settings: Settings
) -> None:
    with pytest.raises(BadRequest):
        hubaoti.attach(Shifting().eval(), artifact, ops=ops, settings=settings)
    with pytest.raises(BadRequest):
        LightweightEngine(settings, ops=ops)


@pytest.mark.parametrize("name", ["nowhere_at_all", "acme_broken_ops"])
def test_a_module_that_cannot_be_imported_is_named_with_its_error(
    name: str, folder: Path, attaching: Callable[..., list[str]]
) -> None:
    (folder / "acme_broken_ops.py").write_text("raise ValueError('no such luck')")
    with pytest.raises(MissingOps, match=f"{name}.*(No module named|no such luck)"):
        attaching(name)


def test_a_module_that_only_its_own_process_cannot_import_is_held_against_no_graph(
    attaching: Callable[..., list[str]], folder: Path
) -> None:
    here = f"import os\nif os.getpid() != {os.getpid()}: raise MemoryError('no more')\n"
    (folder / "acme_picky_ops.py").write_text(here + OPS)
    sys.modules["acme_picky_ops"] = sys.modules["acme_shift_ops"]
    for _ in range(2):
        with pytest.raises(NotTried, match="acme_picky_ops.*MemoryError: no more"):
            attaching("acme_picky_ops")


def test_a_space_has_them_where_its_graphs_are_tried(
    shifting_bundle: Bundle, settings: Settings, repo: str
) -> None:
    api.push(shifting_bundle, repo, as_is=True, settings=settings)
    module = Shifting().eval()
    words: dict[str, Any] = {"trust": True, "settings": settings}
    with torch.no_grad(), hubaoti.spaces.load(module, repo, **words) as loaded:
        with pytest.warns(Fallback, match=r"acme_shift::shifted, an op .* ops=\[\"my.ops\"\]"):
            module(X)
        assert not loaded.stats()["process"]["open"]
    words["ops"] = ["acme_shift_ops"]
    with torch.no_grad(), hubaoti.spaces.load(module, repo, **words) as loaded:
        module(X), module(X)
        assert loaded.stats()["compiled"] == 1
    with pytest.raises(MissingOps):
        hubaoti.spaces.load(module, repo, **words | {"ops": ["nowhere_at_all"]})


@pytest.mark.parametrize("isolate", [False, True])
def test_an_engine_has_them_wherever_a_model_is(
    isolate: bool, folder: Path, settings: Settings, minilm_bundle: Bundle, minilm: Path
) -> None:
    """Also the process in which its graphs are tried, and its own where the model is in one."""
    name = f"acme_marks_{isolate}"
    marks = folder / f"{name}.txt"
    (folder / f"{name}.py").write_text(MARK.format(file=str(marks)))
    with Mirror.open(settings.mirror) as mirror:
        artifact = put_trusted(minilm_bundle, mirror)
    with LightweightEngine(settings, isolate=isolate, ops=[name]) as engine:
        engine.load(minilm, artifact)
        worker = engine.models()[0].pid or os.getpid()
        assert engine.embed(minilm, ["a text"]).shape == (1, 384)
    tried = {int(line) for line in marks.read_text().split()}
    assert worker in tried
    assert len(tried) == 2


def test_run_has_them_where_it_opens_a_graph(
    folder: Path, env: Settings, minilm_bundle: Bundle, minilm: Path, repo: str
) -> None:
    marks = folder / "acme_marks_of_run.txt"
    (folder / "acme_marks_of_run.py").write_text(MARK.format(file=str(marks)))
    api.push(minilm_bundle, repo, as_is=True, settings=env)
    words = ["run", repo, "--model", str(minilm), "--text", "a", "--trust", "--quiet"]
    assert dispatch([*words, "--ops", "acme_marks_of_run"]) == 0
    assert len({*marks.read_text().split()}) == 2
    assert dispatch([*words, "--ops", "nowhere_at_all"]) == MissingOps.exit_code
    assert dispatch([*words, "--eager", "--ops", "acme_marks_of_run"]) == BadRequest.exit_code
