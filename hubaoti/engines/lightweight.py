"""LightweightEngine: several models at once on one machine, within a memory that is told.

Each model answers by its graphs where there are some, and by itself where there are none. It is
loaded when it is asked for, and makes room for another when it is not.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from hubaoti import api
from hubaoti.compiling import request_of
from hubaoti.engines.asks import (
    Ask,
    Begin,
    Embed,
    Embedded,
    Generate,
    Generated,
    Generation,
    Item,
    Likelihood,
    Measure,
    Measured,
    Prompt,
    Reply,
    Sampling,
    Score,
    Scored,
    State,
    Tell,
    Use,
    item_of,
)
from hubaoti.engines.building import Building, Work
from hubaoti.engines.found import (
    TASKS,
    Wanted,
    in_mirror,
    in_repos,
    task_in,
    weights_bytes,
)
from hubaoti.engines.room import Holder, Place, Room, Standing
from hubaoti.errors import BadRequest, HubaotiError, NotEnoughMemory
from hubaoti.fetching import EAGER_FILES, local_folder, model_files
from hubaoti.host import Host, probe
from hubaoti.memory import size_of
from hubaoti.settings import Settings
from hubaoti.steps import Say, silent

if TYPE_CHECKING:
    import torch

    from hubaoti.bundle import Bundle
    from hubaoti.hub.pull import Pulled
    from hubaoti.mirror import Artifact

Compile = Literal["never", "background", "now"]
PROCESS = 400 << 20  # bytes of a worker beside its weights


class NoGraphs(UserWarning):
    """A model answers without graphs, and why."""


class LightweightEngine:
    """Models served in this process, or each in one of its own; safe from many threads."""

    def __init__(  # noqa: PLR0913 - a face of keywords
        self,
        settings: Settings | None = None,
        *,
        memory: int | str | None = None,
        repos: Sequence[str] = (),
        device: str | None = None,
        isolate: bool = False,
        trust: bool = False,
        say: Say = silent,
    ) -> None:
        """Nothing is loaded yet.

        `memory` is what all models may hold together, in bytes or as "8GB"; by default what the
        machine has free. `device` is cpu or cuda:0, by default a GPU where there is one. In `repos`
        the artifacts are looked for that the mirror does not have. With `isolate` each model has a
        process of its own, whose end costs one request.

        Raises:
            BadRequest: `memory` is no size.
        """
        self._settings = settings or Settings.from_env()
        self._room = Room(None if memory is None else size_of(memory))
        self._repos = tuple(repos)
        self._host = probe(self._settings)
        self._device = device or device_of(self._host)
        self._isolates = isolate
        self._trust = trust
        self._say = say

    def load(
        self,
        model: str | Path,
        artifact: Artifact | Pulled | Bundle | str | None = None,
        compile: Compile = "never",
        *,
        task: str | None = None,
        push: str | None = None,
        revision: str | None = None,
        **asked: Any,
    ) -> Standing:
        """Load a model with the graphs that serve it, and say how it stands.

        `artifact` is as `hubaoti.attach` takes it; without one it is looked for in the mirror, then
        in the engine's repos. Where there is none, `compile` says whether the model is answered by
        itself ("never"), until a child process has compiled it ("background"), or compiled first
        ("now"); `asked` are words of `hubaoti.compile`, `push` is a repo for what was built.

        A model that is loaded already gets the artifact that is given.

        Raises:
            ModelNotFound: there is no such model; NotEnoughMemory: it is larger than what is free.
            OtherProgram, BadRequest, Quarantined, ...: the artifact that was given does not serve.
        """
        if compile not in ("never", "background", "now"):
            raise BadRequest(f"compile={compile!r}", hint='say "never", "background" or "now"')
        name = str(model)
        if (known := self._room.find(name)) is not None:
            return self._loaded_again(known, artifact)
        place = self._placed(name, artifact, task, revision, asked)
        work = self._work(place, name, push, revision, asked)
        if place.begin.digest is None and compile != "never" and self._settings.graphs:
            place.building = Building(work)
            if compile == "now":
                self._say(f"compile {name}")
                self._take_built(place)
        if self._room.add(place) is not place:
            if place.building is not None:  # another thread was faster
                place.building.stop()
            return self._loaded_again(self._room.get(name), artifact)
        try:
            with self._using(name):
                return place.standing()
        except BaseException:
            self._room.remove(name)
            raise

    def generate(
        self, model: str | Path, prompts: str | Sequence[Prompt], **sampling: Any
    ) -> list[Generation]:
        """What follows each prompt (a text, or messages), in their order.

        `sampling` are words of `Sampling`: max_new_tokens, do_sample, temperature, …

        Raises:
            OutOfBounds: a prompt and its new tokens are longer than the cache; nothing was
                generated. WorkerEnded: the model's own process ended meanwhile.
        """
        texts: list[Prompt] = [prompts] if isinstance(prompts, str) else [*prompts]
        reply = self._ask(model, Generate(texts, Sampling.of(sampling)))
        assert isinstance(reply, Generated)
        return reply.answers

    def measure(self, model: str | Path, prompts: Sequence[Prompt], **sampling: Any) -> list[int]:
        """The tokens of each prompt; nothing is generated.

        Raises:
            OutOfBounds: one, with what `sampling` has follow it, is longer than the cache.
        """
        reply = self._ask(model, Measure([*prompts], Sampling.of(sampling)), requests=0)
        assert isinstance(reply, Measured)
        return reply.tokens

    def score(self, model: str | Path, items: Sequence[Item | tuple[str, str]]) -> list[Likelihood]:
        """The log-likelihood of each (context, continuation), in their order.

        Raises:
            OutOfBounds: an item is longer than the cache. WorkerEnded: as `generate`.
        """
        reply = self._ask(model, Score([item_of(item) for item in items]))
        assert isinstance(reply, Scored)
        return reply.answers

    def embed(self, model: str | Path, texts: str | Sequence[str]) -> torch.Tensor:
        """One vector for each text: (texts, width), float32, on the CPU.

        Raises:
            OutOfBounds: a text is too long. WorkerEnded: as `generate`.
        """
        reply = self._ask(model, Embed([texts] if isinstance(texts, str) else [*texts]))
        assert isinstance(reply, Embedded)
        import torch

        return torch.frombuffer(bytearray(reply.values), dtype=torch.float32).view(-1, reply.width)

    def state(self, model: str | Path) -> State:
        """How often a model's graphs answered, how often the model itself, and why."""
        reply = self._ask(model, Tell(), requests=0)
        assert isinstance(reply, State)
        return reply

    def unload(self, model: str | Path) -> None:
        """Give a model's memory back, once nobody uses it, and forget it.

        Raises:
            BadRequest: it is not loaded.
        """
        self._room.remove(str(model))

    def models(self) -> list[Standing]:
        """How each model stands."""
        return [place.standing() for place in self._room]

    def close(self) -> None:
        """Unload every model."""
        for place in self._room:
            self.unload(place.name)

    def __enter__(self) -> LightweightEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, model: str | Path, ask: Ask, requests: int = 1) -> Reply:
        with self._using(str(model)) as (place, holder):
            place.requests += requests
            try:
                return holder.ask(ask)
            finally:
                self._room.settle(place)
                if holder.problem and place.begin.digest is not None:
                    self._lost(place, holder.problem)

    @contextmanager
    def _using(self, name: str) -> Iterator[tuple[Place, Holder]]:
        """A model that is loaded, and stays while it is used; loaded again if it had to leave."""
        with self._room.using(name) as place:
            if place.building is not None and place.building.is_done():
                self._take_built(place)
            yield place, self._held(place)

    def _placed(
        self,
        name: str,
        artifact: Artifact | Pulled | Bundle | str | None,
        task: str | None,
        revision: str | None,
        asked: dict[str, Any],
    ) -> Place:
        """A model with its files here, and the artifact that serves it."""
        self._say("files")
        folder, _ = model_files(name, revision, EAGER_FILES, self._settings)
        given = None
        if artifact is not None and self._settings.graphs:
            given = api.artifact_of(artifact, self._trust, self._settings, self._say)
            task = task or given.manifest.program.task
        chosen = task or task_in(folder)
        if chosen not in TASKS:
            raise BadRequest(
                f"an engine has models to {' or '.join(TASKS)}, not for {chosen}",
                hint="compile it with --task generate or embed; hubaoti.attach takes the others",
            )
        dtype, quantization = asked.get("dtype"), asked.get("quantize")
        wanted = Wanted(folder, chosen, self._device, self._host, dtype, quantization)
        why = ""
        if given is not None:
            if refusal := wanted.refusal(given.manifest):
                raise refusal
        elif self._settings.graphs:
            given, why = self._found(wanted)
        begin = Begin(
            str(folder),
            chosen,
            self._device,
            given.manifest.build.dtype if given else dtype,
            given.digest if given else None,
            bool(asked.get("trust_remote_code")),
        )
        needs = weights_bytes(folder, begin.dtype) + (PROCESS if self._isolates else 0)
        told = why or ("" if given else "no graphs are wanted")
        return Place(name, begin, needs, why=told, is_asked=artifact is not None)

    def _found(self, wanted: Wanted) -> tuple[Artifact | None, str]:
        """The artifact of a model, in the mirror or a repo; else why there is none."""
        if found := in_mirror(wanted, self._settings):
            return found, ""
        found, reasons = in_repos(wanted, self._repos, self._trust, self._settings, self._say)
        return found, "" if found else "; ".join(["the mirror has no artifact for it", *reasons])

    def _loaded_again(self, place: Place, artifact: Any) -> Standing:
        """A model that is known; other graphs answer from now on, where some are given."""
        with self._using(place.name) as (_, holder):
            if artifact is not None and self._settings.graphs:
                given = api.artifact_of(artifact, self._trust, self._settings, self._say)
                begin = place.begin
                wanted = Wanted(Path(begin.folder), begin.task, self._device, self._host)
                if refusal := wanted.refusal(given.manifest):
                    raise refusal
                self._use(place, holder, given.digest)
        return place.standing()

    def _work(
        self, place: Place, name: str, push: str | None, revision: str | None, asked: dict[str, Any]
    ) -> Work:
        """What a child process compiles."""
        words = {"task": place.begin.task, "device": self._device, **asked}
        try:
            request_of(words)  # type: ignore[arg-type]  # what it is, it is asked
        except TypeError as why:
            raise BadRequest(f"load: {why}", hint="it takes the words of hubaoti.compile") from why
        if revision is not None:
            words["revision"] = revision
        folder = local_folder(name)
        return Work(str(folder or name), words, push, self._settings.to_env())

    def _take_built(self, place: Place) -> None:
        """Have what was compiled answer, between two requests."""
        building, place.building = place.building, None
        assert building is not None
        try:
            outcome = building.outcome()
            assert outcome.digest is not None
            if outcome.push:
                warnings.warn(f"{place.name}: not pushed: {outcome.push}", NoGraphs, stacklevel=4)
            if place.holder is None:
                place.begin = msgspec.structs.replace(place.begin, digest=outcome.digest)
                place.why = ""
            else:
                self._use(place, place.holder, outcome.digest)
        except HubaotiError as why:
            self._lost(place, f"{why}")

    def _use(self, place: Place, holder: Holder, digest: str) -> None:
        holder.ask(Use(digest))
        place.begin = msgspec.structs.replace(place.begin, digest=digest)
        place.why = ""

    def _lost(self, place: Place, why: str) -> None:
        """A model goes on without graphs."""
        place.begin = msgspec.structs.replace(place.begin, digest=None)
        place.why = why
        warnings.warn(f"{place.name} answers without graphs: {why}", NoGraphs, stacklevel=4)

    def _held(self, place: Place) -> Holder:
        """The model in memory; others make room for it."""
        if place.holder is None:
            self._room.reserve(place)
            started = time.perf_counter()
            try:
                place.holder = self._begun(place)
                place.seconds = time.perf_counter() - started
                place.is_asked = False
            finally:
                self._room.settle(place)
        return place.holder

    def _begun(self, place: Place) -> Holder:
        """Load a model; without graphs, where those that were found cannot be opened."""
        try:
            return self._begin(place.begin)
        except HubaotiError as why:
            if place.begin.digest is None or place.is_asked or isinstance(why, NotEnoughMemory):
                raise
            self._lost(place, f"{why}")
        return self._begin(place.begin)

    def _begin(self, begin: Begin) -> Holder:
        if self._isolates:
            from hubaoti.engines.isolated import Isolated

            return Isolated(begin, self._settings)
        self._say("torch")  # importing it takes longer than most steps
        from hubaoti.engines.resident import Resident

        return Resident(begin, self._settings, self._say)


def device_of(host: Host) -> str:
    """Where models are, unless somebody says: a GPU where there is one that torch can use."""
    return "cuda:0" if host.gpus and host.torch is not None and host.torch.cuda else "cpu"
