"""The manifest: what an artifact holds, was built from, and needs (`hubaoti.json`).

It is written as RFC 8785 canonical JSON, so that one artifact has one digest; a file that is not
its own canonical form is refused. Everything here comes from outside sooner or later: types,
patterns and cross-references are checked once, when a manifest is read, so nothing else has to.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from hubaoti.artifact.asked_sizes import find_size_problems
from hubaoti.artifact.canonical import encode_canonical, is_canonical
from hubaoti.artifact.graph_problems import find_graph_problems
from hubaoti.artifact.kernel_pin import KernelPin
from hubaoti.artifact.kernel_variant import KernelHost
from hubaoti.artifact.requirements import Requirements
from hubaoti.artifact.schema import (
    Build,
    BuildRecord,
    Check,
    File,
    Graph,
    ModelSource,
    Program,
    Record,
    Sha256,
    Target,
    compute_key,
)
from hubaoti.artifact.variant import Recipe, Variant
from hubaoti.errors import BadManifest, BadRequest, NewerSchema
from hubaoti.escape import LONGEST, escape_line

_SCHEMA = 4  # the newest that is read; what is written has the oldest that can say it
FILENAME = "hubaoti.json"
# An honest manifest is far below these: the one of an 80-layer model is some hundred kB.
LARGEST_MANIFEST = 16 << 20  # bytes
MOST_VALUES = 400_000  # of JSON
MOST_GRAPHS = 4096
_MOST_FILES = 10_000  # beside the graphs' packages
MOST_MEMBERS = 50_000  # of all packages together
# What graphs of a whole model answer, by their task.
_ANSWERS = {"embed": "embedding", "classify": "logits", "logits": "logits"}
_TOLD = 9  # problems that are told of one manifest
# What is raised of a text that is no manifest, by msgspec, by ours and by the canonical form.
_MALFORMED = (msgspec.MsgspecError, BadManifest, ValueError, RecursionError)


class Manifest(Record, frozen=True, kw_only=True):
    """All there is to know about an artifact."""

    schema: int = 1
    program: Program
    build: Build
    target: Target
    key: Sha256
    source: ModelSource
    requires: Requirements
    graphs: tuple[Graph, ...]
    kernels: tuple[KernelPin, ...] = ()
    files: tuple[File, ...] = ()
    checks: tuple[Check, ...] = ()
    built: BuildRecord

    @property
    def recipe(self) -> Recipe:
        """How the graphs were built, as a label; the user's own part of it is in the path only."""
        return label_recipe(self.build)

    @property
    def variant(self) -> Variant:
        """The kind of host the graphs were built for, as a label."""
        return label_variant(self.target)

    @property
    def is_whole(self) -> bool:
        """Whether its one graph is a whole model, which answers without the model's own code."""
        return len(self.graphs) == 1 and self.graphs[0].modules == ("",)

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
        return encode_canonical(msgspec.to_builtins(self))

    @property
    def digest(self) -> str:
        """The artifact's digest: the sha256, in hex, of its manifest's canonical form."""
        return hashlib.sha256(self.to_json()).hexdigest()


def label_recipe(build: Build) -> Recipe:
    """How graphs are built, as a label."""
    return Recipe(build.dtype, build.attention, build.quantization)


def label_variant(target: Target) -> Variant:
    """The kind of host that graphs are built for, as a label."""
    torch = ".".join(target.torch.split("+")[0].split(".")[:2])
    return Variant(torch, target.cuda, target.sm, target.level, target.os)


class _Head(msgspec.Struct):
    """What is read of a manifest before anything else is believed of it."""

    schema: Any = None


# msgspec learns a type when it is first used, and two threads that meet there end the process.
_DECODER, _HEAD_DECODER = msgspec.json.Decoder(Manifest), msgspec.json.Decoder(_Head)


