"""The models that an engine knows, and the memory that they share.

The one whose loading would cost the least for the memory that it holds makes room for another
(GDSF: seconds x uses / bytes, above the value of what left last); one in use never does.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from hubaoti.artifact.sizes import format_size
from hubaoti.disk import format_mebibytes
from hubaoti.engines.background_compile import Building
from hubaoti.engines.messages import Begin, EngineRequest, EngineResponse, State
from hubaoti.errors import BadRequest, HubaotiError, NotEnoughMemory, NotTried, WorkerEnded
from hubaoti.host.memory import read_available_memory

# What says nothing of graphs: they are tried again.
_WORTH_ANOTHER_TRY = (NotTried, NotEnoughMemory, WorkerEnded)


class NoGraphs(UserWarning):
    """A model answers without graphs, and why."""


class Unloaded(BadRequest):
    """A model that is not loaded, or not any more."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not loaded", hint=f"engine.load({name!r}) first")


class Holder(Protocol):
    """What holds a loaded model: this process (`Resident`) or one of its own (`Isolated`).

    `problem` says why its graphs do not answer any more.
    """

    problem: str

    @property
    def bytes(self) -> int: ...
    @property
    def pid(self) -> int | None: ...
    def ask(self, ask: EngineRequest) -> EngineResponse: ...
    def state(self) -> State: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ModelStatus:
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
class ModelSlot:
    """A model that the engine knows, loaded or not; `needs` are the bytes before it is."""

    name: str
    begin: Begin
    needs: int
    revision: str | None = None
    why: str = ""
    untried: str | None = None  # an artifact that something else kept from answering
    is_asked: bool = False  # its artifact was given: what is wrong with it is raised
    building: Building | None = None
    holder: Holder | None = None
    bytes: int = 0  # what it counts for, as soon as it is being loaded
    users: int = 0
    requests: int = 0
    seconds: float = 0.0
    clock: float = 0.0
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def value(self) -> float:
        """What would be lost with it, for each byte."""
        return self.clock + self.seconds * max(1, self.requests) / max(1, self.bytes)

    def describe(self) -> ModelStatus:
        """How it stands, as a record that does not change with it."""
        holder, building = self.holder, self.building
        state = "unloaded" if holder is None else "compiled" if self.begin.digest else "eager"
        return ModelStatus(
            model=self.name,
            task=self.begin.task,
            state=state,
            artifact=self.begin.digest,
            bytes=self.bytes,
            seconds=round(self.seconds, 3),
            requests=self.requests,
            is_building=building is not None and not building.is_done(),
            pid=holder.pid if holder else None,
            why=self.why,
        )

    def use(self, digest: str) -> None:
        """Have an artifact's graphs answer, now or once it is loaded."""
        self.begin = msgspec.structs.replace(self.begin, digest=digest)
        self.why, self.untried = "", None

    def note_failure(self, digest: str, error: HubaotiError) -> None:
        """Keep why graphs do not answer, and whether they are to be tried again."""
        self.untried = digest if isinstance(error, _WORTH_ANOTHER_TRY) else None
        self.why = f"{error}"

    def drop_graphs(self, why: str) -> None:
        """Let the model go on by itself, and warn of it with the reason."""
        self.begin = msgspec.structs.replace(self.begin, digest=None)
        self.why = why
        warnings.warn(f"{self.name} answers without graphs: {why}", NoGraphs, stacklevel=4)

    def release(self) -> None:
        """Give its memory back; the slot stays, so that it can be loaded again."""
        holder, self.holder = self.holder, None
        self.bytes = 0
        if holder is not None:
            holder.close()


