"""What a module leaves in its call: its graph leaves the same, or is refused by name."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict, UserDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import parse_manifest
from hubaoti.artifact.schema import Input, Outputs, Write
from hubaoti.attachment.first_call import Beside
from hubaoti.compiler.signature import CallSignature, FlatModule
from hubaoti.errors import CompileFailed
from hubaoti.runtime.containers import Answers, Contents, fill_container
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.golden import GOLDEN_TOLERANCE
from hubaoti.settings import Settings

ROWS = 50
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Leaving(nn.Module):
    """It chooses rows by numbers, writes into what it is given, and answers one thing twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(ROWS, 8))
        self.places = nn.Embedding(400, 8)

    def forward(
        self, x: torch.Tensor, numbers: torch.Tensor, position_ids: torch.Tensor, store: Any
    ) -> Any:
        y = self.linear(x) + self.table[numbers] + self.places(position_ids)
        store["last"] = y * 2
        store["inner"][7] = (y, x)
        store["seen"].append(y + store["seen"][0])
        store.setdefault("count", 3)
        del store["gone"]
        return y, y.flatten(), y, store


def given(rows: int, seed: int = 0) -> tuple[Any, ...]:
    """The arguments of a call, anew."""
    generator = torch.Generator().manual_seed(seed)
    x, first = torch.randn(2, rows, 8, generator=generator)
    numbers = torch.randint(0, ROWS, (rows,), generator=generator)
    return x, numbers, torch.arange(rows), {"inner": {1: x}, "seen": [first], "gone": None}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Where the module is compiled."""
    folder = tmp_path_factory.mktemp("containers")
    return Settings(home=folder / "home", endpoint="http://127.0.0.1:9")


@pytest.fixture(scope="module")
def leaving() -> Leaving:
    """The module, of the same weights wherever it is made."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Leaving().eval()


@pytest.fixture(scope="module")
def bundle(leaving: Leaving, home: Settings) -> Bundle:
    """Its graph, of calls of few rows and of many."""
    with hubaoti.capture(leaving) as calls, torch.no_grad():
        for rows in (4, 9, 300):
            leaving(*given(rows))
    return hubaoti.compile(leaving, home.home.parent / "bundle", calls=calls, settings=home)


@torch.no_grad()
def test_a_graph_leaves_in_a_call_what_its_module_leaves(
    leaving: Leaving, bundle: Bundle, home: Settings
) -> None:
    with hubaoti.attach(leaving, bundle, strict=True, settings=home) as attachment:
        for rows in (4, 5, 300, 77):
            ours, theirs = given(rows), given(rows)
            inner, seen = ours[3]["inner"], ours[3]["seen"]
            answer = leaving(*ours)
            expected = leaving.forward.eager(*theirs)  # type: ignore[attr-defined]
            torch.testing.assert_close(answer[:3], expected[:3], **CLOSE)
            assert answer[0] is answer[2]
            assert answer[3] is ours[3] and ours[3]["inner"] is inner and ours[3]["seen"] is seen
            assert [*ours[3]] == [*theirs[3]] and ours[3]["count"] == 3
            assert inner[7][1] is ours[0] and inner[1] is ours[0]
            torch.testing.assert_close(inner[7][0], theirs[3]["inner"][7][0], **CLOSE)
            torch.testing.assert_close(seen, theirs[3]["seen"], **CLOSE)
            torch.testing.assert_close(ours[3]["last"], theirs[3]["last"], **CLOSE)
        assert attachment.stats()["compiled"] == 3  # the first call was the module's, and compared


def test_only_what_leaves_something_has_schema_2(bundle: Bundle, decoder_bundle: Bundle) -> None:
    assert bundle.manifest.schema == 2
    assert decoder_bundle.manifest.schema == 1
    assert b'"writes"' not in decoder_bundle.manifest.to_json()
    text = bundle.manifest.to_json()
    assert parse_manifest(text, "it") == bundle.manifest
    with pytest.raises(hubaoti.errors.BadManifest, match="its schema is 1, what it says is of sch"):
        parse_manifest(text.replace(b'"schema":2', b'"schema":1'), "it")


class Named(dict[str, Any]):
    """A dictionary that may do something else when it is written."""


def test_dictionaries_of_the_standard_library_are_filled() -> None:
    for kind in (dict, OrderedDict, UserDict):
        store = kind({"a": 1, "b": 2})
        fill_container(store, [("b", 3), (7, 4)])
        assert type(store) is kind and [*store.items()] == [("b", 3), (7, 4)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda store: store | {"seen": (*store["seen"],)}, "seen, which is written, is a tuple"),
        (lambda store: Named(store), "store, which is written, is a Named"),
    ],
)
def test_a_container_that_cannot_be_written_plainly_is_the_modules_affair(
    leaving: Leaving, bundle: Bundle, home: Settings, change: Callable[..., Any], words: str
) -> None:
    with hubaoti.attach(leaving, bundle, settings=home) as attachment:
        leaving(*given(5))
        *others, store = given(5)
        with pytest.warns(UserWarning, match=words), suppress(AttributeError):  # of the tuple
            leaving(*others, change(store))
        assert attachment.stats()["eager"] == 1


