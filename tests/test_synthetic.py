"""The rule: the same numbers everywhere and for ever, and always ones that a graph can take."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hubaoti.runtime import synthetic
from hubaoti.runtime.synthetic import PERIOD, fill_synthetic, make_synthetic

# A deadline would measure whoever shares the machine.
unhurried = settings(deadline=None, max_examples=60)
LONG = (3, PERIOD // 2)  # longer than a period
FROZEN = [
    ("mlp.up_proj.weight", (65, 48), "float32", "constant", "96f5e58cb2af66a0"),
    ("mlp.up_proj.weight", LONG, "float32", "constant", "3f62f1f8ea82a411"),
    ("mlp.up_proj.weight", (65, 48), "bfloat16", "constant", "fe0d7adb425a9e7b"),
    ("mlp.up_proj.weight", LONG, "bfloat16", "constant", "9b2499ccb98fe5af"),
    ("mlp.up_proj.weight", (65, 48), "float16", "constant", "655d8b9e6d7a4966"),
    ("mlp.up_proj.weight", (65, 48), "float64", "constant", "516eb86f61f9312a"),
    ("mlp.up_proj.bias", (65,), "float32", "constant", "06fa533904e0d90f"),
    ("input_layernorm.weight", (48,), "bfloat16", "constant", "e2a6461ff1422682"),
    ("patch.weight", (8, 3, 4, 4), "float32", "constant", "f3033cf63fa747c7"),
    ("q_proj.parametrizations.weight.original0", (48, 65), "int8", "constant", "c8f882cd38da6142"),
    (
        "q_proj.parametrizations.weight.original0",
        (48, 65),
        "float8_e4m3fn",
        "constant",
        "9d19982ecb8876e6",
    ),
    (
        "q_proj.parametrizations.weight.original0",
        (4, 2, 32, 4),
        "int32",
        "constant",
        "e732ca0af6f59fc4",
    ),
    (
        "q_proj.parametrizations.weight.original1",
        (48, 1),
        "float32",
        "constant",
        "773d69cc8a962850",
    ),
    (
        "q_proj.parametrizations.weight.original1",
        (2, 48, 2),
        "bfloat16",
        "constant",
        "465c1e8588501a52",
    ),
    ("q_proj.parametrizations.weight.original2", (48, 1), "int8", "constant", "3390425e827395dd"),
    ("q_proj.qweight", (48, 65), "uint8", "constant", "fb4cbcd5e70b536f"),
    ("freqs", (7, 3), "complex64", "constant", "eb7c9002fd00d9b6"),
    ("hidden_states", (2, 5, 48), "float32", "real", "eafc51f966aee892"),
    ("hidden_states", (2, 5, 48), "bfloat16", "real", "204a655a785ebc11"),
    ("input_ids", (3, 17), "int64", "ids<152064", "6acac5178638b942"),
    ("input_ids", (3, 17), "int32", "ids<7", "8444987ea5a4ffb7"),
    ("attention_mask", (3, 17), "int64", "mask", "8fbe55d06d6f29ec"),
    ("mask", (2, 1, 3, 9), "bool", "mask", "e48d3d7fdb022bc8"),
    ("mask", (2, 1, 3, 9), "bfloat16", "mask", "9bb18b8e00f5b80b"),
    ("position", (2, 9), "int64", "position", "eed7f7f6ea216119"),
]


def digest(tensor: torch.Tensor) -> str:
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return hashlib.sha256(plain.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def named(row: tuple[Any, ...]) -> str:
    return "-".join(str(part) for part in row[:4])


@pytest.mark.parametrize(("name", "shape", "dtype", "values", "expected"), FROZEN, ids=named)
def test_its_numbers_are_frozen(
    name: str, shape: tuple[int, ...], dtype: str, values: str, expected: str
) -> None:
    """A change of any of these makes every published golden answer wrong."""
    assert digest(make_synthetic(name, shape, getattr(torch, dtype), values))[:16] == expected


def test_it_is_the_hash_that_its_docstring_says() -> None:
    def mixed(place: int) -> int:
        for _ in range(2):
            place = ((place >> 16) ^ place) * 0x45D9F3B % 2**32
        return ((place >> 16) ^ place) >> 8

    numbers = synthetic.generate_numbers()
    assert numbers.tolist() == [mixed(place) for place in range(1, PERIOD + 1)] * 3
    assert len({*numbers[:PERIOD].tolist()}) > 0.99 * PERIOD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e5m2])
def test_how_a_tensor_lies_does_not_change_its_values(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "BLOCK", 3 * PERIOD)
    for shape in [(700, 900), (1, 900, 700), (5, 7), (300_000, 2), (9,), ()]:
        plain = make_synthetic("up.weight", shape, dtype, "constant")
        turned = torch.empty(shape[::-1], dtype=dtype).permute(tuple(range(len(shape)))[::-1])
        apart = torch.empty((*shape, 2), dtype=dtype)[..., 1]
        for tensor in (turned, apart):
            fill_synthetic(tensor, "up.weight")
            assert torch.equal(tensor.float(), plain.float()), (shape, tensor.stride())


def test_what_lies_between_is_not_written() -> None:
    around = torch.full((6, 8), 9.0)
    fill_synthetic(around[1:5, 2:6], "up.weight")
    assert torch.equal(
        around[1:5, 2:6], make_synthetic("up.weight", (4, 4), torch.float32, "constant")
    )
    around[1:5, 2:6] = 9.0
    assert (around == 9.0).all()


def test_a_parameter_is_written_in_place_and_known_to_be() -> None:
    parameter = torch.nn.Parameter(torch.empty(4, 4))
    before, place = parameter._version, parameter.data_ptr()
    fill_synthetic(parameter, "up.weight")
    assert parameter.data_ptr() == place
    assert parameter._version > before
    assert parameter.grad_fn is None


def test_it_takes_no_heed_of_defaults() -> None:
    expected = [make_synthetic(*row[:2], getattr(torch, row[2]), row[3]) for row in FROZEN]
    synthetic.generate_numbers.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = [make_synthetic(*row[:2], getattr(torch, row[2]), row[3]) for row in FROZEN]
    finally:
        torch.set_default_dtype(torch.float32)
    assert [*map(digest, found)] == [*map(digest, expected)]


class Sizes(TorchDispatchMode):
    """Keeps the largest tensor that an op has made."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        own = isinstance(found, torch.Tensor) and all(
            found.untyped_storage().data_ptr() != each.untyped_storage().data_ptr()
            for each in args
            if isinstance(each, torch.Tensor)
        )
        self.largest = max(self.largest, found.nbytes if own else 0)
        return found


