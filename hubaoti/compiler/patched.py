"""Another value of what a library has, for a while: where it has no public door."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def patch_attribute(owner: ModuleType | type, name: str, value: Any) -> Iterator[None]:
    """Have a module or class call this by a name that it has; afterwards it is as it was."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
