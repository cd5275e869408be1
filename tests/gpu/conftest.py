"""Which devices the checks take, which of them are run, and where their lines stand."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from gpu.place import KERNEL, Place
from gpu.results import RUNNING, WAITING, Line, Results
from hubaoti.hub.layout import RepoRef
from hubaoti.mirror.trust import Trust
from hubaoti.server import serve_in_thread
from hubaoti.settings import Settings

_NO_GPU = "needs an NVIDIA GPU; with --device cpu it is run on tiny shapes"
_RESULTS = pytest.StashKey[Results]()
_STARTED = pytest.StashKey[float]()
_FIRST = pytest.StashKey[dict[tuple[str, str], str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("gpu")
    options.addoption("--device", help="cuda:0, with its index, or cpu; with every case")
    options.addoption("--only", help="the checks whose names begin so, as encoder,block-cache time")
    options.addoption("--bundles", type=Path, help="what scripts/gpu_build made")
    options.addoption("--results", type=Path, help="a file of the checks' lines, and their table")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIRST] = {}
    if file := config.getoption("--results", None):
        config.stash[_RESULTS] = Results(config.getoption("--device"), file)
        config.stash[_RESULTS].read()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test that takes a device: with every device, and every case that its module has for it.

    Without `--device` a CPU takes few cases, of which each stands for several.
    """
    if "device" not in metafunc.fixturenames:
        return
    named = metafunc.config.getoption("--device", None)
    found = ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]
    params: list[Any] = []
    for name in [named] if named else found:
        marks = [pytest.mark.slow, *([pytest.mark.gpu] if name != "cpu" else [])]
        if "case" not in metafunc.fixturenames:
            params.append(pytest.param(torch.device(name), id=name, marks=marks))
            continue
        for case in metafunc.module.list_cases(name != "cpu" or bool(named)):
            both = torch.device(name), case
            params.append(pytest.param(*both, id=f"{name}-{case.name}", marks=marks))
    names = ["device", "case"] if "case" in metafunc.fixturenames else ["device"]
    metafunc.parametrize(names, params, scope="module")


def is_check(item: pytest.Item) -> bool:
    """Whether a test is a check: it records what it found."""
    return "found" in getattr(item, "fixturenames", ())


def name_check(item: pytest.Item) -> str:
    """The name of a check: its case, or else its module, and its step."""
    assert isinstance(item, pytest.Function)
    case: Any = item.callspec.params.get("case")
    module = item.module.__name__.rpartition(".")[2].removeprefix("test_").replace("_", "-")
    step = item.originalname.removeprefix("test_").replace("_", "-")
    return f"{case.name if case else module} {step}"


@pytest.hookimpl(trylast=True)  # after those of one case stand together
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--only`, leave the checks that it names, and no other test."""
    if only := config.getoption("--only", None):
        words = tuple(word.strip() for word in only.split(",") if word.strip())
        wanted = [each for each in items if is_check(each) and name_check(each).startswith(words)]
        config.hook.pytest_deselected(items=[each for each in items if each not in wanted])
        items[:] = wanted
    if results := config.stash.get(_RESULTS, None):
        results.put(*(Line(name_check(item), WAITING) for item in items))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    item.stash[_STARTED] = time.time()
    callspec = getattr(item, "callspec", None)
    device = callspec.params.get("device") if callspec else None
    if device is None:
        return
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no NVIDIA GPU")
    if results := item.config.stash.get(_RESULTS, None):
        results.put(Line(name_check(item), RUNNING))
    for marker in item.iter_markers("gpu") if device.type == "cpu" else ():
        if marker.args or not item.config.getoption("--device", None):
            pytest.skip(marker.args[0] if marker.args else _NO_GPU)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip what needs a fixture that failed before; write a check's line as soon as it is known."""
    report = yield
    if report.when == "setup" and report.failed and call.excinfo and is_check(item):
        error, name = call.excinfo.value, name_check(item)
        first = item.config.stash[_FIRST].setdefault((str(item.path), repr(error)), name)
        if first != name:  # a fixture raises again what it raised
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, f"Skipped: {first} failed")
    results = item.config.stash.get(_RESULTS, None)
    if results and (report.when == "call" or not report.passed):
        results.end(_make_line(item, call, report))
        if report.failed and is_lost(item.callspec.params["device"]):  # type: ignore[attr-defined]
            item.session.shouldstop = "the GPU is in an error"  # which only another process mends
    return report


def _make_line(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> Line:
    """A check's line, of the report that says how it ended."""
    found: Any = dict(item.user_properties).get("found", {})
    name, seconds = name_check(item), call.stop - item.stash.get(_STARTED, call.start)
    facts: dict[str, Any] = found.get("facts", {})
    if report.skipped:
        assert isinstance(report.longrepr, tuple)
        return Line(name, "skipped", report.longrepr[2].removeprefix("Skipped: "))
    if report.passed:
        return Line(name, "passed", "", found.get("said", ""), seconds, facts)
    assert call.excinfo is not None
    message = call.excinfo.exconly().removeprefix("AssertionError: ").splitlines()[0]
    return Line(name, "failed", message, "", seconds, facts, report.longreprtext)


def is_lost(device: torch.device) -> bool:
    """Whether the GPU is in an error."""
    if device.type == "cpu":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:  # of many kinds
        return True
    return False


class Found(Protocol):
    """Records what a check found: in words for the table, as facts for the file."""

    def __call__(self, said: str, **facts: Any) -> None: ...


@pytest.fixture
def found(request: pytest.FixtureRequest) -> Found:
    """Records what this check found; first, so that a check that fails says it too."""

    def record(said: str, **facts: Any) -> None:
        plain = json.loads(json.dumps(facts, default=str))
        request.node.user_properties.append(("found", {"said": said, "facts": plain}))

    return record


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all checks share: what one of them compiled, others take."""
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture
def place_on_cpu(tmp_path: Path) -> Place:
    """A place where nothing was made."""
    return Place(torch.device("cpu"), tmp_path, Settings(tmp_path / "home", "http://127.0.0.1:9"))


@pytest.fixture(scope="module")
def place(device: torch.device, folder: Path, pytestconfig: pytest.Config) -> Iterator[Place]:
    """A home of its own; what was made beforehand, and the kernels that were brought with it."""
    with open_place(device, folder, pytestconfig.getoption("--bundles", None)) as found:
        yield found


@contextmanager
def open_place(device: torch.device, folder: Path, made: Path | None) -> Iterator[Place]:
    """A place where what was made may be opened, its kernels too, whoever publishes those."""
    hub, folder = made / "hub" if made else None, folder / device.type
    if hub is None or not hub.is_dir():
        yield Place(device, folder, Settings(folder / "home", "http://127.0.0.1:9"), made)
        return
    with serve_in_thread(hub) as endpoint:
        settings = Settings(folder / "home", endpoint.url, endpoint.token)
        Trust(settings.trust).add(endpoint.url, RepoRef(KERNEL).owner)
        yield Place(device, folder, settings, made)
