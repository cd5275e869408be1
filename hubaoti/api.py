"""The verbs: where compiler, runtime, mirror and hub work together.

Nothing heavy is imported before a verb needs it: `pull` works without torch, a warm one without the
Hub's client.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from hubaoti.bundle import Bundle, whole_at
from hubaoti.compiling import evaluating, existing
from hubaoti.extras import require
from hubaoti.fetching import EAGER_FILES, RUN_FILES, model_files
from hubaoti.host import probe
from hubaoti.hub.layout import Place, RepoRef
from hubaoti.manifest import Program
from hubaoti.mirror import Artifact, Mirror
from hubaoti.model_files import refuse_other_program
from hubaoti.opening import refuse_parts, require_sound
from hubaoti.settings import Settings
from hubaoti.steps import Say, silent
from hubaoti.variant import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hubaoti.compiler.calls import Calls
    from hubaoti.compiling import Asked, Explanation
    from hubaoti.hub.pull import Pulled
    from hubaoti.hub.push import Commit
    from hubaoti.match import Verdict
    from hubaoti.runtime.attach import Attachment
    from hubaoti.runtime.text import TextModel


def capture(
    module: nn.Module, n: int | None = None, *, run: bool = True
) -> AbstractContextManager[Calls]:
    """Record the calls that `module` receives inside the block, whoever makes them.

    All of them, or the first `n`. With `run=False` the module is not run, its calls answer None,
    and the block is left, without an error, as soon as `n` of them (one, by default) have come.

    Raises:
        BadRequest: `n` is less than one; what called the module cannot go on without its answer.
    """
    require("capture", "compile")
    from hubaoti.compiler import calls

    return calls.capture(module, n, run=run)


def compile(
    model: str | Path | nn.Module,
    output: str | Path = "bundle",
    *,
    force: bool = False,
    jobs: int | None = None,
    settings: Settings | None = None,
    say: Say = silent,
    **asked: Unpack[Asked],
) -> Bundle:
    """Compile a model into the bundle `output`; what is built already is found and not built again.

    `model` is a Hub id or a folder, of which no weight is read, or a module with the `calls` that
    `hubaoti.capture` recorded. What may be asked of it stands at `hubaoti.compiling.Asked`. `force`
    builds in any case, `jobs` graphs are compiled at a time, by default as many as memory and cores
    allow. `say` is called with the name of each step as it starts.

    Raises:
        HubaotiError: what failed and what to do; no half-written bundle is left.
    """
    from hubaoti.compiling import compiled, planned

    settings = settings or Settings.from_env()
    host, place = probe(settings), Path(output)
    with Mirror.open(settings.mirror) as mirror, evaluating(model):
        mirror.require_writable()
        job, origin = planned(model, asked, place, host, settings, say)
        if not force and (found := existing(job.key, place, mirror, say)):
            return found
        bundle = compiled(job, origin, place, host, jobs, say)
        with whole_at(bundle.path):
            put(bundle, mirror)
            mirror.record_built(bundle.manifest)
        return bundle


def explain(
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    settings: Settings | None = None,
    say: Say = silent,
    **asked: Unpack[Asked],
) -> Explanation:
    """What `compile` would do with the same words: regions, dims, graphs, recipe and key.

    Raises:
        HubaotiError: why it could not be done.
    """
    from hubaoti.compiling import explanation, job_of

    settings = settings or Settings.from_env()
    with Mirror.open(settings.mirror) as mirror, evaluating(model):
        job, _ = job_of(model, asked, probe(settings), settings, say)
        return explanation(job, Path(output) if output else None, mirror)


def push(  # noqa: PLR0913 - a face of keywords
    bundle: Bundle | str | Path,
    repo: str,
    *,
    tag: str | None = None,
    label: str | None = None,
    private: bool = False,
    layout: str | None = None,
    settings: Settings | None = None,
    say: Say = silent,
) -> Commit:
    """Publish a bundle in one commit; the repo is made when there is none.

    With the layout `zerogpu` it goes to the branch `zerogpu/<recipe>/<variant>`, as a `package/`
    that `spaces.aoti_load` and `aokit` read.

    Raises:
        BadRequest: the graphs do not answer without hubaoti, as that layout's loaders ask them.
        DigestMismatch: a file of the bundle is not the one its manifest names.
        Conflict: the path or the tag is taken; AuthFailed, HubUnreachable: of the Hub.
    """
    from hubaoti.hub.push import Destination
    from hubaoti.hub.push import push as push_to

    settings = settings or Settings.from_env()
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.read(Path(bundle))
    place = Destination(RepoRef.parse(repo), tag=tag, label=label, private=private, layout=layout)
    return push_to(bundle, place, settings, say)


def pull(
    repo: str,
    *,
    recipe: str | None = None,
    path: str | None = None,
    trust: bool = False,
    settings: Settings | None = None,
    say: Say = silent,
) -> Pulled:
    """The artifact of `owner/name[@revision]` that fits this host best, verified, in the mirror.

    Or the one at `path`, its `<recipe>/<variant>`, which needs no torch to be fetched.

    Raises:
        NoMatch: none fits, with every reason; NoArtifact: the repo has none, or none at `path`.
        Untrusted: its publisher is not trusted here; `trust=True` remembers that it is.
    """
    from hubaoti.hub.pull import pull as pull_from

    settings = settings or Settings.from_env()
    asked = None if recipe is None else Recipe.parse(recipe)
    place = None if path is None else Place.parse(path)
    ref, host = RepoRef.parse(repo), probe(settings)
    return pull_from(ref, settings, host, recipe=asked, place=place, trust=trust, say=say)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says to texts: `values` has one row a text, on the CPU."""

    task: str
    values: torch.Tensor


