"""Open one graph, bind its constants by reference, and call it; nothing unchecked reaches it.

A compiled graph whose constants are not bound ends the process, and one whose constants were moved
reads what is not there any more. So every call is asked first, here and in `checks`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from hubaoti.artifact.schema import Graph as Entry
from hubaoti.disk import allows_code
from hubaoti.errors import (
    BadInput,
    BadRequest,
    CannotOpen,
    HubaotiError,
    KernelFailed,
    MissingConstant,
    MissingOps,
    NotEnoughMemory,
    first_line,
)
from hubaoti.host.memory import is_limited
from hubaoti.runtime.answer_checks import read_dim_sizes, require_described
from hubaoti.runtime.fallback import ADVICE
from hubaoti.runtime.graph_ops import NAME_OPS, require_ops
from hubaoti.runtime.input_checks import Checks, address, check_constant
from hubaoti.runtime.kernel_adapters import FAILURE
from hubaoti.runtime.library import hold_library, name_files
from hubaoti.runtime.runners import Bound, Runner, open_native_runner
from hubaoti.runtime.threads import run_in_one_thread

_is_contiguous = torch.Tensor.is_contiguous
# As glibc, libstdc++ and torch say that there is no memory left.
_NO_MEMORY = ("annot allocate memory", "an't allocate memory", "not enough memory", "bad_alloc")


def choose_graph_device(target: str, wanted: str | None = None) -> torch.device:
    """Where a graph that was built for `target` (cpu or cuda) is opened: by default its first.

    Raises:
        BadRequest: what is asked for is no device, or one of another kind.
    """
    try:
        device = torch.device(wanted or target)
    except RuntimeError as error:
        raise BadRequest(f"unknown device: {wanted!r:.120}", hint=f"ask for {target}") from error
    if device.type != target:
        raise BadRequest(
            f"the artifact was built for {target}, not for {device}", hint=f"ask for {target}"
        )
    # A CUDA graph is always told which GPU; the CPU has no number.
    return torch.device("cuda", device.index or 0) if target == "cuda" else torch.device("cpu")


def open_graph(
    folder: Path, entry: Entry, device: torch.device, checks: Checks | None = None
) -> Graph:
    """Make the unpacked package in `folder` callable; nothing is copied and nothing is compiled.

    The caller has verified the folder: opening runs the library's initializers, so that one is
    hashed once more by the descriptor that it is loaded by. Graphs of one entry, for the blocks
    that it serves, share one library, and may share their checks; so do those that are opened
    after them, from wherever the package lies by then.

    Raises:
        DigestMismatch: the library has other bytes by now.
        CannotOpen: the system refuses to load the library.
        MissingOps: the graph calls ops that no loaded library registers.
        KernelSchemaMismatch: one is registered with another schema than it was compiled for.
        NotEnoughMemory: there is none left to load it into.
    """
    libraries = [member for member in entry.members if member.path.endswith(".wrapper.so")]
    if len(libraries) != 1:
        raise CannotOpen(
            f"graph {entry.id} has {len(libraries)} libraries, not one",
            hint="its publisher must compile it again",
        )
    require_ops(folder, entry, device)
    try:
        library = hold_library(folder, libraries[0], entry.members)
        runner = open_native_runner(folder, library, device)
    except (RuntimeError, OSError) as error:
        raise explain_refusal(entry.id, folder, str(error)) from error
    return Graph(entry, runner, device, checks or Checks(entry, device))


# What somebody's CUDA graph was captured with: a replay calls its kernels and reads its constants,
# and the CUDA graph keeps neither.
CAPTURED: dict[int, object] = {}


def explain_refusal(
    graph: str, folder: Path, message: str
) -> CannotOpen | MissingOps | NotEnoughMemory:
    """What the loader's message means, in words that say what to do."""
    first = first_line(name_files(message))
    if op := re.search(r"Could not find schema for ([\w:.]+)", message):
        name = op[1].rstrip(".")
        return MissingOps(
            f"graph {graph} calls {name}, an op that is not registered", hint=NAME_OPS
        )
    # glibc has one message for a disk without code and for no memory.
    unmapped = "failed to map segment" in message
    if any(words in message for words in _NO_MEMORY) or (
        unmapped and is_limited() and allows_code(folder)
    ):
        return NotEnoughMemory(
            f"graph {graph} cannot be loaded: {first}",
            hint="free some memory, or raise the limit of this process (ulimit -v)",
        )
    if unmapped:
        return CannotOpen(
            f"graph {graph} cannot be loaded from {folder}: its disk does not allow code",
            hint="the disk is mounted noexec; set HUBAOTI_HOME to a folder on another disk",
        )
    if "cannot open shared object file" in message:
        return CannotOpen(
            f"graph {graph} needs a library that is not here: {first}",
            hint="install that library, or pull a variant built for this host",
        )
    return CannotOpen(
        f"graph {graph} cannot be opened: {first}",
        hint="see what it needs and what is here with: hubaoti doctor",
    )


