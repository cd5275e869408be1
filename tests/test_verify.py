"""Verify: a graph that answers something else than eager is never bundled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hubaoti.artifact.schema import Graph as Entry
from hubaoti.artifact.schema import Input, Output, Outputs
from hubaoti.compiler import verify
from hubaoti.compiler.dims import DimRanges, Probe, choose_probes, limit_graph_dims
from hubaoti.compiler.request import Range
from hubaoti.compiler.verify import (
    CHECK_TOLERANCE,
    Trial,
    cap_probe,
    record_comparison,
    try_eager,
)
from hubaoti.errors import BadDim, BadInput, CheckFailed, CompileFailed
from hubaoti.runtime.golden import measure_difference
from hubaoti.runtime.graph import Graph
from hubaoti.runtime.synthetic import fill_synthetic

CPU = torch.device("cpu")
DIMS = {"batch": Range(1, 4), "seq": Range(2, 16)}
FLOAT32 = CHECK_TOLERANCE["float32"]
HELD = Input(name="held", dtype="float32", shape=("batch", 8), values="real", mutated=True)
IDS = Input(name="input_ids", dtype="int64", shape=("batch", "seq"), values="ids<99")
MASK = msgspec.structs.replace(IDS, name="attention_mask", values="mask")


class Model(nn.Module):
    """Answers with rows of a table where a mask looks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(99, 8)
        self.register_buffer("seen", torch.ones(()))
        fill_synthetic(self.table.weight, "table")

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.table(ids) * mask.unsqueeze(-1),)


def entry_of(bounds: DimRanges, *inputs: Input, width: int = 8) -> Entry:
    """A graph's entry as the compiler would write it."""
    dims = ("batch",) if HELD in inputs else ("batch", "seq")
    output = Output(name="output", dtype="float32", shape=(*dims, width))
    return Entry(
        id="root",
        file="graphs/root.pt2",
        sha256="0" * 64,
        size=0,
        members=(),
        modules=("",),
        bounds={name: (sizes.low, sizes.high) for name, sizes in bounds.items()},
        steps={name: sizes.step for name, sizes in bounds.items() if sizes.step > 1},
        call={"args": [], "kwargs": {}},
        inputs=inputs,
        outputs=Outputs(template=None, tensors=(output,)),
        constants=(),
    )


def trial_of(module: nn.Module, bounds: DimRanges = DIMS, **more: Any) -> Trial:
    given: dict[str, Any] = {
        "entry": entry_of(bounds, IDS, MASK),
        "bounds": bounds,
        "eager": module,
        "module": module,
        "tolerance": FLOAT32,
    }
    return Trial(**(given | more))


@pytest.fixture(scope="module")
def trial() -> Trial:
    return trial_of(Model())


class FakeRunner:
    """Stands for native code: answers as eager does, changed by a function."""

    def __init__(self, call: Callable[..., Sequence[torch.Tensor]]) -> None:
        self.call = call

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [*self.call(*inputs)]

    def get_constant_names_to_original_fqns(self) -> dict[str, str]:
        return {}

    def update_constant_buffer(self, *_: object) -> None:
        raise AssertionError("this graph has no constants")


def fake_graph(trial: Trial, change: Callable[[torch.Tensor], torch.Tensor]) -> Graph:
    def call(*inputs: torch.Tensor) -> list[torch.Tensor]:
        return [change(tensor) for tensor in trial.eager(*inputs)]

    return Graph(trial.entry, FakeRunner(call), CPU)


# Answers


def test_an_equal_graph_passes_at_every_probe(trial: Trial) -> None:
    checks = verify.verify(fake_graph(trial, lambda t: t), trial)
    assert [check.dims for check in checks] == [
        {"batch": 1, "seq": 2},
        {"batch": 3, "seq": 9},
        {"batch": 4, "seq": 2},
        {"batch": 1, "seq": 16},
        {"batch": 2, "seq": 2},
    ]
    assert {check.max_absolute for check in checks} == {0.0}
    assert {check.tolerance for check in checks} == {FLOAT32}


