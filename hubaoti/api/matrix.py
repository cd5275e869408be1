"""A table of builds, and the repos that they go to: what those lack is compiled and pushed.

[[build]]
model = "sentence-transformers/all-MiniLM-L6-v2"
repo = "acme/minilm-compiled"
for = ["cpu", "sm80", "sm90"]
recipe = "bfloat16-sdpa"
dims = { batch = [1, 32], seq = [1, 256] }
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec

from hubaoti.api.building import Explanation, Means, build_missing, explain_jobs
from hubaoti.api.compiling import make_request, make_request_for
from hubaoti.api.filling import compile_alone, find_in_repo, read_recipe
from hubaoti.api.publishing import push
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.variant import Recipe, Variant
from hubaoti.compiler.request import CompileRequest, parse_capabilities
from hubaoti.errors import BadRequest, Conflict, HubaotiError
from hubaoti.flags import require_flags
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import ArtifactPath, RepoRef
from hubaoti.hub.push import Destination
from hubaoti.hub.signing import Signing
from hubaoti.hub.zerogpu import artifact_branch
from hubaoti.mirror import Mirror
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import Settings

if TYPE_CHECKING:
    from hubaoti.api.compiling import CompileOptions

_CPU, _FA3 = "cpu", "fa3"
_LARGEST = 1 << 20  # bytes of a table
_Dims = dict[str, tuple[int, ...]]
_EXAMPLE = 'write each as [[build]] with model = "…", repo = "owner/name", for = ["sm80", "sm90"]'

State = Literal["there", "missing", "pushed", "failed"]


class Entry(msgspec.Struct, frozen=True, kw_only=True, rename={"kinds": "for"}):
    """One [[build]]: a model, the repo that it goes to, for which kinds of host, and how.

    `kinds` are `cpu` and GPUs; `recipe` says dtype, attention, quantization and label at once. All
    else is an option of `compile`, by its name there.
    """

    model: str
    repo: str
    kinds: tuple[str, ...] = (_CPU,)
    recipe: str | None = None
    task: str | None = None
    dims: _Dims | tuple[str, ...] | None = None
    buckets: tuple[_Dims | str, ...] | None = None
    regions: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    attention: str | tuple[str, ...] | None = None
    kernel: str | None = None
    mode: str | None = None
    inductor: dict[str, Any] | tuple[str, ...] | None = None
    level: str | None = None
    layout: str | None = None
    revision: str | None = None
    trust_remote_code: bool | None = None

    @property
    def gpus(self) -> tuple[str, ...]:
        """Those of its kinds that are GPUs."""
        return tuple(kind for kind in self.kinds if kind != _CPU)

    @property
    def label(self) -> str | None:
        """The user's own part of the path in the repo."""
        return None if self.recipe is None else Recipe.parse(self.recipe).label

    @property
    def options(self) -> dict[str, Any]:
        """What `compile` is told.

        Raises:
            BadRequest: the recipe is malformed, or says what another word says, too.
        """
        own = {"model", "repo", "kinds", "recipe"}
        given = ((name, getattr(self, name)) for name in self.__struct_fields__ if name not in own)
        options = {name: value for name, value in given if value is not None}
        if self.recipe is None:
            return options
        said = read_recipe(Recipe.parse(self.recipe))
        if twice := said.keys() & options:
            raise BadRequest(
                f"{', '.join(sorted(twice))} is said beside the recipe, which says it",
                hint="leave one of them out",
            )
        return options | said


@dataclass(frozen=True, slots=True)
class Outcome:
    """One build of a table, and what came of it; of one that could not be planned `path` is empty.

    `there`: the repo has its key. `missing`: it has not, and nothing was to be done; `built` says
    where it lies already. `pushed`: it was compiled, or found, and the repo has it now.
    """

    model: str
    repo: str
    kind: str
    state: State
    path: str = ""
    key: str = ""
    built: str | None = None
    error: HubaotiError | None = None


