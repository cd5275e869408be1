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
from typing import TYPE_CHECKING, Any

import msgspec

from hubaoti.engines.background_compile import Building
from hubaoti.engines.load_plan import Compile, Placing, Want, choose_device
from hubaoti.engines.messages import (
    Begin,
    Embed,
    Embedded,
    EngineRequest,
    EngineResponse,
    Generate,
    Generated,
    Generation,
    Item,
    Likelihood,
    Measure,
    Measured,
    Prompt,
    Sampling,
    Score,
    Scored,
    State,
    Use,
    make_item,
    read_list,
    read_prompts,
    read_texts,
)
from hubaoti.engines.pool import Holder, ModelPool, ModelSlot, ModelStatus, Unloaded
from hubaoti.errors import BadRequest, HubaotiError, NotEnoughMemory, NotTried, WorkerEnded
from hubaoti.host.memory import parse_size
from hubaoti.host.probe import probe_host
from hubaoti.progress import Progress, report_nothing
from hubaoti.runtime.custom_ops import require_module_names
from hubaoti.settings import Settings

if TYPE_CHECKING:
    import torch

    from hubaoti.artifact.bundle import Bundle
    from hubaoti.hub.pull import Pulled
    from hubaoti.mirror import Artifact

# What says nothing of graphs: they are tried again.
_PASSING = (NotTried, NotEnoughMemory, WorkerEnded)


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
        ops: Sequence[str] = (),
        progress: Progress = report_nothing,
    ) -> None:
        """Nothing is loaded yet.

        `memory` is what all models may hold together, in bytes or as "8GB"; by default what the
        machine has free. `device` is cpu or cuda:0, by default a GPU where there is one. In `repos`
        the artifacts are looked for that the mirror does not have. With `isolate` each model has a
        process of its own, whose end costs one request. `ops` are modules that register the ops
        which graphs call; they are imported wherever a model is.

        Raises:
            BadRequest: `memory` is no size; `ops` are no modules.
        """
        self._settings = settings or Settings.from_env()
        self._room = ModelPool(None if memory is None else parse_size(memory))
        host = probe_host(self._settings)
        where = choose_device(host, device)
        require_module_names(ops)
        self._placing = Placing(
            self._settings, host, where, tuple(repos), isolate, trust, progress, tuple(ops)
        )
        self._isolates = isolate
        self._progress = progress

    def load(
        self,
        model: str | Path,
        artifact: Artifact | Pulled | Bundle | Path | str | None = None,
        compile: Compile = "never",
        *,
        task: str | None = None,
        push: str | None = None,
        revision: str | None = None,
        **asked: Any,
    ) -> ModelStatus:
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
        want = Want(str(model), artifact, compile, task, push, revision, asked)
        if (known := self._room.find(want.name)) is None:
            place = self._placing.placed(want)
            self._build(place, want)
            known = self._room.add(place)
            if known is place:
                return self._first(place)
            if place.building is not None:  # another thread was faster
                place.building.stop()
        try:
            return self._again(known, want)
        except Unloaded:  # meanwhile, by another thread
            return self.load(model, artifact, compile, task=task, push=push, **asked)

    def generate(
        self, model: str | Path, prompts: str | Sequence[Prompt], **sampling: Any
    ) -> list[Generation]:
        """What follows each prompt (a text, or messages), in their order.

        `sampling` are words of `Sampling`: max_new_tokens, do_sample, temperature, …

        Raises:
            OutOfBounds: a prompt and its new tokens are longer than the cache; nothing was
                generated. WorkerEnded: the model's own process ended meanwhile.
        """
        reply = self._ask(model, Generate(read_prompts(prompts), Sampling.of(sampling)))
        assert isinstance(reply, Generated)
        return reply.answers

    def measure(self, model: str | Path, prompts: Sequence[Prompt], **sampling: Any) -> list[int]:
        """The tokens of each prompt; nothing is generated.

        Raises:
            OutOfBounds: one, with what `sampling` has follow it, is longer than the cache.
        """
        reply = self._ask(model, Measure(read_prompts(prompts), Sampling.of(sampling)), requests=0)
        assert isinstance(reply, Measured)
        return reply.tokens

    def score(self, model: str | Path, items: Sequence[Item | tuple[str, str]]) -> list[Likelihood]:
        """The log-likelihood of each (context, continuation), in their order.

        Raises:
            OutOfBounds: an item is longer than the cache. WorkerEnded: as `generate`.
        """
        reply = self._ask(model, Score([make_item(item) for item in read_list(items, "items")]))
        assert isinstance(reply, Scored)
        return reply.answers

    def embed(self, model: str | Path, texts: str | Sequence[str]) -> torch.Tensor:
        """One vector for each text: (texts, width), float32, on the CPU.

        Raises:
            OutOfBounds: a text is too long. WorkerEnded: as `generate`.
        """
        reply = self._ask(model, Embed(read_texts(texts)))
        assert isinstance(reply, Embedded)
        import torch

        return torch.frombuffer(bytearray(reply.values), dtype=torch.float32).view(-1, reply.width)

    def state(self, model: str | Path) -> State:
        """How often a model's graphs answered since it was loaded, how often itself, and why."""
        with self._room.using(str(model)) as place:
            if place.holder is None:  # it does not come back for this
                return State(place.begin.task, place.begin.digest, 0, 0, 0, {}, "")
            return place.holder.state()

    def unload(self, model: str | Path) -> None:
        """Give a model's memory back, once nobody uses it, and forget it.

        Raises:
            BadRequest: it is not loaded.
        """
        self._room.drop(self._room.get(str(model)))

    def models(self) -> list[ModelStatus]:
        """How each model that the engine knows stands, loaded or not."""
        return [place.standing() for place in self._room]

    def close(self) -> None:
        """Unload every model, once nobody uses it, and forget it."""
        for place in self._room:
            self._room.drop(place)

    def __enter__(self) -> LightweightEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, model: str | Path, ask: EngineRequest, requests: int = 1) -> EngineResponse:
        with self._using(str(model)) as (place, holder):
            place.requests += requests
            try:
                return holder.ask(ask)
            finally:
                self._room.settle(place)
                if holder.problem and place.begin.digest is not None:
                    self._lost(place, holder.problem)

    @contextmanager
    def _using(self, name: str) -> Iterator[tuple[ModelSlot, Holder]]:
        """A model that is loaded, and stays while it is used; loaded again if it had to leave."""
        with self._room.using(name) as place:
            if place.building is not None and place.building.is_done():
                self._take_built(place)
            yield place, self._held(place)

    def _first(self, place: ModelSlot) -> ModelStatus:
        """A model that nobody had asked for before."""
        try:
            with self._using(place.name):
                return place.standing()
        except BaseException:
            self._room.drop(place)
            raise

    def _build(self, place: ModelSlot, want: Want) -> None:
        """Start a compile where one is wanted; with "now", wait for it."""
        work = self._placing.work(place, want)
        if want.compile == "never" or place.begin.digest or not self._settings.graphs:
            return
        place.building = Building(work)
        if want.compile == "now":
            self._progress(f"compile {place.name}")
            try:
                self._take_built(place)
            except BaseException:  # an interrupt
                if place.building is not None:
                    place.building.stop()
                raise

    def _again(self, place: ModelSlot, want: Want) -> ModelStatus:
        """A model that is known; other graphs answer from now on, or are built, as is wanted.

        Raises:
            BadRequest: it is loaded as something else.
        """
        begin = place.begin
        if want.task not in (None, begin.task) or want.revision not in (None, place.revision):
            raise BadRequest(
                f"{place.name} is loaded already, to {begin.task}"
                + (f", at {place.revision}" if place.revision else ""),
                hint=f"engine.unload({place.name!r}) first",
            )
        with self._using(place.name) as (_, holder):
            if want.artifact is None:
                self._try_again(place, holder)
                if place.building is None:
                    self._build(place, want)
            elif given := self._placing.given(want):
                self._placing.require_serves(given, begin)
                self._use(place, holder, given.digest)
            return place.standing()

    def _take_built(self, place: ModelSlot) -> None:
        """Have what was compiled answer, between two requests."""
        building = place.building
        assert building is not None
        try:
            outcome = building.wait()
            place.building = None
            if outcome.push:
                warnings.warn(f"{place.name}: not pushed: {outcome.push}", NoGraphs, stacklevel=4)
            if place.holder is None:
                place.begin = msgspec.structs.replace(place.begin, digest=outcome.digest)
                place.why, place.untried = "", None
            else:
                self._use(place, place.holder, outcome.digest)
        except HubaotiError as why:
            place.building = None
            self._lost(place, f"{why}")

    def _use(self, place: ModelSlot, holder: Holder, digest: str) -> None:
        """Have other graphs answer; where they cannot, those that did before do."""
        try:
            holder.ask(Use(digest))
        except HubaotiError as why:
            if place.begin.digest is not None and holder.state().artifact is None:
                self._lost(place, f"{why}")
            raise
        place.begin = msgspec.structs.replace(place.begin, digest=digest)
        place.why, place.untried = "", None

    def _try_again(self, place: ModelSlot, holder: Holder) -> None:
        """Have graphs answer that something else kept from it when the model was loaded."""
        digest, place.untried = place.untried, None
        if digest is not None:
            try:
                self._use(place, holder, digest)
            except HubaotiError as why:
                place.untried = digest if isinstance(why, _PASSING) else None
                place.why = f"{why}"

    def _lost(self, place: ModelSlot, why: str) -> None:
        """Let a model go on without graphs, and warn of it with the reason."""
        place.begin = msgspec.structs.replace(place.begin, digest=None)
        place.why = why
        warnings.warn(f"{place.name} answers without graphs: {why}", NoGraphs, stacklevel=4)

    def _held(self, place: ModelSlot) -> Holder:
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

    def _begun(self, place: ModelSlot) -> Holder:
        """Load a model; without graphs, where those that were found cannot be opened."""
        if place.untried is not None:
            place.begin = msgspec.structs.replace(place.begin, digest=place.untried)
            place.untried, place.why = None, ""
        try:
            return self._begin(place.begin)
        except HubaotiError as why:
            if place.begin.digest is None or place.is_asked or isinstance(why, NotEnoughMemory):
                raise
            place.untried = place.begin.digest if isinstance(why, _PASSING) else None
            self._lost(place, f"{why}")
        return self._begin(place.begin)

    def _begin(self, begin: Begin) -> Holder:
        if self._isolates:
            from hubaoti.engines.worker_client import Isolated

            return Isolated(begin, self._settings)
        self._progress("torch")  # importing it takes longer than most steps
        from hubaoti.engines.local import Resident

        return Resident(begin, self._settings, self._progress)
