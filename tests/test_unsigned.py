"""Packages without a manifest: what may differ between a call and the one that was compared."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from hubaoti.artifact.schema import Graph, Outputs
from hubaoti.attachment.first_call import AGREES, DIFFERS, UNTRIED
from hubaoti.attachment.stats import CallStats, Fallback
from hubaoti.errors import NotServed
from hubaoti.spaces.unsigned.outcomes import (
    IS_BUSY,
    IS_FULL,
    OUTCOME_ATTEMPTS,
    PLACES,
    CallOutcomes,
)
from hubaoti.spaces.unsigned.region import UnsignedRegion

CPU = torch.device("cpu")
X = torch.ones(2, 3)


class Scaled(nn.Module):
    """A module with a part, whose answer a number of the call decides."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Identity()
        self.wraps: Callable[[torch.Tensor], Any] = lambda y: y

    def forward(self, x: torch.Tensor, by: Any = 2.0) -> Any:
        return self.wraps(self.part(x) * by)


class Package:
    """The native side of one, as torch's runners have it, with a function for its code."""

    def __init__(self, call: tuple[Any, ...], answer: Any, code: Callable[..., Any]) -> None:
        specs = pytree.tree_structure((call, {})), pytree.tree_structure(answer)
        self.specs = [*map(pytree.treespec_dumps, specs)]
        self.code = code
        self.names: dict[str, str] = {}
        self.bound: dict[str, torch.Tensor] = {}

    def get_call_spec(self) -> list[str]:
        return self.specs

    def get_constant_names_to_original_fqns(self) -> dict[str, str]:
        return self.names

    def update_constant_buffer(self, tensors: dict[str, torch.Tensor], *_: bool) -> None:
        self.bound |= tensors

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = self.code(*inputs)
        return found


def put(
    module: nn.Module, package: Package, *, strict: bool = False, device: torch.device = CPU
) -> tuple[UnsignedRegion, CallStats]:
    """A package in the place of a module's `forward`."""
    nothing: dict[str, Any] = {"modules": ("",), "bounds": {}, "call": {"args": [], "kwargs": {}}}
    nothing |= {"inputs": (), "outputs": Outputs(template=None, tensors=()), "constants": ()}
    entry = Graph(id="root", file="root", sha256="0" * 64, size=1, members=(), **nothing)
    region, tally = (
        UnsignedRegion("", module, entry, package, device),
        CallStats(None, strict),
    )
    region.put(tally.count_miss, CallOutcomes())
    return region, tally


def doubling() -> Package:
    return Package((X, 2.0), X, lambda x: [x * 2.0])


def answered(region: UnsignedRegion) -> int:
    return sum(region.counts().values())


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with torch.no_grad():
        yield


def test_a_number_of_a_call_is_part_of_its_look() -> None:
    module = Scaled().eval()
    region, tally = put(module, doubling())
    for by in (2.0, 2.0, 2, True):
        assert torch.equal(module(X, by), X * by)
    assert answered(region) == 1
    with pytest.warns(Fallback, match="answered otherwise"):
        for _ in range(2):
            assert torch.equal(module(X, 3.0), X * 3.0)
    assert tally.stats({"": {}})["regions"][""]["eager"] == {"differs": 1}


def test_what_cannot_be_told_by_its_words_is_never_answered_by_a_package() -> None:
    class Number(float):
        pass

    module = Scaled().eval()
    region, _ = put(module, doubling())
    with pytest.warns(Fallback, match="given a Number"):
        for by in (2.0, 3.0, 3.0):
            assert torch.equal(module(X, Number(by)), X * by)
    assert answered(region) == 0


@pytest.mark.parametrize("what", ["hook", "pre-hook", "forward", "global"])
def test_hooks_and_forwards_that_a_package_would_not_run_are_the_modules(what: str) -> None:
    module = Scaled().eval()
    region, _ = put(module, doubling())
    for _ in range(2):
        module(X, 2.0)
    assert answered(region) == 1
    removing = changed(module.part, what)
    try:
        with pytest.warns(Fallback):
            assert torch.equal(module(X, 2.0), X * 2.0 + (3.0 if what == "global" else 2.0))
    finally:
        removing()
    assert answered(region) == 1


def changed(part: nn.Module, what: str) -> Callable[[], object]:
    """Have a part add 1 to what it passes on; and the way back."""
    if what == "hook":
        return part.register_forward_hook(lambda *given: given[-1] + 1.0).remove
    if what == "pre-hook":
        return part.register_forward_pre_hook(lambda _, given: (given[0] + 1.0,)).remove
    if what == "forward":
        part.forward = lambda x: x + 1.0
        return lambda: None
    hook = torch.nn.modules.module.register_module_forward_hook
    return hook(lambda _, __, answer: answer + 1.0).remove


class Pair(NamedTuple):
    """One structure of an answer."""

    y: torch.Tensor


@pytest.mark.parametrize("wraps", [lambda y: (y,), lambda y: {"z": y}, Pair, lambda y: {"y": [y]}])
def test_an_answer_of_another_structure_is_never_believed(wraps: Any) -> None:
    module = Scaled().eval()
    module.wraps = wraps
    region, _ = put(module, Package((X, 2.0), {"y": X}, lambda x: [x * 2.0]))
    expected = wraps(X * 2.0)
    with pytest.warns(Fallback, match="answered otherwise"):
        for _ in range(3):
            assert type(module(X, 2.0)) is type(expected)
    assert answered(region) == 0


