"""The forms of a Llama's block that are checked: plain, over its KV cache, quantized, tuned.

Each is compiled from a config alone and bound to a block with random weights. Its answers are
compared with float32 eager of the same weights, beside those of eager in the recipe's own dtype and
quantization, and its times with `torch.compile` of that.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu import llama
from gpu.llama import Size
from gpu.measure import Peak, measure_error
from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import CompileFailed, HubaotiError
from hubaoti.runtime.quantize import make_quantized
from hubaoti.runtime.recipes import check_recipe
from hubaoti.runtime.weights import load_shipped_tensors

TIMES = 1.5  # what a graph may be off, as a multiple of what eager of the same dtype is
FLOOR = {"float32": 1e-5, "bfloat16": 1e-3}  # and on top of that
_REPORT = 20_000  # characters of a compiler's report that are kept
RECOMPILES = 64  # past torch's own limit torch.compile would quietly run it eager
SPARE = 1 << 20  # bytes that a graph may take above eager's peak

SIZES = tuple(Size(batch, seq) for batch in (1, 4) for seq in (1, 128, 2048))
ENDS = (Size(1, 1), Size(4, 2048))
STEPS = tuple(Size(batch, 1, filled, 4096) for batch in (1, 4) for filled in (1024, 4096))
PREFILLS = (Size(4, 128, 1024, 4096), Size(1, 2048, 4096, 4096))
# The same on a CPU.
FEW = (Size(1, 1), Size(3, 8))
FEW_STEPS = (Size(1, 1, 16, 64), Size(3, 1, 64, 64), Size(3, 8, 32, 64))


@dataclass(frozen=True, slots=True)
class Form:
    """One way to compile the block, and at which sizes it is looked at and timed."""

    name: str
    task: str = "forward"  # generate: over its KV cache
    quantize: str | None = None
    mode: str = "default"
    at: tuple[Size, ...] = SIZES
    times: tuple[Size, ...] = ENDS

    def list_sizes(self, device: torch.device) -> tuple[Size, ...]:
        """The calls whose answers are compared."""
        few = FEW_STEPS if self.task == "generate" else FEW
        return self.at if device.type == "cuda" else few

    def list_timed(self, device: torch.device) -> tuple[Size, ...]:
        """The calls that are timed."""
        return self.times if device.type == "cuda" else self.list_sizes(device)[-1:]

    def make_dims(self, device: torch.device) -> dict[str, tuple[int, int]]:
        """The bounds it is compiled for: all of its sizes."""
        sizes = self.list_sizes(device)
        dims = {"batch": (1, max(each.batch for each in sizes))}
        dims["seq"] = (1, max(each.seq for each in sizes))
        if self.task == "generate":
            dims["cache"] = (16, max(each.cache for each in sizes))
        return dims


FORMS = (
    Form("block-plain", times=(Size(1, 1), Size(4, 128), Size(1, 2048), Size(4, 2048))),
    Form("block-cache", task="generate", at=(*STEPS, *PREFILLS), times=(*STEPS, PREFILLS[1])),
    Form("block-int8wo", quantize="int8wo"),
    Form("block-float8dq", quantize="float8dq"),
    Form("block-autotune", mode="max-autotune"),
)


@dataclass(frozen=True, slots=True)
class Opened:
    """A form's graph, bound to a block; eager of the same dtype and quantization; float32 eager.

    Of a quantized form there are two of these: of the weights, and of what they were rounded to,
    since eight bits are so far from the first that little else is seen.
    """

    graph: Any
    of: llama.Llama
    peer: Any
    exact: dict[str, Any]


def skip_impossible(quantize: str | None, device: torch.device) -> None:
    """Skip a recipe that this machine cannot have, with the reason."""
    if quantize is None:
        return
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    try:
        major, minor = (0, 0)
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
        check_recipe(quantize, device.type, 10 * major + minor)
    except CompileFailed as error:
        pytest.skip(str(error))


def compile_with_report(folder: Path, output: Path, **options: Any) -> Bundle:
    """A bundle; where there is none, the compiler's report is a note of its error."""
    output.parent.mkdir(exist_ok=True)
    try:
        return api.compile(folder, output, **options)
    except HubaotiError as error:
        report = output.with_name(f"{output.name}.report.txt")
        error.add_note(f"hint: {error.hint}")
        error.add_note(report.read_text()[-_REPORT:] if report.is_file() else "no report")
        raise


def describe_manifest(found: Any) -> tuple[str, dict[str, Any]]:
    """What a bundle is: one graph for both blocks."""
    served = {graph.id: graph.modules for graph in found.graphs}
    assert [len(modules) for modules in served.values()] == [2], f"two equal blocks became {served}"
    worst = max(check.max_relative for check in found.checks)
    capped = [check.capped for check in found.checks if check.capped]
    said = f"{found.built.seconds:.1f} s, {found.size / 1e6:.1f} MB, largest error {worst:.1e}"
    facts = {"recipe": str(found.recipe), "seconds": found.built.seconds, "bytes": found.size}
    facts |= {"peak_bytes": found.built.peak_bytes, "options": found.build.options}
    return said, facts | {"graphs": served, "largest_error": worst, "capped": capped}


