"""Attached models on a device: generate, time and memory beside eager; streams, replays, forks.

Answers are compared with float32 eager of the same weights, beside those of eager in the model's
own dtype; on a CPU, where everything is float32, with float64.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_llama
from gpu_attached import (
    FORK,
    INT8,
    MODEL,
    NEW,
    answering,
    attach,
    by_replay,
    compiled,
    model_on,
    of_regions,
    one_step,
    told,
    words_of,
)
from gpu_blocks import FLOOR, REPORT, SPARE, TIMES
from gpu_road import (
    ALONE,
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

FORKS = 10
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "cache_implementation": "static",
    "disable_compile": True,
}


def attached(road: Road) -> Finding:
    """Bind the graphs of all blocks; weights are not copied."""
    model = model_on(road, MODEL, road.device)
    peak = Peak.of(model.device) if road.cuda else None
    with stopwatch() as first:
        attach(road, MODEL, model).detach()
    with stopwatch() as again:
        attachment = attach(road, MODEL, model)
    road.made[MODEL] = model, attachment
    facts: dict[str, Any] = {"blocks": len(attachment.regions), "first_ms": first[0]}
    facts |= {"ms": again[0], "bytes": peak.bytes if peak else None}
    if peak and peak.bytes > SPARE:
        raise Failed(f"attaching took {peak.bytes} bytes on the device", facts)
    return Finding(f"{len(attachment.regions)} blocks in {again[0]:.1f} ms", facts)


def answered(road: Road) -> Finding:
    """Logits of a prompt and of single tokens, beside eager's, against a wider float's."""
    import torch

    model, attachment = road.made[MODEL]
    ids = words_of(model, 2)
    ours, stats = told(model, ids), attachment.stats()
    with by_itself(road):
        theirs = told(model, ids)
        exact = copy.deepcopy(model)
    exact = exact.float() if road.cuda else exact.double()
    expected = told(exact, ids)
    del exact
    errors = {"attached": relative(ours, expected), "eager": relative(theirs, expected)}
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    facts = errors | {"same_words": same, "stats": stats}
    said = f"{errors['attached']:.1e} off, eager {errors['eager']:.1e}, {same:.1%} of words alike"
    if not errors["attached"] <= TIMES * errors["eager"] + FLOOR[gpu_llama.dtype_of(road)]:
        raise Failed(said, facts)
    if not road.cuda and not torch.equal(ours.argmax(-1), theirs.argmax(-1)):
        raise Failed(said, facts)
    return Finding(said, facts)


@contextmanager
def by_itself(road: Road) -> Iterator[None]:
    """Inside the block the model answers without graphs; afterwards they are attached anew."""
    model, attachment = road.made[MODEL]
    attachment.detach()
    yield
    road.made[MODEL] = model, attach(road, MODEL, model)


def generated(road: Road) -> Finding:
    """`generate` as anybody calls it: time a token, and what it takes on the device at most."""
    model, _ = road.made[MODEL]
    ids, found = words_of(model), {}
    found["attached"] = generating(road, model, ids)
    with by_itself(road):
        found["eager"] = generating(road, model, ids)
    tokens = {side: each.pop("tokens") for side, each in found.items()}
    same = (tokens["attached"] == tokens["eager"]).float().mean().item()
    ratio = found["eager"]["ms"] / found["attached"]["ms"]
    said = f"{found['attached']['ms']:.2f} ms a token, eager {ratio:.2f} times as long"
    if road.cuda:
        peaks = [found[side]["bytes"] / 1e6 for side in ("attached", "eager")]
        said += f"; at most {peaks[0]:.1f} MB above the model, eager {peaks[1]:.1f}"
    facts = found | {"same_words": same}
    if not road.cuda and same < 1:
        raise Failed(f"only {same:.0%} of the words are eager's", facts)
    if road.cuda and found["attached"]["bytes"] > found["eager"]["bytes"] + SPARE:
        raise Failed(said, facts)
    return Finding(said, facts)


def generating(road: Road, model: Any, ids: Any) -> dict[str, Any]:
    """One side's tokens, milliseconds a token, and most bytes."""
    import torch

    model.generate(ids, **GREEDY)
    peak = Peak.of(model.device) if road.cuda else None
    with stopwatch() as spent:
        tokens = model.generate(ids, **GREEDY)
        if road.cuda:
            torch.cuda.synchronize(model.device)
    return {"tokens": tokens, "ms": spent[0] / NEW, "bytes": peak.bytes if peak else None}