def run(  # noqa: PLR0913 - a face of keywords
    repo: str,
    model: str | Path,
    texts: Sequence[str],
    *,
    recipe: str | None = None,
    trust: bool = False,
    device: str | None = None,
    ops: Sequence[str] = (),
    settings: Settings | None = None,
    say: Say = silent,
) -> Answer:
    """Pull, open and call: the answers of a repo's graph over a model's weights.

    Raises:
        HubaotiError: as `pull` and `load` do; OutOfBounds: a text is too long for the graph.
    """
    require("run", "run")
    settings = settings or Settings.from_env()
    pulled = pull(repo, recipe=recipe, trust=trust, settings=settings, say=say)
    where = device or device_of(pulled.verdict)
    opened = load(pulled.artifact, model, device=where, ops=ops, settings=settings, say=say)
    say("run")
    return Answer(pulled.artifact.manifest.program.task, opened(texts))


def load(  # noqa: PLR0913 - a face of keywords
    artifact: Artifact,
    model: str | Path,
    *,
    device: str | None = None,
    revision: str | None = None,
    ops: Sequence[str] = (),
    settings: Settings | None = None,
    say: Say = silent,
) -> TextModel:
    """Open an artifact over a model's tokenizer and weights: texts in, tensors out.

    `ops` are as `attach` has them.

    Raises:
        DigestMismatch: the mirror's copy was changed; it is in quarantine, pull it again.
        OtherProgram: the model's config says something else than the graph computes.
        MissingConstant: the model's checkpoint lacks a tensor that the graph reads.
        Quarantined: the graph crashed or differed when it was first opened, in its own process.
        MissingOps, NotTried, CannotOpen: it could not be opened there, and is not opened here.
    """
    require("load", "run")
    settings = settings or Settings.from_env()
    refuse_parts(artifact)
    folder, _ = model_files(model, revision, RUN_FILES, settings, say)
    refuse_other_program(folder, artifact.manifest.program)
    say("torch")  # importing it takes longer than all the rest
    from hubaoti.runtime.graph import device_for, open_graph
    from hubaoti.runtime.text import TextEncoder, TextModel
    from hubaoti.runtime.weights import Checkpoint, constants

    say("open")
    where = device_for(artifact.manifest.target.device, device)
    entry = artifact.manifest.graphs[0]
    with Mirror.open(settings.mirror) as mirror:
        require_sound(artifact, mirror, where, say, ops)
    graph = open_graph(artifact.graph_folder(entry), entry, where)
    say("bind")
    graph.bind(constants(entry, artifact.path, Checkpoint(folder, where), where))
    return TextModel(graph, TextEncoder(folder, pad_of(artifact.manifest.program)))