@dataclass(frozen=True, slots=True)
class _Cell:
    """One build: of an entry, for one kind of host, with one attention."""

    entry: Entry
    kind: str
    plan: Explanation

    @property
    def place(self) -> ArtifactPath:
        """Where it lies in its repo."""
        recipe = replace(Recipe.parse(self.plan.recipe), label=self.entry.label)
        return ArtifactPath(recipe, Variant.parse(self.plan.variant))

    @property
    def branch(self) -> str | None:
        """The branch that it goes to; None for the default one."""
        return None if self.entry.layout is None else artifact_branch(self.place)

    @property
    def options(self) -> dict[str, Any]:
        """What `compile` is told of it alone."""
        options = self.entry.options
        if self.place.recipe.attention == _FA3:
            return options | {"attention": _FA3}
        others = {name: value for name, value in options.items() if name != "kernel"}
        return others | ({"attention": "sdpa"} if "attention" in options else {})

    def describe(self, state: State, error: HubaotiError | None = None) -> Outcome:
        """What came of it."""
        entry, plan = self.entry, self.plan
        path = str(self.place)
        return Outcome(entry.model, entry.repo, self.kind, state, path, plan.key, plan.built, error)


def compile_matrix(  # noqa: PLR0913 - a face of keywords
    path: str | Path,
    *,
    dry_run: bool = False,
    jobs: int | None = None,
    sign: str | Path | None = None,
    certificates: str | Path | None = None,
    trust_config: str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> Iterator[Outcome]:
    """Compile each build of a table that its repo lacks, and push it; the outcomes, as they come.

    What a repo has, by its key, is not compiled again, and what was compiled and could not be
    pushed is found in the mirror: so a table that was interrupted goes on where it stopped. A build
    that fails is an outcome, and the others go on. With `dry_run` nothing is compiled or pushed.

    Args:
        path: a TOML file of `[[build]]` tables; `Entry` has their fields.
        jobs: graphs compiled at a time, as `compile` has it.
        sign, certificates, trust_config: with what each is signed that is pushed, as `push` has it.

    Raises:
        BadRequest: the file cannot be read, or has a field that there is not, or the key is none;
            nothing was begun.
        MissingDependency: they are to be signed, and the extra `sign` is not installed.
    """
    require_flags(dry_run=dry_run)
    means = Means(settings or Settings.from_env(), progress, at_once=jobs, own=True)
    options: dict[str, Any] = {}
    if sign is not None:
        Signing.parse(sign, certificates, trust_config)
        options = {"sign": sign, "certificates": certificates, "trust_config": trust_config}
    return _fill_entries(read_matrix(Path(path)), _Filling(means, options, dry_run))


@dataclass(frozen=True, slots=True)
class _Filling:
    """How a table is filled: by what means, with what options for `push`, or not at all."""

    means: Means
    options: Mapping[str, Any]
    dry_run: bool


def _fill_entries(entries: Sequence[Entry], filling: _Filling) -> Iterator[Outcome]:
    means = filling.means
    for entry in entries:
        try:
            cells = _plan_cells(entry, means)
        except HubaotiError as error:
            kinds = ",".join(entry.kinds)
            yield Outcome(entry.model, entry.repo, kinds, "failed", error=error)
            continue
        for cell in cells:
            try:
                yield cell.describe(_fill_cell(cell, filling))
            except HubaotiError as error:
                yield cell.describe("failed", error)


def _plan_cells(entry: Entry, means: Means) -> list[_Cell]:
    """The builds of an entry, with their keys; planned once for all its GPUs."""
    means.progress(f"planning {entry.model} for {', '.join(entry.kinds)}")
    cells = []
    if _CPU in entry.kinds:
        (plan,) = explain_jobs(entry.model, _read_request(entry.model, entry.options), None, means)
        cells.append(_Cell(entry, _CPU, plan))
    if entry.gpus:
        request = _read_request(entry.model, entry.options, entry.gpus)
        for plan in explain_jobs(entry.model, request, None, means):
            cells.append(_Cell(entry, f"sm{Variant.parse(plan.variant).sm}", plan))
    return cells


def _fill_cell(cell: _Cell, filling: _Filling) -> State:
    """See that a repo has a build.

    Raises:
        Conflict: it has another at that path; else as `compile` and `push`.
    """
    means, entry = filling.means, cell.entry
    settings, progress = means.settings, means.progress
    client = HubClient(settings, progress)
    if _is_there(client, cell):
        return "there"
    if filling.dry_run:
        return "missing"
    with (
        Mirror.open(settings.mirror) as mirror,
        compile_alone(cell.plan.key, mirror, settings, progress) as output,
    ):
        if _is_there(client, cell):  # who was faster
            return "there"
        progress(f"compiling {entry.model} for {cell.place}")
        bundle = _compile_cell(cell, output, means)
        options = {**filling.options, "label": entry.label, "layout": entry.layout}
        push(bundle, entry.repo, settings=settings, progress=progress, **options)
    return "pushed"


def _compile_cell(cell: _Cell, output: Path, means: Means) -> Bundle:
    """The bundle of one build, made on this machine: what others built, it does not publish."""
    model, gpus = cell.entry.model, () if cell.kind == _CPU else (cell.kind,)
    return build_missing(model, _read_request(model, cell.options, gpus), output, means)[0]


def _read_request(
    model: str, options: Mapping[str, Any], gpus: Sequence[str] = ()
) -> CompileRequest:
    """What is asked for, for some GPUs or for the CPU."""
    said = cast("CompileOptions", options)
    return make_request_for(gpus, said) if gpus else make_request(model, _CPU, said)


def _is_there(client: HubClient, cell: _Cell) -> bool:
    """Whether a repo has a build, by its key.

    Raises:
        Conflict: it has another at its path.
    """
    there = find_in_repo(client, cell.entry.repo, cell.place, cell.branch)
    if there is not None and there.key != cell.plan.key:
        raise Conflict(
            f"{cell.entry.repo} holds another artifact at {cell.place}: its key is "
            f"{there.key[:12]}, this one's {cell.plan.key[:12]}",
            hint=f'give the build a label of its own: recipe = "{cell.place.recipe}+NAME"',
        )
    return there is not None


def join_failures(outcomes: Sequence[Outcome]) -> HubaotiError | None:
    """One error for the builds that failed, of the first one's kind; None where none did."""
    failed = [each for each in outcomes if each.error is not None]
    if not failed:
        return None
    first = failed[0]
    assert first.error is not None
    return type(first.error)(
        f"{len(failed)} of {len(outcomes)} builds failed; the first, {first.model} for "
        f"{first.kind}: {first.error}",
        hint=f"{first.error.hint}; the same command goes on with what is missing",
    )


def read_matrix(path: Path) -> tuple[Entry, ...]:
    """The builds of a table, each of them looked at before any is begun.

    Raises:
        BadRequest: it cannot be read, has a field that there is not, or one of another type.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST >> 20} MiB")
        table = tomllib.loads(text.decode())
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} is no table of builds: {error}", hint=_EXAMPLE) from error
    _refuse_unknown(f"{path}", table, ("build",))
    builds = table.get("build")
    if not isinstance(builds, list) or not builds:
        raise BadRequest(f"{path} has no [[build]]", hint=_EXAMPLE)
    return tuple(_read_entry(f"{path}, build {at}", each) for at, each in enumerate(builds, 1))


def _read_entry(where: str, table: Any) -> Entry:
    """One [[build]] of a table, its options read as `compile` reads them."""
    if isinstance(table, Mapping):
        _refuse_unknown(where, table, Entry.__struct_encode_fields__)
    try:
        entry = msgspec.convert(table, Entry)
        _refuse_revision(repo := RepoRef.parse(entry.repo))
        Destination(repo, label=entry.label, layout=entry.layout)
        if entry.gpus or not entry.kinds:
            sms = parse_capabilities(entry.gpus)
            CompileRequest.parse({**entry.options, "capabilities": sms})
        if _CPU in entry.kinds:
            CompileRequest.parse(entry.options)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{where}: {error}", hint=_EXAMPLE) from error
    except HubaotiError as error:
        raise type(error)(f"{where}: {error}", hint=error.hint) from error
    return entry


def _refuse_revision(repo: RepoRef) -> None:
    """See that a build goes to a repo, and to no revision of one.

    Raises:
        BadRequest: it does.
    """
    if repo.revision is not None:
        raise BadRequest(
            f"what is built goes to the default branch, not to {repo}",
            hint=f'write it as repo = "{repo.repo}", and tag the repo when all of it is there',
        )


def _refuse_unknown(where: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    """See that a table has no field that nothing would read.

    Raises:
        BadRequest: it has; with the nearest that there is.
    """
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise BadRequest(
                f"{where} has the unknown field {name!r:.80}",
                hint=f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}",
            )
