"""A model in a process of its own, seen from the engine: asked, ended, and started again."""

from __future__ import annotations

import mmap
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from hubaoti.artifact.schema import Graph
from hubaoti.engines.messages import (
    REPLIES,
    Begin,
    EngineRequest,
    EngineResponse,
    Hello,
    State,
    Tell,
    Use,
)
from hubaoti.errors import HubaotiError, WorkerEnded
from hubaoti.folder_trees import remove_tree
from hubaoti.host.memory import is_limited, measure_process_memory
from hubaoti.host.probe import STAND_IN
from hubaoti.host.processes import CRASHES, Child, describe_exit, list_search_path
from hubaoti.host.wire import Gone
from hubaoti.mirror import Artifact, Mirror
from hubaoti.runtime.first_open import name_tested
from hubaoti.settings import Settings, read_needed_environment

_PATIENCE = 5.0  # seconds for a worker to end by itself
_TWICE = 2


class Isolated:
    """A model's worker; `ask` it one thing at a time."""

    def __init__(self, begin: Begin, settings: Settings) -> None:
        """Start it, and wait until the model is loaded.

        Raises:
            HubaotiError: the model cannot be loaded; WorkerEnded: its process ended meanwhile.
        """
        self._begin = begin
        self._settings = settings
        self._crashes: Counter[str] = Counter()
        self._child: Child | None = None
        self._host = ""
        self._bytes = 0
        self.problem = ""  # why its graphs do not answer any more
        self._start()
        try:
            self._await_loaded()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """Of its process; None while it has none."""
        child = self._child
        return child.pid if child is not None else None

    @property
    def bytes(self) -> int:
        """The memory of its process on this host, pages that it shares in parts."""
        child = self._child
        if child is not None and self._is_ready:  # while it loads, it takes what it took before
            self._bytes = measure_process_memory(str(child.pid))
        return self._bytes if child is not None else 0

    def ask(self, ask: EngineRequest) -> EngineResponse:
        """Have the worker answer.

        Raises:
            WorkerEnded: its process ended meanwhile; another one is being started.
            HubaotiError: what the worker raised.
        """
        if self._child is None:
            self._start()
        if not self._is_ready:
            self._await_loaded()
        reply = self._exchange(ask)
        if isinstance(ask, Use) and isinstance(reply, State):
            self._begin = msgspec.structs.replace(self._begin, digest=reply.artifact)
            self.problem = ""
        return reply

    def state(self) -> State:
        """Ask the worker how the model stands; raises as `ask` does."""
        reply = self.ask(Tell())
        assert isinstance(reply, State)
        return reply

    def close(self) -> None:
        """End its process, with all its memory."""
        if self._child is not None:
            self._end()

    def _start(self) -> None:
        """Start its process; it loads the model by itself."""
        self._is_ready = False
        self._scratch = tempfile.TemporaryDirectory(
            prefix="hubaoti-worker-", ignore_cleanup_errors=True
        )
        with tempfile.TemporaryFile() as note:
            note.truncate(mmap.PAGESIZE)
            self._running = mmap.mmap(note.fileno(), mmap.PAGESIZE)
            self._child = Child(
                "hubaoti.engines.worker",
                descriptors=(note.fileno(),),
                # It may make nothing new beside the home, where temporary files may lie.
                environment=read_needed_environment() | {"TMPDIR": self._scratch.name},
            )
        with suppress(Gone):  # which `_await_loaded` meets as well
            told = replace(self._settings, token=None, login=None)  # it fetches nothing
            hello = Hello(self._begin, told.to_env(), (*list_search_path(),))
            self._child.channel.send(hello)

    def _await_loaded(self) -> None:
        """Wait until the model is loaded.

        Raises:
            WorkerEnded: its process ended meanwhile; HubaotiError: what the worker raised.
        """
        try:
            state = self._receive(State)
        except Gone as error:
            code = self._end()
            raise WorkerEnded(
                f"{self._name} cannot be loaded: {_describe_loss(error, code)}",
                hint="see that there is memory for it, and try again",
            ) from None
        except BaseException:
            self._end(0.0)
            raise
        assert isinstance(state, State)
        self._host = state.host
        # Where memory is limited, a crash may be for want of it, and says nothing of a graph.
        assert self._child is not None
        self._is_limited = is_limited(self._child.pid)
        self._is_ready = True

    def _exchange(self, ask: EngineRequest) -> EngineResponse:
        assert self._child is not None
        try:
            self._child.channel.send(ask)
            return self._receive(REPLIES[type(ask)])
        except Gone as error:
            raise self._restart(error) from None
        except HubaotiError:
            raise
        except BaseException:  # an interrupt: its answer would be taken for the next one's
            self._end(0.0)
            raise

    def _receive(self, kind: type[EngineResponse]) -> EngineResponse:
        """The worker's answer, which is of a kind.

        Raises:
            Gone: there is none any more, or none that is one.
            HubaotiError: what the worker raised.
        """
        assert self._child is not None
        response: EngineResponse = self._child.channel.receive(EngineResponse)
        if not isinstance(response, kind):
            raise Gone("it answered something else")
        return response

    def _restart(self, error: Gone) -> WorkerEnded:
        """Start it again, and say what happened."""
        number = int.from_bytes(self._running[:4], sys.byteorder)
        code = self._end()
        blamed = self._blame(number) if -code in CRASHES and not self._is_limited else ""
        self._start()
        return WorkerEnded(
            f"a request to {self._name} has no answer: {_describe_loss(error, code)} in the "
            f"middle of it{blamed}",
            hint="ask again: the model is being loaded by another process",
        )

    def _blame(self, number: int) -> str:
        """Count a crash for the graph that ran last; two of it put its artifact into quarantine."""
        if not number or self._begin.digest is None:
            return ""
        with Mirror.open(self._settings.mirror) as mirror:
            artifact = mirror.artifact(self._begin.digest)
            # What crashes may have written over the number, too.
            if artifact is None or number > len(artifact.manifest.graphs):
                return ""
            graph = artifact.manifest.graphs[number - 1]
            self._crashes[graph.sha256] += 1
            if self._crashes[graph.sha256] < _TWICE:
                return f", after graph {graph.id} had been called"
            self.problem = f"graph {graph.id} crashed its process twice"
            place = self._condemn(graph, artifact, mirror)
        self._begin = msgspec.structs.replace(self._begin, digest=None)
        return f"; {self.problem}: {place}the model goes on without graphs"

    def _condemn(self, graph: Graph, artifact: Artifact, mirror: Mirror) -> str:
        """Keep an artifact apart, unless the device is one that computes nothing."""
        if STAND_IN in self._host:
            return ""
        if mirror.index.is_writable:
            mirror.index.record_tested(name_tested(graph, artifact), self._host, self.problem)
        mirror.withdraw(artifact)
        return "it is in quarantine, and "

    def _end(self, patience: float = _PATIENCE) -> int:
        """Have its process end, if it has not yet; its exit code."""
        child, self._child = self._child, None
        assert child is not None
        self._running.close()
        try:
            return child.end(patience)
        finally:
            remove_tree(Path(self._scratch.name), ignore_errors=True)  # as deep as a stranger liked
            self._scratch.cleanup()

    @property
    def _name(self) -> str:
        return Path(self._begin.folder).name


def _describe_loss(error: Gone, code: int) -> str:
    """How a worker was lost: as its process ended, or what it said before."""
    return (
        describe_exit(code) if code < 0 or not str(error) else f"{error}, and {describe_exit(code)}"
    )