@pytest.mark.parametrize("who", ["package", "module"])
def test_what_writes_into_its_inputs_is_never_believed(who: str) -> None:
    module = Scaled().eval()

    def code(x: torch.Tensor) -> list[torch.Tensor]:
        answer = x * 2.0
        if who == "package":
            x.zero_()
        return [answer]

    region, _ = put(module, Package((X, 2.0), X, code))
    given = X.clone()
    if who == "module":
        module.wraps = lambda y: (y, given.add_(1.0))[0]
    with pytest.warns(Fallback, match="answered otherwise"):
        for at in range(3):
            before = given.clone()
            assert torch.equal(module(given, 2.0), before * 2.0)
            assert torch.equal(given, X + (at + 1.0 if who == "module" else 0.0))
    assert answered(region) == 0


def test_a_module_that_fails_once_says_nothing_of_its_package() -> None:
    module = Scaled().eval()
    region, _ = put(module, doubling(), strict=True)

    def fails(_: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("no memory")

    for _ in range(2 * OUTCOME_ATTEMPTS):
        module.wraps = fails
        with pytest.raises(torch.OutOfMemoryError):
            module(X, 2.0)
    module.wraps = lambda y: y
    for _ in range(2):
        assert torch.equal(module(X, 2.0), X * 2.0)
    assert answered(region) == 1


def test_a_package_that_fails_is_tried_again_and_not_for_ever() -> None:
    module, tries = Scaled().eval(), []

    def code(x: torch.Tensor) -> list[torch.Tensor]:
        tries.append(x)
        raise RuntimeError("no memory")

    put(module, Package((X, 2.0), X, code))
    with pytest.warns(Fallback):
        for _ in range(2 * OUTCOME_ATTEMPTS):
            assert torch.equal(module(X, 2.0), X * 2.0)
    assert len(tries) == OUTCOME_ATTEMPTS


def ended_while_trying(module: Scaled) -> None:
    """A child that is killed in its first call, before anything is remembered."""
    child = os.fork()
    if not child:
        module.wraps = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        module(X, 2.0)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_worker_that_is_killed_in_its_first_call_bans_nothing() -> None:
    torch.set_num_threads(1)
    module = Scaled().eval()
    region, _ = put(module, doubling(), strict=True)
    ended_while_trying(module)
    for _ in range(2):
        assert torch.equal(module(X, 2.0), X * 2.0)
    assert answered(region) == 1


def test_what_ends_worker_after_worker_is_not_tried_again() -> None:
    torch.set_num_threads(1)
    module = Scaled().eval()
    region, _ = put(module, doubling())
    for _ in range(OUTCOME_ATTEMPTS):
        ended_while_trying(module)
    with pytest.warns(Fallback, match="refused"):
        assert torch.equal(module(X, 2.0), X * 2.0)
    assert answered(region) == 0


def test_a_call_while_another_worker_tries_is_the_modules_and_no_failure() -> None:
    module = Scaled().eval()
    region, tally = put(module, doubling(), strict=True)
    inner: list[torch.Tensor] = []

    def meanwhile(y: torch.Tensor) -> torch.Tensor:
        if not inner:
            inner.append(y)
            inner.append(module(X, 2.0))
        return y

    module.wraps = meanwhile
    assert torch.equal(module(X, 2.0), X * 2.0)
    assert torch.equal(inner[1], X * 2.0)
    assert (answered(region), tally.stats({})["eager"]) == (0, 0)
    module(X, 2.0)
    assert answered(region) == 1


def test_a_package_without_constants_is_on_the_device_it_was_opened_for() -> None:
    module = Scaled().eval()
    put(module, doubling(), strict=True, device=torch.device("cuda", 0))
    with pytest.raises(NotServed, match="an input is on cpu"):
        module(X, 2.0)


def test_a_package_keeps_no_weights_of_a_module_that_is_gone() -> None:
    module = nn.Linear(64, 64, bias=False).eval()
    package = Package((X,), X, lambda x: [x @ package.bound["w"].T])
    package.names = {"w": "weight"}
    region, _ = put(module, package)
    given = torch.ones(2, 64)
    for _ in range(2):
        module(given)
    assert answered(region) == 1
    gone = weakref.ref(module.weight.untyped_storage())
    region.remove()
    del module, region
    assert gone() is None
    assert package.bound["w"].shape == (64, 64)  # the container gives nothing back


def test_looks_never_have_another_ones_verdict() -> None:
    looks = CallOutcomes()
    for at in range(PLACES // 2):
        looks[at] = AGREES if at % 2 else DIFFERS
    assert all(looks[at] == (AGREES if at % 2 else DIFFERS) for at in range(PLACES // 2))
    assert {looks[-at] for at in range(1, 1000)} <= {UNTRIED}
    looks.begin("a")
    assert looks["a"] == IS_BUSY
    for at in range(PLACES // 2, 2 * PLACES):
        looks[at] = AGREES
    assert {looks[at] for at in range(3 * PLACES, 3 * PLACES + 1000)} <= {UNTRIED, IS_FULL}
    assert looks[0] == DIFFERS
