"""The verbs: where compiler, runtime, mirror and hub work together.

Nothing heavy is imported before a verb needs it: `pull` works without torch, a warm one without the
Hub's client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti.bundle import Bundle
from hubaoti.errors import BadRequest, ModelNotFound, RepoNotFound
from hubaoti.host import probe
from hubaoti.hub.layout import RepoRef
from hubaoti.manifest import Program, Source
from hubaoti.mirror import Artifact, Mirror
from hubaoti.model_files import refuse_other_program
from hubaoti.settings import Settings
from hubaoti.steps import Say, silent
from hubaoti.variant import Recipe

if TYPE_CHECKING:
    import torch

    from hubaoti.hub.pull import Pulled
    from hubaoti.hub.push import Commit
    from hubaoti.match import Verdict
    from hubaoti.runtime.text import TextModel

# What the compiler reads of a model: config, tokenizer and code; no pattern matches weights.
COMPILE_FILES = ("*.json", "*.txt", "*.py", "*.model", "*/config.json", "tokenizer*")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# What the runtime reads of a model: what it says of itself, its tokenizer and its weights.
RUN_FILES = ("config.json", "modules.json", "*/config.json", "tokenizer.json", *WEIGHTS)
EAGER_FILES = (*COMPILE_FILES, "*.safetensors")


def compile(  # noqa: PLR0913 - a face of keywords
    model: str | Path,
    output: str | Path,
    *,
    task: str | None = None,
    dims: Mapping[str, tuple[int, int]] | Iterable[str] = (),
    dtype: str | None = None,
    level: str | None = None,
    device: str = "cpu",
    regions: str | None = None,
    revision: str | None = None,
    settings: Settings | None = None,
    say: Say = silent,
) -> Bundle:
    """Compile a model, a Hub id or a local folder, into the bundle `output`; no weight is read.

    `task` is embed, classify or logits, by default what the model's files say. `dims` gives bounds
    as `{"batch": (1, 32)}` or `["batch=1:32"]`. `level` is the CPU level of the host code, as
    archspec names it. `say` is called with the name of each step as it starts.

    Raises:
        HubaotiError: what failed and what to do; no half-written bundle is left.
    """
    from hubaoti.compiler.request import Request, ranges

    settings = settings or Settings.from_env()
    request = Request(
        task=task, dims=ranges(dims), dtype=dtype, level=level, device=device, regions=regions
    )
    with Mirror.open(settings.mirror) as mirror:
        mirror.require_writable()
        say("files")
        folder, source = model_files(model, revision, COMPILE_FILES, settings)
        say("torch")  # importing it takes longer than most steps
        from hubaoti.compiler.build import Job, build, device_of, target_of
        from hubaoti.compiler.plan import plan
        from hubaoti.compiler.source import load as load_source

        host = probe(settings)
        where = device_of(request.device)
        target = target_of(host, where, request.level)
        say("source")
        job = Job.of(
            plan(load_source(folder, request, where), request, where), request, target, where
        )
        bundle = build(job, source, host, Path(output), say)
        mirror.record_built(bundle.manifest)
    return bundle


def push(  # noqa: PLR0913 - a face of keywords
    bundle: Bundle | str | Path,
    repo: str,
    *,
    tag: str | None = None,
    label: str | None = None,
    private: bool = False,
    settings: Settings | None = None,
    say: Say = silent,
) -> Commit:
    """Publish a bundle in one commit; the repo is made when there is none.

    Raises:
        DigestMismatch: a file of the bundle is not the one its manifest names.
        Conflict: the path or the tag is taken; AuthFailed, HubUnreachable: of the Hub.
    """
    from hubaoti.hub.push import Destination
    from hubaoti.hub.push import push as push_to

    settings = settings or Settings.from_env()
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.read(Path(bundle))
    place = Destination(RepoRef.parse(repo), tag=tag, label=label, private=private)
    return push_to(bundle, place, settings, say)


def pull(
    repo: str,
    *,
    recipe: str | None = None,
    trust: bool = False,
    settings: Settings | None = None,
    say: Say = silent,
) -> Pulled:
    """The artifact of `owner/name[@revision]` that fits this host best, verified, in the mirror.

    Raises:
        NoMatch: none fits, with every reason; NoArtifact: the repo has none.
        Untrusted: its publisher is not trusted here; `trust=True` remembers that it is.
    """
    from hubaoti.hub.pull import pull as pull_from

    settings = settings or Settings.from_env()
    asked = None if recipe is None else Recipe.parse(recipe)
    ref, host = RepoRef.parse(repo), probe(settings)
    return pull_from(ref, settings, host, recipe=asked, trust=trust, say=say)


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
    settings: Settings | None = None,
    say: Say = silent,
) -> Answer:
    """Pull, open and call: the answers of a repo's graph over a model's weights.

    Raises:
        HubaotiError: as `pull` and `load` do; OutOfBounds: a text is too long for the graph.
    """
    settings = settings or Settings.from_env()
    pulled = pull(repo, recipe=recipe, trust=trust, settings=settings, say=say)
    where = device or device_of(pulled.verdict)
    opened = load(pulled.artifact, model, device=where, settings=settings, say=say)
    say("run")
    return Answer(pulled.artifact.manifest.program.task, opened(texts))


def load(
    artifact: Artifact,
    model: str | Path,
    *,
    device: str | None = None,
    revision: str | None = None,
    settings: Settings | None = None,
    say: Say = silent,
) -> TextModel:
    """Open an artifact over a model's tokenizer and weights: texts in, tensors out.

    Raises:
        DigestMismatch: the mirror's copy was changed; it is in quarantine, pull it again.
        OtherProgram: the model's config says something else than the graph computes.
        MissingConstant: the model's checkpoint lacks a tensor that the graph reads.
    """
    settings = settings or Settings.from_env()
    folder, _ = model_files(model, revision, RUN_FILES, settings)
    refuse_other_program(folder, artifact.manifest.program)
    say("torch")  # importing it takes longer than all the rest
    from hubaoti.runtime.graph import device_for, open_graph
    from hubaoti.runtime.text import TextEncoder, TextModel
    from hubaoti.runtime.weights import Checkpoint, constants

    say("open")
    where = device_for(artifact.manifest.target.device, device)
    entry = artifact.manifest.graphs[0]
    with Mirror.open(settings.mirror) as mirror:
        mirror.verify(artifact)
    graph = open_graph(artifact.graph_folder(entry), entry, where)
    say("bind")
    graph.bind(constants(entry, artifact.path, Checkpoint(folder, where), where))
    return TextModel(graph, TextEncoder(folder, pad_of(artifact.manifest.program)))


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
    import torch

    from hubaoti.compiler import source
    from hubaoti.compiler.request import Request
    from hubaoti.runtime.text import TextEncoder

    settings = settings or Settings.from_env()
    folder, _ = model_files(model, None, EAGER_FILES, settings)
    task, dtype = pulled_before(repo, settings) if repo else (None, None)
    say("load")
    asked = Request(task=task, dtype=dtype, regions="none")
    whole = source.load(folder, asked, torch.device("cpu"), weights=True)
    encoded = TextEncoder(folder, pad_of(whole.program)).encode(texts)
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


def model_files(
    model: str | Path, revision: str | None, patterns: Sequence[str], settings: Settings
) -> tuple[Path, Source]:
    """The folder of a model, and where it came from: a local one as it is, else of the Hub.

    A local path is not written into the source: it would end up in a published manifest.

    Raises:
        ModelNotFound: neither a folder nor a repo of the Hub.
    """
    if folder := local_folder(model):
        return folder, Source(model=folder.resolve().name)
    from hubaoti.hub.client import HubClient

    try:
        found, commit = HubClient(settings).model_folder(str(model), revision, patterns)
    except (BadRequest, RepoNotFound) as why:
        raise ModelNotFound(
            f"{model} is neither a folder nor a model of {settings.endpoint}",
            hint="give a Hub id as owner/name, or the folder of a model",
        ) from why
    return found, Source(model=str(model), commit=commit)


def local_folder(model: str | Path) -> Path | None:
    """The folder of this name; None where there is none, or can be none."""
    try:
        folder = Path(model).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError):  # too long a name; the home of a user that there is not
        return None
