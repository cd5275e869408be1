"""The names that code reads: attributes and strings, from its source or from its bytecode."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

_KEEPING = {f"self.padding_idx = {whose}config.pad_token_id" for whose in ("", "self.")}
UNTRAINED = {"_init_weights", "init_weights", "reset_parameters"}  # weights are replaced


def collect_names_read(node: ast.AST) -> frozenset[str]:
    """Attributes that are read and strings, except where weights are made."""
    found: set[str] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if isinstance(each, ast.FunctionDef) and each.name in UNTRAINED:
            continue
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Load):
            found.add(each.attr)
        elif isinstance(each, ast.Constant) and isinstance(each.value, str):
            found.add(each.value)
        waiting += _list_computing_parts(each)
    return frozenset(found)


def collect_names_in_bytecode(value: object) -> set[str]:
    """What a function or class without a source reads, as its bytecode names it."""
    if isinstance(value, type):
        members = map(unwrap_descriptor, vars(value).values())
        return set[str]().union(*map(collect_names_in_bytecode, members))
    found: set[str] = set()
    for code in walk_code(value.__code__) if isinstance(value, FunctionType) else ():
        found.update(code.co_names, (item for item in code.co_consts if isinstance(item, str)))
    return found


def walk_code(code: CodeType) -> Iterator[CodeType]:
    """Code, and that of the functions and classes which it makes, each before those within it."""
    yield code
    for item in code.co_consts:
        if isinstance(item, CodeType):
            yield from walk_code(item)


def unwrap_descriptor(value: Any) -> Any:
    """The function behind a property, a class method or a static one."""
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (classmethod, staticmethod)) else value


def _list_computing_parts(node: ast.AST) -> Iterable[ast.AST]:
    """The parts of a node, without the padding id of an `nn.Embedding`, and its keeping.

    Such an embedding only keeps that row from being trained.
    """
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Embedding":
        return [*node.args[:2], *(each for each in node.keywords if each.arg != "padding_idx")]
    kept = isinstance(node, ast.Assign) and getattr(node.value, "attr", "") == "pad_token_id"
    if kept and ast.unparse(node) in _KEEPING:
        return []
    return ast.iter_child_nodes(node)


def reads_by_computed_name(node: ast.AST) -> bool:
    """Whether a config is read as a whole, or by a name that is put together."""
    return any(
        _is_config_expression(each.value)
        if isinstance(each, ast.Attribute) and each.attr in {"to_dict", "__dict__"}
        else isinstance(each, ast.Call) and _is_computed_read(each)
        for each in ast.walk(node)
    )


def _is_computed_read(call: ast.Call) -> bool:
    """Whether a call is `getattr(config, name)`, `vars(config)` or has `**config`."""
    if any(each.arg is None and _is_config_expression(each.value) for each in call.keywords):
        return True
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    if (
        name not in {"getattr", "hasattr", "vars"}
        or not call.args
        or not _is_config_expression(call.args[0])
    ):
        return False
    named = len(call.args) > 1 and isinstance(call.args[1], ast.Constant)
    return name == "vars" or not named


def _is_config_expression(node: ast.expr) -> bool:
    """Whether an expression is a model's config, by its name; not one of generating."""
    text = ast.unparse(node).lower()
    return text.endswith("config") and not text.endswith("generation_config")
