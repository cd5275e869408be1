"""Calls by their template: what transformers calls the KV cache differs, and is one argument."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from hubaoti.runtime.call_template import CACHE, CallPlan, choose_cache_word
from hubaoti.runtime.fallback import CannotServe


def before(x: Any, past_key_values: Any = None, **kwargs: Any) -> None:
    """As a block of transformers takes its cache until 5.23."""


def since(x: Any, cache: Any = None, **kwargs: Any) -> None:
    """As it does since 5.24."""


def anything(x: Any, **kwargs: Any) -> None:
    """As a block that passes on whatever it is given."""


def both(x: Any, past_key_values: Any = None, cache: Any = None) -> None:
    """Two arguments of a module of somebody else."""


X, HELD = torch.ones(2), object()


def plan_of(word: str, forward: Callable[..., Any], held: Any = None) -> CallPlan:
    """The plan of a graph that was compiled with a word for the cache."""
    kwargs = {word: {"cache": True} if held is None else held}
    return CallPlan({"args": [{"tensor": 0}], "kwargs": kwargs}, 1, forward)


@pytest.mark.parametrize("forward", [before, since, anything])
@pytest.mark.parametrize("compiled", CACHE)
@pytest.mark.parametrize("called", CACHE)
def test_a_graph_serves_under_either_word_whichever_it_was_compiled_with(
    compiled: str, called: str, forward: Callable[..., Any]
) -> None:
    plan = plan_of(compiled, forward)
    assert plan.flatten([X], {called: HELD}) == [X, HELD]
    assert plan.flatten([], {called: HELD, "x": X}) == [X, HELD]


@pytest.mark.parametrize("forward", [before, since])
@pytest.mark.parametrize("compiled", CACHE)
def test_the_cache_may_be_given_without_a_word(compiled: str, forward: Callable[..., Any]) -> None:
    assert plan_of(compiled, forward).flatten([X, HELD], {}) == [X, HELD]


@pytest.mark.parametrize("forward", [before, since])
@pytest.mark.parametrize("compiled", CACHE)
def test_a_cache_that_is_not_given_is_what_the_module_has_without_it(
    compiled: str, forward: Callable[..., Any]
) -> None:
    assert plan_of(compiled, forward).flatten([X], {}) == [X, None]


@pytest.mark.parametrize("compiled", CACHE)
@pytest.mark.parametrize(("forward", "own"), [(before, "past_key_values"), (since, "cache")])
def test_of_both_words_the_modules_own_is_meant_and_the_other_is_refused(
    compiled: str, forward: Callable[..., Any], own: str
) -> None:
    (other,) = {*CACHE} - {own}
    plan = plan_of(compiled, forward)
    assert plan.flatten([X], {own: HELD, other: None}) == [X, HELD]
    assert plan.flatten([X], {other: None, own: HELD}) == [X, HELD]
    with pytest.raises(CannotServe):
        plan.flatten([X], {own: None, other: HELD})


def test_a_module_that_takes_both_has_two_arguments() -> None:
    plan = plan_of("past_key_values", both)
    assert plan.flatten([X], {"past_key_values": HELD}) == [X, HELD]
    with pytest.raises(CannotServe, match="cache"):
        plan.flatten([X], {"cache": HELD})


def test_only_a_kv_cache_has_two_words() -> None:
    plan = plan_of("cache", since, held={"tensor": 1})
    with pytest.raises(CannotServe, match="past_key_values"):
        plan.flatten([X], {"past_key_values": HELD})


@pytest.mark.parametrize("compiled", CACHE)
@pytest.mark.parametrize("called", CACHE)
@pytest.mark.parametrize("forward", [before, since])
def test_a_graph_without_a_cache_takes_none_under_either_word(
    compiled: str, called: str, forward: Callable[..., Any]
) -> None:
    plan = CallPlan({"args": [{"tensor": 0}], "kwargs": {compiled: None}}, 1, forward)
    assert plan.flatten([X], {called: None})[0] is X
    with pytest.raises(CannotServe):
        plan.flatten([X], {called: HELD})


def test_a_model_is_given_its_cache_by_its_own_word() -> None:
    assert choose_cache_word({"input_ids": 0, "cache": 0}) == "cache"
    assert choose_cache_word({"input_ids": 0, "past_key_values": 0}) == "past_key_values"
    assert choose_cache_word({"kwargs": 0}) == "past_key_values"


def test_what_a_forward_asks_its_keywords_for_is_not_off_because_it_is_false() -> None:
    def forward(self: Any, x: Any, **more: Any) -> Any:
        def inner() -> Any:
            return more["deep"]

        return x if more.get("residual", True) else inner()

    plan = CallPlan({"args": [{"tensor": 0}], "kwargs": {}}, 1, partial(forward, None))
    for name in ("residual", "deep"):
        for value in (False, None):
            with pytest.raises(CannotServe, match=f"{name} is {value}"):
                plan.flatten(["x"], {name: value})
    for value in (False, None):  # nobody looks at it here; it may be handed on, and is off
        assert plan.flatten(["x"], {"output_attentions": value})[0] == "x"
        assert plan.flatten(["x"], {"other": value})[0] == "x"
