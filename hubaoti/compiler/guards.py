"""Where torch decides on a size: the lines of model code, and the remedies that torch suggests."""

from __future__ import annotations

import linecache
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import torch

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.compiler.dims import NESTED, DimRanges

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_OUR_FOLDER = str(Path(__file__).parent)
_CALLER = str(Path(__file__).with_name("export.py"))  # whoever called that is no model
# Torch tells of each guard as it adds it (checked on torch 2.11 to 2.15). Where it does not, an
# error names no line.
_UNMET = re.compile(r"Not all values of ([a-z]\w*) = (\S+) in .* the generated guard (.*)\.$", re.M)
_GUARD = re.compile(r"(?:\bmax\b|\bmin\b|\bn\b|[\d\s()+*,<>=!-])+")  # sums and products of numbers
LOGGER = "torch.fx.experimental.symbolic_shapes"


@dataclass(frozen=True, slots=True)
class Fixes:
    """What torch says that must hold: `sizes` of dims, `multiples`, `related` and `ranges`.

    `forms` are those that no extent says, as `4*n-1`; `guards` are conditions on a dim's size `n`
    for which torch has no suggestion, as where the code cuts a table.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    multiples: dict[str, int] = field(default_factory=dict)
    related: dict[str, DimExpr] = field(default_factory=dict)
    ranges: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)
    guards: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def find_limit(self, name: str, low: int, high: int) -> int:
        """The largest size up to which torch takes every size of a dim, from `low` on."""
        terms = " and ".join(f"({guard})" for guard in self.guards[name])
        holds = eval(f"lambda n: {terms}", {"max": max, "min": min})  # numbers, as _GUARD has them
        return next((n - 1 for n in range(low, high + 1) if not holds(n)), high)


def read_fixes(message: str) -> Fixes:
    """Read the suggested fixes of an export's error; conditions where it suggests nothing."""
    fixes = Fixes(guards=_read_guards(message) if "Suggested fixes:" not in message else {})
    for line in message.partition("Suggested fixes:")[2].splitlines():
        name, _, text = (part.strip() for part in line.partition("="))
        if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
            continue
        if bounds := re.fullmatch(r"Dim\('\w+'(?:, min=(\w+))?(?:, max=(\w+))?\)", text):
            if not name.startswith("_"):
                low, high = (int(n) if n and n.isdigit() else None for n in bounds.groups())
                fixes.ranges[name] = (low, high)
        elif text.isdigit():
            fixes.sizes[name] = int(text)
        elif multiple := re.fullmatch(rf"(\d+)\*_{re.escape(name)}", text):
            fixes.multiples[name] = int(multiple[1])
        elif re.fullmatch(r"[a-z0-9_*+ -]+", text) and not text.startswith("_"):
            _add_relation(fixes, name, text.replace(" ", ""))
    return fixes


def _read_guards(message: str) -> dict[str, tuple[str, ...]]:
    """The conditions on single dims, in Python's words and with `n` for the size."""
    found: dict[str, tuple[str, ...]] = {}
    for name, size, text in _UNMET.findall(message):
        guard = text.replace(size, "n")
        if _GUARD.fullmatch(guard):
            found[name] = (*found.get(name, ()), guard)
    return found


def _add_relation(fixes: Fixes, name: str, text: str) -> None:
    """Add what a dim must always be: an extent, or a form that no extent says."""
    try:
        fixes.related[name] = DimExpr.parse(text)
    except ValueError:
        fixes.forms[name] = re.sub(r"\b_\w+", "n", text)


def limit_by_guards(fixes: Fixes, bounds: DimRanges) -> Fixes:
    """The fixes with ranges that end where torch's conditions do."""
    ranges = dict(fixes.ranges)
    for name, most in read_limits(fixes, bounds).items():
        ranges |= {each: (None, most) for each in find_exceeding_dims(name, most, bounds)}
    return replace(fixes, ranges=ranges)


def read_limits(fixes: Fixes, bounds: DimRanges) -> dict[str, int]:
    """Where conditions end dims that begin within them."""
    named = {name: bounds[name] for name in fixes.guards if name in bounds}
    most = {name: fixes.find_limit(name, sizes.low, sizes.high) for name, sizes in named.items()}
    return {name: size for name, size in most.items() if bounds[name].low <= size}


def find_exceeding_dims(name: str, most: int, bounds: DimRanges) -> list[str]:
    """A dim that exceeds a size; of what is filled, also what fills it and what holds it."""
    names = NESTED if name == "filled" else (name,)
    return [each for each in names if each in bounds and bounds[each].high > most]


@dataclass(slots=True)
class Lines:
    """Lines of model code at which torch added a guard, in order.

    `each` are those that fix or relate sizes, `bounds` those that compare them, `holes` those that
    take them to be another than a number.
    """

    each: list[str] = field(default_factory=list)
    bounds: list[str] = field(default_factory=list)
    holes: list[str] = field(default_factory=list)

    def note(self, record: logging.LogRecord) -> bool:
        """Look at a record of torch's; none of them is printed."""
        guard, added, _ = record.getMessage().partition(" [guard added]")
        if added and re.match(r"eval (\[guard suppressed\] )?Eq\(", guard):
            self._add_line(self.each)
        elif added and re.match(r"eval Ne\(.*, \d+\)$", guard):
            self._add_line(self.holes)
        elif added and re.match(r"eval [^\[]*[<>]", guard):
            self._add_line(self.bounds)
        return False

    def _add_line(self, lines: list[str]) -> None:
        line = find_model_line(sys._getframe())
        if line and line not in lines:
            lines.append(line)


def find_model_line(frame: FrameType | None) -> str | None:
    """The innermost line on the stack that is neither torch's nor ours; below ours is none."""
    while frame is not None and frame.f_code.co_filename != _CALLER:
        file = frame.f_code.co_filename
        outside = not file.startswith((_TORCH_FOLDER, _OUR_FOLDER)) and Path(file).is_file()
        if outside and "logging" not in Path(file).parts:
            code = linecache.getline(file, frame.f_lineno).strip()
            return f"{Path(file).name}:{frame.f_lineno}: {code}"
        frame = frame.f_back
    return None


@contextmanager
def collect_guard_lines() -> Iterator[Lines]:
    """Collect the lines of model code at which torch fixes or relates sizes inside the block."""
    lines = Lines()
    logger = logging.getLogger(LOGGER)
    level = logger.level
    logger.addFilter(lines.note)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeFilter(lines.note)
