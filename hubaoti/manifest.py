"""The manifest: what an artifact holds, was built from, and needs (`hubaoti.json`, schema 1).

It is written as RFC 8785 canonical JSON, so that one artifact has one digest; a file that is not
its own canonical form is refused. Everything here comes from outside sooner or later: types,
patterns and cross-references are checked once, when a manifest is read, so nothing else has to.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec

from hubaoti.canonical import canonical, digest_of
from hubaoti.consistency import MANIFEST, contradictions
from hubaoti.errors import BadManifest, NewerSchema
from hubaoti.extents import PATTERN
from hubaoti.match import KernelPin, Requirements
from hubaoti.variant import Recipe, Variant

SCHEMA = 1
FILENAME = MANIFEST
LARGEST = 16 << 20  # bytes of a manifest; the one of an 80-layer model is some hundred kB
# What is raised of a text that is no manifest, by msgspec, by ours and by the canonical form.
MALFORMED = (msgspec.MsgspecError, BadManifest, ValueError, RecursionError)

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Size = Annotated[int, msgspec.Meta(ge=0)]
# A relative path below the bundle: no empty, hidden, `.` or `..` segment, no backslash, no colon.
SafePath = Annotated[
    str,
    msgspec.Meta(pattern=r"^[A-Za-z0-9_+-][A-Za-z0-9_.+-]*(/[A-Za-z0-9_+-][A-Za-z0-9_.+-]*)*\Z"),
]
MemberPath = Annotated[
    str,
    msgspec.Meta(pattern=r"^(?!.*(^|/)\.{1,2}(/|\Z))[A-Za-z0-9_.+-]+(/[A-Za-z0-9_.+-]+)*\Z"),
]
Dim = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]*\Z")]
Dtype = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]*\Z")]
Extents = tuple[Annotated[str, msgspec.Meta(pattern=PATTERN)] | Size, ...]


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
        return digest_of(msgspec.to_builtins(self))

    @property
    def tag(self) -> str:
        """The repo tag under which all artifacts of this program are found."""
        return f"hubaoti-program-{self.digest[:12]}"


class Build(Record, frozen=True, kw_only=True):
    """The options it was built with; what is at its default is written all the same."""

    regions: str
    dims: dict[Dim, tuple[int, int, int]]
    dtype: Dtype
    attention: str
    quantization: str | None = None
    mode: str = "default"
    buckets: tuple[dict[Dim, tuple[int, int]], ...] = ()
    options: dict[str, Any] = {}


class Target(Record, frozen=True, kw_only=True):
    """The kind of host it was built for."""

    device: Literal["cpu", "cuda"]
    os: str
    level: str
    torch: str
    git: str
    cuda: str | None = None
    sm: int | None = None


class Source(Record, frozen=True, kw_only=True):
    """Where the model came from; not in the key."""

    model: str
    commit: str | None = None
    subfolder: str | None = None


class File(Record, frozen=True, kw_only=True):
    """A file by its path below the bundle and its bytes."""

    path: SafePath
    sha256: Sha256
    size: Size


class Member(Record, frozen=True, kw_only=True):
    """An entry of a `.pt2` that may be unpacked."""

    path: MemberPath
    sha256: Sha256
    size: Size


class Input(Record, frozen=True, kw_only=True):
    """A tensor that a graph takes. `shape` has sizes, dims, and extents that follow from dims.

    `values` says what the numbers mean: `ids<N` (below N), `mask` (true, 1 or 0.0 where to look),
    `position` (counting on along the last axis) or `real`. A mutated input is written in place.
    """

    name: str
    dtype: Dtype
    shape: Extents
    layout: Literal["contiguous"] = "contiguous"
    values: Annotated[str, msgspec.Meta(pattern=r"^(ids<[0-9]+|mask|position|real)\Z")]
    mutated: bool = False


class Output(Record, frozen=True, kw_only=True):
    """A tensor that a graph returns; a size is None where it is neither a dim nor fixed."""

    name: str
    dtype: Dtype
    shape: tuple[Annotated[str, msgspec.Meta(pattern=PATTERN)] | Size | None, ...]


class Outputs(Record, frozen=True, kw_only=True):
    """The tensors a graph returns, and the template that puts them back in their places."""

    template: Any
    tensors: tuple[Output, ...]


class Origin(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Where a constant's values come from: the model's checkpoint, or a file of the artifact.

    `checkpoint` gives tensor names in the order to try them. `transform` is None where that tensor
    is the constant; otherwise it names how the constant is made: by `runtime.quantize.make` of that
    tensor in `dtype`, or by transformers while loading, which a plain reader of the checkpoint
    cannot do. `file` ships with the artifact, the constant in it is
    called by its `fqn`. `module` is its name in the module that the graph serves, which holds it
    without a checkpoint having it. For a graph that serves several modules, names of a checkpoint
    are relative to the module's own.
    """

    checkpoint: tuple[str, ...] = ()
    transform: str | None = None
    dtype: Dtype | None = None
    file: SafePath | None = None
    module: str | None = None