def stepped(road: Road) -> Finding:
    """One token over a cache that is filled in part, the device idle before."""
    model, _ = road.made[MODEL]
    regions = of_regions(model)
    step = one_step(model)
    calls = {"attached": step, "eager": answering(regions, step)}
    if (off := relative(calls["attached"](), calls["eager"]())) > 0.1:
        raise Failed(f"the sides are {off:.1e} apart")
    times = milliseconds(road, calls, pace=ALONE)
    ours, ratio = (
        times["attached"]["median"],
        times["eager"]["median"] / times["attached"]["median"],
    )
    return Finding(f"{ours:.2f} ms, eager {ratio:.2f} times as long", {"times": times})


def streamed(road: Road) -> Finding:
    """The same prompts on several streams at once, none waited for before the end."""
    import torch

    if not road.cuda:
        raise Skipped("a CPU has no streams")
    model, _ = road.made[MODEL]
    prompts = [words_of(model, rows) for rows in (1, 2, 3, 4)]
    expected = [told(model, ids) for ids in prompts]
    streams = [torch.cuda.Stream(model.device) for _ in prompts]
    torch.cuda.synchronize(model.device)
    found = []
    for at in range(3 * len(prompts)):
        with torch.cuda.stream(streams[at % len(streams)]):
            found.append((at % len(prompts), told(model, prompts[at % len(prompts)])))
    torch.cuda.synchronize(model.device)
    errors = [relative(ours, expected[at]) for at, ours in found]
    facts = {"streams": len(streams), "errors": errors}
    if not max(errors) <= FLOOR[gpu_llama.dtype_of(road)]:
        raise Failed(f"a stream answers {max(errors):.1e} off", facts)
    return Finding(f"{len(found)} answers on {len(streams)} streams, {max(errors):.1e} off", facts)


def replayed(road: Road) -> Finding:
    """A decode step as a CUDA graph: captured once, replayed for token after token."""
    if not road.cuda:
        raise Skipped("a CPU has no CUDA graphs")
    model, _ = road.made[MODEL]
    ids = words_of(model)
    expected = told(model, ids)[:, -NEW:]
    found, replay = by_replay(model, ids)
    off = relative(found, expected)
    times = milliseconds(road, {"replay": replay, "attached": one_step(model)}, pace=ALONE)
    ours, ratio = times["replay"]["median"], times["attached"]["median"] / times["replay"]["median"]
    said = f"{off:.1e} off, {ours:.2f} ms, without {ratio:.2f} times as long"
    if not off <= 2 * TIMES * FLOOR["bfloat16"] * len(model.model.layers) ** 0.5:
        raise Failed(said, {"off": off, "times": times})
    return Finding(said, {"off": off, "times": times})


def elsewhere(road: Road) -> Finding:
    """The same artifact over a model on the second device."""
    import torch

    if not road.cuda or torch.cuda.device_count() < 2:
        raise Skipped("there is no second GPU")
    index = (torch.device(road.device).index or 0) + 1
    model = model_on(road, MODEL, f"cuda:{index % torch.cuda.device_count()}")
    ids = words_of(model)
    expected = told(model, ids)
    with attach(road, MODEL, model):
        off = relative(told(model, ids), expected)
    if not off <= 0.1:
        raise Failed(f"{off:.1e} off on {model.device}")
    return Finding(f"{off:.1e} off on {model.device}", {"off": off})


