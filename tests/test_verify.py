"""Verify: a graph that answers something else than eager is never bundled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from bundles import describe, make_bundle

from hubaoti.compiler import verify
from hubaoti.compiler.request import Range
from hubaoti.compiler.shapes import Probe
from hubaoti.compiler.source import Source, load
from hubaoti.compiler.verify import TOLERANCE, capped, compared, distance, fill
from hubaoti.errors import CheckFailed
from hubaoti.manifest import Graph as Entry
from hubaoti.manifest import Input
from hubaoti.runtime.graph import Graph

CPU = torch.device("cpu")
DIMS = {"batch": Range(1, 4), "seq": Range(2, 16)}


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Source:
    found = load(tiny_llama, None, "float32", CPU)
    fill(found.model)
    return found


class FakeRunner:
    """Stands for native code: answers as eager does, changed by a function."""

    def __init__(self, source: Source, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.source = source
        self.change = change

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.change(tensor) for tensor in self.source.model(*inputs)]

    def get_constant_names_to_original_fqns(self) -> dict[str, str]:
        return {}

    def update_constant_buffer(self, *_: object) -> None:
        raise AssertionError("this graph has no constants")


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    folder = tmp_path_factory.mktemp("entry") / "bundle"
    make_bundle(folder)
    ids = Input(name="input_ids", dtype="int64", shape=("batch", "seq"), values="ids<30522")
    mask = msgspec.structs.replace(ids, name="attention_mask", values="mask")
    bounds = {"batch": (1, 4), "seq": (2, 16)}
    return msgspec.structs.replace(describe(folder, "root"), inputs=(ids, mask), bounds=bounds)


def fake_graph(
    source: Source, entry: Entry, change: Callable[[torch.Tensor], torch.Tensor]
) -> Graph:
    return Graph(entry, FakeRunner(source, change), CPU)


def test_an_equal_graph_passes_at_every_probe(source: Source, entry: Entry) -> None:
    checks = verify.verify(fake_graph(source, entry, lambda t: t), source, DIMS, CPU)
    assert [check.dims for check in checks] == [
        {"batch": 1, "seq": 2},
        {"batch": 3, "seq": 9},
        {"batch": 4, "seq": 2},
        {"batch": 1, "seq": 16},
    ]
    assert {check.max_absolute for check in checks} == {0.0}
    assert {check.tolerance for check in checks} == {TOLERANCE["float32"]}


def at_one_place(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[-1, -1, -1] = value
        return changed

    return change


WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one value": at_one_place(9.0),
    "nan": at_one_place(float("nan")),
    "infinity": at_one_place(float("inf")),
    "a little everywhere": lambda tensor: tensor * 1.001,
    "a transposed axis": lambda tensor: tensor.flip(1),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_graph_is_refused(wrong: str, source: Source, entry: Entry) -> None:
    with pytest.raises(CheckFailed, match="batch = 1, seq = 2.*differs from eager") as caught:
        verify.verify(fake_graph(source, entry, WRONG[wrong]), source, DIMS, CPU)
    assert caught.value.hint


def test_a_graph_that_is_wrong_at_one_corner_only_is_refused(source: Source, entry: Entry) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1 if tensor.shape[1] == 16 else tensor

    with pytest.raises(CheckFailed, match="seq = 16"):
        verify.verify(fake_graph(source, entry, change), source, DIMS, CPU)


def test_another_shape_is_refused(source: Source, entry: Entry) -> None:
    with pytest.raises(CheckFailed, match="gives .* eager "):
        verify.verify(fake_graph(source, entry, lambda t: t[:, :1]), source, DIMS, CPU)


def test_a_difference_within_the_dtype_s_tolerance_passes_and_is_recorded() -> None:
    eager = torch.tensor([1.0, -4.0])
    probe = Probe({"batch": 1, "seq": 2})
    check = compared("root", probe, [eager + 0.1], (eager,), "bfloat16")
    assert check.max_absolute == pytest.approx(0.1)
    assert check.max_relative == pytest.approx(0.025)
    with pytest.raises(CheckFailed, match="float32 allows 1e-04"):
        compared("root", probe, [eager + 0.1], (eager,), "float32")


def test_where_eager_answers_nan_a_graph_may_too() -> None:
    nan = torch.tensor([float("nan"), float("inf"), 2.0])
    assert distance(nan, nan.clone()) == (0.0, 2.0)
    assert distance(torch.zeros(2), torch.zeros(2)) == (0.0, 1.0)


def test_a_probe_that_would_take_too_long_is_made_smaller_and_says_why(source: Source) -> None:
    dims = {"batch": Range(1, 64), "seq": Range(2, 512)}
    asked = {"batch": 1, "seq": 512}
    probe = capped(asked, dims, source, seconds_per_token=1.0)
    assert probe.asked == asked
    assert probe.sizes == {"batch": 1, "seq": 16}
    assert probe.capped is not None and probe.capped.startswith("time: it would take")


def test_a_probe_that_would_take_too_much_memory_is_made_smaller_and_says_why(
    source: Source,
) -> None:
    dims = {"batch": Range(1, 4096), "seq": Range(2, 512)}
    probe = capped({"batch": 4096, "seq": 2}, dims, source, 0.0)
    assert probe.asked == {"batch": 4096, "seq": 2}
    assert probe.sizes["batch"] < 4096
    assert probe.capped is not None and probe.capped.startswith("memory: it would take")


def test_the_smallest_probe_is_never_skipped(source: Source) -> None:
    probe = capped({"batch": 1, "seq": 2}, DIMS, source, seconds_per_token=1e6)
    assert probe == Probe({"batch": 1, "seq": 2})


def test_a_cap_is_written_into_the_checks(
    source: Source, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "MEMORY", 8 * 30522 * 8)
    checks = verify.verify(fake_graph(source, entry, lambda t: t), source, DIMS, CPU)
    cut = [check for check in checks if check.capped]
    assert cut
    assert all(check.asked and check.asked != check.dims for check in cut)


def test_values_are_given_by_rule_and_depend_on_the_name(tiny_llama: Path, source: Source) -> None:
    again = load(tiny_llama, None, "float32", CPU)
    fill(again.model)
    pairs = zip(source.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    layer = again.model.get_submodule("model.layers.0.self_attn")
    assert not torch.equal(layer.k_proj.weight, layer.v_proj.weight)  # type: ignore[union-attr,arg-type]
    assert replace(again, model=source.model).program == source.program