class Constant(Record, frozen=True, kw_only=True):
    """A tensor that is bound to a graph before its first call."""

    fqn: str
    aliases: tuple[str, ...] = ()
    dtype: Dtype
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    origin: Origin = msgspec.field(name="from")
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


class Graph(Record, frozen=True, kw_only=True):
    """One region, compiled: its package, whom it serves, what it takes, gives and needs bound.

    `bounds` are the smallest and largest size of each dim, `steps` what its size is a multiple of.
    Of the graphs that serve a module, the first by `order` whose bounds hold a call serves it.
    """

    id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")]
    file: SafePath
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


class Check(Record, frozen=True, kw_only=True):
    """One comparison with eager: at which dims, how far apart, and what was allowed."""

    graph: str
    dims: dict[Dim, int]
    asked: dict[Dim, int] | None = None
    max_absolute: float
    max_relative: float
    tolerance: float
    capped: str | None = None


class Built(Record, frozen=True, kw_only=True):
    """When and how it was built; in the digest, not in the key."""

    at: str
    seconds: float
    peak_bytes: Size
    host: str
    hubaoti: str
    transformers: str


class Manifest(Record, frozen=True, kw_only=True):
    """All there is to know about an artifact."""

    schema: int = SCHEMA
    program: Program
    build: Build
    target: Target
    key: Sha256
    source: Source
    requires: Requirements
    graphs: tuple[Graph, ...]
    kernels: tuple[KernelPin, ...] = ()
    files: tuple[File, ...] = ()
    checks: tuple[Check, ...] = ()
    built: Built

    @property
    def recipe(self) -> Recipe:
        """How the graphs were built, as a label; the user's own part of it is in the path only."""
        return recipe_of(self.build)

    @property
    def variant(self) -> Variant:
        """The kind of host the graphs were built for, as a label."""
        return variant_of(self.target)

    @property
    def size(self) -> int:
        """Bytes of the artifact's files, the manifest left out."""
        return sum(file.size for file in self.all_files())

    def all_files(self) -> tuple[File, ...]:
        """Every file beside the manifest: the graphs' packages, then the small tensors."""
        packages = (File(path=g.file, sha256=g.sha256, size=g.size) for g in self.graphs)
        return (*packages, *self.files)

    def to_json(self) -> bytes:
        """The canonical form; its sha256 is the artifact's digest."""
        return canonical(msgspec.to_builtins(self))

    @property
    def digest(self) -> str:
        """The artifact's digest."""
        return hashlib.sha256(self.to_json()).hexdigest()


def recipe_of(build: Build) -> Recipe:
    """How graphs are built, as a label."""
    return Recipe(build.dtype, build.attention, build.quantization)


def variant_of(target: Target) -> Variant:
    """The kind of host that graphs are built for, as a label."""
    torch = ".".join(target.torch.split("+")[0].split(".")[:2])
    return Variant(torch, target.cuda, target.sm, target.level, target.os)


# msgspec learns a type when it is first used, and two threads that meet there end the process.
msgspec.json.Decoder(Manifest)


def key_of(program: Program, build: Build, target: Target) -> str:
    """The key: "is this already built?" Two honest builds of one key may differ in digest."""
    parts = {"program": program, "build": build, "target": target}
    return digest_of(msgspec.to_builtins(parts))


def parse(text: bytes, where: str) -> Manifest:
    """Read a manifest that came from `where` (a path or URL, for messages).

    Raises:
        NewerSchema: it was written for a schema that this hubaoti does not know.
        BadManifest: it is no manifest, not canonical, or contradicts itself.
    """
    hint = "compile the bundle again, or pull it again if it came from a repo"
    if len(text) > LARGEST:
        raise BadManifest(f"the manifest {where} is larger than {LARGEST >> 20} MiB", hint=hint)
    try:
        value = msgspec.json.decode(text)
        refuse_newer(value, where)
        manifest = msgspec.convert(value, Manifest)
        same = manifest.to_json() == text
    except NewerSchema:
        raise
    except MALFORMED as why:
        raise BadManifest(f"{where} is not a manifest: {why!s:.300}", hint=hint) from why
    if not same:
        raise BadManifest(f"{where} is not in canonical form: it was edited", hint=hint)
    problems = contradictions(manifest)
    if manifest.key != key_of(manifest.program, manifest.build, manifest.target):
        problems.insert(0, "the key is not the one of its program, build and target")
    if problems:
        raise BadManifest(f"{where} contradicts itself: {'; '.join(problems)}", hint=hint)
    return manifest


def refuse_newer(value: Any, where: str) -> None:
    """Say so when a newer hubaoti wrote this, before its fields look like nonsense."""
    schema = value.get("schema") if isinstance(value, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise NewerSchema(
            f"{where} has schema {schema}; this hubaoti reads up to {SCHEMA}",
            hint="upgrade hubaoti: pip install -U hubaoti",
        )
    if schema != SCHEMA:
        raise ValueError(f"schema is {schema!r}, not {SCHEMA}")
