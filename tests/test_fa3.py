"""FlashAttention-3 in graphs: asked for, named where it says all, told lengths, or refused.

On the CPU plain torch answers its ops, and graphs that are planned for a GPU are built for this
CPU, whose answers can be looked at.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache, WhisperConfig

import hubaoti
from hubaoti.artifact.bundle import Bundle, write_manifest
from hubaoti.artifact.schema import ModelSource, Target
from hubaoti.attachment.attach import Attachment
from hubaoti.attachment.masks import Says, read_step_mask, show_unfilled
from hubaoti.attachment.stats import Fallback
from hubaoti.compiler.attention import name_attention
from hubaoti.compiler.build import build
from hubaoti.compiler.flash_attention import (
    KernelAbilities,
    list_other_attention,
    read_abilities,
    refuse_fa3,
    require_dtype,
)
from hubaoti.compiler.from_config import load_source
from hubaoti.compiler.job import Job, make_jobs
from hubaoti.compiler.plan import Plan, add_fa3_graphs, drop_told_graphs, make_plan
from hubaoti.compiler.request import CompileRequest, make_ranges
from hubaoti.compiler.targets import choose_targets
from hubaoti.errors import BadRequest, NotServed
from hubaoti.host.probe import probe_host
from hubaoti.progress import report_nothing
from hubaoti.runtime.capturing import rehearse, tell
from hubaoti.settings import Settings

CPU = torch.device("cpu")
NEW = 16  # tokens
DIMS: dict[str, tuple[int, int]] = {"batch": (1, 4), "seq": (1, 40)}
STATIC: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "cache_implementation": "static",
}


def make_target(sm: int | None) -> Target:
    device, cuda = ("cuda", "13.0") if sm else ("cpu", None)
    words = {"os": "linux", "level": "x86_64_v3", "torch": "2.11.0", "git": "1"}
    return Target(device=device, cuda=cuda, sm=sm, **words)


# Asked for


def test_attentions_are_asked_for_in_words_or_a_list_and_unknown_ones_refused() -> None:
    for words in ("fa3,sdpa", "fa3, sdpa,fa3", ["fa3", "sdpa"]):
        asked = CompileRequest.parse({"attention": words, "capabilities": (90,)})
        assert asked.attentions == ("fa3", "sdpa")
    assert CompileRequest.parse({}).attentions == ()
    with pytest.raises(BadRequest, match="unknown attention 'fa4'") as caught:
        CompileRequest.parse({"attention": "fa4"})
    assert "sdpa, fa3" in caught.value.hint
    with pytest.raises(BadRequest, match="a bundle has one attention, and fa3 and sdpa"):
        CompileRequest.parse({"attention": "fa3,sdpa", "device": "cuda"})
    with pytest.raises(BadRequest, match=r"know nothing of kernels \(fa3\)"):
        CompileRequest.parse({"attention": "fa3", "layout": "zerogpu", "capabilities": (90,)})


@pytest.mark.parametrize(
    ("words", "where"),
    [({}, "a CPU"), ({"device": "cpu"}, "a CPU"), ({"capabilities": (80, 120)}, "sm80")],
)
def test_where_no_gpu_has_it_that_is_said_before_torch_is_loaded(
    words: dict[str, Any], where: str
) -> None:
    with pytest.raises(BadRequest, match=f"fa3 is asked for {where}, and .* sm90 alone"):
        CompileRequest.parse({"attention": "fa3", **words})
    CompileRequest.parse({"attention": "fa3", "device": "cuda"})
    CompileRequest.parse({"attention": "fa3", "capabilities": (80, 90)})


@pytest.mark.parametrize(
    ("sm", "dtype", "message"),
    [
        (80, "bfloat16", "asked for sm80"),
        (120, "bfloat16", "asked for sm120"),
        (None, "bfloat16", "asked for a CPU"),
        (90, "float32", "asked in float32"),
    ],
)
def test_what_the_kernel_does_not_run_on_or_in_is_refused_by_name(
    sm: int | None, dtype: str, message: str
) -> None:
    refusal = refuse_fa3(make_target(sm), dtype)
    assert refusal is not None and message in str(refusal) and "--attention sdpa" in refusal.hint


def test_a_build_of_the_kernel_that_has_float16_is_asked_in_it() -> None:
    for dtype in ("bfloat16", "float16"):
        assert refuse_fa3(make_target(90), dtype) is None
        require_dtype(dtype, KernelAbilities(fp16=True), "acme/flash")
    require_dtype("bfloat16", KernelAbilities(), "acme/flash")
    with pytest.raises(BadRequest, match="in float16, in which acme/flash does not compute"):
        require_dtype("float16", KernelAbilities(), "acme/flash")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "CONFIG = {'build_flags': {'FLASHATTENTION_DISABLE_LOCAL': True, "
            "'FLASHATTENTION_DISABLE_SOFTCAP': False, 'FLASHATTENTION_DISABLE_FP16': False}}",
            KernelAbilities(fp16=True, softcap=True),
        ),
        (
            "CONFIG = {'build_flags': {'FLASHATTENTION_DISABLE_HDIM192': True, "
            "'FLASHATTENTION_DISABLE_HDIM256': True, 'FLASHATTENTION_DISABLE_APPENDKV': True}}",
            KernelAbilities(widest=128, appends=False),
        ),
        ("CONFIG = {'build_flags': __import__('os').environ}", KernelAbilities()),
        ("CONFIG = {'build_flags': 1}", KernelAbilities()),
        ("CONFIG = {", KernelAbilities()),
        ("", KernelAbilities()),
    ],
)
def test_what_a_build_has_is_read_from_its_flags_and_not_run(
    text: str, found: KernelAbilities, tmp_path: Path
) -> None:
    file = tmp_path / "digest"
    file.write_text(text)
    assert read_abilities({"metadata.json": file}) == KernelAbilities()
    assert read_abilities({"flash_attn_config.py": file}) == found


@pytest.fixture(scope="module")
def planned(tiny_decoder: Path) -> Callable[..., Plan]:
    """The plan of the tiny decoder for a GPU, without the kernel."""

    def find(task: str, **more: Any) -> Plan:
        dims = make_ranges(DIMS | ({"cache": (16, 64)} if task == "generate" else {}))
        request = CompileRequest(task=task, dims=dims, capabilities=(90,), **more)
        return make_plan(load_source(tiny_decoder, request, CPU), request, CPU)

    return find


def test_each_gpu_and_attention_is_a_job_with_a_key_and_the_others_are_told(
    planned: Callable[..., Plan],
) -> None:
    plan = planned("forward", dtype="bfloat16")
    request = CompileRequest(attentions=("fa3", "sdpa"), capabilities=(80, 90))
    found = make_jobs(plan, request, [make_target(80), make_target(90)])
    jobs = found.jobs
    assert [(job.gpu, job.build.attention) for job in jobs] == [
        ("sm80", "sdpa"),
        ("sm90-fa3", "fa3"),
        ("sm90", "sdpa"),
    ]
    assert [job.build.kernels for job in jobs[1:]] == [
        ("fa3", "flash", "efficient"),
        ("flash", "efficient"),
    ]
    assert len({job.key for job in jobs}) == 3
    reason = str(refuse_fa3(make_target(80), "bfloat16"))
    assert ([*map(str, found.left_out)], found.refused) == ([reason], ())
    alone = make_jobs(plan, replace(request, attentions=("fa3",)), [*map(make_target, (80, 90))])
    assert ([*map(str, alone.refused)], alone.left_out) == ([reason], ())
    only = CompileRequest(attentions=("fa3",), device="cuda")  # which is asked what it is
    with pytest.raises(BadRequest, match="asked for sm80"):
        make_jobs(plan, only, [make_target(80)])


def test_asking_for_sdpa_is_asking_for_nothing(planned: Callable[..., Plan]) -> None:
    plan = planned("forward", dtype="bfloat16")
    keys = {
        make_jobs(plan, CompileRequest(attentions=each), [make_target(90)]).jobs[0].key
        for each in ((), ("sdpa",))
    }
    assert len(keys) == 1


# Which graphs there are


def test_graphs_that_are_told_lengths_stand_before_those_with_masks(
    planned: Callable[..., Plan],
) -> None:
    units = add_fa3_graphs(planned("generate")).units
    assert [(unit.id, unit.unmasked, unit.masks) for unit in units] == [
        ("model.layers-decode", True, None),
        ("model.layers-padded", False, "padded"),
        ("model.layers", False, None),
    ]
    assert [unit.order for unit in units] == sorted({unit.order for unit in units})
    assert all(unit.face == units[0].face for unit in units)
    whole = add_fa3_graphs(planned("forward")).units
    assert [(unit.id, unit.masks) for unit in whole] == [
        ("model.layers-causal", "causal"),
        ("model.layers", None),
    ]


def test_a_build_of_the_kernel_is_not_asked_for_wider_heads_than_it_takes(
    planned: Callable[..., Plan],
) -> None:
    plan = add_fa3_graphs(planned("generate"))
    width = plan.units[0].face.inputs[plan.units[0].face.cache.keys].shape[-1]  # type: ignore[union-attr]
    assert drop_told_graphs(plan, width) is plan
    left = drop_told_graphs(plan, width - 1)  # type: ignore[operator]
    assert [unit.masks for unit in left.units] == [None, None]
    q = torch.randn(1, 2, 4, 128, dtype=torch.bfloat16)
    program = torch.export.export(_Attends(), (q,))
    for widest, called in ((128, True), (96, False)):
        named = name_attention(program, ("fa3", "flash", "efficient"), widest)
        targets = [str(node.target) for node in named.graph.nodes]
        assert any("fa3_fwd" in each for each in targets) == called
        assert bool(list_other_attention(named)) != called


class _Attends(torch.nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)


@pytest.mark.slow
def test_a_decoder_that_looks_at_an_encoder_too_is_told_of_its_own_mask_alone(
    ops: list[str], built_at: Settings, tmp_path: Path
) -> None:
    """What the encoder saw, longer than the text, is looked at by all rows."""
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    more = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 30}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(
        **sizes, **heads, **more, **tokens, vocab_size=99, max_target_positions=64,
        suppress_tokens=None, begin_suppress_tokens=None,
        architectures=["WhisperForConditionalGeneration"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "whisper")
    request = CompileRequest(task="forward", capabilities=(90,))
    plan = make_plan(load_source(tmp_path / "whisper", request, CPU), request, CPU)
    added = add_fa3_graphs(plan)
    told = [unit for unit in added.units if unit.masks]
    assert [unit.id for unit in told] == ["model.decoder.layers-causal"]
    bundle = build_here(replace(added, units=(*told,)), built_at, tmp_path / "bundle")
    assert [graph.masks for graph in bundle.manifest.graphs] == ["causal"]


def test_an_encoder_has_no_such_graphs(tiny_roberta: Path) -> None:
    request = CompileRequest(task="forward", capabilities=(90,), regions="auto")
    plan = make_plan(load_source(tiny_roberta, request, CPU), request, CPU)
    assert add_fa3_graphs(plan) is plan


# What they answer


def build_here(plan: Plan, settings: Settings, output: Path) -> Bundle:
    """The graphs of a plan for a GPU, for this CPU."""
    host = probe_host(settings)
    here = CompileRequest(task=plan.source.program.task)
    (target,) = choose_targets(host, here)
    jobs = {output: Job.of(plan, here, target)}
    (bundle,) = build(jobs, ModelSource(model="tiny"), host, report_nothing)
    assert isinstance(bundle, Bundle), bundle
    return bundle


@pytest.fixture(scope="module")
def bundles(
    planned: Callable[..., Plan],
    ops: list[str],
    built_at: Settings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, Bundle]:
    """The tiny decoder's blocks, over a cache and without one."""
    folder = tmp_path_factory.mktemp("fa3")
    return {
        task: build_here(add_fa3_graphs(planned(task)), built_at, folder / task)
        for task in ("generate", "forward")
    }


