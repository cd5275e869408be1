"""The records of a manifest, schemas 1 and 2: types, patterns and bounds of every field.

Everything here comes from outside sooner or later, so a field that is malformed, or that no schema
has, is refused when it is read.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from hubaoti.artifact.canonical import digest_canonical
from hubaoti.artifact.dim_expr import PATTERN

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Size = Annotated[int, msgspec.Meta(ge=0)]
# A path below a bundle, or in a package. Of so many folders, and so long, at most: what is unpacked
# by strangers' paths has to be removed again, and that is done folder by folder.
LONGEST_PATH = 1024  # bytes, all of them ASCII
LONGEST_PART = 255
MOST_FOLDERS = 16
_CHARACTERS = r"[A-Za-z0-9_.+-]"
_PART = rf"{_CHARACTERS}{{1,{LONGEST_PART}}}"
_PLAIN_PART = rf"[A-Za-z0-9_+-]{_CHARACTERS}{{0,{LONGEST_PART - 1}}}"
# No empty, hidden, `.` or `..` segment, no backslash, no colon.
_SafePath = Annotated[
    str,
    msgspec.Meta(
        pattern=rf"^{_PLAIN_PART}(/{_PLAIN_PART}){{0,{MOST_FOLDERS}}}\Z", max_length=LONGEST_PATH
    ),
]
_MemberPath = Annotated[
    str,
    msgspec.Meta(
        pattern=rf"^(?!.*(^|/)\.{{1,2}}(/|\Z)){_PART}(/{_PART}){{0,{MOST_FOLDERS}}}\Z",
        max_length=LONGEST_PATH,
    ),
]
Dim = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]*\Z")]
_Dtype = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]*\Z")]
_Expression = Annotated[str, msgspec.Meta(pattern=PATTERN, max_length=1000)]
_Op = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]*::[a-z][a-z0-9_]*\Z")]
# An op with its overload, and the rest of its schema: `(Tensor x, float by) -> Tensor`.
LONGEST_SCHEMA = 8000
_OpName = Annotated[
    str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.]+::[A-Za-z0-9_.]+\Z", max_length=LONGEST_PATH)
]
_OpSchema = Annotated[str, msgspec.Meta(pattern=r"^\([\x20-\x7e]+\Z", max_length=LONGEST_SCHEMA)]
_OpSchemas = Annotated[dict[_OpName, _OpSchema], msgspec.Meta(min_length=1, max_length=1000)]
_DimExprs = tuple[_Expression | Size, ...]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen record of the manifest; a field that schema 1 does not have is refused."""


class Program(Record, frozen=True, kw_only=True):
    """What is computed, whatever the weights: all fine-tunes of a model have one program."""

    config: dict[str, Any]
    code: Sha256
    task: Literal["embed", "classify", "logits", "generate", "forward"]
    steps: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """The sha256 of the program's canonical form."""
        return digest_canonical(msgspec.to_builtins(self))

    @property
    def tag(self) -> str:
        """The repo tag under which all artifacts of this program are found."""
        return f"hubaoti-program-{self.digest[:12]}"


class Build(Record, frozen=True, kw_only=True):
    """The options it was built with; what is at its default is written all the same.

    `version` is that of what hubaoti itself puts into graphs, as `compiler.job` has it. `layout`
    names the loaders that graphs were made for, where those know no manifest. `kernels` are those
    that attention may have on a GPU, the first that fits a call.
    """

    regions: str
    dims: dict[Dim, tuple[int, int, int]]
    dtype: _Dtype
    attention: str
    quantization: str | None = None
    mode: str = "default"
    buckets: tuple[dict[Dim, tuple[int, int]], ...] = ()
    options: dict[str, Any] = {}
    version: int = 1
    layout: Literal["zerogpu"] | msgspec.UnsetType = msgspec.UNSET  # else not in the key
    kernels: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET  # else not in the key


class Target(Record, frozen=True, kw_only=True):
    """The kind of host it was built for."""

    device: Literal["cpu", "cuda"]
    os: str
    level: str
    torch: str
    git: str
    cuda: str | None = None
    sm: int | None = None


