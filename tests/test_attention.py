"""Attention by the kernels' names answers what sdpa does, at sizes that no example had.

The kernels themselves are CUDA's. Here twins of them compute, on a CPU, what they compute: in their
own arithmetic, with what their host code refuses, and with each one's reading of `causal`.
"""

from __future__ import annotations

import io
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hubaoti.artifact.schema import Input
from hubaoti.compiler.asserts import drop_ties, require_asserts_hold
from hubaoti.compiler.attention import choose_kernels, name_attention
from hubaoti.compiler.flash_attention import list_other_attention
from hubaoti.compiler.request import Range
from hubaoti.compiler.signature import CallSignature
from hubaoti.errors import CompileFailed
from hubaoti.runtime.attention_ops import REFERENCES

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
FLASH_3 = torch.ops.hubaoti.fa3_fwd.default
HALF, FULL = ("flash", "efficient"), ("efficient",)
HOPPER = ("fa3", *HALF)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
BATCH, ROWS, KEYS = Dim("batch", min=1, max=8), Dim("rows", min=1, max=64), Dim("keys", max=64)
# Beside the smallest, sizes around multiples of 8 and 16; the examples have 3, 6 and 7.
SIZES = [
    {"batch": batch, "rows": rows, "keys": keys}
    for batch, rows, keys in itertools.product((1, 2), (1, 2, 16, 17), (1, 5, 8, 15, 16, 33))
]
Attend = Callable[..., Any]


class Module(nn.Module):
    """A function as a module."""

    def __init__(self, function: Attend) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def export(
    function: Attend, tensors: Sequence[torch.Tensor], shapes: Sequence[Any] = ()
) -> ExportedProgram:
    return torch.export.export(
        Module(function),
        tuple(tensors),
        dynamic_shapes=(tuple(shapes or [None] * len(tensors)),),
        # Of eager's own attention over groups 2.11 makes guards that always hold.
        prefer_deferred_runtime_asserts_over_guards=torch.__version__.startswith("2.11"),
        strict=False,
    )


def softmax_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """As both kernels have it: in float32, with powers of two, zeros where nothing is seen."""
    scores = query.float() @ key.float().mT * scale
    scores = (scores if mask is None else scores + mask.float()) * math.log2(math.e)
    most = scores.amax(-1, keepdim=True)
    powers = (scores - most.masked_fill(most == -math.inf, 0.0)).exp2()
    total = powers.sum(-1, keepdim=True)
    return (powers @ value.float() / total.masked_fill(total == 0, 1.0)).to(query.dtype)


def see_causal(rows: int, keys: int, offset: int) -> torch.Tensor:
    return torch.full((rows, keys), -math.inf).triu(1 + offset)


def twin_flash(  # noqa: PLR0913 - as torch has it
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: float,
) -> tuple[torch.Tensor]:
    """Flash: the last row sees the last key."""
    rows, keys = query.shape[2], key.shape[2]
    assert query.dtype in {torch.bfloat16, torch.float16}
    assert query.shape[3] == key.shape[3] == value.shape[3] <= 256
    for each in (query, key, value):
        require_readable(each)
    group = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(group, 1) for each in (key, value))
    mask = see_causal(rows, keys, keys - rows) if causal and rows > 1 else None
    return (softmax_product(query, key, value, mask, scale),)


def twin_efficient(  # noqa: PLR0913 - as torch has it
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sums: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float,
) -> tuple[torch.Tensor]:
    """The memory-efficient kernel: the first row sees the first key."""
    rows, keys = query.shape[2], key.shape[2]
    assert query.shape[1] == key.shape[1] == value.shape[1]
    for each in (query, key, value):
        require_readable(each)
    if mask is not None:
        assert mask.shape == (*query.shape[:3], keys)
        assert mask.dtype == query.dtype
        require_readable(mask, width=8)
    if causal:
        mask = see_causal(rows, keys, 0) + (0 if mask is None else mask.float())
    return (softmax_product(query, key, value, mask, scale),)


