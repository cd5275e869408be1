"""A model in this process: its weights, its tokenizer, and the graphs that answer for it."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubaoti import api
from hubaoti.attachment.attach import Attachment
from hubaoti.compiler import from_config
from hubaoti.compiler.request import CompileRequest
from hubaoti.engines.decoder import Decoder
from hubaoti.engines.encoder import Encoder
from hubaoti.engines.messages import (
    Begin,
    Embed,
    Embedded,
    EngineRequest,
    EngineResponse,
    Generate,
    Generated,
    Measure,
    Measured,
    Score,
    Scored,
    State,
    Tell,
    Use,
)
from hubaoti.errors import BadRequest, HubaotiError, NotEnoughMemory, first_line
from hubaoti.mirror import Artifact, Mirror
from hubaoti.program.model_files import read_sentence_steps
from hubaoti.progress import Progress, report_nothing
from hubaoti.runtime.first_open import name_host_kind
from hubaoti.runtime.graph import Graph, choose_graph_device
from hubaoti.runtime.heap import release_pages
from hubaoti.runtime.text import TextModel
from hubaoti.settings import Settings

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@dataclass(slots=True)
class Counted:
    """How often a whole graph, or a module without graphs, has answered."""

    compiled: int = 0
    eager: int = 0


class Resident:
    """A model in this process; `ask` it one thing at a time."""

    pid: int | None = None  # it has no process of its own
    problem = ""

    def __init__(
        self, begin: Begin, settings: Settings, progress: Progress = report_nothing
    ) -> None:
        """Load it.

        Raises:
            HubaotiError: its weights, its tokenizer or its graphs cannot be had.
        """
        self._begin = begin
        self._settings = settings
        self._progress = progress
        self._attachment: Attachment | None = None
        self._artifact: Artifact | None = None
        self._counted = Counted()
        self._model: Decoder | Encoder | TextModel | None = None
        artifact = self._mirrored(begin.digest) if begin.digest else None
        if artifact is None or not _is_text_graph(artifact):
            self._model = self._own()
        if artifact is not None:
            self._use(artifact)

    @property
    def module(self) -> nn.Module | None:
        """The model of transformers; None where one graph answers alone."""
        return None if isinstance(self._model, TextModel | None) else self._model.model

    def _mirrored(self, digest: str) -> Artifact:
        with Mirror.open(self._settings.mirror) as mirror:
            artifact = mirror.artifact(digest)
        if artifact is None:
            raise HubaotiError(
                f"artifact {digest[:12]} is not in the mirror any more",
                hint="pull it again, or compile it again",
            )
        return artifact

    def _own(self) -> Decoder | Encoder:
        """Load the model itself, with its weights, as transformers computes it."""
        begin, folder = self._begin, Path(self._begin.folder)
        device = _parse_device(begin.device)
        self._progress(f"load {folder.name}")
        regions = "none" if begin.task == "embed" else "auto"
        request = CompileRequest(
            task=begin.task,
            dtype=begin.dtype,
            regions=regions,
            trust_remote_code=begin.trust_remote_code,
        )
        found = from_config.load_source(folder, request, device, weights=True)
        if begin.task == "embed":
            return Encoder(found.model, folder, found.config, found.positions)
        steps = read_sentence_steps(folder)
        return Decoder(found.model.to(device), folder, steps, begin.trust_remote_code)

    def _use(self, artifact: Artifact) -> None:
        """Have an artifact's graphs answer; where they cannot, all stays as it was."""
        folder, device = self._begin.folder, self._begin.device
        if _is_text_graph(artifact):
            if self._begin.task != "embed":
                raise BadRequest(
                    f"the artifact answers texts ({artifact.manifest.program.task}), the model was "
                    "loaded to generate",
                    hint="compile it with --task generate",
                )
            self._model = api.load(
                artifact,
                folder,
                device=device,
                ops=self._begin.ops,
                settings=self._settings,
                progress=self._progress,
            )
        else:
            before = self._artifact
            self._detach()
            try:
                self._attach(artifact)
            except HubaotiError:
                if before is not None:
                    with suppress(HubaotiError):
                        self._attach(before)
                raise
        self._artifact = artifact

    def _attach(self, artifact: Artifact) -> None:
        """Have an artifact's graphs answer for the model's blocks."""
        module = self.module
        assert module is not None
        self._attachment = api.attach(
            module,
            artifact,
            quantize=artifact.manifest.build.quantization is not None,
            ops=self._begin.ops,
            settings=self._settings,
            progress=self._progress,
        )
        self._artifact = artifact
        if isinstance(self._model, Decoder) and self._settings.graphs:
            self._model.serve(artifact.manifest)

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        self._attachment = self._artifact = None
        if isinstance(self._model, Decoder):
            self._model.serve(None)

    def ask(self, ask: EngineRequest) -> EngineResponse:
        """Answer a request.

        Raises:
            HubaotiError: why it cannot be.
        """
        try:
            return self._answer(ask)
        except HubaotiError:
            raise
        except Exception as why:  # a model raises what it likes
            told = f"{why}".lower()
            if isinstance(why, MemoryError) or any(words in told for words in _OUT_OF_MEMORY):
                raise NotEnoughMemory(
                    f"{self._name} ran out of memory: {first_line(why)}",
                    hint="ask for shorter texts or for fewer at a time, or unload another model",
                ) from why
            raise HubaotiError(
                f"{self._name} failed: {type(why).__name__}: {first_line(why)}",
                hint="see whether it answers without graphs, and whether its files are whole",
            ) from why

    @property
    def _name(self) -> str:
        return Path(self._begin.folder).name

    def _answer(self, ask: EngineRequest) -> EngineResponse:
        match ask:
            case Generate(prompts, sampling):
                return Generated(self._decoder("generate").generate(prompts, sampling))
            case Measure(prompts, sampling):
                rows = self._decoder("generate").measured(prompts, sampling)
                return Measured([*map(len, rows)])
            case Score(items):
                return Scored(self._decoder("score").score(items))
            case Embed(texts):
                return self._embedded(texts)
            case Use(digest):
                self._use(self._mirrored(digest))
                return self.state()
            case Tell():
                return self.state()

    def _decoder(self, what: str) -> Decoder:
        if not isinstance(self._model, Decoder):
            raise BadRequest(
                f"{self._name} embeds texts; it cannot {what}",
                hint="load a causal language model for that",
            )
        return self._model

    def _embedded(self, texts: list[str]) -> Embedded:
        model = self._model
        assert model is not None
        vectors = model(texts) if isinstance(model, TextModel) else model.embed(texts)
        if isinstance(model, TextModel):
            self._counted.compiled += 1
        elif self._attachment is None:
            self._counted.eager += 1
        return Embedded(vectors.shape[1], vectors.float().contiguous().numpy().tobytes())

    def state(self) -> State:
        """Its artifact, bytes and calls so far; `reasons` are those of eager calls."""
        stats: dict[str, Any] = {"compiled": 0, "eager": 0, "regions": {}}
        if self._attachment is not None:
            stats = self._attachment.stats()
        reasons: dict[str, int] = {}
        for region in stats["regions"].values():
            for reason, calls in region["eager"].items():
                reasons[reason] = reasons.get(reason, 0) + calls
        return State(
            task=self._begin.task,
            artifact=self._artifact.digest if self._artifact else None,
            bytes=self.bytes,
            compiled=stats["compiled"] + self._counted.compiled,
            eager=stats["eager"] + self._counted.eager,
            reasons=reasons,
            host=name_host_kind(_parse_device(self._begin.device)),
        )

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The open graphs that answer; none where the model answers by itself."""
        if isinstance(self._model, TextModel):
            return (self._model.graph,)
        return self._attachment.graphs if self._attachment else ()

    def number_of(self, graph: Graph) -> int:
        """The place of a graph in its manifest, counted from one."""
        assert self._artifact is not None
        return self._artifact.manifest.graphs.index(graph.entry) + 1

    @property
    def bytes(self) -> int:
        """The bytes that its weights take, each counted once."""
        if isinstance(self._model, TextModel):
            return sum(tensor.nbytes for tensor in self._model.graph.bound)
        return 0 if self.module is None else count_module_bytes(self.module)

    def close(self) -> None:
        """Detach the graphs, and give the model's memory back to the system."""
        self._detach()
        self._model = None
        gc.collect()
        release_pages(())


def _parse_device(device: str) -> torch.device:
    """A device by its name.

    Raises:
        BadRequest: it is none that graphs are compiled for.
    """
    target = device.partition(":")[0]
    return choose_graph_device(target if target in {"cpu", "cuda"} else "cpu", device)


def _is_text_graph(artifact: Artifact) -> bool:
    """Whether one graph of it answers texts alone."""
    return artifact.manifest.is_whole and artifact.manifest.program.task == "embed"


def count_module_bytes(module: nn.Module) -> int:
    """The memory of a module's tensors; what several share counts once."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
