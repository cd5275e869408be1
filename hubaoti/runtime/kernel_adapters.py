"""Our ops by the one op of a build, whose arguments are given by their names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hubaoti.artifact.kernel_pin import KernelBuild, KernelOp
from hubaoti.artifact.kernel_schema import CALLED, UNASKED, list_unknown
from hubaoti.errors import KernelSchemaMismatch, first_line
from hubaoti.runtime.attention_ops import DECODE, FORWARD, VARLEN

_HINT = "use a kernel of one of the schemas that hubaoti knows, or an sdpa recipe"


class _Failure(threading.local):
    """What a kernel said that failed in this thread.

    The native code of a graph between it and who called the graph tells that something failed, and
    no more.
    """

    last: str | None = None


FAILURE = _Failure()


def adapt_kernel(build: KernelBuild, name: str) -> Mapping[str, Callable[..., torch.Tensor]]:
    """What answers each of our ops by a build that is loaded; in words it is called `name`.

    Raises:
        KernelSchemaMismatch: an op is not what was pinned, or not called in a way that we know.
    """
    for op in build.ops:
        _require_schema(build, op)
    if CALLED not in {op.name for op in build.ops}:
        raise KernelSchemaMismatch(f"no op {CALLED} is pinned of {build.namespace}", hint=_HINT)
    adapter = _Adapter(getattr(getattr(torch.ops, build.namespace), CALLED).default, name)
    return {FORWARD: adapter.forward, VARLEN: adapter.varlen, DECODE: adapter.decode}


def _require_schema(build: KernelBuild, op: KernelOp) -> None:
    """See that a loaded library's op is the one that was pinned."""
    packet = getattr(getattr(torch.ops, build.namespace), op.name, None)
    is_one = packet is not None and packet.overloads() == ["default"]
    found = str(packet.default._schema) if packet is not None and is_one else "no op, or several"
    if found != _spell(f"{build.namespace}::{op.schema}"):
        raise KernelSchemaMismatch(
            f"the op {op.name} of {build.namespace} was pinned as {op.schema}, and is {found}",
            hint="compile the artifact again, with the kernel as it is now",
        )


def _spell(schema: str) -> str | None:
    """A schema as torch writes it; None where it is none.

    Private, checked on torch 2.11 to 2.15: what reads a library's own `def`.
    """
    try:
        return str(torch._C.parse_schema(schema))
    except RuntimeError:
        return None


class _Adapter:
    """An op `fwd`, called as each of our ops is: what it is asked stands at its arguments' places.

    Raises:
        KernelSchemaMismatch: it has an argument that we do not know, or lacks one.
    """

    def __init__(self, op: Any, name: str) -> None:
        names = [argument.name for argument in op._schema.arguments]
        if problems := list_unknown(names):
            raise KernelSchemaMismatch(
                f"nobody knows how to call {op._schema.name}: it {', '.join(problems)}", hint=_HINT
            )
        returns = op._schema.returns
        if len(returns) == 1 and returns[0].type.kind() != "ListType":
            raise KernelSchemaMismatch(
                f"nobody knows what {op._schema.name} answers: {op._schema}", hint=_HINT
            )
        self._op, self._name = op, name
        self._places = {name: index for index, name in enumerate(names)}
        self._arguments = [UNASKED.get(name) for name in names]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rule: Any) -> Any:
        """`hubaoti::fa3_fwd`."""
        return self._call(rule, **_make_dense(q=q, k=k, v=v))

    def varlen(  # noqa: PLR0913 - the op's own
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *rule: Any,
    ) -> Any:
        """`hubaoti::fa3_varlen`."""
        given = _make_dense(q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        return self._call(rule, max_seqlen_q=max_q, max_seqlen_k=max_k, **given)

    def decode(  # noqa: PLR0913 - the op's own
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k_new: torch.Tensor,
        v_new: torch.Tensor,
        used: torch.Tensor,
        leftpad: torch.Tensor | None,
        *rule: Any,
    ) -> Any:
        """`hubaoti::fa3_decode`; the caches are written where they lie, and never copied.

        Kernels take the places before a text from those that were filled before the call, and
        those of a prompt are filled in it: there would be fewer than none. So rows are put into
        the caches here, but for a single one, which comes after a prompt.
        """
        if q.shape[1] > 1:
            given = _make_dense(q=q, seqused_k=_append(k_cache, v_cache, k_new, v_new, used))
        else:
            given = _make_dense(q=q, k_new=k_new, v_new=v_new, seqused_k=used)
        if leftpad is not None:
            given |= _make_dense(leftpad_k=leftpad)
        return self._call(rule, k=k_cache, v=v_cache, **given)

    def _call(self, rule: tuple[Any, ...], **asked: Any) -> torch.Tensor:
        scale, causal, left, right, softcap = rule
        arguments = [*self._arguments]
        asked |= {
            "softmax_scale": scale,
            "is_causal": causal,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": softcap,
        }
        for name, value in asked.items():
            arguments[self._places[name]] = value
        try:
            answer: torch.Tensor = self._op(*arguments)[0]
        except torch.OutOfMemoryError:  # which says nothing of the kernel
            raise
        except Exception as error:
            FAILURE.last = f"the kernel {self._name} failed: {first_line(error)}"
            raise
        return answer


def _append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    used: torch.Tensor,
) -> torch.Tensor:
    """Put new rows behind those that are used; how many there are then, int32."""
    batch, rows = k_new.shape[:2]
    each = torch.arange(batch, device=used.device)[:, None]
    places = used.long()[:, None] + torch.arange(rows, device=used.device)
    k_cache[each, places], v_cache[each, places] = k_new, v_new
    return used + rows


def _make_dense(**tensors: torch.Tensor) -> dict[str, Any]:
    """Tensors, or copies of those whose last stride is not 1, which no kernel takes."""
    return {
        name: tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        for name, tensor in tensors.items()
    }
