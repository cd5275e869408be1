"""What was asked of the compiler: checked words, before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hubaoti.errors import BadDim, BadRequest, UnknownTask

TASKS = ("embed", "classify", "logits")
DTYPES = ("float32", "bfloat16", "float16")
DIMS = ("batch", "seq")
DEFAULT_LEVEL = "x86_64_v3"


@dataclass(frozen=True, slots=True)
class Range:
    """The sizes of a dim: `low` to `high` in steps of `step`."""

    low: int
    high: int
    step: int = 1

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True)
class Request:
    """How to compile a model; None means: as the model says.

    Raises:
        UnknownTask, BadDim, BadRequest: a word that the compiler does not know.
    """

    task: str | None = None
    dims: dict[str, Range] = field(default_factory=dict)
    dtype: str | None = None
    level: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise UnknownTask(f"unknown task {self.task!r}", hint=f"one of: {', '.join(TASKS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise BadRequest(f"unknown dtype {self.dtype!r}", hint=f"one of: {', '.join(DTYPES)}")
        if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", self.device):
            raise BadRequest(f"unknown device {self.device!r}", hint="cpu, cuda or cuda:0")
        for name, sizes in self.dims.items():
            check_dim(name, sizes)


def check_dim(name: str, sizes: Range) -> None:
    """Refuse a dim that the tasks do not have, or that no size can have."""
    if name not in DIMS:
        raise BadDim(f"the model has no dim {name!r}", hint=f"its dims are: {', '.join(DIMS)}")
    if not 1 <= sizes.low <= sizes.high:
        raise BadDim(
            f"dim {name} goes from {sizes.low} to {sizes.high}",
            hint=f"give a range with 1 <= min <= max: --dim {name}=1:32",
        )


def ranges(dims: Mapping[str, tuple[int, int]] | Iterable[str]) -> dict[str, Range]:
    """Dims as Python or the command line gives them."""
    if isinstance(dims, Mapping):
        return {name: Range(*sizes) for name, sizes in dims.items()}
    return parse_dims(dims)


def parse_dims(texts: Iterable[str]) -> dict[str, Range]:
    """Read `name=min:max` words, as `--dim` takes them.

    Raises:
        BadDim: a word is malformed, or names a dim twice.
    """
    dims: dict[str, Range] = {}
    for text in texts:
        match = re.fullmatch(r"([a-z_]+)=(\d{1,9}):(\d{1,9})", text)
        if match is None or match[1] in dims:
            what = "is malformed" if match is None else "gives its dim twice"
            raise BadDim(f"--dim {text} {what}", hint="write it as --dim batch=1:32")
        dims[match[1]] = Range(int(match[2]), int(match[3]))
    return dims
