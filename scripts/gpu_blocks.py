"""A Llama's block at its real width: plain, over its KV cache, quantized, tuned.

Each form is compiled from a config alone and bound to a block with random weights. Its answers are
compared with float32 eager of the same weights, beside those of eager in the recipe's own dtype and
quantization, and its times with `torch.compile` of that.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gpu_llama
from gpu_llama import Size
from gpu_road import (
    QUEUED,
    Check,
    Failed,
    Finding,
    Peak,
    Road,
    Skipped,
    milliseconds,
    relative,
    stopwatch,
)

TIMES = 1.5  # what a graph may be off, as a multiple of what eager of the same dtype is
FLOOR = {"float32": 1e-5, "bfloat16": 1e-3}  # and on top of that
RECOMPILES = 64  # past torch's own limit torch.compile would quietly run it eager
SPARE = 1 << 20  # bytes that a graph may take above eager's peak
REPORT = 20_000  # characters of a compiler's report that are kept

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

    def sizes(self, road: Road) -> tuple[Size, ...]:
        """The calls whose answers are compared."""
        few = FEW_STEPS if self.task == "generate" else FEW
        return self.at if road.cuda else few

    def timed(self, road: Road) -> tuple[Size, ...]:
        """The calls that are timed."""
        return self.times if road.cuda else self.sizes(road)[-1:]

    def dims(self, road: Road) -> dict[str, tuple[int, int]]:
        """The bounds it is compiled for: all of its sizes."""
        sizes = self.sizes(road)
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
    of: gpu_llama.Llama
    peer: Any
    exact: dict[str, Any]


def require_possible(road: Road, form: Form) -> None:
    """Skip a recipe that this machine cannot have.

    Raises:
        Skipped: with the reason.
    """
    if form.quantize is None:
        return
    import torch

    from hubaoti.errors import CompileFailed
    from hubaoti.runtime.quantize import check_recipe

    if importlib.util.find_spec("torchao") is None:
        raise Skipped("torchao is not installed")
    try:
        check_recipe(form.quantize, torch.device(road.device))
    except CompileFailed as why:
        raise Skipped(str(why)) from why


def compiled(road: Road, form: Form) -> Finding:
    """Compile from the config alone; hubaoti compares with eager of the same dtype itself."""
    from hubaoti import api
    from hubaoti.artifact.package import unpack_all
    from hubaoti.errors import HubaotiError
    from hubaoti.settings import Settings

    require_possible(road, form)
    folder = gpu_llama.write_config(road, road.folder / "models" / "llama")
    output = road.folder / "bundles" / form.name
    output.parent.mkdir(exist_ok=True)
    try:
        bundle = api.compile(
            folder,
            output,
            task=form.task,
            regions="auto",
            dims=form.dims(road),
            dtype=gpu_llama.dtype_of(road),
            quantize=form.quantize,
            mode=form.mode,
            device=road.device,
            settings=Settings(home=road.folder / "home", endpoint="http://127.0.0.1:9"),
        )
    except HubaotiError as why:
        report = output.with_name(f"{output.name}.report.txt")
        told = report.read_text()[-REPORT:] if report.is_file() else ""
        raise Failed(str(why), {"report": told, "hint": why.hint}) from why
    found = described(bundle.manifest)
    road.made[form.name, "bundle"] = bundle
    unpack_all(bundle.path / bundle.manifest.graphs[0].file, road.folder / "unpacked" / form.name)
    return found


def described(found: Any) -> Finding:
    """What a bundle is.

    Raises:
        Failed: it is not one graph for both blocks.
    """
    served = {graph.id: graph.modules for graph in found.graphs}
    if [len(modules) for modules in served.values()] != [2]:
        raise Failed(f"two equal blocks became {served}")
    worst = max(check.max_relative for check in found.checks)
    capped = [check.capped for check in found.checks if check.capped]
    said = f"{found.built.seconds:.1f} s, {found.size / 1e6:.1f} MB, largest error {worst:.1e}"
    facts = {"recipe": str(found.recipe), "seconds": found.built.seconds, "bytes": found.size}
    facts |= {"peak_bytes": found.built.peak_bytes, "options": found.build.options}
    return Finding(said, facts | {"graphs": served, "largest_error": worst, "capped": capped})


def graph_of(road: Road, form: Form) -> Any:
    """A form's graph, opened."""
    import torch

    from hubaoti.runtime.graph import choose_graph_device, open_graph

    (entry,) = road.made[form.name, "bundle"].manifest.graphs
    device = choose_graph_device(torch.device(road.device).type, road.device)
    return open_graph(road.folder / "unpacked" / form.name, entry, device)