def detached(road: Road) -> Finding:
    """Give everything back: the model's answers, and its memory when it is gone."""
    import torch

    model, attachment = road.made.pop(MODEL)
    ids = words_of(model)
    attachment.detach()
    plain, again = told(model, ids), told(model, ids)
    size, device = sum(each.nbytes for each in model.parameters()), model.device
    before = torch.cuda.memory_allocated(device) if road.cuda else 0
    del model, attachment
    gc.collect()
    if not torch.equal(plain, again):
        raise Failed("two answers of the plain model differ")
    if not road.cuda:
        return Finding("the model answers itself again")
    freed = before - torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()
    facts = {"bytes": size, "freed": freed}
    if freed < size:
        raise Failed(f"of {size / 1e6:.0f} MB of weights {freed / 1e6:.0f} came back", facts)
    return Finding(f"{freed / 1e6:.0f} MB came back", facts)


def quantized(road: Road) -> Finding:
    """Attach with quantize=True: what the model holds, and its answers beside its own after it."""
    model = model_on(road, INT8, road.device)
    ids = words_of(model)
    plain, before = told(model, ids), bytes_of(model)
    attachment = attach(road, INT8, model, quantize=True)
    gc.collect()
    after, ours = bytes_of(model), told(model, ids)
    attachment.detach()
    theirs = told(model, ids)
    same = (ours.argmax(-1) == plain.argmax(-1)).float().mean().item()
    facts = {"before": before, "after": after, "off": relative(ours, theirs)}
    facts |= {"off_plain": relative(ours, plain), "same_words_as_plain": same}
    del model, attachment
    gc.collect()
    said = (
        f"{after / before:.2f} of {before / 1e6:.1f} MB, {facts['off']:.1e} off its own answers, "
    )
    said += f"{facts['off_plain']:.1e} off the plain model's, {same:.1%} of words alike"
    if after > 0.85 * before or not facts["off"] <= (0.1 if road.cuda else 1e-4):
        raise Failed(said, facts)
    return Finding(said, facts)


def bytes_of(model: Any) -> int:
    """What the tensors of a model take; on a GPU all that torch has given."""
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        return torch.cuda.memory_allocated(model.device)
    return sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


def forked(road: Road) -> Finding:
    """Children of a process that never touched the device, one after the other; one is killed."""
    bundle, home = road.made[FORK, "bundle"].path, road.folder / "home"
    script = Path(__file__).with_name("gpu_forks.py")
    words = [sys.executable, "-W", "ignore", script, road.device, bundle, home, str(FORKS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Else torch would touch the driver to ask whether there is a GPU.
    environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    done = subprocess.run(
        [*map(str, words)], env=environment, capture_output=True, text=True, timeout=500
    )
    if done.returncode:
        raise Failed(done.stderr.splitlines()[-1], {"stderr": done.stderr[-REPORT:]})
    facts = json.loads(done.stdout.splitlines()[-1])
    errors = [each["off"] for each in facts["children"] if "off" in each]
    killed = [each for each in facts["children"] if each.get("signal") == 9]
    said = f"{len(errors)} answered, {max(errors):.1e} off, {len(killed)} killed"
    if facts["used"] is not None:
        said += f"; {facts['used'][1] - facts['used'][0]:+d} MB afterwards"
    if len(errors) != FORKS or len(killed) != 1 or not max(errors) <= (0.1 if road.cuda else 1e-4):
        raise Failed(said, facts)
    if facts["used"] is not None and facts["used"][1] - facts["used"][0] > 64:
        raise Failed(said, facts)
    return Finding(said, facts)


def checks_of_attached() -> Iterator[Check]:
    """The checks, in groups that share a compiled model."""
    yield Check(f"{MODEL} compile", lambda road: compiled(road, MODEL))
    yield Check(f"{MODEL} attach", attached, (f"{MODEL} compile",))
    steps = {
        "answer": answered,
        "generate": generated,
        "step": stepped,
        "streams": streamed,
        "replay": replayed,
        "second": elsewhere,
        "detach": detached,
    }
    for step, function in steps.items():
        yield Check(f"{MODEL} {step}", function, (f"{MODEL} attach",))
    yield Check(f"{INT8} compile", lambda road: compiled(road, INT8, "int8wo"))
    yield Check(f"{INT8} memory", quantized, (f"{INT8} compile",))
    yield Check(f"{FORK} compile", lambda road: compiled(road, FORK))
    yield Check(f"{FORK} children", forked, (f"{FORK} compile",))
