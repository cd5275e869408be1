"""The benchmarks run with the product as it is: what they import is there."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def sources() -> list[Path]:
    """Every Python file of scripts, those without an ending among them."""
    found = [path for path in SCRIPTS.iterdir() if path.is_file() and path.suffix in {"", ".py"}]
    return sorted(path for path in found if path.suffix or b"python" in path.read_bytes()[:40])


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """What a file imports from the product, and from the files beside it, at any depth."""
    beside = {each.stem for each in SCRIPTS.glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        module = node.module if isinstance(node, ast.ImportFrom) else None
        if module and module.partition(".")[0] in {"hubaoti", *beside}:
            yield from ((module, alias.name) for alias in node.names)  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_what_a_script_imports_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    for module, name in imports(path):
        loaded = importlib.import_module(module)
        there = hasattr(loaded, name) or f"{module}.{name}" in sys.modules
        if not there:
            importlib.import_module(f"{module}.{name}")