def attach(  # noqa: PLR0913 - a face of keywords
    module: nn.Module,
    artifact: Artifact | Pulled | Bundle | Path | str,
    *,
    strict: bool = False,
    quantize: bool = False,
    trust: bool = False,
    ops: Sequence[str] = (),
    settings: Settings | None = None,
    say: Say = silent,
) -> Attachment:
    """Have an artifact's graphs answer for the regions of a module; all else about it stays.

    `artifact` is one of the mirror, a bundle or its folder, or a repo to pull. The module's
    tensors are bound by reference. What no graph serves is answered by the module itself, counted,
    and warned of once for each reason; with `strict` it raises `NotServed`. A module that has no
    config, or other code than was compiled, or of which code or attributes were patched, answers
    the first call of each graph itself, and the graph's answer is compared. Of a PeftModel it is
    the model within.

    Of an artifact that was compiled with `--quantize`, the graphs make quantized weights of the
    module's, which then has both. With `quantize`, the module gives its own up and is smaller: what
    it answers itself is of the quantized weights too, and stays so after `detach`.

    `ops` are modules of the caller's that register the ops which graphs call, as "my.ops". They are
    imported here, and wherever a graph is tried before it is opened here.

    Raises:
        OtherProgram: the module's config says that it computes something else.
        MissingConstant: it lacks tensors that the graphs need; all are named, nothing was touched.
        AlreadyAttached: it has graphs already.
        BadRequest: `quantize` is asked of an artifact without quantized weights, or of layers that
            are no plain Linears.
        DigestMismatch: the mirror's copy was changed; it is in quarantine, pull it again.
        Quarantined: a graph crashed or differed when it was first opened, in its own process.
        MissingOps, NotTried, CannotOpen: it could not be opened there, and is not opened here.
    """
    settings = settings or Settings.from_env()
    if settings.graphs:
        require("attach", "run")
    from hubaoti.compiler.parsed import lending
    from hubaoti.compiler.program import is_program_of
    from hubaoti.runtime import attach as runtime
    from hubaoti.runtime.adapters import base_of

    if not settings.graphs:
        return runtime.nothing(module)
    module = base_of(module)
    found = artifact_of(artifact, trust, settings, say)
    manifest = found.manifest
    with Mirror.open(settings.mirror) as mirror:
        with lending(mirror.index):
            known = is_program_of(module, manifest.program, manifest.is_whole)
        say("open")
        require_sound(found, mirror, runtime.device_of(module, manifest.target.device), say, ops)
    parts = runtime.Parts(manifest, found.path, found.graph_folder)
    return runtime.attach(module, parts, strict=strict, tries=not known, quantize=quantize)


def detach(module: nn.Module) -> None:
    """Give a module everything back that `attach` took.

    Raises:
        NotAttached: nothing was attached to it.
    """
    from hubaoti.runtime import attach as runtime
    from hubaoti.runtime.adapters import base_of

    runtime.detach(base_of(module))


def artifact_of(
    artifact: Artifact | Pulled | Bundle | Path | str, trust: bool, settings: Settings, say: Say
) -> Artifact:
    """An artifact of the mirror, by whatever it is called."""
    if isinstance(artifact, Artifact):
        return artifact
    if isinstance(artifact, Path):
        artifact = Bundle.read(artifact)
    if isinstance(artifact, str):
        artifact = pull(artifact, trust=trust, settings=settings, say=say)
    if not isinstance(artifact, Bundle):
        return artifact.artifact
    with Mirror.open(settings.mirror) as mirror:
        return mirror.artifact(artifact.manifest.digest) or put(artifact, mirror)


def put(bundle: Bundle, mirror: Mirror) -> Artifact:
    """A bundle's files in the mirror, each hashed on its way."""
    files = {file.path: bundle.path / file.path for file in bundle.manifest.all_files()}
    return mirror.put(bundle.manifest, files)


def device_of(verdict: Verdict) -> str | None:
    """The GPU that an artifact was judged to fit; None is the first of those that torch sees.

    A verdict counts all GPUs of the host, torch those that CUDA_VISIBLE_DEVICES shows: where it
    shows fewer, nothing is said.
    """
    if not verdict.device:
        return None
    import torch

    return f"cuda:{verdict.device}" if verdict.device < torch.cuda.device_count() else None


def pad_of(program: Program) -> int | None:
    """The padding id, of a program that computes with it."""
    pad = program.config.get("pad_token_id")
    return pad if isinstance(pad, int) and pad >= 0 else None


def eager(
    model: str | Path,
    texts: Sequence[str],
    *,
    repo: str | None = None,
    settings: Settings | None = None,
    say: Say = silent,
) -> Answer:
    """The same answers through transformers, for comparison; nothing compiled is opened.

    Task and dtype are those of the artifact that was pulled from `repo`, if one was, else what the
    model's files say.
    """
    require("eager", "compile", "run")
    import torch

    from hubaoti.compiler import source
    from hubaoti.compiler.request import Request
    from hubaoti.runtime.text import TextEncoder

    settings = settings or Settings.from_env()
    folder, _ = model_files(model, None, EAGER_FILES, settings, say)
    task, dtype = pulled_before(repo, settings) if repo else (None, None)
    say("load")
    asked = Request(task=task, dtype=dtype, regions="none")
    whole = source.load(folder, asked, torch.device("cpu"), weights=True)
    encoded = TextEncoder(folder, pad_of(whole.program)).encode(texts, high=whole.positions)
    say("run")
    with torch.no_grad():
        values = whole.model(encoded.input_ids, encoded.attention_mask)[0]
    return Answer(whole.program.task, values)


def pulled_before(repo: str, settings: Settings) -> tuple[str | None, str | None]:
    """Task and dtype of the artifact that was last pulled from a repo, and is still here."""
    ref = RepoRef.parse(repo)
    with Mirror.open(settings.mirror) as mirror:
        for digest in mirror.index.pulled_from(settings.endpoint, ref.repo, ref.commit):
            if artifact := mirror.artifact(digest):
                return artifact.manifest.program.task, artifact.manifest.build.dtype
    return None, None
