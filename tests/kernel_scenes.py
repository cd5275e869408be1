"""Processes that open kernels: one has one build of a kernel, so each scene has its own.

A scene is told what it needs as JSON, and prints what came of it.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from space import worker
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import hubaoti
from hubaoti.artifact.kernel_pin import KernelPin
from hubaoti.errors import HubaotiError
from hubaoti.runtime import kernels
from hubaoti.runtime.attention_ops import REFERENCES

CPU = torch.device("cpu")
RULES = [
    (0.25, False, -1, -1, 0.0),
    (0.25, True, -1, -1, 0.0),
    (0.3, False, 3, 2, 0.0),
    (0.25, True, 4, -1, 5.0),
]


class Attending(nn.Module):
    """A module over the op that kernels answer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 16))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.hubaoti.fa3_fwd(
            q * self.weight, k, v, 0.25, True, -1, -1, 0.0
        )
        return found * 2


def make_tensors(batch: int, rows: int) -> tuple[torch.Tensor, ...]:
    """Four heads that share two, of width 16."""
    numbers = torch.Generator().manual_seed(batch * 100 + rows)
    heads = (4, 2, 2)
    return tuple(torch.randn(batch, rows, each, 16, generator=numbers) for each in heads)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What the module answers, by sdpa."""
    q, k, v = (each.transpose(1, 2) for each in (q * torch.linspace(0.5, 1.5, 16), k, v))
    found = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    return found.transpose(1, 2) * 2


def find_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return (found.float() - expected.float()).abs().max().item()


def compare_forward() -> float:
    """`fa3_fwd` with every rule, more keys than rows, and tensors that lie otherwise."""
    q, k, v = make_tensors(2, 9)
    turned, *others = (each.transpose(1, 3).contiguous().transpose(1, 3) for each in (q, k, v))
    return max(
        find_difference(
            torch.ops.hubaoti.fa3_fwd(*given, *rule), REFERENCES["fa3_fwd"](*given, *rule)
        )
        for rule in RULES
        for given in ((q, k, v), (turned[:, :5], *others))
    )


def compare_varlen() -> float:
    """`fa3_varlen` of three sequences."""
    q, k, v = (each[0] for each in make_tensors(1, 12))
    of_q = torch.tensor([0, 2, 7, 12], dtype=torch.int32)
    of_k = torch.tensor([0, 3, 8, 12], dtype=torch.int32)
    given = (q, k, v, of_q, of_k, 5, 5)
    op, expected = torch.ops.hubaoti.fa3_varlen, REFERENCES["fa3_varlen"]
    return max(find_difference(op(*given, *rule), expected(*given, *rule)) for rule in RULES)


def compare_decode(is_padded: bool, rows: int = 1, filled: tuple[int, int] = (3, 6)) -> float:
    """`fa3_decode` over views of caches (batch, heads, places, width), written in place."""
    used = torch.tensor([[filled[0], 0], [filled[1], 0]], dtype=torch.int32)[:, 0]
    leftpad = torch.tensor([1, 2], dtype=torch.int32) if is_padded else None
    q, k, v = make_tensors(2, rows)
    numbers = torch.Generator().manual_seed(7)
    before = torch.randn(2, 2, 2, 11, 16, generator=numbers)
    ops = torch.ops.hubaoti.fa3_decode, REFERENCES["fa3_decode"]
    worst = 0.0
    for rule in RULES:
        caches = [before.clone() for _ in ops]
        found, expected = (
            op(q, *cache.transpose(2, 3), k, v, used, leftpad, *rule)
            for op, cache in zip(ops, caches, strict=True)
        )
        assert not torch.equal(caches[0], before)
        worst = max(worst, find_difference(found, expected), find_difference(*caches))
    return worst


def answers(mirror: str, pins: list[Any]) -> dict[str, float]:
    """How far a kernel's answers are from the references; those are compared elsewhere, too."""
    open_pins(mirror, pins)
    found = {
        "forward": compare_forward(),
        "varlen": compare_varlen(),
        "decode": compare_decode(False),
        "padded": compare_decode(True),
        "several": compare_decode(True, 3),
        "prompt": compare_decode(True, 5, (0, 0)),
    }
    q, k, v = make_tensors(3, 8)
    with torch.no_grad():
        found["sdpa"] = find_difference(Attending()(q, k, v), attend(q, k, v))
    for pin in msgspec.convert(pins, list[KernelPin]):
        importlib.import_module(f"{pin.namespace}._late")
    return found