@pytest.mark.parametrize("turned", [False, True])
def test_a_huge_tensor_is_written_without_another(turned: bool) -> None:
    tensor = torch.empty(6000, 4000, dtype=torch.bfloat16)
    with Sizes() as seen:
        fill_synthetic(tensor.t() if turned else tensor, "up.weight")
    assert 0 < seen.largest <= max(3 * PERIOD * 8, turned * synthetic.BLOCK * 2)
    assert seen.largest < tensor.nbytes / 4


@pytest.mark.parametrize("fan_in", [64, 100, 768, 1024, 4096, 8192, 29568])
def test_a_product_keeps_the_size_of_what_goes_in(fan_in: int) -> None:
    given = make_synthetic("hidden_states", (8, fan_in), torch.float32)
    weight = make_synthetic("up.weight", (256, fan_in), torch.float32, "constant")
    assert 0.9 < given.std() < 1.4
    assert 0.6 < (given @ weight.T).std() / given.std() < 1.7
    assert abs(given.mean()) < 0.15


@pytest.mark.parametrize(
    "name", ["norm.weight", "weight", "norm1.scale", "layer_scale1.lambda1", "bn.running_var"]
)
def test_what_multiplies_an_activation_is_about_one(name: str) -> None:
    found = make_synthetic(name, (500,), torch.bfloat16, "constant")
    assert (found > 0.85).all()
    assert (found < 1.15).all()
    assert found.unique().numel() > 10


def test_a_bias_is_about_zero() -> None:
    found = make_synthetic("up.bias", (5000,), torch.float32, "constant")
    assert found.abs().max() <= 0.125
    assert abs(found.mean()) < 0.01