@pytest.fixture
def model(tiny_decoder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()


@pytest.fixture
def plain(tiny_decoder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()


@pytest.fixture
def over_cache(
    model: Any, bundles: Mapping[str, Bundle], ops: list[str], settings: Settings
) -> Iterator[Attachment]:
    with hubaoti.attach(
        model, bundles["generate"], ops=ops, trust=True, settings=settings
    ) as attachment:
        yield attachment


@pytest.fixture
def without_cache(
    model: Any, bundles: Mapping[str, Bundle], ops: list[str], settings: Settings
) -> Iterator[Attachment]:
    with hubaoti.attach(
        model, bundles["forward"], ops=ops, trust=True, settings=settings
    ) as attachment:
        yield attachment


def count_calls(attached: Attachment) -> dict[str, int]:
    """How many calls of the first block each graph answered, by the end of its name."""
    counts: dict[str, int] = attached.stats()["regions"]["model.layers.0"]["compiled"]
    assert attached.stats()["eager"] == 0
    return {name.removeprefix("model.layers").strip("-"): n for name, n in counts.items() if n}


def test_what_such_graphs_take_stands_in_their_manifest(bundles: Mapping[str, Bundle]) -> None:
    manifest = bundles["generate"].manifest
    assert [graph.masks or None for graph in manifest.graphs] == [None, "padded", None]
    assert manifest.schema == 4
    assert {check.graph for check in manifest.checks} == {graph.id for graph in manifest.graphs}


def test_a_prompt_is_answered_by_lengths_and_a_step_without(
    model: Any, plain: Any, over_cache: Attachment
) -> None:
    ids = torch.arange(5, 17).reshape(3, 4)
    found = model.generate(input_ids=ids, **STATIC)
    assert count_calls(over_cache) == {"padded": 1, "decode": NEW - 1}
    assert torch.equal(found, plain.generate(input_ids=ids, **STATIC))


def test_padded_texts_are_answered_by_where_they_begin(
    model: Any, plain: Any, over_cache: Attachment
) -> None:
    ids = torch.tensor([[0, 0, 0, 101, 7], [101, 8, 9, 10, 11], [0, 3, 4, 5, 6]])
    asked = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    found = model.generate(**asked, **STATIC)
    assert count_calls(over_cache) == {"padded": NEW}
    assert torch.equal(found, plain.generate(**asked, **STATIC))


def hide(*places: int, rows: int = 4, first: int = 0) -> torch.Tensor:
    """A mask over 16 places: causal from a first place on, without some."""
    row, place = torch.arange(rows)[:, None], torch.arange(16)
    seen = (place <= first + row)[None, None]
    seen[..., list(places)] = False
    return seen


ODD: dict[str, tuple[torch.Tensor, str]] = {
    "causal": (hide(), "padded"),
    "its first place": (hide(0), "padded"),
    "a hole": (hide(1), ""),
    "its last place": (hide(3), ""),
    "a window": (hide() & (torch.arange(16) > torch.arange(4)[:, None] - 2), ""),
    "what no row sees yet": (hide() | (torch.arange(16) < 4), ""),
    "one row for all": (hide(first=3)[:, :, :1], ""),
}


@pytest.mark.parametrize("case", ODD)
def test_a_mask_that_says_more_than_lengths_is_looked_at(
    case: str, model: Any, plain: Any, over_cache: Attachment
) -> None:
    mask, graph = ODD[case]
    answers = []
    for each in (model, plain):
        cache = StaticCache(config=each.config, max_cache_len=16)
        with torch.no_grad():
            given = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
            answers.append(each(torch.tensor([[5, 6, 7, 8]]), **given).logits)
    seen = mask[0, 0, :, :4].any(1).expand(4)
    torch.testing.assert_close(answers[0][:, seen], answers[1][:, seen], atol=1e-5, rtol=1e-5)
    assert count_calls(over_cache) == {graph: 1}


def test_where_all_graphs_are_told_lengths_a_mask_that_says_more_is_the_module_s(
    model: Any,
    plain: Any,
    bundles: Mapping[str, Bundle],
    ops: list[str],
    settings: Settings,
    tmp_path: Path,
) -> None:
    manifest = bundles["forward"].manifest
    told = tuple(graph for graph in manifest.graphs if graph.masks)
    shutil.copytree(bundles["forward"].path, tmp_path / "told")
    for graph in (each for each in manifest.graphs if not each.masks):
        (tmp_path / "told" / graph.file).unlink()
    write_manifest(tmp_path / "told", msgspec.structs.replace(manifest, graphs=told))
    words: dict[str, Any] = {"ops": ops, "trust": True, "settings": settings}
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "use_cache": False}
    odd = {**ids, "attention_mask": hide(1)[..., :4]}
    with torch.no_grad(), hubaoti.attach(model, tmp_path / "told", **words) as attached:
        model(**ids)
        assert attached.stats()["eager"] == 0
        with pytest.warns(Fallback, match="its mask says more than any graph of it is told"):
            assert torch.equal(model(**odd).logits, plain(**odd).logits)
        assert attached.stats()["regions"]["model.layers.0"]["eager"] == {"arguments": 1}
    with (
        torch.no_grad(),
        hubaoti.attach(model, tmp_path / "told", strict=True, **words),
        pytest.raises(NotServed, match="its mask says more than any graph of it is told"),
    ):
        model(**odd)


@pytest.mark.parametrize("case", ["asked", "not asked", "a hole"])
def test_a_step_that_is_captured_is_answered_by_lengths_where_its_mask_is_asked_before(
    case: str,
    model: Any,
    plain: Any,
    over_cache: Attachment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a replay computes it: over all places of the cache, of which none is known in Python."""
    ids = torch.tensor([[0, 0, 0, 101, 7], [101, 8, 9, 10, 11], [0, 3, 4, 5, 6]])
    start = (ids == 0).sum(1)
    place, filled = torch.arange(16), ids.shape[1]
    caches = [StaticCache(config=each.config, max_cache_len=16) for each in (model, plain)]
    with torch.no_grad():
        for each, cache in zip((model, plain), caches, strict=True):
            given = {"attention_mask": (ids != 0).long(), "past_key_values": cache}
            each(ids, position_ids=(torch.arange(5) - start[:, None]).clamp(min=0), **given)
    before = over_cache.stats()["regions"]["model.layers.0"]["compiled"].copy()
    for where in ("attachment.region", "runtime.kv_cache"):
        monkeypatch.setattr(f"hubaoti.{where}.is_capturing", lambda device: True)
    for step in range(3):
        count = filled + step
        seen = (place >= start[:, None]) & (place <= count)
        seen[1, 3] &= case != "a hole"
        mask, answers = seen[:, None, None], []
        for each, cache in zip((model, plain), caches, strict=True):
            counts = [layer.cumulative_length for layer in cache.layers]
            asked = case != "not asked" and read_step_mask(mask, counts) is Says.PADDED
            given = {"attention_mask": mask, "past_key_values": cache}
            given["position_ids"] = (count - start)[:, None]
            with torch.no_grad(), ExitStack() as around:
                around.enter_context(rehearse())
                if asked:
                    around.enter_context(tell(mask, show_unfilled(mask, counts[0])))
                answers.append(each(ids[:, :1] + step + 1, **given).logits)
        torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)
    after = over_cache.stats()["regions"]["model.layers.0"]["compiled"]
    counted = {name: n - before[name] for name, n in after.items() if n != before[name]}
    assert counted == {"model.layers-padded" if case == "asked" else "model.layers": 3}


def test_without_a_cache_a_causal_mask_is_not_looked_at_and_any_other_is(
    model: Any, plain: Any, without_cache: Attachment
) -> None:
    ids = torch.arange(5, 17).reshape(2, 6)
    padding = torch.ones_like(ids)
    padding[0, 4:] = 0
    for mask in (None, torch.ones_like(ids), padding):
        with torch.no_grad():
            ours, theirs = (
                each(ids, attention_mask=mask, use_cache=False).logits for each in (model, plain)
            )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert count_calls(without_cache) == {"causal": 2, "": 1}