def at_one_place(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[-1, 0, -1] = value
        return changed

    return change


WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one value": at_one_place(9.0),
    "nan": at_one_place(float("nan")),
    "infinity": at_one_place(float("inf")),
    "a little everywhere": lambda tensor: tensor * 1.001,
    "a flipped axis": lambda tensor: tensor.flip(1),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_graph_is_refused(wrong: str, trial: Trial) -> None:
    with pytest.raises(CheckFailed, match="batch = 1, seq = 2.*differs from eager") as caught:
        verify.verify(fake_graph(trial, WRONG[wrong]), trial)
    assert caught.value.hint


def test_a_graph_that_is_wrong_at_one_corner_only_is_refused(trial: Trial) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1 if tensor.shape[1] == 16 else tensor

    with pytest.raises(CheckFailed, match="seq = 16"):
        verify.verify(fake_graph(trial, change), trial)


def test_another_shape_is_refused(trial: Trial) -> None:
    with pytest.raises(BadInput, match=r"answers float32 \[.*; its manifest says"):
        verify.verify(fake_graph(trial, lambda t: t[:, :1]), trial)


def test_another_dtype_is_refused(trial: Trial) -> None:
    with pytest.raises(BadInput, match="answers float64 .*; its manifest says float32"):
        verify.verify(fake_graph(trial, lambda t: t.double()), trial)


def test_a_difference_within_the_tolerance_passes_and_is_recorded() -> None:
    eager = torch.tensor([1.0, -4.0])
    probe = Probe({"batch": 1, "seq": 2})
    check = record_comparison("root", probe, [eager + 0.1], (eager,), CHECK_TOLERANCE["bfloat16"])
    assert check.max_absolute == pytest.approx(0.1)
    assert check.max_relative == pytest.approx(0.025)
    with pytest.raises(CheckFailed, match="1e-04 is allowed"):
        record_comparison("root", probe, [eager + 0.1], (eager,), FLOAT32)


def test_each_answer_is_compared_with_its_own_largest_value() -> None:
    small, large = torch.tensor([0.001]), torch.tensor([1000.0])
    probe = Probe({"batch": 1})
    with pytest.raises(CheckFailed):
        record_comparison("root", probe, [large, small * 2], [large, small], FLOAT32)


def test_what_is_nothing_but_nan_is_no_answer_to_compare_with() -> None:
    nan, one = torch.full((2, 3), float("nan")), torch.ones(1)
    probe = Probe({"batch": 1})
    with pytest.raises(CheckFailed, match="eager itself answers nothing but nan"):
        record_comparison("root", probe, [one, nan], [one, nan], FLOAT32)
    record_comparison("root", probe, [nan[:0]], [nan[:0]], FLOAT32)  # no values at all


def test_where_eager_answers_nan_a_graph_may_too() -> None:
    nan = torch.tensor([float("nan"), float("inf"), 2.0])
    assert measure_difference(nan, nan.clone()) == (0.0, 2.0)
    assert measure_difference(torch.zeros(2), torch.zeros(2)) == (0.0, 1.0)
    assert measure_difference(torch.tensor([1.0, 2.0]), nan[[0, 2]])[0] == float("inf")
    assert measure_difference(nan[[0, 2]], torch.tensor([1.0, 2.0]))[0] == float("inf")


# What is written


class Writes(Model):
    """Adds the first of its rows to what it is given."""

    def forward(self, ids: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, ...]:
        held.add_(self.table(ids)[:, 0])
        return (held * 2,)


@pytest.fixture(scope="module")
def writing() -> Trial:
    return trial_of(Writes(), entry=entry_of(DIMS, IDS, HELD))


def test_what_both_write_alike_passes(writing: Trial) -> None:
    graph = Graph(writing.entry, FakeRunner(writing.eager), CPU)
    assert {check.max_absolute for check in verify.verify(graph, writing)} == {0.0}


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held.clone(),  # nothing is written
        lambda held: held,  # written, and then some more
    ],
)
def test_a_graph_that_writes_something_else_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], writing: Trial
) -> None:
    """Its answers are right."""

    def call(ids: torch.Tensor, held: torch.Tensor) -> list[torch.Tensor]:
        own = change(held)
        answers = [*writing.eager(ids, own)]
        if own is held:
            held[0, 0] += 1
        return answers

    with pytest.raises(CheckFailed, match="differs from eager"):
        verify.verify(Graph(writing.entry, FakeRunner(call), CPU), writing)


# Eager alone


def points(trial: Trial) -> list[dict[str, int]]:
    return choose_probes(trial.bounds)


def test_eager_that_can_everything_passes_and_writes_nothing(trial: Trial) -> None:
    assert try_eager(trial, points(trial)) == frozenset()


def test_the_inputs_that_eager_writes_are_named(writing: Trial) -> None:
    unknown = msgspec.structs.replace(HELD, mutated=False)
    asked = replace(writing, entry=entry_of(DIMS, IDS, unknown))
    assert try_eager(asked, points(asked)) == {"held"}


class WritesItsBuffer(Model):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.seen.add_(1)  # type: ignore[operator,union-attr]
        return super().forward(ids, mask)


class ReplacesItsBuffer(Model):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.seen = self.seen + ids.shape[1]
        return super().forward(ids, mask)


@pytest.mark.parametrize("module", [WritesItsBuffer, ReplacesItsBuffer])
def test_a_model_that_writes_its_own_buffer_stays_eager(module: Callable[[], nn.Module]) -> None:
    asked = trial_of(module())
    with pytest.raises(CompileFailed, match="writes to its own seen") as caught:
        try_eager(asked, points(asked))
    assert "eager" in caught.value.hint


class Counts(Model):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.count += 1
        return tuple(t * self.count for t in super().forward(ids, mask))


class Remembers(Model):
    def __init__(self) -> None:
        super().__init__()
        self.before: list[torch.Tensor] = []

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.before.append(self.table(ids))
        return (self.before[0] + self.before[-1],)