@pytest.mark.parametrize(
    "name",
    [
        *("up.weight_scale", "up.scale", "up.scales", "up.weight_scale_inv", "up.zero_point"),
        *("up.parametrizations.weight.original1", "up.scale_and_zero", "original1"),
    ],
)
@pytest.mark.parametrize("shape", [(), (64,), (64, 1), (4, 64, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_is_small_and_positive(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    found = make_synthetic(name, shape, dtype, "constant")
    assert (found > 0).all()
    assert (found < 0.01).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
@pytest.mark.parametrize("name", ["up.weight", "up.parametrizations.weight.original0"])
def test_quantized_values_are_spread_over_their_dtype(name: str, dtype: torch.dtype) -> None:
    found = make_synthetic(name, (300, 400), dtype, "constant").double()
    limits = torch.iinfo(dtype)
    assert found.min() <= limits.min + 2
    assert found.max() >= limits.max - 2
    assert abs(found.mean() - (limits.min + limits.max) / 2) < 0.01 * limits.max


def test_every_four_bits_of_a_packed_word_are_spread() -> None:
    found = make_synthetic("up.qweight", (300, 400), torch.int32, "constant").long()
    for low in range(0, 32, 4):
        assert ((found >> low) & 15).flatten().bincount(minlength=16).min() > 300_00 / 8


def test_float8_weights_are_finite() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        found = make_synthetic("up.original0", (300, 400), dtype, "constant").float()
        assert found.isfinite().all()
        assert found.abs().max() == 128


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_index_that_nobody_knows_is_the_first(dtype: torch.dtype) -> None:
    assert make_synthetic("relative_position_index", (9, 9), dtype, "constant").count_nonzero() == 0


def test_two_names_have_two_kinds_of_values() -> None:
    names = [f"{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    assert (
        len({digest(make_synthetic(name, (64, 64), torch.float32, "constant")) for name in names})
        == 7
    )
    assert make_synthetic("x", (64, 64), torch.float32).unique(dim=0).shape == (64, 64)


@unhurried
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    many=st.integers(1, 1 << 20),
    name=st.text(max_size=9),
)
def test_ids_are_of_the_vocabulary(shape: list[int], many: int, name: str) -> None:
    found = make_synthetic(name, shape, torch.int64, f"ids<{many}")
    assert ((found >= 0) & (found < many)).all()
    if found.numel() > 1000 and many > 1000:
        assert found.unique().numel() > 500


@unhurried
@given(
    shape=st.lists(st.integers(1, 12), max_size=5),
    dtype=st.sampled_from([torch.bool, torch.int64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_row_of_a_mask_sees_a_place(shape: list[int], dtype: torch.dtype) -> None:
    found = make_synthetic("mask", shape, dtype, "mask")
    assert found.shape == torch.Size(shape)
    seen = found == 0 if dtype.is_floating_point else found == 1
    hidden = found == torch.finfo(dtype).min if dtype.is_floating_point else found == 0
    assert (seen ^ hidden).all()
    assert seen.any(dim=-1).all() if shape else seen


def test_a_mask_of_two_axes_pads_every_second_row() -> None:
    found = make_synthetic("attention_mask", (3, 5), torch.int64, "mask")
    assert found.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert make_synthetic("attention_mask", (2, 1), torch.int64, "mask").tolist() == [[1], [1]]


def test_a_mask_of_more_axes_is_causal_from_the_end() -> None:
    found = make_synthetic("mask", (2, 1, 2, 4), torch.bool, "mask").int().tolist()
    assert found == [[[[1, 1, 1, 0], [1, 1, 1, 1]]]] * 2
    wide = make_synthetic("mask", (1, 3, 2), torch.bool, "mask").int().tolist()
    assert wide == [[[1, 0], [1, 0], [1, 1]]]


@unhurried
@given(shape=st.lists(st.integers(1, 9), max_size=4), start=st.integers(0, 99))
def test_positions_count_on_along_the_last_axis(shape: list[int], start: int) -> None:
    found = make_synthetic("position", shape, torch.int64, "position", start)
    last = shape[-1] if shape else 1
    assert found.shape == torch.Size(shape)
    assert (found == torch.arange(start, start + last)).all()
