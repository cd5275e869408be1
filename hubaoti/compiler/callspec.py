"""A graph's own call spec: how loaders that know no manifest flatten a module's call.

torch writes two trees into a library: how a call becomes a list of tensors, and how an answer is
made of one. Our graphs take a flat list, so their trees would be flat, too; here they are those of
the module's own call, wherever that is all that the graph takes and gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import nn
from torch.utils import _pytree as pytree

from hubaoti.artifact.schema import Direct, Graph
from hubaoti.compiler.capture import thaw_arguments
from hubaoti.compiler.patched import patch_attribute
from hubaoti.compiler.signature import CallSignature
from hubaoti.errors import BadManifest, CompileFailed
from hubaoti.runtime.call_template import is_own_call, walk_template_words
from hubaoti.runtime.output_template import parse_output_template

CallSpec = tuple[str, str]
# The one folder of a package as those loaders make it: by it they find what torch unpacked in /tmp
# for a worker that was ended without a word, and remove it.
ARCHIVE = "archive"


def make_call_spec(face: CallSignature, answer: Any) -> CallSpec | None:
    """The trees of a module's call and answer; None where they are not the graph's, in its order.

    Not the graph's are a KV cache among its inputs, a tensor that it was compiled without, and
    numbers in the answer: torch's loader gives a library every tensor, and makes answers of those
    that it gets.
    """
    if face.cache is not None or not is_own_call(face.template):
        return None
    tensors = [torch.empty(0) for _ in face.inputs]
    known = {"size": lambda _: 2, "cache": None, "device": "cpu"}
    args, kwargs = thaw_arguments(face.template, tensors, known)
    leaves, call = pytree.tree_flatten((tuple(args), kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    results = [torch.empty(0) for word in walk_template_words(answer) if word == "tensor"]
    try:
        answered, made = pytree.tree_flatten(parse_output_template(answer)(results))
        if [*map(id, given), *map(id, answered)] != [*map(id, tensors), *map(id, results)]:
            return None
        return pytree.treespec_dumps(call), pytree.treespec_dumps(made)
    except (BadManifest, NotImplementedError):  # a class that torch cannot name
        return None


@contextmanager
def write_call_spec(spec: CallSpec | None) -> Iterator[None]:
    """Have inductor write these trees into the library.

    Private, checked on torch 2.11 to 2.15: `compile_fx._aoti_flatten_inputs`, which takes the trees
    of the exported program whatever the options say. Where it has another name the trees stay flat,
    and `record_call_spec` says that they are.
    """
    with warnings.catch_warnings(action="ignore"):  # of torch about torch
        from torch._inductor import compile_fx

    original = getattr(compile_fx, "_aoti_flatten_inputs", None)
    if spec is None or original is None:
        yield
        return

    names = ("aot_inductor.serialized_in_spec", "aot_inductor.serialized_out_spec")

    def flatten_inputs(*args: Any, **kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        inputs, options = original(*args, **kwargs)
        return inputs, options | dict(zip(names, spec, strict=True))

    with patch_attribute(compile_fx, "_aoti_flatten_inputs", flatten_inputs):
        yield


def record_call_spec(
    entry: Graph, spec: CallSpec | None, written: Sequence[str], model: nn.Module
) -> Graph:
    """The graph's entry, which tells of its call spec where the library has one.

    `every` names a list whose children are all served, `absent` are constants that the `state_dict`
    of a served module does not have: loaders without a manifest bind what is in there.
    """
    if spec is None or tuple(written) != spec:
        return entry
    saved = model.get_submodule(entry.modules[0]).state_dict(keep_vars=True)
    absent = tuple(sorted(each.fqn for each in entry.constants if each.fqn not in saved))
    return msgspec.structs.replace(
        entry, direct=Direct(every=_find_module_list(entry, model), absent=absent)
    )


def require_direct(entry: Graph) -> None:
    """Refuse a graph that loaders without a manifest could not call or bind.

    Raises:
        CompileFailed: with what it takes, gives or reads that they do not know.
    """
    if not isinstance(entry.direct, Direct):
        raise CompileFailed(
            "build: torch's own loader cannot call it as its module is called: the call or the "
            "answer holds a cache, an output of a library, one tensor twice, or a number that "
            "follows from sizes",
            hint="compile a module inside of it, or leave --layout zerogpu out",
        )
    if entry.direct.absent:
        raise CompileFailed(
            f"build: it reads {', '.join(entry.direct.absent)}, which no state_dict has",
            hint="make them buffers of the module, or leave --layout zerogpu out",
        )


def _find_module_list(entry: Graph, model: nn.Module) -> str | None:
    """The list whose children, all of them, a graph serves; one that computes nothing itself."""
    path = entry.modules[0].rpartition(".")[0]
    found = model.get_submodule(path)
    if type(found) is not nn.ModuleList or not path:
        return None
    children = {f"{path}.{name}" for name, _ in found.named_children()}
    return path if children == {*entry.modules} else None
