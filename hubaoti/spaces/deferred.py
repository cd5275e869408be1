"""An attachment that each process makes for itself, at the first call that it is asked for.

A graph that was opened before a fork is of no use after it on a GPU, and a worker that is forked
for a call ends without a word. So nothing of one process is believed in another: after a fork the
modules wait again, and what the parent had open is left alone.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.sizes import format_count
from hubaoti.attachment.attach import Attachment, attach_nothing
from hubaoti.attachment.forward_patch import ForwardPatch
from hubaoti.attachment.served_modules import find_device_kind
from hubaoti.attachment.stats import CallStats
from hubaoti.errors import HubaotiError, NotEnoughMemory, NotTried, first_line
from hubaoti.runtime.fallback import CannotServe

_PASSING = (NotTried, NotEnoughMemory)  # what says nothing of graphs
REST = 60.0  # seconds until they are tried again


class _WaitingPatch(ForwardPatch):
    """What answers in the place of a module's `forward` until its process has opened graphs."""

    __slots__ = ("deferred", "region", "over")

    def __init__(self, path: str, module: nn.Module, deferred: Deferred) -> None:
        super().__init__(path, module)
        self.deferred = deferred
        self.region: Any = None  # one with a manifest or without
        self.over: Any = None  # what stood in our place when this process began to open graphs
        self._count_miss = deferred.count_miss

    def remove(self) -> None:
        """Give the module its own `forward` back, for good."""
        self.region = None
        super().remove()

    def renew(self, halfway: bool) -> None:
        """Wait again, unless the module was given back before.

        `halfway` is of a fork while another thread was opening graphs, who is not here.
        """
        region, self.region = self.region, None
        if self.is_gone or self.is_removed or (region is not None and region.is_removed):
            return
        forward = vars(self.module).get("forward")
        is_bare = forward is region or forward is self._own
        self.install(self.over if halfway else None if is_bare else forward)

    def hand_over(self) -> None:
        """The process has opened its graphs: a region answers, below what somebody put over us."""
        found = vars(self.module).get("forward")
        self.region = found if found is not self._own else None
        if self.over is not self and self.over is not None:
            self.module.forward = self.over

    def answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the region of this process answers, once it has opened its graphs."""
        if self.region is None:
            self.deferred.require_open()
        answer = self.region or self.eager
        return answer(*args, **kwargs)


class Deferred:
    """What was attached to a module, as each process sees it: counts, and the way back.

    `modules` are those that graphs will answer for, by path. `opens` makes the attachment, in a
    process that may; `only_elsewhere` says that the process in which this was made is not one. A
    forked child cannot use its parent's threads on a CPU, and hangs where it tries to (libgomp).
    """

    def __init__(
        self,
        module: nn.Module,
        modules: Mapping[str, nn.Module],
        opens: Callable[[nn.Module], Attachment],
        tally: CallStats,
        *,
        only_elsewhere: bool = False,
    ) -> None:
        if modules:
            import_module("torch._dynamo")  # each worker needs it: once for all forked from here
        self._module = weakref.ref(module)
        self._opens = opens
        self._tally = tally
        self._home = os.getpid()
        self._only_elsewhere = only_elsewhere
        # A worker that moves the module to a GPU has one thread for the rest: slow, and no hang.
        self._single = bool(modules) and find_device_kind(module) != "cuda"
        self._waiting = [_WaitingPatch(path, part, self) for path, part in modules.items()]
        self._left: list[Attachment] = []  # of a process before a fork: never touched, nor freed
        self._is_detached = False
        self._begin()
        for each in self._waiting:
            each.install()
        _DEFERRED.add(self)

    def __repr__(self) -> str:
        module, attachment, problem = self._module(), self._attachment, self._problem
        name = "a module that is gone" if module is None else type(module).__name__
        if attachment is not None:
            return f"Deferred({name}, open: {attachment})"
        state = "detached" if self._is_detached else "not opened" if problem else "waiting"
        return f"Deferred({name}, {state}, {format_count(len(self.regions), 'region')})"

    def _begin(self) -> None:
        """As a process begins: nothing is open, nothing failed."""
        self._lock = threading.Lock()
        self._attachment: Attachment | None = None
        self._problem: tuple[str, str | None, float] | None = None  # of which device, until when
        self._is_opening = False

    @property
    def regions(self) -> tuple[str, ...]:
        """The paths of the modules that graphs answer for, or will."""
        return () if self._is_detached else tuple(each.path for each in self._waiting)

    def count_miss(self, path: str, error: CannotServe) -> None:
        """Count a call that the module answers itself, in this process."""
        self._tally.count_miss(path, error)

    def require_open(self) -> None:
        """See that this process has opened its graphs, once, whoever comes first.

        Raises:
            CannotServe: why it has none.
        """
        if self._attachment is not None or self._is_detached:
            return
        if self._only_elsewhere and os.getpid() == self._home:
            raise CannotServe("main", "this process has no GPU; its workers do")
        with self._lock:
            if self._attachment is not None or self._is_detached:
                return
            module = self._module()
            kind = None if module is None else find_device_kind(module)
            if self._problem is not None:
                message, of, until = self._problem
                if of == kind and time.monotonic() < until:
                    raise CannotServe("unopened", message)
            try:
                self._attach(module)
            except Exception as error:  # the module always answers, whatever fails
                hint = f" ({error.hint})" if isinstance(error, HubaotiError) and error.hint else ""
                message = str(error) if isinstance(error, HubaotiError) else first_line(error)
                rest = REST if isinstance(error, _PASSING) else float("inf")
                self._problem = (f"{message}{hint}", kind, time.monotonic() + rest)
                raise CannotServe("unopened", self._problem[0]) from error

    def _attach(self, module: nn.Module | None) -> None:
        """Have regions in the place of those who wait, below what somebody put over them."""
        assert module is not None  # it is being called
        living = [each for each in self._waiting if not each.is_gone]
        for each in living:
            each.over = vars(each.module).get("forward")
        self._is_opening = True
        try:
            for each in living:
                each.lift()
            self._attachment = self._opens(module)
            for each in living:
                each.hand_over()
        except BaseException:
            for each in living:
                each.install(each.over)
            raise
        finally:  # a fork before this waits again: some of the regions may not be known yet
            self._is_opening = False

    def renew(self) -> None:
        """After a fork: this process has opened nothing yet."""
        if self._attachment is not None:
            self._left.append(self._attachment)
        opened = [each.region for each in self._waiting if each.region is not None]
        if opened and all(region.is_removed for region in opened):
            self._is_detached = True  # by `hubaoti.detach`, which knows of no one who waits
        halfway = self._is_opening
        self._begin()
        self._tally = self._tally.make_empty()
        if self._is_detached:
            return
        for each in self._waiting:
            each.renew(halfway)
        if self._single:
            torch.set_num_threads(1)

    def detach(self) -> None:
        """Give the module everything back, in this process; a second time does nothing."""
        with self._lock:
            attachment, self._attachment = self._attachment, None
            self._is_detached = True
            if attachment is not None:
                attachment.detach()
            for each in self._waiting:
                each.remove()

    def rebind(self) -> None:
        """As `Attachment.rebind`, where this process has opened its graphs.

        Raises:
            MissingConstant: some tensors do not fit.
        """
        if self._attachment is not None:
            self._attachment.rebind()

    def stats(self) -> dict[str, Any]:
        """Calls of this process by region, as `Attachment.stats` has them, and what it opened."""
        with self._lock:
            attachment, problem = self._attachment, self._problem
        before = self._tally.stats({path: {} for path in self.regions})
        found = before if attachment is None else _merge_stats(before, attachment.stats())
        message = problem[0] if problem and attachment is None else None
        return {**found, "process": {"pid": os.getpid(), "open": bool(attachment), "why": message}}

    def save_misses(self, path: str | Path) -> None:
        """Write `stats` to a file, for `hubaoti compile --from-misses`."""
        if self._attachment is not None:
            self._attachment.save_misses(path)
        else:
            self._tally.save(self.stats(), Path(path))

    def __enter__(self) -> Deferred:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def defer_nothing(module: nn.Module) -> Deferred:
    """What waits for nobody: the module answers everything itself, as it did."""
    return Deferred(module, {}, attach_nothing, CallStats(None, False))


def _merge_stats(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The counts of graphs, with the calls that came before they were open."""
    regions = {}
    for path in {**before["regions"], **now["regions"]}:
        each = [found["regions"][path] for found in (before, now) if path in found["regions"]]
        eager = sum((Counter(counts["eager"]) for counts in each), Counter())
        regions[path] = {**each[-1], "eager": dict(eager)}
    return {**now, "regions": regions, "eager": before["eager"] + now["eager"]}


# Each lives as long as its module does, which holds it.
_DEFERRED: weakref.WeakSet[Deferred] = weakref.WeakSet()


def _renew_all() -> None:
    """In a child, right after the fork: only the thread that forked is there."""
    for each in [*_DEFERRED]:
        each.renew()


os.register_at_fork(after_in_child=_renew_all)