class ModelPool:
    """The places of models; safe from many threads."""

    def __init__(self, most: int | None) -> None:
        """`most` are the bytes that all may hold; None is what the machine has free."""
        self._most = most
        self._slots: dict[str, ModelSlot] = {}
        self._free = threading.Condition()
        self._clock = 0.0

    def __str__(self) -> str:
        slots = [each.describe() for each in self]
        models = ", ".join(f"{each.model} {each.state}" for each in slots) or "no model"
        held = format_size(sum(each.bytes for each in slots))
        most = f" of {format_size(self._most)}" if self._most is not None else ""
        return f"{models}; {held}{most}"

    def __iter__(self) -> Iterator[ModelSlot]:
        with self._free:
            return iter([*self._slots.values()])

    def find(self, name: str) -> ModelSlot | None:
        """The slot of a model; None where it has none."""
        with self._free:
            return self._slots.get(name)

    def get(self, name: str) -> ModelSlot:
        """The slot of a model.

        Raises:
            BadRequest: it has none.
        """
        if (slot := self.find(name)) is None:
            raise Unloaded(name)
        return slot

    def add(self, slot: ModelSlot) -> ModelSlot:
        """A slot for a model, or the one that another thread gave it."""
        with self._free:
            return self._slots.setdefault(slot.name, slot)

    def drop(self, slot: ModelSlot) -> None:
        """Take a model's slot away, once nobody uses it."""
        with slot.lock:
            if slot.building is not None:
                slot.building.stop()
                slot.building = None
            with self._free:
                slot.release()
                if self._slots.get(slot.name) is slot:
                    del self._slots[slot.name]
                self._free.notify_all()

    @contextmanager
    def hold(self, name: str) -> Iterator[ModelSlot]:
        """A model's slot, for one request at a time; it does not leave meanwhile."""
        with self._free:
            slot = self.get(name)
            slot.users += 1
        try:
            with slot.lock:
                if self.find(name) is not slot:  # another thread took it away
                    raise Unloaded(name)
                slot.clock = self._clock
                yield slot
        finally:
            with self._free:
                slot.users -= 1
                self._free.notify_all()

    def reserve(self, slot: ModelSlot) -> None:
        """Count a model's memory as taken, as soon as there is enough.

        Raises:
            NotEnoughMemory: there never will be.
        """
        with self._free:
            while (lacking := self._count_lacking(slot)) > 0:
                if self._evict(slot):
                    continue
                if not any(each.bytes for each in self._list_others(slot)):
                    raise self._explain_too_large(slot, lacking)
                self._free.wait()
            slot.bytes = slot.needs

    def settle(self, slot: ModelSlot) -> None:
        """Count what a model holds by now; where all hold too much, others leave."""
        with self._free:
            slot.bytes = slot.holder.bytes if slot.holder is not None else 0
            while self._most is not None and sum(each.bytes for each in self) > self._most:
                if not self._evict(slot):
                    break
            self._free.notify_all()

    def _list_others(self, slot: ModelSlot) -> list[ModelSlot]:
        return [each for each in self if each is not slot]

    def _evict(self, slot: ModelSlot) -> bool:
        """Unload the least valuable beside one; whether there was any. It may be loaded again."""
        idle = [
            each for each in self._list_others(slot) if each.holder is not None and not each.users
        ]
        if not idle:
            return False
        least = min(idle, key=lambda each: each.value)
        self._clock = least.value
        least.release()
        return True

    def _count_lacking(self, slot: ModelSlot) -> int:
        """The bytes that a model lacks: of the machine's, and of what all may hold."""
        lacking = slot.needs - read_available_memory()
        if self._most is not None:
            held = sum(each.bytes for each in self._list_others(slot))
            lacking = max(lacking, held + slot.needs - self._most)
        return lacking

    def _explain_too_large(self, slot: ModelSlot, lacking: int) -> NotEnoughMemory:
        have = slot.needs - lacking
        verb = "may be held" if have == self._most else "are free"
        return NotEnoughMemory(
            f"{slot.name} takes {format_mebibytes(slot.needs)} of memory; "
            f"{format_mebibytes(have)} {verb}",
            hint="give the engine more memory, or load it in bfloat16 or quantized",
        )