def twin_flash_3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rule: Any
) -> torch.Tensor:
    """FlashAttention-3, which has rows before heads."""
    assert query.dtype in {torch.bfloat16, torch.float16}
    for each in (query, key, value):
        require_readable(each)
    return REFERENCES["fa3_fwd"](query, key, value, *rule)


def require_readable(tensor: torch.Tensor, width: int | None = None) -> None:
    """What both kernels want of memory, that they read by vectors of 16 bytes."""
    places = (*tensor.stride()[:-1], tensor.storage_offset(), width or tensor.shape[3])
    assert tensor.dim() == 4
    assert tensor.shape[3] == 1 or tensor.stride(3) == 1
    assert all(place % 8 == 0 for place in places), (tensor.shape, places)


def list_kernels(program: ExportedProgram) -> list[str]:
    """The kernels that a program names, in order."""
    names = {FLASH: "flash", EFFICIENT: "efficient", FLASH_3: "fa3"}
    return [names[node.target] for node in program.graph.nodes if node.target in names]


def make_twin(program: ExportedProgram) -> Callable[..., Any]:
    """The program with a kernel's twin wherever it names one."""
    twins: Mapping[Any, Any] = {
        FLASH: twin_flash,
        EFFICIENT: twin_efficient,
        FLASH_3: twin_flash_3,
    }
    for node in program.graph.nodes:
        node.target = twins.get(node.target, node.target)
    program.graph_module.recompile()
    return program.module(check_guards=False)


def require_close(found: Any, wanted: Any, *where: Any) -> None:
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape, where
        assert got.dtype == want.dtype, where
        assert torch.equal(got.isfinite(), want.isfinite()), where
        most = want.double().abs().max().clamp(min=1.0)
        assert (got.double() - want.double()).abs().max() / most < TOLERANCES[want.dtype], where


