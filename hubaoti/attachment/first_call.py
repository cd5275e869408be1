"""The first call of a graph beside the module's own, where no config says that they are one."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hubaoti.errors import BadInput, KernelFailed
from hubaoti.runtime import golden
from hubaoti.runtime.containers import (
    Answers,
    Contents,
    Filling,
    Items,
    Path,
    get_at_path,
    list_items,
    spell_path,
    walk_containers,
)
from hubaoti.runtime.fallback import CannotServe, explain_failure
from hubaoti.runtime.graph import Graph
from hubaoti.runtime.input_checks import name_dtype

UNTRIED, AGREES, DIFFERS = range(3)


class Verdicts:
    """What came of trials, in memory that a process shares with all that are forked from it.

    A worker that serves one call would answer it by the module itself for ever.
    """

    def __init__(self, names: Iterable[tuple[str, str]]) -> None:
        """Room for these regions' graphs, by path and id."""
        self._places = {name: index for index, name in enumerate(dict.fromkeys(names))}
        self._bytes = mmap.mmap(-1, max(1, len(self._places)))

    def __getitem__(self, name: tuple[str, str]) -> int:
        return self._bytes[self._places[name]] if name in self._places else UNTRIED

    def __setitem__(self, name: tuple[str, str], verdict: int) -> None:
        if name in self._places:
            self._bytes[self._places[name]] = verdict

    def is_sound(self, name: str, host: str) -> bool:
        """Whether a process on this kind of host has opened this artifact or package before."""
        return self[name, ""] == _hash_host(host)

    def remember(self, name: str, host: str) -> None:
        """It was opened, after all that is asked before."""
        self[name, ""] = _hash_host(host)


def _hash_host(host: str) -> int:
    """A kind of host in one byte, which is not 0."""
    return 1 + hash(host) % 255


class FirstCallCheck:
    """Graphs of a region that were not tried yet, and those that answered otherwise than it.

    With `verdicts`, one trial is enough for all processes that share them.
    """

    def __init__(
        self, graphs: Iterable[str], path: str = "", verdicts: Verdicts | None = None
    ) -> None:
        self._all = frozenset(graphs)
        self._waiting = {*self._all}
        self._refused: dict[str, str] = {}
        self._path = path
        self._verdicts = verdicts

    def restart(self) -> None:
        """Try all graphs once more: what was seen of them anywhere was of other tensors."""
        self._refused, self._verdicts = {}, None
        self._waiting = {*self._all}

    def wants(self, graph: str) -> bool:
        """Whether a graph has to be tried first.

        Raises:
            CannotServe: it was tried, and answered otherwise.
        """
        known = UNTRIED if self._verdicts is None else self._verdicts[self._path, graph]
        if known == DIFFERS:
            raise CannotServe("differs", f"graph {graph} answered otherwise in another process")
        if known == AGREES:
            self._waiting.discard(graph)
        if graph in self._waiting:  # it leaves here last: who comes in between tries it, too
            return True
        if graph in self._refused:
            raise CannotServe("differs", self._refused[graph])
        return False

    def compare(self, graph: Graph, inputs: list[torch.Tensor], small: bool, call: Beside) -> Any:
        """What the module answers, after the graph was asked the same.

        What is written in place is written by the module; the graph has copies of it, which
        the call may prepare before.

        Raises:
            CannotServe: the graph fails. Where it answers otherwise, it is not asked again.
        """
        written = [index for index, item in enumerate(graph.entry.inputs) if item.mutated]
        given = [each.clone() if index in written else each for index, each in enumerate(inputs)]
        call.prepare(given)
        try:
            ours = graph.run(given, small)
        except (BadInput, KernelFailed) as error:
            raise explain_failure(error) from error
        contents = Contents(call.arguments)
        answer = call.eager()
        problem = (
            call.compare_answers(ours, answer)
            or call.compare_tensors([given[n] for n in written], [inputs[n] for n in written])
            or call.compare_contents(ours, contents)
        )
        name = graph.entry.id
        if problem:
            self._refused[name] = f"graph {name}: {problem}"
        self._waiting.discard(name)
        if self._verdicts is not None:
            self._verdicts[self._path, name] = DIFFERS if problem else AGREES
        return answer


@dataclass(frozen=True, slots=True)
class Beside:
    """A call that its module answers beside a graph: how, and what the graph's outputs become.

    `tolerance` is that of what a graph computes with, as float8, which may be coarser than answers.
    """

    eager: Callable[[], Any]
    arguments: Mapping[str, Any]
    answers: Answers
    filling: Filling | None
    prepare: Callable[[list[torch.Tensor]], object] = lambda inputs: None
    tolerance: float = 0.0

    def compare_answers(self, outputs: list[torch.Tensor], answer: Any) -> str | None:
        """How the graph's answer differs from the module's; None where it does not."""
        given = self.filling.given if self.filling else ()
        ours = self.answers.make([*outputs, *given])
        return self.compare_tensors(_find_tensors(ours), _find_tensors(answer))

    def compare_tensors(self, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str | None:
        """How tensors of the graph differ from the module's; None where they do not."""
        return describe_difference(ours, theirs, self.tolerance)

    def compare_contents(self, outputs: list[torch.Tensor], before: Contents) -> str | None:
        """How what the graph leaves in the call differs from what the module has left there."""
        wanted: dict[Path, Items] = {}
        if self.filling is not None:
            contents = self.answers.make_contents(self.filling, outputs)
            wanted = dict(zip(self.answers.into, contents, strict=True))
        for change in before.changes():
            if change.path not in wanted:
                return (
                    f"the module leaves something in {spell_path(change.path)}, the graph does not"
                )
        for path, items in wanted.items():
            left = list_items(get_at_path(self.arguments, path))
            if [key for key, _ in items] != [key for key, _ in left]:
                return f"it leaves other keys in {spell_path(path)} than the module"
            if problem := self.compare_tensors(_find_tensors(items), _find_tensors(left)):
                return f"in {spell_path(path)}: {problem}"
        return None


def describe_difference(
    ours: list[torch.Tensor], theirs: list[torch.Tensor], coarsest: float = 0.0
) -> str | None:
    """How a graph's answers differ from the module's, in words; None where they do not.

    Numbers may be off as their dtype is, or by `coarsest`, whole numbers not at all.
    """
    if len(ours) != len(theirs):
        return f"it gives {len(ours)} tensors, the module {len(theirs)}"
    problems = (
        golden.compare_golden(f"answer {index}", our, their, _choose_tolerance(our, coarsest))
        for index, (our, their) in enumerate(zip(ours, theirs, strict=True))
    )
    return next(filter(None, problems), None)


def _choose_tolerance(tensor: torch.Tensor, coarsest: float) -> float:
    own = golden.GOLDEN_TOLERANCE.get(name_dtype(tensor.dtype), 0.0)
    return max(own, coarsest) if own else 0.0


def _find_tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of an answer, in its order; one that stands twice in it is there twice."""
    return [item for _, item in walk_containers(value, ()) if isinstance(item, torch.Tensor)]
