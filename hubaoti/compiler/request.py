"""What was asked of the compiler: checked options, before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hubaoti.compiler.stand_in import CAPABILITIES
from hubaoti.errors import BadDim, BadRequest, UnknownTask
from hubaoti.flags import require_flags

TASKS = ("embed", "classify", "logits", "generate", "forward")
DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "fa3")
KERNEL = "kernels-community/flash-attn3"  # what answers fa3, unless another is named
_FA3_SM = 90  # its code is Hopper's
LAYOUTS = ("zerogpu",)
RECIPES = ("int8wo", "int4wo", "float8dq")  # of torchao, as `runtime/quantize.py` has them
DEFAULT_LEVEL = "x86_64_v3"

Shape = Sequence[str | int | None]


@dataclass(frozen=True, slots=True)
class Range:
    """The sizes of a dim: `low` to `high` in steps of `step`."""

    low: int
    high: int
    step: int = 1

    @property
    def sizes(self) -> range:
        """Each of them, the smallest first."""
        return range(self.low, self.high + 1, self.step)

    def __contains__(self, size: int) -> bool:
        return self.low <= size <= self.high and size % self.step == 0

    def __str__(self) -> str:
        return f"{self.low}:{self.high}" + (f":{self.step}" if self.step != 1 else "")


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """All that is asked of a compile; None means: as the model says.

    `calls` and `shapes` are of a module from Python; `inductor` has its options as they are given,
    and once they were looked at as JSON has them. `capabilities` are of GPUs that need not be here,
    90 for 9.0; without them, and without a `device`, it is the CPU. Of each of `attentions` there
    is a bundle; without one it is the model's own. `kernel` is the repo that fa3 comes from.

    Raises:
        UnknownTask, BadDim, BadRequest: a word that the compiler does not know.
    """

    task: str | None = None
    dims: dict[str, Range] = field(default_factory=dict)
    dtype: str | None = None
    level: str | None = None
    device: str | None = None
    capabilities: tuple[int, ...] = ()
    regions: str | None = None
    buckets: tuple[dict[str, Range], ...] = ()
    mode: str = "default"
    inductor: Mapping[str, Any] | Iterable[str] = field(default_factory=dict)
    quantize: str | None = None
    attentions: tuple[str, ...] = ()
    kernel: str | None = None
    trust_remote_code: bool = False
    layout: str | None = None
    revision: str | None = None
    calls: Any = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> CompileRequest:
        """The keywords of `hubaoti.compile`, dims and buckets as people write them.

        Raises:
            TypeError: it takes no such keyword. UnknownTask, BadDim, BadRequest: as above.
        """
        own = dict(options)
        own["attentions"] = parse_attentions(own.pop("attention", None))
        return cls(
            **{
                **own,
                "dims": make_ranges(options.get("dims", ())),
                "buckets": make_bucket_ranges(options.get("buckets", ())),
                "shapes": options.get("shapes") or {},
            }
        )

    def __post_init__(self) -> None:
        require_flags(trust_remote_code=self.trust_remote_code)
        if self.task is not None and self.task not in TASKS:
            raise UnknownTask(f"unknown task {self.task!r}", hint=f"one of: {', '.join(TASKS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise BadRequest(f"unknown dtype {self.dtype!r}", hint=f"one of: {', '.join(DTYPES)}")
        if self.quantize is not None and self.quantize not in RECIPES:
            raise BadRequest(
                f"unknown quantization: {self.quantize!r:.120}",
                hint=f"there are {', '.join(RECIPES)}",
            )
        self._check_device()
        self._check_attentions()
        for name, sizes in self.dims.items():
            check_dim(name, sizes)
        if self.layout is not None:
            self._check_layout()

    @property
    def is_for_gpus(self) -> bool:
        """Whether graphs for GPUs are asked for, here or not."""
        return bool(self.capabilities) or self.device not in {None, "cpu"}

    def _check_device(self) -> None:
        """Refuse a device that there cannot be, and what contradicts GPUs that are not here."""
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:[0-9]+)?", self.device):
            raise BadRequest(f"unknown device {self.device!r}", hint="cpu, cuda or cuda:0")
        if self.capabilities and self.device is not None:
            raise BadRequest(
                f"what to compile for is named twice, by --for and by --device {self.device}",
                hint="leave one out: GPUs of --for need not be here, that of --device is here",
            )
        if self.capabilities and self.mode == "max-autotune":
            raise BadRequest(
                "--mode max-autotune chooses kernels by measuring them on the GPU itself",
                hint="compile on a machine with that GPU, with --device cuda; or leave it out",
            )

    def _check_attentions(self) -> None:
        """Refuse an attention that there is not, and several for one bundle."""
        for name in self.attentions:
            if name not in ATTENTIONS:
                raise BadRequest(
                    f"unknown attention {name!r:.40}", hint=f"there are {', '.join(ATTENTIONS)}"
                )
        if self.kernel is not None and "fa3" not in self.attentions:
            raise BadRequest(
                f"the kernel {self.kernel!r:.120} is named, and nothing is asked for that calls it",
                hint="add --attention fa3, or leave it out",
            )
        if len(self.attentions) > 1 and not self.capabilities:
            raise BadRequest(
                f"a bundle has one attention, and {' and '.join(self.attentions)} are asked for",
                hint="name one; or make a folder of bundles: --for sm90",
            )
        if self.attentions == ("fa3",):
            # Another device than a CPU is asked what it is.
            asked = self.capabilities or ((None,) if self.device in {None, "cpu"} else ())
            refusals = [error for sm in asked if (error := refuse_fa3_for(sm))]
            if refusals and len(refusals) == len(asked):
                raise refusals[0]

    def _check_layout(self) -> None:
        """Refuse what loaders without a manifest cannot do."""
        if self.layout not in LAYOUTS:
            raise BadRequest(
                f"unknown layout: {self.layout!r:.120}", hint=f"there is {', '.join(LAYOUTS)}"
            )
        other = {
            f"the task {self.task}": self.task not in {None, "forward"},
            "several graphs for one module (buckets)": bool(self.buckets),
            f"weights that are no module's ({self.quantize})": self.quantize is not None,
            "kernels (fa3)": "fa3" in self.attentions,
        }
        if found := [what for what, is_asked in other.items() if is_asked]:
            raise BadRequest(
                f"the loaders of the layout {self.layout} know nothing of {', '.join(found)}",
                hint="leave it out: they call a module as it is called, with --task forward",
            )


def check_dim(name: str, sizes: Range) -> None:
    """Refuse bounds that no size can have."""
    if sizes.step < 1 or sizes.low % sizes.step or sizes.high % sizes.step:
        raise BadDim(
            f"dim {name} goes from {sizes.low} to {sizes.high} in steps of {sizes.step}",
            hint=f"begin and end it at multiples of the step: --dim {name}=8:4096:8",
        )
    if not 1 <= sizes.low <= sizes.high:
        raise BadDim(
            f"dim {name} goes from {sizes.low} to {sizes.high}",
            hint=f"give a range with 1 <= min <= max: --dim {name}=1:32",
        )


def refuse_fa3_for(sm: int | None) -> BadRequest | None:
    """Why FlashAttention-3 runs on no GPU of a capability, or on no CPU; None where it does."""
    if sm == _FA3_SM:
        return None
    return BadRequest(
        f"--attention fa3 is asked for {f'sm{sm}' if sm else 'a CPU'}, and FlashAttention-3 runs "
        f"on sm{_FA3_SM} alone",
        hint="compile for it with --attention sdpa, and with fa3 for sm90",
    )


def parse_attentions(names: str | Iterable[str] | None) -> tuple[str, ...]:
    """Attentions as people write them: `fa3,sdpa`, a list of them, or none."""
    given = names.split(",") if isinstance(names, str) else names or ()
    return tuple(dict.fromkeys(str(word).strip() for word in given))


def parse_capabilities(names: str | Iterable[str | int]) -> tuple[int, ...]:
    """Compute capabilities as people write them: `sm80,sm90`, or a list of `sm90`, `9.0`, 90.

    Raises:
        BadRequest: one is malformed, or of no GPU that graphs can be built for.
    """
    given = names.split(",") if isinstance(names, str) else names
    found = tuple(dict.fromkeys(_read_capability(str(word).strip()) for word in given))
    if not found:
        raise BadRequest("no GPU is named to compile for", hint=f"one of: {_list_capabilities()}")
    return found


def _read_capability(word: str) -> int:
    """One capability; of `9.0`, `90`, `sm90` and `sm_90` it is 90."""
    match = re.fullmatch(r"(?:sm_?)?(\d{2,3})|(\d{1,2})\.(\d)", word)
    number = int((match[1] or match[2] + match[3]) if match else 0)
    if number not in CAPABILITIES:
        raise BadRequest(
            f"there is no building for {word!r:.40}", hint=f"one of: {_list_capabilities()}"
        )
    return number


def _list_capabilities() -> str:
    return ", ".join(f"sm{number}" for number in CAPABILITIES)


RangeLike = tuple[int, int] | tuple[int, int, int]


def make_ranges(dims: Mapping[str, RangeLike] | Iterable[str]) -> dict[str, Range]:
    """Dims as Python or the command line gives them."""
    if not isinstance(dims, Mapping):
        return parse_dims(dims)
    try:
        return {name: Range(*sizes) for name, sizes in dims.items()}
    except TypeError as error:
        hint = "give each as (min, max), or (min, max, step)"
        raise BadDim(f"dims are {dims!r:.200}", hint=hint) from error


def parse_dims(texts: Iterable[str]) -> dict[str, Range]:
    """Read `name=min:max` or `name=min:max:step` words, as `--dim` takes them.

    Raises:
        BadDim: a word is malformed, or names a dim twice.
    """
    dims: dict[str, Range] = {}
    for text in texts:
        match = re.fullmatch(r"([a-z][a-z0-9_]*)=(\d{1,9}):(\d{1,9})(?::(\d{1,9}))?", text)
        if match is None or match[1] in dims:
            what = "is malformed" if match is None else "gives its dim twice"
            hint = f"write it as --dim batch=1:32, or for one size alone as --dim {_fix(text)}"
            raise BadDim(f"--dim {text} {what}", hint=hint)
        dims[match[1]] = Range(int(match[2]), int(match[3]), int(match[4] or 1))
    return dims


def _fix(text: str) -> str:
    """The dim of a word that has one size, as a range of this size; of another an example."""
    match = re.fullmatch(r"([a-z][a-z0-9_]*)=(\d{1,9})", text)
    return f"{match[1]}={match[2]}:{match[2]}" if match else "seq=20:20"


def make_bucket_ranges(
    buckets: Iterable[Mapping[str, RangeLike] | str],
) -> tuple[dict[str, Range], ...]:
    """Buckets as Python or the command line gives them."""
    return tuple(make_ranges(b.split(",") if isinstance(b, str) else b) for b in buckets)
