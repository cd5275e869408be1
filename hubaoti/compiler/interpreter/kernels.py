"""The Triton kernels of a package: text, block sizes and signatures, as lowering left them.

Their text is a part of the comments in the host code's source.
"""

from __future__ import annotations

import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from hubaoti.compiler.cubins import KERNELS
from hubaoti.compiler.interpreter import NotInterpreted
from hubaoti.compiler.patched import patch_attribute

_TEXT = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", re.DOTALL)


class _Description(msgspec.Struct):
    """What inductor knows of a kernel: its name in the library, and how it is launched."""

    mangled_name: str
    config: dict[str, Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    call_args: list[str]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel: its function, which the interpreter runs, and what it is called with.

    `passed` are its parameters that a launch gives, in that order, each with Triton's type;
    `fixed` those that were settled when it was compiled, block sizes among them.
    """

    name: str
    text: str
    function: Any
    passed: Mapping[str, str]
    fixed: Mapping[str, Any]


def read_kernels(keep: Path, scratch: Path) -> dict[str, Kernel | NotInterpreted]:
    """The kernels of the package whose sources are in `keep`, by their names in the library.

    Their text is written to `scratch`, where the interpreter reads it again. In the place of a
    kernel that cannot be known stands why.

    Raises:
        NotInterpreted: lowering left nothing of kernels.
    """
    try:
        content = (keep / KERNELS).read_bytes()
    except FileNotFoundError as error:
        raise NotInterpreted(f"kernels: lowering left no {KERNELS}") from error
    described = msgspec.json.decode(content, type=dict[str, _Description])
    code = "".join(path.read_text() for path in sorted(keep.rglob("*.cpp")))
    texts = {name: textwrap.dedent(text) for name, text in _TEXT.findall(code)}
    found: dict[str, Kernel | NotInterpreted] = {}
    for name, description in described.items():
        loaded = description.mangled_name
        if loaded in found:
            found[loaded] = NotInterpreted(f"{loaded}: several kernels have this name")
            continue
        try:
            text = texts.get(name) or texts.get(loaded)  # a model's own kernel has its own name
            found[loaded] = _make_kernel(name, text, description, scratch)
        except NotInterpreted as error:
            found[loaded] = error
    return found


def _make_kernel(name: str, text: str | None, description: _Description, scratch: Path) -> Kernel:
    """Run a kernel's text, as our own compile wrote it, with a decorator that keeps the function.

    Raises:
        NotInterpreted: it is no text of a kernel that this torch and triton know.
    """
    if text is None:
        raise NotInterpreted(f"{name}: its text is not in the wrapper's source")
    text = text.replace("triton_helpers.set_driver_to_gpu()", "")
    path = scratch / f"kernel{len([*scratch.iterdir()])}.py"  # its own name may be too long
    path.write_text(text)
    with _keep_functions() as kept:
        try:
            exec(compile(text, str(path), "exec"), {"__file__": str(path), "__name__": name})
        except Exception as error:  # of whatever it imports
            raise NotInterpreted(f"{name}: {type(error).__name__}: {error}") from error
    if len(kept) != 1:
        raise NotInterpreted(f"{name}: its text has {len(kept)} kernels, not one")
    constants, signature = description.constants, description.signature
    passed = {
        each: signature[each]
        for each in description.call_args
        if each not in constants and signature[each] != "constexpr"
    }
    return Kernel(name, text, kept[0], passed, constants | description.config)


@contextmanager
def _keep_functions() -> Iterator[list[Any]]:
    """Inside, inductor's decorators of kernels keep the functions, and do nothing else.

    Private, checked on torch 2.11 and 2.15: they are all of `runtime.triton_heuristics`. Where they
    are not, a kernel's text keeps nothing, which is said.
    """
    kept: list[Any] = []

    def keep(function: Any) -> Any:
        kept.append(function)
        return function

    class Heuristics(types.ModuleType):
        def __getattr__(self, name: str) -> Callable[..., Callable[[Any], Any]]:
            return lambda *args, **kwargs: keep

    import_module("torch._inductor.runtime.triton_heuristics")
    runtime: Any = import_module("torch._inductor.runtime")
    with patch_attribute(runtime, "triton_heuristics", Heuristics("triton_heuristics")):
        yield kept