def test_a_container_that_is_given_twice_is_the_modules_affair() -> None:
    store: dict[str, Any] = {}
    writes = (Write(into=("store",), items=(("last", {"tensor": 0}),)),)
    answers = Answers(Outputs(template=None, tensors=(), writes=writes))
    with pytest.raises(CannotServe, match="store, which is written, is given twice"):
        answers.find({"store": store, "other": [store]})
    assert answers.find({"store": store, "other": [{}]}).containers == (store,)


def test_a_first_call_sees_what_a_graph_does_not_leave() -> None:
    """As of one that was compiled before anybody looked."""
    x, store = torch.ones(2), dict[str, Any]()
    arguments = {"store": store}
    silent = Answers(Outputs(template={"tensor": 0}, tensors=()))
    beside = Beside(lambda: x, arguments, silent, None)
    before = Contents(arguments)
    assert beside.compare_contents([x], before) is None
    store["last"] = x
    found = beside.compare_contents([x], before)
    assert found == "the module leaves something in store, the graph does not"


def test_a_first_call_sees_what_a_graph_leaves_otherwise() -> None:
    x, store = torch.ones(2), dict[str, Any]()
    writes = (Write(into=("store",), items=(("last", {"tensor": 0}),)),)
    answers = Answers(Outputs(template=None, tensors=(), writes=writes))
    beside = Beside(lambda: None, {"store": store}, answers, answers.find({"store": store}))
    before = Contents({"store": store})
    store["last"] = x
    assert beside.compare_contents([x], before) is None
    assert "in store: answer 0 is off" in (beside.compare_contents([x + 1], before) or "")
    store["first"] = x
    assert "other keys in store" in (beside.compare_contents([x], before) or "")


def test_what_float8_computes_may_be_as_far_off_as_float8_is_and_whole_numbers_may_not() -> None:
    one = Answers(Outputs(template={"tensor": 0}, tensors=()))
    plain = Beside(lambda: None, {}, one, None)
    coarse = replace(plain, tolerance=GOLDEN_TOLERANCE["float8_e4m3fn"])
    ours, theirs = torch.tensor([1.0, 0.9]).bfloat16(), torch.tensor([1.0, 1.0]).bfloat16()
    assert "is off" in (plain.compare_answers([ours], theirs) or "")
    assert coarse.compare_answers([ours], theirs) is None
    assert "is off" in (coarse.compare_answers([ours - 0.2], theirs) or "")
    assert "is off" in (coarse.compare_answers([torch.tensor([20])], torch.tensor([19])) or "")


def flat(forward: Callable[..., Any]) -> FlatModule:
    """A module of this forward as a function of tensors, called with x and an empty store."""

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor, store: Any) -> Any:
            return forward(x, store)

    template = {"args": [{"tensor": 0}, {"dict": {}}], "kwargs": {}}
    item = Input(name="x", dtype="float32", shape=("n",), values="real")
    return FlatModule(Plain(), CallSignature(template, (item,)))


def test_what_no_graph_can_leave_is_refused_by_name() -> None:
    def keep(x: torch.Tensor, store: Any) -> torch.Tensor:
        store["lock"] = object()
        return x

    with pytest.raises(CompileFailed, match="leaves in its arguments.*store_lock is a builtins.ob"):
        flat(keep)(torch.ones(2))


def test_what_is_left_at_some_sizes_only_is_refused() -> None:
    def keep(x: torch.Tensor, store: Any) -> torch.Tensor:
        if len(x) > 2:
            store["long"] = x
        return x

    called = flat(keep)
    called(torch.ones(2))
    with pytest.raises(CompileFailed, match="put together in another way at other sizes"):
        called(torch.ones(3))


OUTSIDE = """
import sys
import torch, hubaoti
from hubaoti.settings import Settings
from test_containers import Leaving, given
from hubaoti.artifact.bundle import Bundle
from pathlib import Path

torch.manual_seed(7)
module = Leaving().eval()
home = Settings(home=Path(sys.argv[2]), endpoint="http://127.0.0.1:9")
with torch.no_grad():
    attachment = hubaoti.attach(module, Bundle.read(Path(sys.argv[1])), settings=home)
    module(*given(4))
    for rows in (4, 300):
        for at, wrong in ((1, 50), (1, -51), (1, 1 << 40), (2, 400), (2, -1)):
            call = given(rows)
            call[at][rows // 2] = wrong
            try:
                module(*call)
            except IndexError as why:
                print("IndexError")
    module(*given(300))
    print(attachment.stats()["compiled"])
"""


def test_a_number_that_no_table_has_raises_as_the_module_does(
    bundle: Bundle, home: Settings
) -> None:
    """In a process of its own: it would end."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OUTSIDE, str(bundle.path), str(home.home)],
        capture_output=True,
        text=True,
        cwd=here,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["IndexError"] * 10 + ["1"]
