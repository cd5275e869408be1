"""LightweightEngine: several models at once on one machine, within a memory that is told.

Each model answers by its graphs where there are some, and by itself where there are none. A model
is loaded when it is asked for, and the one whose loading would cost the least for the memory that
it holds makes room for another (GDSF: seconds × uses / bytes, above what left last).
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from hubaoti import api
from hubaoti.compiling import request_of
from hubaoti.disks import mebibytes
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
from hubaoti.errors import BadRequest, HubaotiError, NotEnoughMemory
from hubaoti.fetching import EAGER_FILES, local_folder, model_files
from hubaoti.host import Host, probe
from hubaoti.memory import available, size_of
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


class Holder(Protocol):
    """What holds a loaded model: this process (`Resident`) or one of its own (`Isolated`)."""

    @property
    def bytes(self) -> int: ...
    def ask(self, ask: Ask) -> Reply: ...
    def state(self) -> State: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Standing:
    """How a model stands: `compiled`, `eager` or `unloaded`; `why` says why it has no graphs.

    `bytes` are what it holds now, `seconds` what loading it took, `requests` what it was asked so
    far; `pid` is of its worker, where it has one.
    """

    model: str
    task: str
    state: str
    artifact: str | None
    bytes: int
    seconds: float
    requests: int
    is_building: bool
    pid: int | None
    why: str


@dataclass(slots=True)
class Place:
    """A model that the engine knows, loaded or not."""

    name: str
    begin: Begin
    needs: int
    holder: Holder | None = None
    bytes: int = 0  # what it counts for; as soon as it is being loaded
    users: int = 0
    requests: int = 0
    seconds: float = 0.0
    clock: float = 0.0
    why: str = ""
    is_asked: bool = False  # its artifact was given: what is wrong with it is raised
    building: Building | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def value(self) -> float:
        """What would be lost with it, for each byte."""
        return self.clock + self.seconds * max(1, self.requests) / max(1, self.bytes)


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
        self._most = None if memory is None else size_of(memory)
        self._repos = tuple(repos)
        self._host = probe(self._settings)
        self._device = device or device_of(self._host)
        self._isolates = isolate
        self._trust = trust
        self._say = say
        self._places: dict[str, Place] = {}
        self._free = threading.Condition()
        self._clock = 0.0

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
        with self._free:
            known = self._places.get(name)
        if known is not None:
            return self._loaded_again(known, artifact)
        place = self._placed(name, artifact, task, revision)
        work = self._work(place, name, push, revision, asked)
        if place.begin.digest is None and compile != "never" and self._settings.graphs:
            place.building = Building(work)
            if compile == "now":
                self._say(f"compile {name}")
                self._take_built(place)
        with self._free:
            place = self._places.setdefault(name, place)
        try:
            with self._using(name, requests=0):
                pass
        except BaseException:
            if place.holder is None:
                self.unload(name)
            raise
        return self._standing(place)

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
        place = self._known(str(model))
        with place.lock:
            if place.building is not None:
                place.building.stop()
                place.building = None
            with self._free:
                self._let_go(place)
                self._places.pop(place.name, None)
                self._free.notify_all()

    def models(self) -> list[Standing]:
        """How each model stands."""
        with self._free:
            places = [*self._places.values()]
        return [self._standing(place) for place in places]

    def close(self) -> None:
        """Unload every model."""
        for place in [*self._places.values()]:
            self.unload(place.name)

    def __enter__(self) -> LightweightEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # One request

    def _ask(self, model: str | Path, ask: Ask, requests: int = 1) -> Reply:
        with self._using(str(model), requests) as (place, holder):
            try:
                return holder.ask(ask)
            finally:
                self._note(place)

    def _known(self, name: str) -> Place:
        with self._free:
            if name not in self._places:
                raise unknown(name)
            return self._places[name]

    @contextmanager
    def _using(self, name: str, requests: int = 1) -> Iterator[tuple[Place, Holder]]:
        """A model that is loaded, and stays while it is used; loaded again if it had to leave."""
        with self._free:
            place = self._known(name)
            place.users += 1
        try:
            with place.lock:
                if self._places.get(name) is not place:  # unloaded by another thread
                    raise unknown(name)
                place.requests += requests
                place.clock = self._clock
                if place.building is not None and place.building.is_done():
                    self._take_built(place)
                yield place, self._held(place)
        finally:
            with self._free:
                place.users -= 1
                self._free.notify_all()

    def _note(self, place: Place) -> None:
        """What a request may have changed: the memory that is held, graphs that had to go."""
        holder = place.holder
        if holder is None:
            return
        with self._free:
            place.bytes = holder.bytes
        problem = getattr(holder, "problem", "")
        if problem and place.begin.digest is not None:
            self._lost(place, problem)

    # Finding graphs

    def _placed(
        self,
        name: str,
        artifact: Artifact | Pulled | Bundle | str | None,
        task: str | None,
        revision: str | None,
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
        wanted = Wanted(folder, chosen, self._device, self._host)
        why = ""
        if given is not None:
            if refusal := wanted.refusal(given.manifest):
                raise refusal
        elif self._settings.graphs:
            given, why = self._found(wanted)
        dtype = given.manifest.build.dtype if given else None
        begin = Begin(str(folder), chosen, self._device, dtype, given.digest if given else None)
        needs = weights_bytes(folder, dtype) + (PROCESS if self._isolates else 0)
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
        with self._using(place.name, requests=0) as (_, holder):
            if artifact is not None and self._settings.graphs:
                given = api.artifact_of(artifact, self._trust, self._settings, self._say)
                begin = place.begin
                wanted = Wanted(Path(begin.folder), begin.task, self._device, self._host)
                if refusal := wanted.refusal(given.manifest):
                    raise refusal
                self._use(place, holder, given.digest)
        return self._standing(place)

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

    # Memory

    def _held(self, place: Place) -> Holder:
        """The model in memory; others make room for it."""
        if place.holder is not None:
            return place.holder
        self._reserve(place)
        started = time.perf_counter()
        try:
            place.holder = self._begun(place)
        except BaseException:
            with self._free:
                place.bytes = 0
                self._free.notify_all()
            raise
        place.seconds = time.perf_counter() - started
        place.is_asked = False
        with self._free:
            place.bytes = place.holder.bytes
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

    def _reserve(self, place: Place) -> None:
        """Count a model's memory as taken, when there is enough.

        Raises:
            NotEnoughMemory: there never will be.
        """
        with self._free:
            while (lacking := self._lacking(place)) > 0:
                held = [each for each in self._places.values() if each.bytes and each is not place]
                idle = [each for each in held if not each.users and each.holder is not None]
                if idle:
                    self._evict(min(idle, key=lambda each: each.value))
                elif held:
                    self._free.wait()
                else:
                    raise self._too_large(place, lacking)
            place.bytes = place.needs

    def _lacking(self, place: Place) -> int:
        """The bytes that a model lacks."""
        lacking = place.needs - available()
        if self._most is not None:
            held = sum(each.bytes for each in self._places.values() if each is not place)
            lacking = max(lacking, held + place.needs - self._most)
        return lacking

    def _too_large(self, place: Place, lacking: int) -> NotEnoughMemory:
        have = place.needs - lacking
        said = "may be held" if self._most is not None and have >= self._most else "are free"
        return NotEnoughMemory(
            f"{place.name} takes {mebibytes(place.needs)} of memory; {mebibytes(have)} {said}",
            hint="give the engine more memory, or load it in bfloat16 or quantized",
        )

    def _evict(self, place: Place) -> None:
        """Unload the least valuable; it is loaded again when it is asked for."""
        self._clock = place.value
        self._let_go(place)

    def _let_go(self, place: Place) -> None:
        holder, place.holder = place.holder, None
        place.bytes = 0
        if holder is not None:
            holder.close()

    def _standing(self, place: Place) -> Standing:
        holder = place.holder
        state = "unloaded" if holder is None else "compiled" if place.begin.digest else "eager"
        return Standing(
            model=place.name,
            task=place.begin.task,
            state=state,
            artifact=place.begin.digest,
            bytes=place.bytes,
            seconds=round(place.seconds, 3),
            requests=place.requests,
            is_building=place.building is not None and not place.building.is_done(),
            pid=getattr(holder, "pid", None),
            why=place.why,
        )


def unknown(name: str) -> BadRequest:
    """No such model."""
    return BadRequest(f"{name} is not loaded", hint=f"engine.load({name!r}) first")


def device_of(host: Host) -> str:
    """Where models are, unless somebody says: a GPU where there is one that torch can use."""
    return "cuda:0" if host.gpus and host.torch is not None and host.torch.cuda else "cpu"
