"""The verbs that answer texts: by a graph, or by transformers beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti.api.attaching import get_artifact, require_kernels
from hubaoti.api.filling import make_fill_options
from hubaoti.api.publishing import pull
from hubaoti.errors import BadRequest
from hubaoti.host.extras import require
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.model_download import EAGER_FILES, RUN_FILES, fetch_model_files
from hubaoti.mirror import Artifact, Mirror
from hubaoti.program.model_files import padding_id, refuse_other_program
from hubaoti.progress import Progress, report_nothing
from hubaoti.runtime.first_open import require_sound
from hubaoti.settings import Settings

if TYPE_CHECKING:
    import torch

    from hubaoti.artifact.bundle import Bundle
    from hubaoti.hub.choice import Pulled
    from hubaoti.runtime.text import TextModel

_ATTACHED = "hubaoti.attach(model, artifact) has them answer for their model"
_GENERATES = f"{_ATTACHED}, which generates; or LightweightEngine().load(model, artifact)"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says to texts: `values` has one row a text, on the CPU."""

    task: str
    values: torch.Tensor

    def __repr__(self) -> str:
        return f"Answer({self.task}, {list(self.values.shape)})"


def run(  # noqa: PLR0913 - a face of keywords
    repo: str,
    model: str | Path,
    texts: Sequence[str],
    *,
    recipe: str | None = None,
    trust: bool = False,
    missing: str | None = None,
    push_back: bool = False,
    device: str | None = None,
    ops: Sequence[str] = (),
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> Answer:
    """Pull, open and call: the answers of a repo's graph over a model's weights.

    What is `missing` in the repo can be compiled, and pushed back, as `pull` has it.

    Raises:
        HubaotiError: as `pull` and `load` do; OutOfBounds: a text is too long for the graph.
    """
    require("run", "run")
    settings = settings or Settings.from_env()
    fill = make_fill_options(missing, push_back, model)
    pulled = pull(repo, recipe=recipe, trust=trust, settings=settings, progress=progress, **fill)
    _refuse_parts(pulled.artifact, "hubaoti run answers prompts: --prompt; in Python, ")
    opened = load(
        pulled.artifact, model, device=device, ops=ops, settings=settings, progress=progress
    )
    progress("run")
    return Answer(pulled.artifact.manifest.program.task, opened(texts))


def load(  # noqa: PLR0913 - a face of keywords
    artifact: Artifact | Pulled | Bundle | Path | str,
    model: str | Path,
    *,
    device: str | None = None,
    revision: str | None = None,
    trust: bool = False,
    missing: str | None = None,
    push_back: bool = False,
    ops: Sequence[str] = (),
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> TextModel:
    """Open an artifact over a model's tokenizer and weights: texts in, tensors out.

    `artifact`, `trust`, `missing` and `ops` are as `attach` has them. Without `device`, it is the
    CPU, or the GPU that the artifact fits best.

    Raises:
        BadRequest: what is given is no artifact. Untrusted, Blocked: its code may not run here.
        NoMatch: the GPU is of another kind than the artifact is for, or there is none that fits.
        DigestMismatch: the mirror's copy was changed; it is in quarantine, pull it again.
        OtherProgram: the model's config says something else than the graph computes.
        UnknownTask: its files say of texts what is not done here.
        MissingConstant: the model's checkpoint lacks a tensor that the graph reads.
        Quarantined: the graph crashed or differed when it was first opened, in its own process.
        MissingOps, NotTried, CannotOpen: it could not be opened there, and is not opened here.
    """
    require("load", "run")
    settings = settings or Settings.from_env()
    fill = make_fill_options(missing, push_back, model)
    artifact = get_artifact(artifact, trust, settings, progress, fill=fill)
    _refuse_parts(artifact)
    folder, _ = fetch_model_files(model, revision, RUN_FILES, settings, progress)
    program = artifact.manifest.program
    refuse_other_program(folder, program)
    progress("torch")  # importing it takes longer than all the rest
    from hubaoti.runtime.gpus import choose_device
    from hubaoti.runtime.graph import open_graph
    from hubaoti.runtime.text import TextEncoder, TextModel
    from hubaoti.runtime.weights import Checkpoint, load_constants

    progress("open")
    where = choose_device(artifact.manifest, device)
    entry = artifact.manifest.graphs[0]
    with Mirror.open(settings.mirror) as mirror:
        require_kernels(artifact, mirror, settings, progress)
        require_sound(artifact, mirror, where, progress, ops)
    graph = open_graph(artifact.graph_folder(entry), entry, where)
    progress("bind")
    graph.bind(load_constants(entry, artifact.path, Checkpoint(folder, where), where))
    encoder = TextEncoder(folder, padding_id(program), program.task)
    return TextModel(graph, encoder, program.task)


def _refuse_parts(artifact: Artifact, prompts: str = "") -> None:
    """Refuse an artifact whose graphs are parts of a model: alone they answer no text.

    `prompts` says how else prompts are answered, where that is possible.
    """
    manifest = artifact.manifest
    if not manifest.is_whole:
        served = sum(len(graph.modules) for graph in manifest.graphs if not graph.order)
        raise BadRequest(
            f"the artifact was built for {manifest.program.task}, its graphs serve {served} blocks "
            "of a model and not the whole of it",
            hint=(f"{prompts}{_GENERATES}" if manifest.program.task == "generate" else _ATTACHED)
            + "; texts are answered by what was compiled with --task embed, classify or logits and "
            "--regions none",
        )


def eager(
    model: str | Path,
    texts: Sequence[str],
    *,
    repo: str | None = None,
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> Answer:
    """The same answers through transformers, for comparison; nothing compiled is opened.

    Task and dtype are those of the artifact that was pulled from `repo`, if one was, else what the
    model's files say.
    """
    require("eager", "compile", "run")
    import torch

    from hubaoti.compiler import from_config
    from hubaoti.compiler.request import CompileRequest
    from hubaoti.runtime.text import TextEncoder

    settings = settings or Settings.from_env()
    folder, _ = fetch_model_files(model, None, EAGER_FILES, settings, progress)
    task, dtype = recall_task_and_dtype(repo, settings) if repo else (None, None)
    progress("load")
    request = CompileRequest(task=task, dtype=dtype, regions="none")
    whole = from_config.load_source(folder, request, torch.device("cpu"), weights=True)
    program = whole.program
    encoder = TextEncoder(folder, padding_id(program), program.task)
    encoded = encoder.encode(texts, high=whole.positions)
    progress("run")
    with torch.no_grad():
        values = whole.model(encoded.input_ids, encoded.attention_mask)[0]
    return Answer(program.task, values)


def recall_task_and_dtype(repo: str, settings: Settings) -> tuple[str | None, str | None]:
    """Task and dtype of the artifact that was last pulled from a repo, and is still here."""
    ref = RepoRef.parse(repo)
    with Mirror.open(settings.mirror) as mirror:
        for digest in mirror.index.list_pulls(settings.endpoint, ref.repo, ref.commit):
            if artifact := mirror.artifact(digest):
                return artifact.manifest.program.task, artifact.manifest.build.dtype
    return None, None