def parse_manifest(text: bytes, where: str, is_known: bool = False) -> Manifest:
    """Read a manifest that came from `where` (a path or URL, for messages).

    Of one that is known by its digest the form was looked at before, which no later hubaoti sees
    otherwise; all else is looked at again.

    Raises:
        NewerSchema: it was written for a schema that this hubaoti does not know.
        BadManifest: it is no manifest, not canonical, or contradicts itself.
    """
    hint = "compile the bundle again, or pull it again if it came from a repo"
    if len(text) > LARGEST_MANIFEST:
        raise BadManifest(
            f"the manifest {where} is larger than {LARGEST_MANIFEST >> 20} MiB", hint=hint
        )
    if sum(text.count(sign) for sign in (b",", b"[", b"{")) > MOST_VALUES:
        raise BadManifest(f"the manifest {where} has more than {MOST_VALUES} values", hint=hint)
    try:
        manifest = _decode(text, where)
        same = is_known or is_canonical(text, msgspec.to_builtins(manifest))
        problems = _find_contradictions(manifest) if same else []
    except NewerSchema:
        raise
    except _MALFORMED as error:
        raise BadManifest(
            f"{where} is not a manifest: {escape_line(str(error))}", hint=hint
        ) from error
    if not same:
        raise BadManifest(f"{where} is not in canonical form: it was edited", hint=hint)
    if manifest.key != compute_key(manifest.program, manifest.build, manifest.target):
        problems.insert(0, "the key is not the one of its program, build and target")
    if problems:
        raise BadManifest(f"{where} contradicts itself: {_summarize_problems(problems)}", hint=hint)
    return manifest


def _decode(text: bytes, where: str) -> Manifest:
    """The text as a manifest, unless a newer hubaoti wrote it: its fields would look like nonsense.

    Raises:
        NewerSchema: one did. msgspec.MsgspecError, ValueError, RecursionError: it is none.
    """
    try:
        manifest = _DECODER.decode(text)
    except msgspec.MsgspecError:
        _refuse_newer(_HEAD_DECODER.decode(text).schema, where)
        raise
    _refuse_newer(manifest.schema, where)
    return manifest