def open_pins(mirror: str, pins: list[Any]) -> None:
    """Open kernels one after the other."""
    for pin in msgspec.convert(pins, list[KernelPin]):
        kernels.open_kernels([pin], Path(mirror) / "kernels", CPU)


def opens(mirror: str, pins: list[Any]) -> dict[str, Any]:
    """Nothing but to open kernels."""
    open_pins(mirror, pins)
    return {"ops": torch.ops.hubaoti.fa3_fwd(*make_tensors(1, 2), *RULES[0]).shape}


def loads_and_opens(mirror: str, pins: list[Any], theirs: str) -> dict[str, Any]:
    """A kernel that somebody loads by the kernels library, before it is opened."""
    from kernels import get_local_kernel

    get_local_kernel(Path(theirs), backend="cpu")
    return opens(mirror, pins)


def attaches(repos: list[str], **how: Any) -> dict[str, Any]:
    """Modules that repos' graphs answer for, one after the other in this process."""
    found = {}
    for repo in repos:
        module, given = Attending().eval(), make_tensors(3, 8)
        with torch.no_grad(), hubaoti.attach(module, repo, **how) as attachment:
            off = [find_difference(module(*given), attend(*given)) for _ in range(2)]
            found[repo] = {"off": max(off), "compiled": attachment.stats()["compiled"]}
    return found


def answers_itself(repo: str) -> list[dict[str, Any]]:
    """Modules of which the kernel refuses a call: the second after others, the first before any."""
    setattr(Attending, "forward", lambda self, q, k, v: attend(q, k, v))  # noqa: B010
    found = []
    for rows in ((7,), (8, 8, 7)):
        module = Attending().eval()
        with torch.no_grad(), hubaoti.attach(module, repo, trust=True) as attachment:
            with warnings.catch_warnings(record=True) as told:
                for each in rows:
                    given = make_tensors(3, each)
                    off = find_difference(module(*given), attend(*given))
            stats = attachment.stats()
        said = [str(each.message) for each in told]
        found.append({"off": off, "told": said, "eager": stats["regions"][""]["eager"]})
    return found


def attaches_bundle(folder: str, trust: bool) -> dict[str, Any]:
    """A module that the graphs of a bundle in a folder answer for."""
    module, given = Attending().eval(), make_tensors(3, 8)
    with torch.no_grad(), hubaoti.attach(module, Path(folder), trust=trust):
        return {"off": find_difference(module(*given), attend(*given))}


def serves_workers(repo: str) -> list[dict[str, Any]]:
    """Three forked workers of a Space, which each open their graphs, and so their kernels."""
    import hubaoti.spaces

    module, given = Attending().eval(), make_tensors(3, 8)
    loaded = hubaoti.spaces.load(module, repo, trust=True)

    def work() -> dict[str, Any]:
        torch.set_num_threads(1)
        with torch.no_grad():
            off = find_difference(module(*given), attend(*given))
        return {"off": off, "compiled": loaded.stats()["compiled"]}

    return [worker(work) for _ in range(3)]


_SCENES = (
    *(answers, opens, loads_and_opens, attaches, answers_itself, attaches_bundle, serves_workers),
)
SCENES: dict[str, Callable[..., Any]] = {scene.__name__: scene for scene in _SCENES}

if __name__ == "__main__":
    scene, words = sys.argv[1:]
    try:
        told = SCENES[scene](**json.loads(words))
    except HubaotiError as error:
        told = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
    sys.stdout.write(json.dumps(told))
