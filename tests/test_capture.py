"""Calls: what a module is given is recorded whoever calls it, as a template and its tensors."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from hubaoti.artifact.canonical import encode_canonical
from hubaoti.compiler.capture import Calls, Frozen, make_call, record_calls, thaw, thaw_arguments
from hubaoti.errors import BadRequest
from hubaoti.runtime.call_template import CallPlan
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.output_template import parse_output_template


class Echo(nn.Module):
    """Takes whatever it is given, and answers its first tensor."""

    def forward(self, x: torch.Tensor, *rest: Any, scale: Any = None, **more: Any) -> torch.Tensor:
        return x


class Pipeline(nn.Module):
    """Calls a module inside, as a library does."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or Echo()

    def forward(self, x: torch.Tensor, times: int = 1) -> torch.Tensor:
        for _ in range(times):
            x = self.inner(x, scale=2.0) + 1
        return x


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline()


def shapes(calls: Calls) -> list[tuple[tuple[int, ...], ...]]:
    return [call.sizes for call in calls]


# What is recorded


def test_positional_and_keyword_arguments_are_told_apart_and_named(pipeline: Pipeline) -> None:
    inner = pipeline.inner
    with record_calls(inner) as calls:
        inner(torch.ones(2), torch.ones(3), scale=torch.ones(4), mask=torch.ones(5))
    (call,) = calls
    assert call.template == {
        "args": [{"tensor": 0}, {"tensor": 1}],
        "kwargs": {"scale": {"tensor": 2}, "mask": {"tensor": 3}},
    }
    assert call.names == ("x", "input_1", "scale", "mask")
    assert call.sizes == ((2,), (3,), (4,), (5,))


def test_calls_say_in_a_line_how_many_they_are_and_no_tensor(pipeline: Pipeline) -> None:
    with record_calls(pipeline.inner) as calls:
        pipeline(torch.ones(2), times=2)
    assert repr(calls) == "Calls(2 calls of Echo, 1 kept)"


def test_tensors_within_tuples_lists_and_dictionaries_are_found(pipeline: Pipeline) -> None:
    inner = pipeline.inner
    rotary = (torch.ones(2), [torch.zeros(3), None])
    with record_calls(inner) as calls:
        inner(torch.ones(1), scale={"a": rotary, "b": {"c": 1.5}}, flag=True, name="x")
    (call,) = calls
    assert call.template["kwargs"] == {
        "scale": {
            "dict": {
                "a": {"tuple": [{"tensor": 1}, [{"tensor": 2}, None]]},
                "b": {"dict": {"c": 1.5}},
            }
        },
        "flag": True,
        "name": "x",
    }
    assert call.names == ("x", "scale_a_0", "scale_a_1_0")


def test_a_template_is_json(pipeline: Pipeline) -> None:
    with record_calls(pipeline.inner) as calls:
        pipeline.inner(
            torch.ones(1), scale=(torch.float16, torch.device("cuda:1"), None, "x", 1, 1.5, False)
        )
    (call,) = calls
    assert json.loads(json.dumps(call.template)) == call.template
    assert call.template["kwargs"]["scale"]["tuple"][:2] == [
        {"dtype": "float16"},
        {"device": "cuda:1"},
    ]


def test_a_model_s_output_is_a_dictionary_of_its_fields() -> None:
    output = BaseModelOutput(last_hidden_state=torch.ones(2))  # type: ignore[arg-type]
    call = make_call(Echo().forward, (torch.ones(1),), {"scale": output})
    fields = call.template["kwargs"]["scale"]
    assert fields["fields"] == {"last_hidden_state": {"tensor": 1}}
    assert fields["class"] == "transformers.modeling_outputs.BaseModelOutput"


def test_a_kv_cache_is_a_word_and_no_tensor() -> None:
    cache = DynamicCache()
    call = make_call(Echo().forward, (torch.ones(1),), {"past_key_values": cache})
    assert call.template["kwargs"] == {"past_key_values": {"cache": True}}
    assert call.caches == (cache,)
    assert len(call.tensors) == 1


def test_a_tensor_that_is_given_twice_has_one_place() -> None:
    x = torch.ones(2)
    call = make_call(Echo().forward, (x, x.clone()), {"scale": x})
    assert call.template["kwargs"] == {"scale": {"tensor": 0}}
    assert len(call.tensors) == 2