class ModelSource(Record, frozen=True, kw_only=True):
    """Where the model came from; not in the key."""

    model: str
    commit: str | None = None
    subfolder: str | None = None


class File(Record, frozen=True, kw_only=True):
    """A file by its path below the bundle and its bytes."""

    path: _SafePath
    sha256: Sha256
    size: Size


class Member(Record, frozen=True, kw_only=True):
    """An entry of a `.pt2` that may be unpacked."""

    path: _MemberPath
    sha256: Sha256
    size: Size


class Input(Record, frozen=True, kw_only=True):
    """A tensor that a graph takes. `shape` has sizes, dims, and extents that follow from dims.

    `values` says what the numbers mean: `ids<N` (below N), `mask` (true, 1 or 0.0 where to look),
    `position` (counting on along the last axis), `real`, or `any<N`: whole numbers of which nothing
    is known but that those below N may be given. A mutated input is written in place.
    """

    name: str
    dtype: _Dtype
    shape: _DimExprs
    layout: Literal["contiguous"] = "contiguous"
    values: Annotated[str, msgspec.Meta(pattern=r"^((ids|any)<[0-9]+|mask|position|real)\Z")]
    mutated: bool = False


class Output(Record, frozen=True, kw_only=True):
    """A tensor that a graph returns; a size is None where it is neither a dim nor fixed."""

    name: str
    dtype: _Dtype
    shape: tuple[_Expression | Size | None, ...]


class Write(Record, frozen=True, kw_only=True):
    """What a graph leaves in a list or a dictionary that its call gives, all of it and in order.

    `into` is where that stands in the call: the argument's name, then keys and places. An item's
    template has one more word than an answer's: `{"given": path}`, what the call gives at a path.
    """

    into: tuple[str | int, ...]
    items: tuple[tuple[str | int, Any], ...]


class Outputs(Record, frozen=True, kw_only=True):
    """The tensors a graph returns, and the template that puts them back in their places.

    `writes` is what is put into the containers of the call, since schema 2.
    """

    template: Any
    tensors: tuple[Output, ...]
    writes: tuple[Write, ...] | msgspec.UnsetType = msgspec.UNSET


