"""Guards: what torch wants of sizes is read, and the line of model code that decides it found."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.artifact.schema import Input
from hubaoti.compiler.export import find_guard_lines
from hubaoti.compiler.guards import LOGGER, Fixes, collect_guard_lines, find_model_line, read_fixes
from hubaoti.compiler.request import Range
from hubaoti.compiler.signature import CallSignature

A = DimExpr.of({"a": 1})
HEAD = "Constraints violated (seq)!\n  - Not all values of seq satisfy it.\nSuggested fixes:\n"


@pytest.mark.parametrize(
    ("text", "fixes"),
    [
        ("  seq = 24", Fixes(sizes={"seq": 24})),
        (
            "  _seq = Dim('_seq', min=1, max=8)\n  seq = 8*_seq",
            Fixes(multiples={"seq": 8}),
        ),
        ("  b = a", Fixes(related={"b": DimExpr.of({"a": 1})})),
        ("  b = 2*a", Fixes(related={"b": DimExpr.of({"a": 2})})),
        ("  b = a - 1", Fixes(related={"b": DimExpr.of({"a": 1}, -1)})),
        ("  _seq = Dim('_seq')\n  seq = 4*_seq - 1", Fixes(forms={"seq": "4*n-1"})),
        ("  seq = Dim('seq', max=40)", Fixes(ranges={"seq": (None, 40)})),
        ("  seq = Dim('seq', min=21)", Fixes(ranges={"seq": (21, None)})),
        ("  a = Dim('a', min=2, max=9)\n  b = a", Fixes({}, {}, {"b": A}, {"a": (2, 9)})),
        ("  seq = 5\n  rows = 7\n", Fixes(sizes={"seq": 5, "rows": 7})),
        ("  seq = Dim('seq', max=int_oo)", Fixes(ranges={"seq": (None, None)})),
    ],
)
def test_a_suggested_fix_is_read(text: str, fixes: Fixes) -> None:
    assert read_fixes(f"{HEAD}{text}\n\nThe error above occurred when calling export.") == fixes


UNMET = "  - Not all values of {} = L['x'].size()[3] in the specified range {} <= 64 satisfy the "
CUT = "generated guard (64 + ((-1)*max(0, 64 + ((-1)*L['x'].size()[3])))) != 64.\n"


@pytest.mark.parametrize(
    ("guards", "high", "most"),
    [
        (("generated guard L['x'].size()[3] != 64.\n",), 64, 63),
        ((CUT,), 64, 63),
        ((CUT, "generated guard L['x'].size()[3] <= 40.\n"), 128, 40),
        (("generated guard L['x'].size()[3] != 64.\n",), 48, 48),
        (("generated guard L['x'].size()[3] != 1.\n",), 64, 0),
    ],
)
def test_a_condition_without_a_suggestion_ends_a_dim_where_it_ends(
    guards: tuple[str, ...], high: int, most: int
) -> None:
    fixes = read_fixes("".join(UNMET.format("filled", "filled") + guard for guard in guards))
    assert fixes.guards.keys() == {"filled"}
    assert fixes.find_limit("filled", 1, high) == most


@pytest.mark.parametrize(
    "guard", ["L['x'].size()[3] != L['y'].size()[0]", "exit()", "n.real", "f(n)"]
)
def test_a_condition_on_more_than_one_size_is_no_code_of_ours(guard: str) -> None:
    assert read_fixes(UNMET.format("seq", "seq") + f"generated guard {guard}.\n") == Fixes()


@pytest.mark.parametrize(
    "text",
    [
        "seq = 24",
        f"{HEAD}The error above: set dynamic = False",
        f"{HEAD}  x.shape[1] = 4",
        f"{HEAD}  Seq = 4",
        "",
    ],
)
def test_what_is_no_suggestion_is_passed_over(text: str) -> None:
    assert read_fixes(text) == Fixes()


class Model(nn.Module):
    """Decides on sizes at two lines: one relates them, one compares them."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = x + y
        return z * 2 if x.shape[0] > 20 else z


def trace(*dims: Any) -> None:
    with torch.no_grad():
        torch.export.export(
            Model(), (torch.ones(30), torch.ones(30)), dynamic_shapes=dims, strict=False
        )


def test_the_lines_that_relate_and_compare_sizes_are_those_of_the_model() -> None:
    with pytest.raises(Exception, match="Suggested fixes"), collect_guard_lines() as lines:
        trace({0: Dim("a", max=64)}, {0: Dim("b", max=64)})
    first = Model.forward.__code__.co_firstlineno
    assert lines.each == [f"test_guards.py:{first + 1}: z = x + y"]
    branch = "return z * 2 if x.shape[0] > 20 else z"
    assert lines.bounds == [f"test_guards.py:{first + 2}: {branch}"]


def test_a_trace_that_decides_nothing_has_no_line() -> None:
    with collect_guard_lines() as lines:
        trace(None, None)
    assert (lines.each, lines.bounds) == ([], [])


def test_torch_s_logger_is_as_it_was_and_prints_nothing(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(LOGGER)
    before = (logger.level, [*logger.filters])
    with pytest.raises(ZeroDivisionError), collect_guard_lines():
        logger.info("eval Eq(a, b) [guard added] (x.py:1 in forward)")
        1 / 0  # noqa: B018
    assert (logger.level, [*logger.filters]) == before
    assert "guard added" not in caplog.text


def test_who_calls_the_compiler_is_no_line_of_the_model() -> None:
    """Nothing but a face's sizes is decided on: above torch and ours is only this test."""
    inputs = tuple(Input(name=n, dtype="float32", shape=(n,), values="real") for n in "ab")
    face = CallSignature({"args": [{"tensor": 0}, {"tensor": 1}], "kwargs": {}}, inputs)
    bounds = {"a": Range(2, 64), "b": Range(2, 64)}
    lines = find_guard_lines(nn.Identity(), face, bounds, [torch.ones(30), torch.ones(30)])
    assert (lines.each, lines.bounds, lines.holes) == ([], [], [])


def test_a_stack_without_the_model_has_no_line() -> None:
    assert find_model_line(None) is None
