"""Another value of what a library has, for a while: where it has no public door."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn


@contextmanager
def patch_attribute(owner: ModuleType | type, name: str, value: Any) -> Iterator[None]:
    """Have a module or class call this by a name that it has; afterwards it is as it was."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def shadow_attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Let a value stand before a module's own attribute, buffer or method, for this module only."""
    own = vars(module)
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)