class Graph:
    """An open graph: bind its constants, then call it with its inputs in the manifest's order."""

    def __init__(
        self, entry: Entry, runner: Runner, device: torch.device, checks: Checks | None = None
    ) -> None:
        self.entry = entry
        self.device = device
        self.checks = checks or Checks(entry, device)
        self._runner = runner
        self._run_short = getattr(runner, "run_short", runner.run)
        self._given: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._contiguous: list[bool] = []
        self._bound = Bound({})
        self._reads = bool(runner.get_constant_names_to_original_fqns())
        self._ready = not self._reads
        self.is_called = False  # since it was bound, so that its kernels are loaded
        self.note: Callable[[], None] | None = None  # told before native code is entered

    @property
    def bound(self) -> tuple[torch.Tensor, ...]:
        """The tensors that it reads, as they were given."""
        return (*self._given,)

    def read_constant_fqns(self) -> set[str]:
        """The names of the constants that the library reads."""
        return {*self._runner.get_constant_names_to_original_fqns().values()}

    def read_call_spec(self) -> list[str]:
        """How torch's own loader flattens a call, and what it makes of the answer."""
        return self._runner.get_call_spec()

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the graph its constants, by fqn; they are kept alive and not copied.

        Raises:
            MissingConstant: one that the graph reads is not given or not in the manifest, or has
                another dtype, shape, stride, alignment or device.
        """
        listed = {constant.fqn: constant for constant in self.entry.constants}
        names = self._runner.get_constant_names_to_original_fqns()
        for fqn in names.values():
            if fqn not in listed or fqn not in tensors:
                raise MissingConstant(
                    f"graph {self.entry.id} reads {fqn}, which is not "
                    + ("given" if fqn in listed else "in its manifest"),
                    hint="bind every constant that the manifest lists",
                )
            check_constant(listed[fqn], tensors[fqn], self.device)
        bound = Bound({inner: tensors[fqn] for inner, fqn in names.items()})
        self._runner.update_constant_buffer(bound.aliases, False, True, True)
        # The memory that the library reads now must not be given to somebody else before it.
        self._bound = bound
        self._given = [tensors[fqn] for fqn in names.values()]
        self._addresses = [*map(address, self._given)]
        self._contiguous = [*map(_is_contiguous, self._given)]
        self._ready, self.is_called = True, False

    @property
    def is_moved(self) -> bool:
        """Whether a tensor that was bound lies elsewhere by now, as after `.to()`, or transposed.

        Its strides would take longer to ask for.
        """
        given = self._given
        return [*map(address, given)] != self._addresses or (
            [*map(_is_contiguous, given)] != self._contiguous
        )

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Run it. An input that is only read is copied where its layout does not fit.

        Raises:
            BadInput: constants are not bound, or were moved since; and as `Checks.fit` does.
            OutOfBounds: a dim is outside of what the graph was compiled for.
        """
        if self.is_moved:
            raise self._explain_unbound()
        return self.run(*self.checks.fit(inputs))

    def run(self, inputs: list[torch.Tensor], small: bool) -> list[torch.Tensor]:
        """Run it on inputs that were checked, with constants that are bound; `small` in one thread.

        Raises:
            BadInput: the native code itself refuses, as of an embedding's ids; or its first answer
                is not of the dtype and shape that the manifest says.
            KernelFailed: a kernel that it calls does.
        """
        bound = self._bound  # held until it has run, whoever binds or releases meanwhile
        if not self._ready:
            raise self._explain_unbound()
        if self.note is not None:
            self.note()
        FAILURE.last = None  # of somebody else's call
        try:
            run = self._runner.run
            outputs = run_in_one_thread(self._run_short, inputs) if small else run(inputs)
            if not self.is_called:  # a manifest that lies of its answers does so at every call
                require_described(self.entry, outputs, read_dim_sizes(self.entry, inputs))
            self.is_called = True
            return outputs
        except Exception as error:
            problem = self._explain_failure(error)
            if problem is None:
                raise
            raise problem from error
        finally:
            del bound

    def hold(self) -> tuple[Runner, Bound]:
        """What is used of it by a CUDA graph in which it was captured, for as long as that is."""
        return self._runner, self._bound

    def hold_for_ever(self) -> None:
        """The same for a CUDA graph of somebody's, of which nobody says when it is gone."""
        CAPTURED[id(self._bound)] = self.hold()

    def release(self) -> None:
        """Let go of the constants: it is not called again before it is bound again."""
        self._ready = not self._reads
        self._bound = Bound({})
        self._given, self._addresses, self._contiguous = [], [], []

    def _explain_failure(self, error: Exception) -> HubaotiError | None:
        """What an error of native code says to who called; None where it is none of its own."""
        if FAILURE.last is not None:
            message, hint = f"graph {self.entry.id}: {FAILURE.last}", ADVICE["kernel"]
            return KernelFailed(message, hint=hint)
        if not isinstance(error, RuntimeError):
            return None
        return BadInput(
            f"graph {self.entry.id} failed: {first_line(error)}",
            hint="see that its inputs are what the manifest says of their values",
        )

    def _explain_unbound(self) -> BadInput:
        """Why it cannot be called: what it would read is not there."""
        if not self._ready:
            return BadInput(f"graph {self.entry.id} has no constants yet", hint="call bind first")
        return BadInput(
            f"a constant of graph {self.entry.id} lies elsewhere than it was bound",
            hint="bind again after a model was moved or given other weights",
        )