def opened(road: Road, form: Form) -> Finding:
    """Open the graph and bind it to a block, by reference where nothing has to be made."""
    of = gpu_llama.llama(road)
    with stopwatch() as opening:
        graph = graph_of(road, form)
    with stopwatch() as binding:
        graph.bind(constants_of(graph, of.block, road.made[form.name, "bundle"].path))
    peer, exact = of.block, {"float32 eager": of.exact}
    if form.quantize:
        peer = gpu_llama.quantized(of.block, form.quantize)
        exact[f"float32 of {form.quantize}"] = gpu_llama.dequantized(peer, of.exact)
    road.made[form.name] = Opened(graph, of, peer, exact)
    made = [each.origin.transform for each in graph.entry.constants if each.origin.transform]
    said = f"{opening[0]:.2f} ms, bound in {binding[0]:.1f} ms"
    said += f", {len(made)} of {len(graph.entry.constants)} constants made" if made else ""
    return Finding(said, {"open_ms": opening[0], "bind_ms": binding[0], "made": sorted({*made})})


def constants_of(graph: Any, block: Any, artifact: Any) -> dict[str, Any]:
    """A graph's constants, as their origins say: the block's own, made of them, or shipped."""
    from hubaoti.runtime.quantize import make_quantized
    from hubaoti.runtime.weights import load_shipped_tensors

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


def answered(road: Road, form: Form) -> Finding:
    """Every size against float32 eager, beside eager of the same dtype; writes to a cache too."""
    made: Opened = road.made[form.name]
    facts = {str(size): compared(made, size) for size in form.sizes(road)}
    dtype = gpu_llama.dtype_of(road)
    if wrong := [why for size, each in facts.items() for why in problems(size, each, dtype)]:
        raise Failed("; ".join(wrong), facts)
    ours, theirs, what = max(
        (ours, each["eager"][name], f"{size}: {name}")
        for size, each in facts.items()
        for name, ours in each["hubaoti"].items()
    )
    return Finding(f"{what} {ours:.1e} off, {dtype} eager {theirs:.1e}", facts)


def problems(size: str, found: dict[str, Any], dtype: str) -> Iterator[str]:
    """What is wrong at one size; an error that is no number is more than any."""
    for name, ours in found["hubaoti"].items():
        theirs = found["eager"][name]
        if not ours <= TIMES * theirs + FLOOR[dtype]:
            yield f"{size}: {name} {ours:.1e} off, {dtype} eager {theirs:.1e}"
    for name in found["elsewhere"]:
        yield f"{size}: {name} changed where nothing was to be written"


def compared(made: Opened, size: Size) -> dict[str, Any]:
    """The errors of both sides at one size, by answer, and what was written where it should not."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    known = gpu_llama.inputs_at(made.of, size)
    theirs = gpu_llama.answers(made.of, made.peer, known)
    after = known | {name: known[name].clone() for name in ("keys", "values") if name in known}
    ours = {"output": gpu_llama.by_graph(made.graph, after)()}
    found: dict[str, Any] = {"hubaoti": {}, "eager": {}, "elsewhere": []}
    if "keys" in known:
        ours |= gpu_llama.written(after, after["keys"], after["values"])
        found["elsewhere"] = gpu_llama.elsewhere(known, after)
    for word, block in made.exact.items():
        with sdpa_kernel(SDPBackend.MATH):  # nothing is rounded on the way
            exact = gpu_llama.answers(made.of, block, gpu_llama.in_float32(known))
        for name, expected in exact.items():
            found["hubaoti"][f"{name} from {word}"] = relative(ours[name], expected)
            found["eager"][f"{name} from {word}"] = relative(theirs[name], expected)
    return found


def replayed(road: Road, form: Form) -> Finding:
    """Ask the golden questions again, and compare with the answers that the bundle ships."""
    from hubaoti.runtime import golden

    bundle, graph = road.made[form.name, "bundle"], graph_of(road, form)
    asked = graph.entry.golden
    if asked is None:
        raise Failed("the bundle has no golden answers")
    peak = Peak.of(graph.device) if road.cuda else None
    found = golden.ask_golden(graph, bundle.path)
    facts: dict[str, Any] = {"dims": asked.dims, "tolerances": asked.tolerances}
    facts |= {"memory": asked.memory, "device_peak_bytes": peak.bytes if peak else None}
    expected = golden.load_expected(graph.entry, bundle.path)
    if wrong := golden.compare_golden_answers(found, expected, asked.tolerances):
        raise Failed("; ".join(wrong), facts)
    return Finding(f"{len(expected)} answers at {asked.dims}", facts)


def weighed(road: Road, form: Form) -> Finding:
    """What a call takes on the device at most, beside eager over transformers' static cache."""
    import torch

    if not road.cuda:
        raise Skipped("memory is counted on a GPU only")
    made: Opened = road.made[form.name]
    facts: dict[str, Any] = {}
    for size in form.sizes(road):
        known = gpu_llama.inputs_at(made.of, size)
        sides = {"hubaoti": gpu_llama.by_graph(made.graph, known)}
        sides["eager"] = gpu_llama.by_eager(made.peer, known, gpu_llama.held(made.of, known))
        with torch.no_grad():
            facts[str(size)] = {name: peak_of(made, call) for name, call in sides.items()}
    over = [size for size, each in facts.items() if each["hubaoti"] > each["eager"] + SPARE]
    words = {
        size: f"{size}: {each['hubaoti'] / 1e6:.1f} MB, eager {each['eager'] / 1e6:.1f}"
        for size, each in facts.items()
    }
    if over:
        raise Failed("; ".join(words[size] for size in over), facts)
    return Finding("; ".join(words.values()), facts)


