"""A model in this process: its weights, its tokenizer, and the graphs that answer for it."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubaoti import api
from hubaoti.attachment.attach import Attachment, has_steps
from hubaoti.compiler import from_config
from hubaoti.compiler.request import CompileRequest
from hubaoti.engines import messages
from hubaoti.engines.decoder import Decoder
from hubaoti.engines.encoder import Encoder
from hubaoti.engines.messages import Begin, EngineRequest, EngineResponse, State
from hubaoti.engines.resolve import explain_other_task
from hubaoti.errors import BadRequest, HubaotiError, NotEnoughMemory, first_line
from hubaoti.mirror import Artifact, Mirror
from hubaoti.program.model_files import read_sentence_steps
from hubaoti.progress import Progress, report_nothing
from hubaoti.runtime.first_open import name_host_kind
from hubaoti.runtime.graph import Graph, choose_graph_device
from hubaoti.runtime.heap import release_pages
from hubaoti.runtime.text import TextModel
from hubaoti.settings import Settings

_NO_STATS: dict[str, Any] = {"compiled": 0, "eager": 0, "regions": {}}
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


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
        self._embeds = {"compiled": 0, "eager": 0}  # calls of a whole graph, or without graphs
        self._model: Decoder | Encoder | TextModel | None = None
        artifact = self._read_artifact(begin.digest) if begin.digest else None
        if artifact is None or not _is_text_graph(artifact):
            self._model = self._load_model()
        if artifact is not None:
            self._use(artifact)

    @property
    def module(self) -> nn.Module | None:
        """The model of transformers; None where one graph answers alone."""
        return None if isinstance(self._model, TextModel | None) else self._model.model

    def _read_artifact(self, digest: str) -> Artifact:
        with Mirror.open(self._settings.mirror) as mirror:
            artifact = mirror.artifact(digest)
        if artifact is None:
            raise HubaotiError(
                f"artifact {digest[:12]} is not in the mirror any more",
                hint="get it again as it came: pull, compile or import it",
            )
        return artifact

    def _load_model(self) -> Decoder | Encoder:
        """Load the model itself, with its weights, as transformers computes it."""
        begin, folder = self._begin, Path(self._begin.folder)
        device = _parse_device(begin.device)
        self._progress(f"load {folder.name}")
        request = CompileRequest(
            task=begin.task,
            dtype=begin.dtype,
            regions="none" if begin.task == "embed" else "auto",
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
                raise explain_other_task(artifact.manifest, self._name, self._begin.task)
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
        module, replays = self.module, has_steps(artifact.manifest)
        assert module is not None
        self._attachment = api.attach(
            module,
            artifact,
            cuda_graphs=replays,
            quantize=artifact.manifest.build.quantization is not None,
            ops=self._begin.ops,
            settings=self._settings,
            progress=self._progress,
        )
        self._artifact = artifact
        if isinstance(self._model, Decoder) and self._settings.graphs:
            self._model.serve(artifact.manifest, replays)

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        self._attachment = self._artifact = None
        if isinstance(self._model, Decoder):
            self._model.serve(None)

    def ask(self, request: EngineRequest) -> EngineResponse:
        """Answer a request.

        Raises:
            HubaotiError: why it cannot be.
        """
        try:
            return self._answer(request)
        except HubaotiError:
            raise
        except Exception as error:  # a model raises what it likes
            message = f"{error}".lower()
            if isinstance(error, MemoryError) or any(words in message for words in _OUT_OF_MEMORY):
                raise NotEnoughMemory(
                    f"{self._name} ran out of memory: {first_line(error)}",
                    hint="ask for shorter texts or for fewer at a time, or unload another model",
                ) from error
            raise HubaotiError(
                f"{self._name} failed: {type(error).__name__}: {first_line(error)}",
                hint="see whether it answers without graphs, and whether its files are whole",
            ) from error

    @property
    def _name(self) -> str:
        return Path(self._begin.folder).name

    def _answer(self, request: EngineRequest) -> EngineResponse:
        match request:
            case messages.Generate(prompts, sampling):
                return messages.Generated(self._decoder("generate").generate(prompts, sampling))
            case messages.Measure(prompts, sampling):
                rows = self._decoder("generate").measure(prompts, sampling)
                return messages.Measured([*map(len, rows)])
            case messages.Score(items):
                return messages.Scored(self._decoder("score").score(items))
            case messages.Embed(texts):
                return self._embed(texts)
            case messages.Use(digest):
                self._use(self._read_artifact(digest))
        return self.state()

    def _decoder(self, verb: str) -> Decoder:
        if not isinstance(self._model, Decoder):
            raise BadRequest(
                f"{self._name} embeds texts; it cannot {verb}",
                hint="ask it for vectors (embed, --text), or load a causal language model",
            )
        return self._model

    def _embed(self, texts: list[str]) -> messages.Embedded:
        if isinstance(self._model, TextModel):
            vectors = self._model(texts)
            self._embeds["compiled"] += 1
        else:
            assert self._model is not None
            vectors = self._model.embed(texts)
            self._embeds["eager"] += self._attachment is None
        return messages.Embedded(vectors.shape[1], vectors.float().contiguous().numpy().tobytes())

    def state(self) -> State:
        """Its artifact, bytes and calls so far; `reasons` are those of eager calls."""
        stats = self._attachment.stats() if self._attachment else _NO_STATS
        reasons: Counter[str] = Counter()
        for region in stats["regions"].values():
            reasons.update(region["eager"])
        return State(
            task=self._begin.task,
            artifact=self._artifact.digest if self._artifact else None,
            bytes=self.bytes,
            compiled=stats["compiled"] + self._embeds["compiled"],
            eager=stats["eager"] + self._embeds["eager"],
            reasons=dict(reasons),
            host=name_host_kind(_parse_device(self._begin.device)),
        )

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The open graphs that answer; none where the model answers by itself."""
        if isinstance(self._model, TextModel):
            return (self._model.graph,)
        return self._attachment.graphs if self._attachment else ()

    def find_number(self, graph: Graph) -> int:
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
    """A device by its name; one that graphs are not compiled for is refused."""
    return choose_graph_device("cuda" if device.startswith("cuda") else "cpu", device)


def _is_text_graph(artifact: Artifact) -> bool:
    """Whether one graph of it answers texts alone."""
    return artifact.manifest.is_whole and artifact.manifest.program.task == "embed"


def count_module_bytes(module: nn.Module) -> int:
    """The memory of a module's tensors; what several share counts once."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
