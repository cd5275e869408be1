"""LightweightEngine: several models at once on one machine, within a memory that is told.

Each model answers by its graphs where there are some, and by itself where there are none. It is
loaded when it is asked for, and makes room for another when it is not.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hubaoti.compiler.request import RangeLike
from hubaoti.engines import messages
from hubaoti.engines.background_compile import Building
from hubaoti.engines.load_plan import Compile, LoadPlanner, Want, choose_device
from hubaoti.engines.messages import Generation, Item, Likelihood, Prompt, Sampling, State
from hubaoti.engines.pool import Holder, ModelPool, ModelSlot, ModelStatus, NoGraphs, Unloaded
from hubaoti.errors import BadRequest, HubaotiError
from hubaoti.flags import require_flags
from hubaoti.host.memory import parse_size
from hubaoti.host.probe import probe_host
from hubaoti.progress import Progress, report_nothing
from hubaoti.runtime.custom_ops import require_module_names
from hubaoti.settings import Settings

if TYPE_CHECKING:
    import torch

    from hubaoti.artifact.bundle import Bundle
    from hubaoti.hub.choice import Pulled
    from hubaoti.mirror import Artifact

_Response = TypeVar("_Response", bound=messages.EngineResponse)


class LightweightEngine:
    """Models served in this process, or each in one of its own; safe from many threads."""

    def __init__(  # noqa: PLR0913 - a face of keywords
        self,
        settings: Settings | None = None,
        *,
        memory: int | str | None = None,
        repos: str | Sequence[str] = (),
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
        require_flags(isolate=isolate, trust=trust)
        settings = settings or Settings.from_env()
        self._room = ModelPool(None if memory is None else parse_size(memory))
        host = probe_host(settings)
        where = choose_device(host, device)
        require_module_names(ops)
        repos = (repos,) if isinstance(repos, str) else tuple(repos)
        self._planner = LoadPlanner(
            settings,
            host,
            where,
            repos,
            isolate,
            trust,
            progress,
            tuple(ops),
        )

    def __repr__(self) -> str:
        return f"LightweightEngine({self._room})"

    def load(  # noqa: PLR0913 - a face of keywords
        self,
        model: str | Path,
        artifact: Artifact | Pulled | Bundle | Path | str | None = None,
        compile: Compile = "never",
        *,
        task: str | None = None,
        push: str | None = None,
        revision: str | None = None,
        dims: Mapping[str, RangeLike] | Iterable[str] = (),
        buckets: Iterable[Mapping[str, RangeLike] | str] = (),
        regions: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        mode: str = "default",
        inductor: Mapping[str, Any] | Iterable[str] = (),
        level: str | None = None,
        trust_remote_code: bool = False,
    ) -> ModelStatus:
        """Load a model with the graphs that serve it, and say how it stands.

        A model that is loaded already gets the artifact that is given.

        Args:
            model: a Hub id or a folder.
            artifact: as `hubaoti.attach` takes it; without one it is looked for in the mirror, then
                in the engine's repos.
            compile: where there is no artifact, or the repo that is given has none for this host:
                "never", the model answers by itself, or that is refused; "background", it does
                until a child process has compiled it; "now", it is compiled first.
            task: generate or embed; by default as the artifact or the model's files say.
            push: a repo for what is compiled.
            revision: of the model: a branch, tag or commit.
            dims: bounds for a compile, as `{"batch": (1, 32)}`; with a step, `(8, 512, 8)`.
            buckets: dims that have a graph of their own, as `[{"seq": (1, 1)}]`.
            regions: auto (the repeated blocks), none (the whole model) or a module's path.
            dtype: float32, bfloat16 or float16; by default the artifact's or the config's.
            quantize: int8wo, int4wo or float8dq: of the graphs that are looked for or compiled.
            mode, inductor, level: for a compile, as `hubaoti.compile` has them.
            trust_remote_code: whether the code that the model brings may run.

        Raises:
            ModelNotFound: there is no such model; NotEnoughMemory: it is larger than what is free.
            OtherProgram, BadRequest, Quarantined, ...: the artifact that was given does not serve.
        """
        require_flags(trust_remote_code=trust_remote_code)
        if compile not in ("never", "background", "now"):
            raise BadRequest(f"compile={compile!r}", hint='say "never", "background" or "now"')
        options = {
            "dims": dims,
            "buckets": buckets,
            "regions": regions,
            "dtype": dtype,
            "quantize": quantize,
            "mode": mode,
            "inductor": inductor,
            "level": level,
            "trust_remote_code": trust_remote_code,
        }
        return self._load(Want(str(model), artifact, compile, task, push, revision, options))

    def _load(self, want: Want) -> ModelStatus:
        if (known := self._room.find(want.name)) is None:
            slot = self._planner.plan_slot(want)
            self._build(slot, want)
            known = self._room.add(slot)
            if known is slot:
                try:
                    with self._using(slot.name):
                        return slot.describe()
                except BaseException:
                    self._room.drop(slot)
                    raise
            if slot.building is not None:  # another thread was faster
                slot.building.stop()
        try:
            return self._load_again(known, want)
        except Unloaded:  # meanwhile, by another thread
            return self._load(want)

    def generate(  # noqa: PLR0913 - a face of keywords
        self,
        model: str | Path,
        prompts: str | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_beams: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """What follows each prompt (a text, or messages), in their order.

        Args:
            model: its name, as `load` was given it.
            prompts: one text, or several; a conversation is a list of messages, as
                `{"role": "user", "content": "..."}`.
            max_new_tokens: at most that many for each prompt.
            do_sample: whether tokens are drawn; this and what follows is by default as the model's
                own generation config says.
            temperature: 0 is greedy.
            top_p, top_k, min_p, repetition_penalty, num_beams: as transformers has them.
            seed: the same prompts are sampled alike, as long as no other model samples meanwhile.
            stop: texts that end an answer.

        Raises:
            OutOfBounds: a prompt and its new tokens are longer than the cache; nothing was
                generated. WorkerEnded: the model's own process ended meanwhile.
        """
        sampling = Sampling.of(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            num_beams=num_beams,
            seed=seed,
            stop=stop,
        )
        request = messages.Generate(messages.read_prompts(prompts), sampling)
        return self._ask(model, request, messages.Generated).answers

    def measure(
        self, model: str | Path, prompts: Sequence[Prompt], *, max_new_tokens: int = 128
    ) -> list[int]:
        """The tokens of each prompt; nothing is generated.

        Raises:
            OutOfBounds: one, with the new tokens that are to follow it, is longer than the cache.
        """
        sampling = Sampling.of(max_new_tokens=max_new_tokens)
        request = messages.Measure(messages.read_prompts(prompts), sampling)
        return self._ask(model, request, messages.Measured, requests=0).tokens

    def score(self, model: str | Path, items: Sequence[Item | tuple[str, str]]) -> list[Likelihood]:
        """The log-likelihood of each (context, continuation), in their order.

        Raises:
            OutOfBounds: an item is longer than the cache. WorkerEnded: as `generate`.
        """
        return self._ask(model, messages.Score(messages.read_items(items)), messages.Scored).answers

    def embed(self, model: str | Path, texts: str | Sequence[str]) -> torch.Tensor:
        """One vector for each text: (texts, width), float32, on the CPU.

        The last hidden states, pooled as the model's sentence-transformers files say, else their
        mean over a text's tokens.

        Raises:
            OutOfBounds: a text is too long. WorkerEnded: as `generate`.
        """
        found = self._ask(model, messages.Embed(messages.read_texts(texts)), messages.Embedded)
        import torch

        return torch.frombuffer(bytearray(found.values), dtype=torch.float32).view(-1, found.width)

    def state(self, model: str | Path) -> State:
        """How often a model's graphs answered since it was loaded, how often itself, and why."""
        with self._room.hold(str(model)) as slot:
            if slot.holder is None:  # it does not come back for this
                return State(slot.begin.task, slot.begin.digest, 0, 0, 0, {}, "")
            return slot.holder.state()

    def unload(self, model: str | Path) -> None:
        """Give a model's memory back, once nobody uses it, and forget it.

        Raises:
            BadRequest: it is not loaded.
        """
        self._room.drop(self._room.get(str(model)))

    def models(self) -> list[ModelStatus]:
        """How each model that the engine knows stands, loaded or not."""
        return [slot.describe() for slot in self._room]

    def close(self) -> None:
        """Unload every model, once nobody uses it, and forget it."""
        for slot in self._room:
            self._room.drop(slot)

    def __enter__(self) -> LightweightEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(
        self,
        model: str | Path,
        request: messages.EngineRequest,
        kind: type[_Response],
        requests: int = 1,
    ) -> _Response:
        """What a model responds, which is of that kind."""
        with self._using(str(model)) as (slot, holder):
            slot.requests += requests
            try:
                response = holder.ask(request)
                assert isinstance(response, kind)
                return response
            finally:
                self._room.settle(slot)
                if holder.problem and slot.begin.digest is not None:
                    slot.drop_graphs(holder.problem)

    @contextmanager
    def _using(self, name: str) -> Iterator[tuple[ModelSlot, Holder]]:
        """A model that is loaded, and stays while it is used; loaded again if it had to leave."""
        with self._room.hold(name) as slot:
            if slot.building is not None and slot.building.is_done():
                self._take_built(slot)
            yield slot, self._hold(slot)

    def _build(self, slot: ModelSlot, want: Want) -> None:
        """Start a compile where one is wanted; with "now", wait for it."""
        work = self._planner.make_work(slot, want)
        if want.compile == "never" or slot.begin.digest or not self._planner.settings.graphs:
            return
        slot.building = Building(work)
        if want.compile == "now":
            self._planner.progress(f"compile {slot.name}")
            try:
                self._take_built(slot)
            except BaseException:  # an interrupt
                if slot.building is not None:
                    slot.building.stop()
                raise

    def _load_again(self, slot: ModelSlot, want: Want) -> ModelStatus:
        """A model that is known; other graphs answer from now on, or are built, as is wanted."""
        begin = slot.begin
        if want.task not in (None, begin.task) or want.revision not in (None, slot.revision):
            raise BadRequest(
                f"{slot.name} is loaded already, to {begin.task}"
                + (f", at {slot.revision}" if slot.revision else ""),
                hint=f"engine.unload({slot.name!r}) first",
            )
        with self._using(slot.name) as (_, holder):
            if given := self._planner.fetch_given(want):
                self._planner.require_serves(given, begin)
                self._use(slot, holder, given.digest)
            else:
                self._try_untried(slot, holder)
                if slot.building is None:
                    self._build(slot, want)
            return slot.describe()

    def _take_built(self, slot: ModelSlot) -> None:
        """Have what was compiled answer, between two requests."""
        building = slot.building
        assert building is not None
        try:
            outcome = building.wait()
            slot.building = None
            if outcome.push:
                warnings.warn(f"{slot.name}: not pushed: {outcome.push}", NoGraphs, stacklevel=4)
            if slot.holder is None:
                slot.use(outcome.digest)
            else:
                self._use(slot, slot.holder, outcome.digest)
        except HubaotiError as error:
            slot.building = None
            slot.drop_graphs(f"{error}")

    def _use(self, slot: ModelSlot, holder: Holder, digest: str) -> None:
        """Have other graphs answer; where they cannot, those that did before do."""
        try:
            holder.ask(messages.Use(digest))
        except HubaotiError as error:
            if slot.begin.digest is not None and holder.state().artifact is None:
                slot.drop_graphs(f"{error}")
            raise
        slot.use(digest)

    def _try_untried(self, slot: ModelSlot, holder: Holder) -> None:
        """Have graphs answer that something else kept from it when the model was loaded."""
        digest, slot.untried = slot.untried, None
        if digest is not None:
            try:
                self._use(slot, holder, digest)
            except HubaotiError as error:
                slot.note_failure(digest, error)

    def _hold(self, slot: ModelSlot) -> Holder:
        """The model in memory; others make room for it."""
        if slot.holder is None:
            self._room.reserve(slot)
            started = time.perf_counter()
            try:
                slot.holder = self._planner.open_slot(slot)
                slot.seconds = time.perf_counter() - started
                slot.is_asked = False
            finally:
                self._room.settle(slot)
        return slot.holder