def peak_of(made: Opened, call: Callable[[], Any]) -> int:
    """Bytes that a call takes at most, its libraries' own workspaces left out."""
    call()
    peak = Peak.of(made.graph.device)
    answer = call()
    found = peak.bytes
    del answer
    return found


def timed(road: Road, form: Form) -> Finding:
    """A call through eager, `torch.compile` and hubaoti, in turn, several behind each other."""
    import torch

    made: Opened = road.made[form.name]
    modules, caches = modules_of(road, form, made.peer), {}
    facts, said = {}, []
    with torch._dynamo.config.patch(recompile_limit=RECOMPILES), torch.no_grad():
        for size in form.timed(road):
            known = gpu_llama.inputs_at(made.of, size)
            # Another cache of the same shape would be compiled for again.
            if size.batch not in caches:
                caches[size.batch] = gpu_llama.held(made.of, known)
            cache = caches[size.batch]
            calls = {name: gpu_llama.by_eager(each, known, cache) for name, each in modules.items()}
            calls["hubaoti"] = gpu_llama.by_graph(made.graph, known)
            started, lost = first_calls(calls)
            times = milliseconds(road, started, pace=QUEUED)
            facts[str(size)] = {"times": times, "lost": lost}
            said.append(in_words(size, times, lost))
    torch._dynamo.reset()
    if any("hubaoti" in each["lost"] for each in facts.values()):
        raise Failed("; ".join(said), facts)
    return Finding("; ".join(said), facts)


def modules_of(road: Road, form: Form, peer: Any) -> dict[str, Any]:
    """The sides that are not ours, as modules; on a CPU nothing is generated for them."""
    import torch

    torch._dynamo.reset()
    backend = "inductor" if road.cuda else "eager"
    if form.mode == "max-autotune" and road.cuda:  # the other ones are with the plain form
        mode = f"{form.mode}-no-cudagraphs"
        return {"eager": peer, "torch.compile": torch.compile(peer, dynamic=False, mode=mode)}
    return {
        "eager": peer,
        "torch.compile dynamic": torch.compile(peer, dynamic=True, backend=backend),
        "torch.compile": torch.compile(peer, dynamic=False, backend=backend),
    }


def first_calls(
    calls: dict[str, Callable[[], Any]],
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The calls that work, and for each other the reason: one side must not hide the rest."""
    started, lost = {}, {}
    for name, call in calls.items():
        try:
            call()
            started[name] = call
        except Exception as why:  # whatever torch.compile raises
            lost[name] = f"{type(why).__name__}: {why}"
    return started, lost


def in_words(size: Size, times: dict[str, dict[str, float]], lost: dict[str, str]) -> str:
    """Our time, and how many times as long the others take."""
    ours = times.get("hubaoti", {}).get("median")
    words = [f"{ours:.3f} ms" if ours else "hubaoti failed"]
    for name, found in times.items():
        if ours and name != "hubaoti":
            words.append(f"{name} {found['median'] / ours:.2f}")
    words += [f"{name} failed ({why.splitlines()[0]:.60})" for name, why in lost.items()]
    return f"{size}: {', '.join(words)}"


def checks_of(form: Form) -> Iterator[Check]:
    """The checks of one form; a wrong answer hides no time, and the other way round."""
    steps: dict[str, tuple[Callable[[Road, Form], Finding], tuple[str, ...]]] = {
        "compile": (compiled, ()),
        "golden": (replayed, ("compile",)),
        "open": (opened, ("compile",)),
        "answer": (answered, ("open",)),
        "time": (timed, ("open",)),
    }
    if form.task == "generate":
        steps["memory"] = (weighed, ("open",))
    for step, (function, needs) in steps.items():
        yield Check(
            f"{form.name} {step}",
            lambda road, does=function: does(road, form),
            tuple(f"{form.name} {each}" for each in needs),
        )
