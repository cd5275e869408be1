"""The names that code reads: attributes and strings, from its source or from its bytecode."""

from __future__ import annotations

import ast
from collections.abc import Iterable
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
    if isinstance(value, CodeType):
        inner = [
            collect_names_in_bytecode(item)
            for item in value.co_consts
            if isinstance(item, CodeType)
        ]
        texts = {item for item in value.co_consts if isinstance(item, str)}
        return {*value.co_names, *texts}.union(*inner)
    if isinstance(value, type):
        return set[str]().union(
            *(collect_names_in_bytecode(unwrap_descriptor(item)) for item in vars(value).values())
        )
    return (
        collect_names_in_bytecode(getattr(value, "__code__", None))
        if isinstance(value, FunctionType)
        else set()
    )


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


def has_forward(node: ast.stmt) -> bool:
    """Whether a statement is a class that is mixed into modules."""
    if not isinstance(node, ast.ClassDef):
        return False
    return any(isinstance(each, ast.FunctionDef) and each.name == "forward" for each in node.body)