def test_a_template_gives_back_what_was_frozen() -> None:
    args = (torch.ones(2), (torch.zeros(3), [1, None]))
    kwargs = {"scale": {"a": torch.full((1,), 7.0)}, "dtype": torch.bfloat16, "no": False}
    call = make_call(Echo().forward, args, kwargs)
    found_args, found = thaw_arguments(call.template, call.tensors, {})
    assert found_args[0] is args[0]
    assert found_args[1][0] is args[1][0] and found_args[1][1] == [1, None]
    assert isinstance(found_args[1], tuple)
    assert found["scale"]["a"] is kwargs["scale"]["a"]  # type: ignore[index]
    assert (found["dtype"], found["no"]) == (torch.bfloat16, False)


def test_a_number_that_follows_a_dim_has_its_size() -> None:
    known = {"size": lambda text: {"2*seq": 14}[text], "cache": "the cache"}
    template = [{"size": "2*seq"}, {"cache": True}, {"device": "cpu"}]
    assert thaw(template, [], known) == [14, "the cache", torch.device("cpu")]


def test_a_tensor_that_is_not_computed_with_may_be_any_of_its_shape() -> None:
    known = {"size": lambda text: {"seq": 7}[text], "device": torch.device("cpu")}
    made = thaw({"any": {"dtype": "int64", "shape": ["seq", 2]}}, [], known)
    assert (made.shape, made.dtype) == ((7, 2), torch.int64)


# Who calls, and how often


def test_a_direct_call_of_forward_is_seen(pipeline: Pipeline) -> None:
    with record_calls(pipeline.inner) as calls:
        pipeline.inner.forward(torch.ones(3))
    assert shapes(calls) == [((3,),)]


def test_calls_from_inside_of_another_module_are_seen_and_answered(pipeline: Pipeline) -> None:
    with record_calls(pipeline.inner) as calls:
        answer = pipeline(torch.zeros(2))
    assert torch.equal(answer, torch.ones(2))
    assert shapes(calls) == [((2,),)]


def test_another_module_of_the_class_is_not_seen(pipeline: Pipeline) -> None:
    other = Echo()
    with record_calls(pipeline.inner) as calls:
        other(torch.ones(1))
    assert len(calls) == 0


def test_equal_calls_are_kept_once_and_other_sizes_and_values_again(pipeline: Pipeline) -> None:
    inner = pipeline.inner
    with record_calls(inner) as calls:
        for size in (2, 2, 3):
            inner(torch.ones(size))
        inner(torch.ones(2), scale=1)
        inner(torch.ones(2), scale=2)
    assert shapes(calls) == [((2,),), ((3,),), ((2,),), ((2,),)]
    assert calls.came == 5


def test_only_the_first_n_are_recorded_and_all_are_run(pipeline: Pipeline) -> None:
    with record_calls(pipeline.inner, 2) as calls:
        answers = [pipeline(torch.zeros(size)).sum().item() for size in (1, 2, 3)]
    assert shapes(calls) == [((1,),), ((2,),)]
    assert answers == [1, 2, 3]


class Heavy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it was run")


def test_without_running_it_the_block_is_left_after_the_first_call() -> None:
    pipeline, after = Pipeline(Heavy()), []
    with record_calls(pipeline.inner, run=False) as calls:
        pipeline.inner(torch.ones(2))
        after.append("still there")
    assert shapes(calls) == [((2,),)]
    assert after == []


def test_without_running_it_n_calls_are_waited_for() -> None:
    heavy, after = Heavy(), []
    with record_calls(heavy, 2, run=False) as calls:
        assert heavy(torch.ones(2)) is None
        heavy(torch.ones(3))
        after.append("still there")
    assert shapes(calls) == [((2,),), ((3,),)]
    assert after == []


def test_a_caller_that_needs_the_answer_is_told_so() -> None:
    pipeline = Pipeline(Heavy())
    with (
        pytest.raises(BadRequest, match="the caller needed the answer of call 1") as caught,
        record_calls(pipeline.inner, 2, run=False),
    ):
        pipeline.inner(torch.ones(1)) + 1
    assert "run=False" in caught.value.hint


@pytest.mark.parametrize("n", [0, -1])
def test_less_than_one_call_is_refused(n: int) -> None:
    with pytest.raises(BadRequest, match=f"asked for {n} calls") as caught, record_calls(Echo(), n):
        raise AssertionError("the block was entered")
    assert caught.value.hint


# What is left behind


class WritesItsInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.zero_()