def collect_constants(graph: Any, block: Any, artifact: Path) -> dict[str, Any]:
    """A graph's constants, as their origins say: the block's own, made of them, or shipped."""
    own = dict(block.named_parameters()) | dict(block.named_buffers())
    found = dict(load_shipped_tensors(graph.entry, artifact, graph.device))
    for constant in graph.entry.constants:
        origin = constant.origin
        tensor = own.get(origin.module or constant.fqn)
        if tensor is not None:
            found[constant.fqn] = (
                make_quantized(origin.transform, tensor) if origin.transform else tensor
            )
    return found


def compare_sizes(made: Opened, form: Form, device: torch.device) -> dict[str, Any]:
    """What every size is off float32 eager, beside eager of the same dtype; with `problems`."""
    facts: dict[str, Any] = {str(size): _compare(made, size) for size in form.list_sizes(device)}
    dtype = llama.choose_dtype(device)
    facts["problems"] = [
        problem for size, each in facts.items() for problem in list_problems(size, each, dtype)
    ]
    return facts


def word_worst(facts: dict[str, Any]) -> str:
    """The answer that is off most, and how far eager's is."""
    ours, theirs, what = max(
        (ours, each["eager"][name], f"{size}: {name}")
        for size, each in facts.items()
        if size != "problems"
        for name, ours in each["hubaoti"].items()
    )
    return f"{what} {ours:.1e} off, eager {theirs:.1e}"


def list_problems(size: str, found: dict[str, Any], dtype: str) -> Iterator[str]:
    """What is wrong at one size; an error that is no number is more than any."""
    for name, ours in found["hubaoti"].items():
        theirs = found["eager"][name]
        if not ours <= TIMES * theirs + FLOOR[dtype]:
            yield f"{size}: {name} {ours:.1e} off, {dtype} eager {theirs:.1e}"
    for name in found["elsewhere"]:
        yield f"{size}: {name} changed where nothing was to be written"


def _compare(made: Opened, size: Size) -> dict[str, Any]:
    """The errors of both sides at one size, by answer, and what was written where it should not."""
    known = llama.make_inputs(made.of, size)
    theirs = llama.answer_eagerly(made.of, made.peer, known)
    after = known | {name: known[name].clone() for name in ("keys", "values") if name in known}
    ours = {"output": llama.bind_graph(made.graph, after)()}
    found: dict[str, Any] = {"hubaoti": {}, "eager": {}, "elsewhere": []}
    if "keys" in known:
        ours |= llama.select_written(after, after["keys"], after["values"])
        found["elsewhere"] = llama.find_other_writes(known, after)
    for word, block in made.exact.items():
        with sdpa_kernel(SDPBackend.MATH):  # nothing is rounded on the way
            exact = llama.answer_eagerly(made.of, block, llama.widen(known))
        for name, expected in exact.items():
            found["hubaoti"][f"{name} from {word}"] = measure_error(ours[name], expected)
            found["eager"][f"{name} from {word}"] = measure_error(theirs[name], expected)
    return found


def weigh(made: Opened, size: Size) -> dict[str, int]:
    """What a call takes on the device at most, beside eager over transformers' static cache."""
    known = llama.make_inputs(made.of, size)
    sides = {"hubaoti": llama.bind_graph(made.graph, known)}
    sides["eager"] = llama.bind_eager(made.peer, known, llama.fill_cache(made.of, known))
    with torch.no_grad():
        return {name: _measure_peak(made, call) for name, call in sides.items()}


def _measure_peak(made: Opened, call: Callable[[], Any]) -> int:
    """Bytes that a call takes at most, its libraries' own workspaces left out."""
    call()
    peak = Peak.of(made.graph.device)
    answer = call()
    found = peak.bytes
    del answer
    return found


def make_sides(device: torch.device, form: Form, peer: Any) -> dict[str, Any]:
    """The sides that are not ours, as modules; on a CPU nothing is generated for them."""
    torch._dynamo.reset()
    cuda = device.type == "cuda"
    backend = "inductor" if cuda else "eager"
    if form.mode == "max-autotune" and cuda:  # the other ones are with the plain form
        mode = f"{form.mode}-no-cudagraphs"
        return {"eager": peer, "torch.compile": torch.compile(peer, dynamic=False, mode=mode)}
    return {
        "eager": peer,
        "torch.compile dynamic": torch.compile(peer, dynamic=True, backend=backend),
        "torch.compile": torch.compile(peer, dynamic=False, backend=backend),
    }


def start_calls(
    calls: dict[str, Callable[[], Any]],
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The calls that work, and for each other the reason: one side must not hide the rest."""
    started, lost = {}, {}
    for name, call in calls.items():
        try:
            call()
            started[name] = call
        except Exception as error:  # whatever torch.compile raises
            lost[name] = f"{type(error).__name__}: {error}"
    return started, lost


def word_times(size: Size, times: dict[str, dict[str, float]], lost: dict[str, str]) -> str:
    """Our time, and how many times as long the others take."""
    ours = times.get("hubaoti", {}).get("median")
    words = [f"{ours:.3f} ms" if ours else "hubaoti failed"]
    for name, found in times.items():
        if ours and name != "hubaoti":
            words.append(f"{name} {found['median'] / ours:.2f}")
    words += [f"{name} failed ({message.splitlines()[0]:.60})" for name, message in lost.items()]
    return f"{size}: {', '.join(words)}"