class ConstantOrigin(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Where a constant's values come from: the model's checkpoint, or a file of the artifact.

    `checkpoint` gives tensor names in the order to try them. `transform` is None where that tensor
    is the constant; otherwise it names how the constant is made: by
    `runtime.quantize.make_quantized` of that tensor in `dtype`, or by transformers while loading,
    which a plain reader of the checkpoint cannot do. `file` ships with the artifact, the constant
    in it is called by its `fqn`. `module` is its name in the module that the graph serves, which
    holds it without a checkpoint having it. For a graph that serves several modules, names of a
    checkpoint are relative to the module's own.
    """

    checkpoint: tuple[str, ...] = ()
    transform: str | None = None
    dtype: _Dtype | None = None
    file: _SafePath | None = None
    module: str | None = None


class Constant(Record, frozen=True, kw_only=True):
    """A tensor that is bound to a graph before its first call."""

    fqn: str
    aliases: tuple[str, ...] = ()
    dtype: _Dtype
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    origin: ConstantOrigin = msgspec.field(name="from")
    shared_by_all_modules: bool = False


class Cache(Record, frozen=True, kw_only=True):
    """A layer's KV cache among a graph's inputs, by their places; it is written in place.

    `static`: the new keys and values go to `position`, and what is looked at are the first
    `filled` places, the size of the mask's last axis; `filled` is at most `cache`. `sliding`: the
    cache is full, the oldest entries leave it, and what is looked at are `cache+seq-1` places.
    """

    kind: Literal["static", "sliding"]
    keys: Size
    values: Size
    position: Size | None = None
    window: Size | None = None


class Golden(Record, frozen=True, kw_only=True):
    """The answers in `golden.safetensors`: at which dims, how near, with how much memory (bytes).

    Tolerances are by tensor, each a part of the tensor's largest value; the tensors of the file
    are called `<graph>/<tensor>`.
    """

    dims: dict[Dim, int]
    tolerances: dict[str, float]
    memory: Size


class Direct(Record, frozen=True, kw_only=True):
    """The package itself takes the module's own call and gives its answer, without a manifest.

    `every` is the list whose children are the graph's modules, all of them; `absent` are constants
    that the `state_dict` of such a module does not have.
    """

    every: str | None = None
    absent: tuple[str, ...] = ()


class DeviceCode(Record, frozen=True, kw_only=True):
    """What the GPU kernels of a graph are and take, the most of any: read from their cubins.

    `capability` is 90 for 9.0; `registers` of a thread, `local_bytes` of a thread's own memory,
    `shared_memory` bytes of a block.
    """

    capability: Size
    kernels: Size
    registers: Size
    local_bytes: Size
    shared_memory: Size


class Graph(Record, frozen=True, kw_only=True):
    """One region, compiled: its package, whom it serves, what it takes, gives and needs bound.

    `bounds` are the smallest and largest size of each dim, `steps` what its size is a multiple of.
    Of the graphs that serve a module, the first by `order` whose bounds hold a call serves it. One
    that is `unmasked` does not look at its mask, and serves calls whose mask hides nothing. One
    with `masks` serves those whose mask says no more than it: `causal`, the last row sees all
    places and each row above it one less; or `padded`, the same but for places before a text.
    Where FlashAttention-3 was asked for, `not_fa3` is the attention that another kernel computes.
    `ops` are those of ours that its library asks torch's dispatcher for, by their names. `schemas`
    are of all ops that it asks for and that torch itself does not have, as they were registered
    where it was compiled: it gives them what they took then.
    """

    id: Annotated[
        str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\Z", max_length=LONGEST_PART)
    ]
    file: _SafePath
    sha256: Sha256
    size: Size
    members: tuple[Member, ...]
    modules: tuple[str, ...]
    bounds: dict[Dim, tuple[int, int]]
    steps: dict[Dim, int] = {}
    order: int = 0
    call: dict[str, Any]
    inputs: tuple[Input, ...]
    outputs: Outputs
    constants: tuple[Constant, ...]
    cache: Cache | None = None
    golden: Golden | None = None
    direct: Direct | msgspec.UnsetType = msgspec.UNSET  # not in what was compiled before it was
    unmasked: Literal[True] | msgspec.UnsetType = msgspec.UNSET
    device_code: DeviceCode | msgspec.UnsetType = msgspec.UNSET  # of a GPU
    not_interpreted: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET  # of a GPU, where some was
    masks: Literal["causal", "padded"] | msgspec.UnsetType = msgspec.UNSET
    not_fa3: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    ops: tuple[_Op, ...] | msgspec.UnsetType = msgspec.UNSET
    schemas: _OpSchemas | msgspec.UnsetType = msgspec.UNSET


class Check(Record, frozen=True, kw_only=True):
    """One comparison with eager: at which dims, how far apart, and what was allowed.

    Of a graph for a GPU `where` says what was compared: its program on a CPU (`cpu`) with eager, in
    another `dtype` where one stands, or the package itself with that program, its kernels
    interpreted (`interpreted`). Without it, the graph itself answered on its device.
    """

    graph: str
    dims: dict[Dim, int]
    asked: dict[Dim, int] | None = None
    max_absolute: float
    max_relative: float
    tolerance: float
    capped: str | None = None
    where: Literal["cpu", "interpreted"] | msgspec.UnsetType = msgspec.UNSET
    dtype: _Dtype | msgspec.UnsetType = msgspec.UNSET


class BuildRecord(Record, frozen=True, kw_only=True):
    """When and how it was built; in the digest, not in the key."""

    at: str
    seconds: float
    peak_bytes: Size
    host: str
    hubaoti: str
    transformers: str


def compute_key(program: Program, build: Build, target: Target) -> str:
    """The key: "is this already built?" Two honest builds of one key may differ in digest."""
    parts = {"program": program, "build": build, "target": target}
    return digest_canonical(msgspec.to_builtins(parts))