def split(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, rows, heads of some width) as blocks of transformers lay it: a transposed view."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def see(
    tensors: Sequence[torch.Tensor], mask: torch.Tensor | None = None, **how: Any
) -> torch.Tensor:
    """Attention of 4 heads over as many as the width of the keys has, of 16."""
    query, key = tensors
    key = split(key, key.shape[2] // 16)
    return sdpa(split(query, 4), key, key * 2, attn_mask=mask, **how)


SELF = ({0: BATCH, 1: ROWS}, {0: BATCH, 1: ROWS})
CROSS = ({0: BATCH, 1: ROWS}, {0: BATCH, 1: KEYS})
WHOLE = {0: BATCH, 2: ROWS, 3: KEYS}
GROUPED = {"enable_gqa": True}
CASES: dict[str, tuple[Attend, int, tuple[Any, ...], str]] = {
    # what is done with the tensors, heads of the keys, their dims, the kernel in bfloat16
    "to itself": (lambda *t: see(t), 4, SELF, "flash"),
    "to itself, causal": (lambda *t: see(t, is_causal=True), 4, SELF, "flash"),
    "to itself, causal groups": (lambda *t: see(t, is_causal=True, **GROUPED), 2, SELF, "flash"),
    "to others": (lambda *t: see(t), 4, CROSS, "flash"),
    "to others, causal": (lambda *t: see(t, is_causal=True), 4, CROSS, "efficient"),
    "to others, causal groups": (
        lambda *t: see(t, is_causal=True, **GROUPED),
        2,
        CROSS,
        "efficient",
    ),
    "to others, groups": (lambda *t: see(t, **GROUPED), 2, CROSS, "flash"),
    "to others, one head": (lambda *t: see(t, **GROUPED), 1, CROSS, "flash"),
    "scaled": (lambda *t: see(t, scale=0.5), 4, CROSS, "flash"),
    "masked": (lambda *t: see(t[:2], t[2]), 4, (*CROSS, WHOLE), "efficient"),
    "masked groups": (lambda *t: see(t[:2], t[2], **GROUPED), 2, (*CROSS, WHOLE), "efficient"),
    "masked, of two axes": (lambda *t: see(t[:2], t[2][0, 0]), 4, (*CROSS, WHOLE), "efficient"),
    "masked, scaled groups": (
        lambda *t: see(t[:2], t[2], scale=2.0, **GROUPED),
        1,
        (*CROSS, WHOLE),
        "efficient",
    ),
}


@pytest.mark.parametrize(
    "kernels", [FULL, pytest.param(HALF, marks=pytest.mark.slow), HOPPER], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_a_named_kernel_answers_as_sdpa_does_at_sizes_that_no_example_had(
    case: str, kernels: tuple[str, ...]
) -> None:
    function, heads, shapes, named = CASES[case]
    dtype = torch.float32 if kernels == FULL else torch.bfloat16
    masked, best = len(shapes) == 3, kernels[0]

    def make(sizes: Mapping[str, int]) -> list[torch.Tensor]:
        batch, rows = sizes["batch"], sizes["rows"]
        keys = rows if shapes[1] == SELF[1] else sizes["keys"]
        tensors = [torch.randn(batch, rows, 64), torch.randn(batch, keys, 16 * heads)]
        mask = [torch.rand(batch, 1, rows, keys) > 0.3] if masked else []
        return [*(tensor.to(dtype) for tensor in tensors), *mask]

    program = save_and_load(export(function, make({"batch": 3, "rows": 6, "keys": 7}), shapes))
    program = name_attention(program, kernels)
    assert list_kernels(program) == [best if named == "flash" else named]
    require_asserts_hold(program, *describe(shapes))
    twin = make_twin(program)
    for sizes in SIZES:
        tensors = make(sizes)
        require_close([twin(*tensors)], [function(*tensors)], sizes)


def describe(shapes: Sequence[Mapping[int, Any]]) -> tuple[dict[str, Range], CallSignature]:
    """The bounds and the face of inputs with these dims; other sizes do not matter to a face."""
    dims = {dim.__name__: Range(dim.min or 1, dim.max) for each in shapes for dim in each.values()}
    inputs = tuple(
        Input(
            name=f"input{index}",
            dtype="float32",
            shape=tuple(shape[axis].__name__ if axis in shape else 1 for axis in range(4)),
            values="real",
        )
        for index, shape in enumerate(shapes)
    )
    return dims, CallSignature({}, inputs)


def test_every_width_is_padded_and_scaled_as_what_it_was() -> None:
    """Slices of rows of 301 numbers: no stride is a multiple of anything, and offsets are not."""
    torch.manual_seed(0)

    def attend(query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
        pairs = [(width, width) for width in (*range(1, 34), *range(40, 301, 21), 256, 264)]
        pairs += [(24, 8), (8, 24), (192, 128), (17, 3), (64, 300)]
        return [
            sdpa(query[..., 1 : width + 1], key[..., :width], key[..., -other:])
            for width, other in pairs
        ]

    pairs = ((torch.float32, FULL), (torch.bfloat16, HALF), (torch.bfloat16, HOPPER))
    for dtype, kernels in pairs:
        tensors = [torch.randn(2, 2, size, 301).to(dtype) for size in (5, 7)]
        program = name_attention(export(attend, tensors), kernels)
        widest = list_kernels(program)[-7:-5]
        assert widest == [kernels[0], "efficient"]  # 256 and 264, which is too wide for flash
        require_close(make_twin(program)(*tensors), attend(*tensors), dtype)


@pytest.mark.parametrize("heads", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_a_mask_of_any_shape_that_fits_is_laid_out_as_the_kernel_reads_it(heads: int) -> None:
    shapes = (*CROSS, WHOLE)

    def attend(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        cuts = itertools.product(*([slice(None), slice(1)],) * 4)
        masks = [mask[cut] for cut in cuts]
        masks += [masks[-1].expand_as(mask), mask[:, :1, :1].expand_as(mask), mask[0], mask[0, 0]]
        masks += [mask.mT.contiguous().mT, mask[..., :1].expand_as(mask)]
        kinds = itertools.cycle([lambda each: each > 0, torch.clone, torch.Tensor.float])
        given = [kind(each) for kind, each in zip(kinds, masks[heads // 4 :: 2], strict=False)]
        return [see((query, key), each, enable_gqa=True) for each in given]

    def make(batch: int, rows: int, keys: int) -> list[torch.Tensor]:
        mask = torch.randn(batch, 4, rows, keys)
        if rows > 1:
            mask[:, 1, 1] = -math.inf
        tensors = [torch.randn(batch, rows, 64), torch.randn(batch, keys, 16 * heads), mask]
        return [tensor.bfloat16() for tensor in tensors]

    program = name_attention(save_and_load(export(attend, make(3, 6, 7), shapes)), HALF)
    require_asserts_hold(program, *describe(shapes))
    twin = make_twin(program)
    for sizes in ((1, 1, 1), (2, 5, 16), (1, 3, 31)):
        tensors = make(*sizes)
        require_close(twin(*tensors), attend(*tensors), sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_that_sees_nothing_answers_what_eager_does(dtype: torch.dtype) -> None:
    """Zeros where a mask says no, and the mean where it adds the lowest number there is."""
    hidden = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    hidden[..., 2, :] = False

    def attend(query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor) -> list[torch.Tensor]:
        masks = [hidden]
        for low, kind in itertools.product((-math.inf, torch.finfo(dtype).min), (dtype, None)):
            masks.append(torch.zeros(5, 7, dtype=kind or torch.float32).masked_fill(~hidden, low))
        if dtype is not torch.float16:  # which has no number so low that it outweighs each score
            lowest = torch.finfo(torch.float32).min
            masks.append(torch.zeros(5, 7).masked_fill(~hidden, lowest))
        return [sdpa(query, key, key, attn_mask=mask) for mask in masks]

    tensors = [torch.randn(2, 2, size, 16).to(dtype) for size in (5, 7)]
    program = name_attention(export(attend, [*tensors, hidden]), FULL)
    answers = make_twin(program)(*tensors, hidden)
    require_close(answers, attend(*tensors, hidden))
    assert not answers[0][:, :, 2].any()
    assert answers[-1][:, :, 2].any()


def test_tensors_with_other_axes_than_four_are_taken_as_sdpa_takes_them() -> None:
    def attend(two: torch.Tensor, three: torch.Tensor, five: torch.Tensor) -> list[torch.Tensor]:
        four, mask = three[None], two[:, :5] > 0
        return [
            sdpa(two, two, two),
            sdpa(two, two, two, attn_mask=mask),
            sdpa(three, three, three, is_causal=True),
            sdpa(three, three, three, attn_mask=three[..., :5] > 0),
            sdpa(three, three[:3], three[:3], attn_mask=mask, enable_gqa=True),
            sdpa(four, three, three),
            sdpa(four, four[:, :1], four[:, :1]),
            sdpa(four[:, :1], four, four, attn_mask=four[..., :5]),
            sdpa(four, four[:, :3], four[:, :1], enable_gqa=True),
            sdpa(four.expand(2, -1, -1, -1), four, four, attn_mask=mask),
            sdpa(five, five[:, :1], five[:1], attn_mask=five[..., :5] > 0),
            sdpa(five, five, five, attn_mask=five[:, :1, :1, :1, :5] > 0),
        ]

    tensors = [torch.randn(5, 8), torch.randn(6, 5, 8), torch.randn(2, 3, 4, 5, 8)]
    pairs = ((torch.float32, FULL), (torch.bfloat16, HALF), (torch.bfloat16, HOPPER))
    for dtype, kernels in pairs:
        given = [tensor.to(dtype) for tensor in tensors]
        program = name_attention(export(attend, given), kernels)
        require_close(make_twin(program)(*given), attend(*given), dtype)


def test_attention_of_no_rows_is_the_efficient_kernel_s() -> None:
    """Flash has no launch of none; the other kernel looks."""
    some, none = torch.randn(3, 5, 64).bfloat16(), torch.randn(3, 0, 64).bfloat16()
    for tensors in ((some, none), (none, some), (none, none)):
        program = name_attention(export(lambda *t: see(t), tensors), HALF)
        assert list_kernels(program) == ["efficient"]


def test_no_head_of_a_cache_is_repeated() -> None:
    """A group's heads are rows of the query; what is read of the cache is the cache."""
    shapes = ({0: BATCH, 2: ROWS}, {0: BATCH, 2: KEYS}, WHOLE)

    def attend(query: torch.Tensor, cache: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = cache.narrow(2, 0, mask.shape[3])
        return sdpa(query, places, places, attn_mask=mask, enable_gqa=True)

    tensors = [torch.randn(3, 8, 6, 16), torch.randn(3, 2, 7, 16)]
    mask = torch.ones(3, 1, 6, 7, dtype=torch.bool)
    program = name_attention(export(attend, [*tensors, mask], shapes), FULL)
    kernel = next(node for node in program.graph.nodes if node.target is EFFICIENT)
    query, keys, values, _ = kernel.args[:4]
    assert keys is values
    assert keys.target in {aten.narrow.default, aten.slice.Tensor}
    assert keys.args[0].op == "placeholder"
    assert query.meta["val"].shape[1] == 2


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_folded_rows_are_laid_out_by_the_program_itself(is_contiguous: bool) -> None:
    """Inductor may lay out in another way what was contiguous when attention was named (Phi-3)."""

    def attend(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query = (2 * query).transpose(1, 2)
        query = torch.cat([query, query], -1) if is_contiguous else query
        return sdpa(query, key, key, attn_mask=mask, enable_gqa=True)

    width = 16 if is_contiguous else 32
    tensors = [torch.randn(3, 6, 8, width), torch.randn(3, 2, 7, 32)]
    mask = torch.ones(3, 1, 6, 7, dtype=torch.bool)
    shapes = ({0: BATCH, 1: ROWS}, {0: BATCH, 2: KEYS}, {0: BATCH, 2: ROWS, 3: KEYS})
    program = name_attention(export(attend, [*tensors, mask], shapes), FULL)
    kernel = next(node for node in program.graph.nodes if node.target is EFFICIENT)
    source = kernel.args[0]
    while source.target in {aten.view.default, aten.reshape.default}:
        source = source.args[0]
    assert source.target is aten.clone.default
    assert source.args[0].meta["val"].is_contiguous() == is_contiguous


def test_a_mask_that_was_expanded_is_laid_out_once() -> None:
    shapes = ({0: BATCH, 2: ROWS}, {0: BATCH, 2: KEYS}, {0: BATCH, 3: KEYS})

    def attend(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = mask.expand(-1, 8, query.shape[2], -1)
        return sdpa(query, key, key, attn_mask=mask, enable_gqa=True)

    tensors = [torch.randn(3, 8, 6, 16), torch.randn(3, 2, 7, 16)]
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    program = name_attention(export(attend, [*tensors, mask], shapes), FULL)
    padded = [node for node in program.graph.nodes if "pad" in str(node.target)]
    assert [list(node.meta["val"].shape[1:3]) for node in padded] == [[1, 1]]


def test_a_program_without_attention_stays_as_it_is() -> None:
    program = export(operator.add, [torch.ones(2), torch.ones(2)])
    assert name_attention(program, ()) is program


def test_a_kernel_is_chosen_by_dtype_and_capability_alone() -> None:
    assert choose_kernels("bfloat16", 90) == choose_kernels("float16", 80) == HALF
    assert choose_kernels("float32", 120) == choose_kernels("float16", 75) == FULL
    assert choose_kernels("bfloat16", 75) == ()
    assert choose_kernels("bfloat16", 90, "fa3") == HOPPER


def test_what_another_kernel_computes_is_told_once() -> None:
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)

    def attend(query: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        wide = torch.cat([query] * 5, -1)
        calls = [sdpa(query, query, query), sdpa(wide, wide, wide)]
        return [*calls, *(sdpa(query, query, query, mask) for _ in range(2))]

    program = export(attend, [torch.randn(1, 2, 5, 64).bfloat16(), mask])
    assert list_other_attention(program) == ()
    named = name_attention(program, HOPPER)
    assert list_kernels(named) == ["fa3", "efficient", "efficient", "efficient"]
    assert list_other_attention(named) == (
        "2 heads of 320: memory-efficient",
        "2 heads of 64 under a mask: memory-efficient",
    )


REFUSED: dict[str, tuple[Attend, torch.dtype, tuple[str, ...], str, str]] = {
    # what is done, in which dtype, the kernels there are, the error, the hint
    "dropout": (lambda q: sdpa(q, q, q, dropout_p=0.5), torch.float32, FULL, "drops 0.5", "eval"),
    "a dtype": (lambda q: sdpa(q, q, q), torch.float64, FULL, r"float64: it", "--dtype float32"),
    "a capability": (lambda q: sdpa(q, q, q), torch.bfloat16, (), "capability", "float16"),
    "no width": (lambda q: sdpa(q[..., :0], q[..., :0], q), torch.float32, FULL, "width", "eager"),
    "another device's": (
        lambda q: aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0],
        torch.float32,
        FULL,
        "calls _scaled_dot_product_flash_attention_for_cpu",
        "scaled_dot_product_attention",
    ),
    "flex attention": (
        lambda q: torch.nn.attention.flex_attention.flex_attention(q, q, q),
        torch.float32,
        FULL,
        "calls flex_attention",
        "scaled_dot_product_attention",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_no_kernel_computes_is_refused_by_name(case: str) -> None:
    function, dtype, kernels, message, advice = REFUSED[case]
    program = export(function, [torch.randn(1, 2, 4, 8, dtype=dtype)])
    with pytest.raises(CompileFailed, match=message) as caught:
        name_attention(program, kernels)
    assert advice in caught.value.hint
    assert "executing" not in str(caught.value)


def save_and_load(program: ExportedProgram) -> ExportedProgram:
    archive = io.BytesIO()
    torch.export.save(program, archive)
    archive.seek(0)
    return torch.export.load(archive)


def assert_sizes(*conditions: Callable[[Any, Any], Any]) -> tuple[Any, ...]:
    """A program that asserts something of its two dims, and what they are."""
    dims = {"short": Range(1, 48), "long": Range(8, 800, 8)}
    shapes = ({0: Dim("short", max=48)}, {0: 8 * Dim("_long", max=100)})

    def forward(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        for condition in conditions:
            torch._check(condition(first.shape[0], second.shape[0]))
        return torch.cat([first, second])

    program = torch.export.export(
        Module(forward),
        (torch.ones(3), torch.ones(40)),
        dynamic_shapes=(shapes,),
        prefer_deferred_runtime_asserts_over_guards=True,
        strict=False,
    )
    names = [(name,) for name in dims]
    inputs = (Input(name=n, dtype="float32", shape=(n,), values="real") for (n,) in names)
    return program, dims, CallSignature({}, tuple(inputs))


def test_asserts_that_hold_at_every_size_are_let_through() -> None:
    program, dims, face = assert_sizes(
        lambda short, long: short + long > 8, lambda short, long: long % 4 == 0
    )
    require_asserts_hold(program, dims, face)
    require_asserts_hold(save_and_load(program), dims, face)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (lambda short, long: short != 47, "short != 47, which is not so at short=47"),
        (lambda short, long: short % 3 == 0, r"(?m)short % 3.*not so at short=1$"),
        (lambda short, long: long % 16 == 8, r"(?m)not so at long=16$"),
        (lambda short, long: short < long, r"(?m)not so at long=8, short=\d+$"),
        (lambda short, long: (short + long) % 9 != 5, r"(?m)not so at long=\d+, short=\d+$"),
    ],
)
def test_an_assert_that_fails_at_some_size_is_told_with_it(condition: Any, message: str) -> None:
    program, dims, face = assert_sizes(condition)
    for each in (program, save_and_load(program)):
        with pytest.raises(CompileFailed, match=message) as caught:
            require_asserts_hold(each, dims, face)
        assert "narrow the dims" in caught.value.hint


def test_an_assert_that_sizes_differ_as_the_example_s_did_is_dropped() -> None:
    program, dims, face = assert_sizes(lambda short, long: short != long)
    with pytest.raises(CompileFailed, match=r"(?m)short != .*not so at long=\d+, short=\d+$"):
        require_asserts_hold(program, dims, face)
    drop_ties(program, dims)
    require_asserts_hold(program, dims, face)
    given = torch.ones(8)
    assert torch.equal(program.module(check_guards=False)(given, given), torch.ones(16))


def test_a_remainder_that_has_to_differ_is_no_tie() -> None:
    """A model that pads what does not divide does something else with what does."""
    program, dims, face = assert_sizes(lambda short, long: long % short != 0)
    drop_ties(program, dims)
    with pytest.raises(CompileFailed, match=r"which is not so at"):
        require_asserts_hold(program, dims, face)


def test_a_value_that_has_to_differ_from_a_size_is_no_tie() -> None:
    def scale(tensor: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        torch._check(number.item() != tensor.shape[0])
        return tensor * number

    program = torch.export.export(
        Module(scale),
        (torch.ones(3), torch.tensor(5)),
        dynamic_shapes=(({0: Dim("short", max=48)}, None),),
        prefer_deferred_runtime_asserts_over_guards=True,
        strict=False,
    )
    drop_ties(program, {"n": Range(1, 64)})
    with pytest.raises(RuntimeError):
        program.module(check_guards=False)(torch.ones(4), torch.tensor(4))


def test_a_size_that_has_to_be_below_a_number_is_no_tie() -> None:
    """Of a step that asks torch of one size alone, both answers are not right."""
    program, dims, face = assert_sizes()
    node = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name.endswith("_1"))
    assert bool(node.meta["val"].shape[0] < 64)
    with pytest.raises(CompileFailed, match=r"(?m) < 64, which is not so at long=64$"):
        require_asserts_hold(program, dims, face)


def test_a_loaded_program_has_sizes_that_are_sums() -> None:
    """As a block of Flux has: its text and its image look at each other."""
    image, text = Dim("image", max=64), Dim("text", max=32)
    shapes = ({1: image}, {1: text}, {0: Dim.DYNAMIC})

    def attend(image: torch.Tensor, text: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        both = split(torch.cat([image, text], 1) + places, 2)
        return sdpa(both, both, both)

    def make(image: int, text: int) -> list[torch.Tensor]:
        return [torch.randn(1, image, 16), torch.randn(1, text, 16), torch.randn(image + text, 16)]

    program = name_attention(save_and_load(export(attend, make(7, 5), shapes)), FULL)
    dims = {"image": Range(1, 64), "text": Range(1, 32)}
    inputs = (
        Input(name="x", dtype="float32", shape=shape, values="real")
        for shape in ((1, "image", 16), (1, "text", 16), ("image+text", 16))
    )
    require_asserts_hold(program, dims, CallSignature({}, tuple(inputs)))
    twin = make_twin(program)
    for sizes in ((1, 1), (9, 8), (2, 30)):
        tensors = make(*sizes)
        require_close([twin(*tensors)], [attend(*tensors)], sizes)


def test_a_guard_of_the_example_s_size_is_found_where_nothing_asserts_it() -> None:
    """As a step leaves it that asks torch whether 40 is a multiple of 5."""
    program, dims, face = assert_sizes()
    require_asserts_hold(program, dims, face)
    node = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name.endswith("_1"))
    assert bool(node.meta["val"].shape[0] % 5 == 0)
    with pytest.raises(CompileFailed, match=r"(?m)not so at long=16$"):
        require_asserts_hold(program, dims, face)


def test_what_a_cache_holds_is_looked_at_where_a_call_fits_into_it() -> None:
    shapes = ({0: Dim("seq", max=64)}, {0: Dim("filled", max=64)}, {0: Dim("cache", max=64)})

    def forward(seq: torch.Tensor, filled: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        torch._check(seq.shape[0] <= filled.shape[0])
        torch._check(filled.shape[0] <= cache.shape[0])
        return torch.cat([seq, filled, cache])

    program = torch.export.export(
        Module(forward),
        (torch.ones(3), torch.ones(5), torch.ones(7)),
        dynamic_shapes=(shapes,),
        prefer_deferred_runtime_asserts_over_guards=True,
        strict=False,
    )
    names = ("seq", "filled", "cache")
    inputs = (Input(name=n, dtype="float32", shape=(n,), values="real") for n in names)
    face = CallSignature({}, tuple(inputs))
    require_asserts_hold(program, {name: Range(1, 64) for name in names}, face)