def test_tensors_are_kept_as_they_were_given() -> None:
    module, given = WritesItsInput(), torch.ones(2)
    with record_calls(module) as calls:
        module(given)
    assert torch.equal(given, torch.zeros(2))
    assert torch.equal(calls.each[0].tensors[0], torch.ones(2))


def test_a_captured_tensor_keeps_no_graph_of_gradients(pipeline: Pipeline) -> None:
    with record_calls(pipeline.inner) as calls:
        pipeline.inner(torch.ones(2, requires_grad=True) * 2)
    assert not calls.each[0].tensors[0].requires_grad


def test_the_module_is_as_it_was_afterwards(pipeline: Pipeline) -> None:
    before = dict(vars(pipeline.inner))
    with record_calls(pipeline.inner):
        assert vars(pipeline.inner) != before
    assert vars(pipeline.inner) == before


def test_a_forward_of_the_module_s_own_is_put_back(pipeline: Pipeline) -> None:
    def own(x: torch.Tensor, **_: Any) -> torch.Tensor:
        return x * 5

    pipeline.inner.forward = own
    with record_calls(pipeline.inner) as calls:
        assert pipeline.inner(torch.ones(1)).item() == 5
    assert pipeline.inner.forward is own
    assert calls.each[0].names == ("x",)


@pytest.mark.parametrize("run", [True, False])
def test_an_error_of_the_caller_passes_and_the_module_is_restored(
    pipeline: Pipeline, run: bool
) -> None:
    with pytest.raises(ZeroDivisionError), record_calls(pipeline.inner, run=run):
        1 / 0  # noqa: B018
    assert "forward" not in vars(pipeline.inner)


def test_an_error_of_the_module_passes_and_its_call_is_kept() -> None:
    heavy = Heavy()
    with pytest.raises(AssertionError, match="it was run"), record_calls(heavy) as calls:
        heavy(torch.ones(4))
    assert shapes(calls) == [((4,),)]
    assert "forward" not in vars(heavy)


# What cannot be compiled


def test_a_module_that_was_never_called_is_named() -> None:
    with record_calls(Echo()) as calls:
        pass
    with pytest.raises(BadRequest, match="Echo was never called") as caught:
        calls.require()
    assert "hubaoti.capture" in caught.value.hint


class Scheduler:
    """Nothing that a template holds."""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            Scheduler(),
            "scale is a tests?.*test_capture.Scheduler|scale is a test_capture.Scheduler",
        ),
        ([1, {"a": Scheduler()}], "scale_1_a is a"),
        ({(1, 2): torch.ones(1)}, "scale has keys that are neither words nor whole numbers"),
        ({1, 2}, "scale is a builtins.set"),
        (1j, "scale is a builtins.complex"),
    ],
)
def test_an_argument_that_no_template_holds_is_named(value: object, words: str) -> None:
    module = Echo()
    with record_calls(module) as calls:
        module(torch.ones(1), scale=value)
    with pytest.raises(BadRequest, match=words) as caught:
        calls.require()
    assert caught.value.hint
    assert "Echo" in str(caught.value)


def test_a_call_that_can_be_recorded_counts_beside_one_that_cannot() -> None:
    module = Echo()
    with record_calls(module) as calls:
        module(torch.ones(1), scale=Scheduler())
        module(torch.ones(2), scale=OrderedDict(a=1))
    assert shapes(calls) == [((2,),)]
    assert calls.require() == calls.each


def test_a_float_without_a_part_is_no_whole_number() -> None:
    """JSON has one word for both, and what is computed with them has two dtypes."""
    frozen = Frozen()
    template = {
        "args": [frozen.freeze(2.0, "scale"), 2],
        "kwargs": {"rate": frozen.freeze(1.5, "rate")},
    }
    read = msgspec.json.decode(encode_canonical(template))
    assert read == {"args": [{"float": "2.0"}, 2], "kwargs": {"rate": 1.5}}
    args, kwargs = thaw_arguments(read, [], {})
    assert [*map(type, args)] == [float, int] and kwargs == {"rate": 1.5}
    plan = CallPlan(read, 0, lambda scale, times, rate=1.5: None)
    assert plan.flatten((2.0, 2), {}) == [None]
    for wrong in ((2, 2), (2.0, 2.0), (3.0, 2)):
        with pytest.raises(CannotServe):
            plan.flatten(wrong, {})
    assert type(parse_output_template({"float": "2.0"})([])) is float
