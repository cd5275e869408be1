"""What `load` is asked for, and what comes of it: files, a task, an artifact, a place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hubaoti import api
from hubaoti.compiler.request import CompileRequest
from hubaoti.engines.background_compile import Work
from hubaoti.engines.messages import Begin
from hubaoti.engines.pool import Holder, ModelSlot
from hubaoti.engines.resolve import (
    ENGINE_TASKS,
    Wanted,
    choose_task,
    estimate_weight_bytes,
    find_in_mirror,
    find_in_repos,
    read_dtype,
)
from hubaoti.errors import BadRequest, HubaotiError, NoArtifact, NoMatch, NotEnoughMemory
from hubaoti.host.probe import Host
from hubaoti.hub.model_download import EAGER_FILES, fetch_model_files, find_local_folder
from hubaoti.progress import Progress
from hubaoti.settings import Settings

if TYPE_CHECKING:
    from hubaoti.artifact.bundle import Bundle
    from hubaoti.hub.choice import Pulled
    from hubaoti.mirror import Artifact

Compile = Literal["never", "background", "now"]
_PROCESS = 400 << 20  # bytes of a worker beside its weights


@dataclass(frozen=True, slots=True)
class Want:
    """What `load` was asked for."""

    name: str
    artifact: Artifact | Pulled | Bundle | Path | str | None
    compile: Compile
    task: str | None
    push: str | None
    revision: str | None
    options: dict[str, Any]  # of `hubaoti.compile`


@dataclass(frozen=True, slots=True)
class LoadPlanner:
    """Where an engine looks for models and artifacts, and on which device they are to be."""

    settings: Settings
    host: Host
    device: str
    repos: tuple[str, ...]
    isolate: bool
    trust: bool
    progress: Progress
    ops: tuple[str, ...] = ()

    def plan_slot(self, want: Want) -> ModelSlot:
        """A model with its files here, and the artifact that serves it.

        Raises:
            ModelNotFound: there is no such model.
            OtherProgram, BadRequest: the artifact that was given does not serve it.
        """
        self.progress("files")
        folder, _ = fetch_model_files(
            want.name, want.revision, EAGER_FILES, self.settings, self.progress
        )
        given = self.fetch_given(want)
        why = "the settings say so (AOTI_DISABLED, ENABLE_AOTI_COMPILATION)"
        is_asked = given is not None
        task = want.task or (given.manifest.program.task if given else choose_task(folder))
        wanted = self._make_wanted(folder, task, want.options)
        if given is not None:
            wanted.require(given.manifest)
        elif self.settings.graphs:
            given, why = self._find_artifact(wanted)
        begin = Begin(
            str(folder.resolve()),
            task,
            self.device,
            given.manifest.build.dtype if given else wanted.dtype,
            given.digest if given else None,
            bool(want.options.get("trust_remote_code")),
            self.ops,
        )
        needs = estimate_weight_bytes(folder, begin.dtype) + (_PROCESS if self.isolate else 0)
        why = "" if given else why
        return ModelSlot(want.name, begin, needs, want.revision, why, is_asked=is_asked)

    def fetch_given(self, want: Want) -> Artifact | None:
        """The artifact that a call gave, in the mirror; None where it gave none.

        Nor where it gave a repo that has nothing for this host, and that is to be compiled.
        """
        if want.artifact is None or not self.settings.graphs:
            return None
        try:
            return api.get_artifact(want.artifact, self.trust, self.settings, self.progress)
        except (NoArtifact, NoMatch):
            if want.compile == "never":
                raise
            return None

    def require_serves(self, artifact: Artifact, begin: Begin) -> None:
        """See that an artifact serves a model that is loaded.

        Raises:
            OtherProgram, BadRequest: it does not.
        """
        self._make_wanted(Path(begin.folder), begin.task, {}).require(artifact.manifest)

    def _make_wanted(self, folder: Path, task: str, options: dict[str, Any]) -> Wanted:
        if task not in ENGINE_TASKS:
            raise BadRequest(
                f"an engine has models to {' or '.join(ENGINE_TASKS)}, not for {task}",
                hint="compile it with --task generate or embed; hubaoti.attach takes the others",
            )
        dtype, quantization = options.get("dtype"), options.get("quantize")
        return Wanted(folder, task, self.device, self.host, dtype, quantization)

    def _find_artifact(self, wanted: Wanted) -> tuple[Artifact | None, str]:
        """The artifact of a model, in the mirror or a repo; else why there is none.

        It computes in the model's own dtype, unless another is asked for.
        """
        wanted = replace(wanted, dtype=wanted.dtype or read_dtype(wanted.folder))
        if found := find_in_mirror(wanted, self.settings):
            return found, ""
        found, reasons = find_in_repos(wanted, self.repos, self.trust, self.settings, self.progress)
        return found, "" if found else "; ".join(["the mirror has no artifact for it", *reasons])

    def make_work(self, slot: ModelSlot, want: Want) -> Work:
        """What a child process is to compile, in options that were looked at before it starts."""
        options = {"task": slot.begin.task, "device": self.device, **want.options}
        try:
            CompileRequest.parse(options)
        except TypeError as error:
            raise BadRequest(
                f"load: {error}", hint="it takes the options of hubaoti.compile"
            ) from error
        if want.revision is not None:
            options["revision"] = want.revision
        folder = find_local_folder(slot.name)
        return Work(str(folder or slot.name), options, want.push, self.settings.to_env())

    def open_slot(self, slot: ModelSlot) -> Holder:
        """Load a model; without graphs, where those that were found cannot be opened.

        Raises:
            HubaotiError: its weights or its tokenizer cannot be had, or the graphs that were given.
        """
        if slot.untried is not None:
            slot.use(slot.untried)
        digest = slot.begin.digest
        try:
            return self._open(slot.begin)
        except HubaotiError as error:
            if digest is None or slot.is_asked or isinstance(error, NotEnoughMemory):
                raise
            slot.note_failure(digest, error)
            slot.drop_graphs(f"{error}")
        return self._open(slot.begin)

    def _open(self, begin: Begin) -> Holder:
        """A model in this process, or in one of its own."""
        if self.isolate:
            from hubaoti.engines.worker_client import Isolated

            return Isolated(begin, self.settings)
        self.progress("torch")  # importing it takes longer than most steps
        from hubaoti.engines.local import Resident

        return Resident(begin, self.settings, self.progress)


def choose_device(host: Host, name: str | None) -> str:
    """Where models are: as is asked, else on a GPU where there is one that torch can use.

    Raises:
        BadRequest: there is no such device here.
    """
    has_cuda = bool(host.gpus) and host.torch is not None and host.torch.cuda is not None
    if name is None:
        return "cuda:0" if has_cuda else "cpu"
    kind, _, number = name.partition(":")
    known = kind == "cpu" and not number or kind == "cuda" and (not number or number.isdigit())
    if not known or (kind == "cuda" and not (has_cuda and int(number or 0) < len(host.gpus))):
        raise BadRequest(f"there is no device {name!r} here", hint="cpu, or cuda:0 with a GPU")
    return name