@pytest.mark.parametrize(("module", "name"), [(Counts, "count"), (Remembers, "before")])
def test_a_model_that_changes_from_call_to_call_stays_eager(
    module: Callable[[], nn.Module], name: str
) -> None:
    asked = trial_of(module())
    with pytest.raises(CompileFailed, match=f"changes its own .*{name}") as caught:
        try_eager(asked, points(asked))
    assert "eager" in caught.value.hint


class BreaksWhenLong(Model):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if ids.shape[1] > 10:
            raise IndexError("index out of range in self\nand more")
        return super().forward(ids, mask)


class WantsMore(Model):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise ValueError("You have to specify pixel_values")


def test_what_eager_cannot_do_is_said_before_it_is_compiled() -> None:
    asked = trial_of(BreaksWhenLong())
    with pytest.raises(BadDim, match="seq = 16 eager itself fails: index out of range") as caught:
        try_eager(asked, points(asked))
    assert "--dim batch=1:4 --dim seq=2:16" in caught.value.hint
    assert "\n" not in str(caught.value)
    with pytest.raises(CompileFailed, match="pixel_values") as failed:
        try_eager(trial_of(WantsMore()), points(asked))
    assert failed.value.hint


# Budgets


def test_a_probe_that_would_take_too_long_is_made_smaller_and_says_why(trial: Trial) -> None:
    large = replace(trial, bounds={"batch": Range(1, 64), "seq": Range(2, 512)})
    asked = {"batch": 1, "seq": 512}
    probe = cap_probe(asked, large, seconds_per_token=verify.CHECK_SECONDS / 16)
    assert probe.requested == asked
    assert probe.sizes == {"batch": 1, "seq": 16}
    assert probe.capped is not None and probe.capped.startswith("time: it would take")


def test_a_probe_that_would_take_too_much_memory_is_made_smaller_and_says_why(
    trial: Trial,
) -> None:
    bounds = {"batch": Range(1, 1 << 20), "seq": Range(2, 512)}
    large = replace(trial, bounds=bounds, width=100)
    probe = cap_probe({"batch": 1 << 20, "seq": 2}, large, 0.0)
    assert probe.requested == {"batch": 1 << 20, "seq": 2}
    assert 1 < probe.sizes["batch"] < 1 << 20
    assert probe.capped is not None and probe.capped.startswith("memory: it would take")


def test_the_smallest_probe_is_never_skipped(trial: Trial) -> None:
    probe = cap_probe({"batch": 1, "seq": 2}, trial, seconds_per_token=1e6)
    assert probe == Probe({"batch": 1, "seq": 2})


def test_a_cap_is_written_into_the_checks(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MEMORY", 4000)
    checks = verify.verify(fake_graph(trial, lambda t: t), trial)
    cut = [check for check in checks if check.capped]
    assert cut
    assert all(check.asked and check.asked != check.dims for check in cut)


def cache_trial(bounds: DimRanges) -> Trial:
    """A decoder's block, of which only the shapes count."""
    held = Input(name="keys", dtype="float32", shape=("batch", 2, "cache", 4), values="real")
    mask = Input(name="mask", dtype="bool", shape=("batch", 1, "seq", "filled"), values="mask")
    module = Model()
    return trial_of(module, bounds, entry=entry_of(bounds, mask, held), heads=4, width=64)


ranges = st.tuples(st.integers(1, 500), st.integers(0, 4000)).map(
    lambda pair: Range(pair[0], sum(pair))
)


@given(ranges, ranges, st.floats(0, 10))
def test_a_capped_probe_is_within_the_bounds_and_a_call_fits_its_cache(
    seq: Range, cache: Range, seconds: float
) -> None:
    seq = Range(min(seq.low, cache.high), seq.high)
    dims = {"batch": Range(1, 64), "seq": seq, "cache": cache}
    bounds = limit_graph_dims(dims, ("batch", "seq", "filled", "cache"), {})
    trial = cache_trial(bounds)
    for sizes in choose_probes(bounds):
        probe = cap_probe(sizes, trial, seconds)
        assert all(bounds[n].low <= size <= bounds[n].high for n, size in probe.sizes.items())
        order = [probe.sizes[name] for name in ("seq", "filled", "cache")]
        assert order == sorted(order)
        assert (probe.capped is None) == (probe.sizes == sizes)


def test_the_same_sizes_have_the_same_inputs(trial: Trial) -> None:
    first, second = (trial.make_inputs({"batch": 3, "seq": 9}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [list(tensor.shape) for tensor in first] == [[3, 9], [3, 9]]
    assert first[1].min() == 0, "no row is padded"


def test_a_graph_is_bound_to_the_memory_that_eager_uses(tmp_path: Path) -> None:
    module = Model()
    found = verify.share_constants(module, entry_of(DIMS, IDS), tmp_path)
    assert found["table.weight"].data_ptr() == module.table.weight.data_ptr()