def _summarize_problems(problems: Sequence[str]) -> str:
    """Some of the problems, as many as a person reads."""
    more = [f"and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
    return "; ".join([escape_line(problem, LONGEST) for problem in problems[:_TOLD]] + more)


def _refuse_newer(schema: Any, where: str) -> None:
    """Refuse a schema that is none, or that only a newer hubaoti knows."""
    if isinstance(schema, int) and schema > _SCHEMA:
        raise NewerSchema(
            f"{where} has schema {escape_line(str(schema))}; this hubaoti reads up to {_SCHEMA}",
            hint="upgrade hubaoti: pip install -U hubaoti",
        )
    if schema not in range(1, _SCHEMA + 1) or isinstance(schema, bool):
        raise ValueError(f"schema is {schema!r:.80}, not 1 to {_SCHEMA}")


def _find_contradictions(manifest: Manifest) -> list[str]:
    """What cannot be true together; a good manifest has none."""
    found = []
    if not manifest.graphs:
        found.append("it lists no graph")
    kernels = manifest.requires.kernels
    if manifest.schema != (schema := find_oldest_schema(manifest.build, manifest.graphs, kernels)):
        found.append(f"its schema is {manifest.schema}, what it says is of schema {schema}")
    found += _find_excesses(manifest)
    found += _find_unspeakable_labels(manifest)
    found += _find_other_task(manifest)
    found += _find_clashing_files(manifest)
    found += _find_requirement_clashes(manifest)
    found += _find_kernel_clashes(manifest)
    for graph in manifest.graphs:
        found += find_graph_problems(graph)
    found += find_size_problems(manifest.build, manifest.graphs)
    return found


def find_oldest_schema(
    build: Build, graphs: Iterable[Graph], kernels: Iterable[KernelPin] = ()
) -> int:
    """The oldest schema that can say how graphs were built, what they take and leave, and call."""
    graphs = tuple(graphs)
    newest = (
        each for graph in graphs for each in (graph.masks, graph.not_fa3, graph.ops, graph.schemas)
    )
    if any(each is not msgspec.UNSET for each in newest) or any(pin.build for pin in kernels):
        return 4
    if build.kernels is not msgspec.UNSET or any(graph.unmasked is True for graph in graphs):
        return 3
    return 2 if any(_needs_second_schema(graph) for graph in graphs) else 1


def _needs_second_schema(graph: Graph) -> bool:
    """Whether a graph leaves something in its call, or its call has words of schema 2."""
    args, kwargs = graph.call.get("args"), graph.call.get("kwargs")
    templates = [args, {"dict": kwargs}, graph.outputs.template]
    return graph.outputs.writes is not msgspec.UNSET or any(map(_has_new_words, templates))


def _has_new_words(template: Any) -> bool:
    """Whether a template has a dictionary whose keys are no words, or a float without a part."""
    if isinstance(template, list):
        return any(map(_has_new_words, template))
    if not isinstance(template, dict):
        return False
    inner: Any = template.get("dict", template.get("fields", template.get("tuple", ())))
    each = inner.values() if isinstance(inner, dict) else inner
    new = "items" in template or "float" in template
    return new or (isinstance(inner, (dict, list)) and any(map(_has_new_words, each)))


def _find_excesses(manifest: Manifest) -> list[str]:
    """What it lists so many of that each would cost whoever only reads it."""
    counted = {
        "graphs": (len(manifest.graphs), MOST_GRAPHS),
        "files": (len(manifest.files), _MOST_FILES),
        "members": (sum(len(graph.members) for graph in manifest.graphs), MOST_MEMBERS),
    }
    return [
        f"it lists {count} {what}, at most {most} are read"
        for what, (count, most) in counted.items()
        if count > most
    ]


def _find_unspeakable_labels(manifest: Manifest) -> list[str]:
    """A recipe or a variant that has no name, and so no path in a repo."""
    found = []
    for name in ("recipe", "variant"):
        try:
            getattr(manifest, name)
        except BadRequest as error:
            found.append(f"its {name}: {error}")
    return found


def _find_other_task(manifest: Manifest) -> list[str]:
    """A task that is not what the program ends with, or not what its one graph is said to answer.

    Whoever edits a task may edit these, too: a digest that is trusted, or a signature, says more.
    """
    task, steps = manifest.program.task, manifest.program.steps
    found = []
    if steps and task != "embed":
        found.append(f"its task is {task}, its program ends with {', '.join(steps)}, as of embed")
    names = [item.name for graph in manifest.graphs for item in graph.outputs.tensors]
    if manifest.is_whole and task in _ANSWERS and names and names != [_ANSWERS[task]]:
        found.append(f"its task is {task}, its graph answers {', '.join(names)}")
    return found


def _find_clashing_files(manifest: Manifest) -> list[str]:
    """Paths that two files share, and constants from files that are not listed."""
    paths = {file.path for file in manifest.all_files()}
    listed = [*(file.path for file in manifest.all_files()), FILENAME]
    ids = [graph.id for graph in manifest.graphs]
    found = [f"{path} is listed twice" for path in _find_repeated_names(listed)]
    found += [f"graph {name} is listed twice" for name in _find_repeated_names(ids)]
    for graph in manifest.graphs:
        members = [member.path for member in graph.members]
        found += [
            f"{graph.id}: member {path} is listed twice" for path in _find_repeated_names(members)
        ]
        files = {c.origin.file for c in graph.constants if c.origin.file}
        found += [f"{graph.id}: constants from {f}, not listed" for f in sorted(files - paths)]
    return found


def _find_requirement_clashes(manifest: Manifest) -> list[str]:
    """`requires`, `target` and the graphs describe one host; where they speak they must agree."""
    target, needs = manifest.target, manifest.requires
    found = [
        f"target.{name} is {getattr(target, name)}, requires.{name} is {getattr(needs, name)}"
        for name in ("device", "os", "level", "torch", "cuda", "sm")
        if getattr(target, name) != getattr(needs, name)
    ]
    for graph in manifest.graphs:
        code = graph.device_code
        if isinstance(code, msgspec.UnsetType):
            continue
        if code.capability != target.sm:
            found.append(f"target.sm is {target.sm}, {graph.id} has code for {code.capability}")
        if code.shared_memory > (needs.shared_memory or 0):
            found.append(
                f"requires.shared_memory is {needs.shared_memory}, {graph.id} takes "
                f"{code.shared_memory}"
            )
    return found


def _find_kernel_clashes(manifest: Manifest) -> list[str]:
    """Kernels that are pinned twice, for another host than the graphs, or elsewhere than needed."""
    target, pins = manifest.target, manifest.requires.kernels
    found = [f"kernel {name} is pinned twice" for name in _find_repeated_names([*map(str, pins)])]
    if manifest.kernels and manifest.kernels != pins:
        found.append("kernels are not requires.kernels")
    if sum(pin.build is not None for pin in pins) > 1:
        found.append("several kernels are pinned, of which a process has one")
    host = KernelHost(target.torch, target.cuda, target.level, target.os)
    for pin in pins:
        found += [
            f"kernel {pin} is for {each}, the graphs are not" for each in pin.list_misfits(host)
        ]
        if pin.build and target.sm is not None and not pin.supports(target.sm):
            found.append(f"target.sm is {target.sm}, kernel {pin} is for {pin.describe_archs()}")
    return found


def _find_repeated_names(names: list[str]) -> list[str]:
    """The names that stand more than once, compared as a case-folding disk would."""
    counted = Counter(name.casefold() for name in names)
    return sorted(name for name, times in counted.items() if times > 1)
