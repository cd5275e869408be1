"""Attach: a model keeps its face, answers by graphs where it can, and by itself where it cannot."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import linecache
import pickle
import shutil
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import msgspec
import pytest
import torch
from bundles import changed, put_trusted
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

import hubaoti
from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.misses import propose_dims, read_misses
from hubaoti.attachment.attach import (
    Attachment,
    Parts,
    attach_graphs,
    find_regions,
    refuse_attached,
)
from hubaoti.attachment.first_call import FirstCallCheck
from hubaoti.attachment.stats import Fallback
from hubaoti.errors import (
    AlreadyAttached,
    BadInput,
    BadManifest,
    BadRequest,
    DigestMismatch,
    MissingConstant,
    NotAttached,
    NotServed,
    OtherProgram,
)
from hubaoti.mirror import Artifact, Mirror
from hubaoti.program.output_capturing import FLAGS, find_unread_flags
from hubaoti.runtime.call_template import CallPlan
from hubaoti.runtime.fallback import ADVICE, CannotServe
from hubaoti.runtime.kv_cache import CacheState
from hubaoti.settings import Settings

GREEDY: dict[str, Any] = {
    "max_new_tokens": 20,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}
STATIC: dict[str, Any] = {**GREEDY, "cache_implementation": "static"}
PROMPTS = {
    "one text": [[5, 6, 7, 8]],
    "one token": [[9]],
    "three of one length": [[5, 6, 7], [8, 9, 10], [11, 12, 13]],
    "padded on the left": [[0, 0, 0, 101, 7], [101, 8, 9, 10, 11]],
}


@pytest.fixture
def model(tiny_decoder: Path) -> Any:
    """The decoder, anew for each test."""
    return AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()


@pytest.fixture
def attached(model: Any, decoder_bundle: Bundle, built_at: Settings) -> Iterator[Attachment]:
    """Graphs over the decoder's blocks."""
    with hubaoti.attach(model, decoder_bundle, settings=built_at) as attachment:
        yield attachment


@pytest.fixture
def plain(model: Any) -> Any:
    """The same decoder without graphs; it has to be asked for before `attached`."""
    return copy.deepcopy(model)


def prompt(case: str) -> dict[str, torch.Tensor]:
    ids = torch.tensor(PROMPTS[case])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def step(model: Any, ids: torch.Tensor | None = None, length: int = 32) -> torch.Tensor:
    """The logits of a prefill into a new static cache."""
    ids = torch.tensor([[5, 6, 7, 8]]) if ids is None else ids
    cache = StaticCache(config=model.config, max_cache_len=length)
    return model(ids, past_key_values=cache, use_cache=True).logits  # type: ignore[no-any-return]


# Generation


@pytest.mark.parametrize("case", PROMPTS)
def test_plain_generate_over_a_static_cache_is_answered_by_graphs(
    case: str, plain: Any, model: Any, attached: Attachment
) -> None:
    expected = plain.generate(**prompt(case), **STATIC)
    found = model.generate(**prompt(case), **STATIC)
    assert torch.equal(found, expected)
    stats = attached.stats()
    assert (stats["compiled"], stats["eager"]) == (40, 0)
    assert stats["regions"]["model.layers.1"] == {"compiled": {"model.layers": 20}, "eager": {}}


def test_graphs_of_a_transformers_with_another_word_for_the_cache_serve(
    plain: Any, model: Any, decoder_bundle: Bundle, settings: Settings, tmp_path: Path
) -> None:
    """As 5.24 writes them: what 5.23 calls `past_key_values` is `cache` there."""
    shutil.copytree(decoder_bundle.path, tmp_path / "newer")
    (graph,) = decoder_bundle.manifest.graphs
    kwargs = {
        ("cache" if k == "past_key_values" else k): v for k, v in graph.call["kwargs"].items()
    }
    assert kwargs != graph.call["kwargs"]
    newer = msgspec.structs.replace(graph, call={**graph.call, "kwargs": kwargs})
    bundle = changed(Bundle(tmp_path / "newer", decoder_bundle.manifest), graphs=(newer,))
    with hubaoti.attach(model, bundle, trust=True, settings=settings) as attachment:
        found = model.generate(**prompt("one text"), **STATIC)
        assert torch.equal(found, plain.generate(**prompt("one text"), **STATIC))
        assert (attachment.stats()["compiled"], attachment.stats()["eager"]) == (40, 0)


def test_an_attachment_says_in_a_line_what_it_is(model: Any, attached: Attachment) -> None:
    with torch.no_grad():
        step(model)
    artifact = attached.stats()["artifact"][:12]
    assert repr(attached) == (
        f"Attachment(LlamaForCausalLM, artifact {artifact}, 2 regions, 2 calls compiled, 0 eager)"
    )


def test_a_bundle_may_be_named_by_its_folder(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    with hubaoti.attach(model, decoder_bundle.path, settings=built_at) as attachment:
        model.generate(**prompt("one text"), **STATIC)
        assert attachment.stats()["compiled"] == 40


def test_a_folder_s_name_as_a_text_is_a_repo_s_and_says_so(
    model: Any, decoder_bundle: Bundle, built_at: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(decoder_bundle.path.parent.parent)  # where its name looks like a repo's
    with pytest.raises(BadRequest, match="names a repo of the Hub"):
        hubaoti.attach(model, "/".join(decoder_bundle.path.parts[-2:]), settings=built_at)
    monkeypatch.chdir(decoder_bundle.path.parent)
    with pytest.raises(BadRequest, match="names a repo of the Hub") as caught:
        hubaoti.attach(model, decoder_bundle.path.name, settings=built_at)
    assert f"give './{decoder_bundle.path.name}'" in caught.value.hint


def test_a_text_that_can_be_no_repo_s_name_is_a_folder(
    model: Any, decoder_bundle: Bundle, built_at: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = decoder_bundle.path
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for text in (f"./{folder.name}", f"../{folder.parent.name}/{folder.name}", str(folder)):
        hubaoti.attach(model, text, settings=built_at).detach()
    hubaoti.attach(model, f"~/{folder.name}", settings=built_at).detach()


def test_a_folder_that_is_no_bundle_is_refused_in_words(
    model: Any, tiny_decoder: Path, built_at: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_decoder.parent)
    here = f"./{tiny_decoder.name}"
    with pytest.raises(BadManifest, match="is not a bundle: it holds no hubaoti.json"):
        hubaoti.attach(model, here, settings=built_at)
    with pytest.raises(BadManifest, match="is not a bundle: it holds no hubaoti.json"):
        hubaoti.load(here, tiny_decoder, settings=built_at)
    with pytest.raises(BadManifest, match="there is no such folder"):
        hubaoti.attach(model, "~nobody-of-this-name/bundle", settings=built_at)


@pytest.mark.parametrize("wrong", [None, 5, b"acme/model"])
def test_what_is_no_artifact_is_refused_in_words(
    wrong: Any, model: Any, tiny_decoder: Path, built_at: Settings
) -> None:
    kind = type(wrong).__name__
    with pytest.raises(BadRequest, match=f"a {kind} is no artifact") as caught:
        hubaoti.attach(model, wrong, settings=built_at)
    assert "hubaoti.pull" in caught.value.hint and not [*find_regions(model)]
    with pytest.raises(BadRequest, match=f"a {kind} is no artifact") as caught:
        hubaoti.load(wrong, tiny_decoder, settings=built_at)
    assert "hubaoti.pull" in caught.value.hint


@pytest.mark.parametrize("wrong", [None, 5, "acme/model"])
def test_what_is_no_module_is_refused_in_words(
    wrong: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    verbs = (
        lambda: hubaoti.attach(wrong, decoder_bundle, settings=built_at),
        lambda: hubaoti.detach(wrong),
        lambda: hubaoti.spaces.load(wrong, "acme/model", settings=built_at),
    )
    for verb in verbs:
        with pytest.raises(BadRequest, match=f"a {type(wrong).__name__} is no module") as caught:
            verb()
        assert "torch.nn.Module" in caught.value.hint


@pytest.mark.parametrize("wrong", [None, 5])
def test_what_is_no_repo_is_refused_in_words(wrong: Any, model: Any, built_at: Settings) -> None:
    with pytest.raises(BadRequest, match=f"malformed repo: {wrong}"):
        hubaoti.spaces.load(model, wrong, settings=built_at)
    with pytest.raises(BadRequest, match="malformed revision: 5"):
        hubaoti.spaces.load(model, "acme/model", revision=5, settings=built_at)  # type: ignore[arg-type]


def test_sampling_and_beams_are_untouched(plain: Any, model: Any, attached: Attachment) -> None:
    for more in ({"do_sample": True, "top_k": 50}, {"num_beams": 2}):
        answers = []
        for each in (plain, model):
            torch.manual_seed(3)
            answers.append(each.generate(**prompt("padded on the left"), **{**STATIC, **more}))
        assert torch.equal(*answers)
    assert (attached.stats()["compiled"], attached.stats()["eager"]) == (80, 0)


def test_it_is_never_compiled_by_generate_itself(model: Any, attached: Attachment) -> None:
    """On a GPU `generate` compiles for static caches; this word makes a CPU do the same."""
    from transformers import CompileConfig

    compiles = CompileConfig(backend="eager")
    compiles._compile_all_devices = True
    model.generate(**prompt("one text"), **STATIC, compile_config=compiles)
    assert (attached.stats()["compiled"], attached.stats()["eager"]) == (40, 0)
    attached.detach()
    assert model._valid_auto_compile_criteria.__self__ is model


@torch.no_grad()
def test_what_a_cuda_graph_captures_before_it_was_called_is_the_modules_own(
    plain: Any, model: Any, attached: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    cache, other = (StaticCache(config=model.config, max_cache_len=32) for _ in range(2))
    model(ids, past_key_values=cache)
    attached.rebind()
    with monkeypatch.context() as fake:
        for room in ("runtime.kv_cache", "attachment.region"):
            fake.setattr(f"hubaoti.{room}.is_capturing", lambda device: True)
        with pytest.warns(Fallback, match=r"\(capture\)"):
            found = model(ids[:, :1], past_key_values=cache).logits
    plain(ids, past_key_values=other)
    torch.testing.assert_close(found, plain(ids[:, :1], past_key_values=other).logits)
    for layer in cache.layers:  # as a replay does, which nobody here sees
        layer.cumulative_length.fill_(4)
    for layer in other.layers:
        layer.cumulative_length.fill_(4)
    again = model(ids[:, 1:2], past_key_values=cache).logits
    torch.testing.assert_close(again, plain(ids[:, 1:2], past_key_values=other).logits)
    assert attached.stats()["regions"]["model.layers.0"] == {
        "compiled": {"model.layers": 2},
        "eager": {"capture": 1},
    }


def test_where_there_is_no_gpu_cuda_graphs_are_refused(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    with pytest.raises(BadRequest, match="no CUDA graphs"):
        hubaoti.attach(model, decoder_bundle, cuda_graphs=True, settings=built_at)
    assert "forward" not in vars(model)


def test_over_a_dynamic_cache_it_falls_back_and_says_what_to_do(
    plain: Any, model: Any, attached: Attachment
) -> None:
    with pytest.warns(Fallback, match=r'\(cache\).*cache_implementation="static"'):
        found = model.generate(**prompt("one text"), **GREEDY)
    assert torch.equal(found, plain.generate(**prompt("one text"), **GREEDY))
    assert attached.stats()["regions"]["model.layers.0"]["eager"] == {"cache": 20}


def test_what_to_do_about_a_cache_follows_from_what_the_graphs_have(
    model: Any, attached: Attachment, forward_bundle: Bundle, built_at: Settings
) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        with pytest.warns(Fallback, match=r"\(cache\)") as told:
            model(ids)
        assert "--task forward" in str(told[0].message)
        assert "use_cache=False" not in str(told[0].message)
        attached.detach()
        with hubaoti.attach(model, forward_bundle, settings=built_at) as other:
            with pytest.warns(Fallback, match=r"\(cache\).*without a cache: use_cache=False$"):
                model(ids)
            model(ids, use_cache=False)
            assert (other.stats()["compiled"], other.stats()["eager"]) == (2, 2)


def test_of_a_cache_that_is_too_short_a_longer_one_is_the_advice() -> None:
    held = CacheState(None, *[torch.zeros(1, 2, 8, 4)] * 2, 6, 3, False, None)
    with pytest.raises(CannotServe, match="8 places, 6 are filled") as why:
        held.require_room()
    assert "longer cache" in why.value.advice


def test_a_cache_that_outlives_a_call_goes_on(plain: Any, model: Any, attached: Attachment) -> None:
    """Prefill by graphs, a step by the module, and steps by graphs again."""
    ids = torch.tensor([[5, 6, 7, 8]])
    answers = []
    for each in (plain, model):
        cache = StaticCache(config=each.config, max_cache_len=32)
        with torch.no_grad():
            each(ids, past_key_values=cache)
            with warnings.catch_warnings(action="ignore"), torch.enable_grad():
                each(ids[:, :1], past_key_values=cache)
            answers.append(
                [each(ids[:, at : at + 1], past_key_values=cache).logits for at in (1, 2)]
            )
            cache.reset()
            answers[-1].append(each(ids, past_key_values=cache).logits)
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert attached.stats()["compiled"] == 8


# What stays


def test_the_model_keeps_its_face(plain: Any, model: Any, attached: Attachment) -> None:
    assert type(model) is type(plain)
    assert model.config.to_dict() == plain.config.to_dict()
    assert (model.dtype, model.device) == (plain.dtype, plain.device)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [*dict(model.named_modules())] == [*dict(plain.named_modules())]
    ours, theirs = (each.model.layers[0].forward for each in (model, plain))
    assert inspect.signature(ours) == inspect.signature(theirs)
    with torch.no_grad():
        step(model)
    assert attached.stats()["compiled"] == 2


def test_what_it_binds_is_the_model_s_own_memory(model: Any, attached: Attachment) -> None:
    graphs = 0
    for region in find_regions(model):
        own = {each.data_ptr() for each in region.inside.module.parameters()}
        for graph in region.graphs:
            bound = {each.data_ptr() for each in graph._bound.values()}
            assert bound and bound <= own
            graphs += 1
    assert graphs == 2


def test_a_copy_is_the_plain_model(plain: Any, model: Any, attached: Attachment) -> None:
    other = copy.deepcopy(model)
    assert not [*find_regions(other)]
    with torch.no_grad():
        assert torch.equal(step(other), step(plain))
        other.model.layers[0].mlp.down_proj.weight.zero_()
        assert not torch.equal(step(other), step(model))
    assert attached.stats()["compiled"] == 2


def test_hooks_on_a_region_run_around_its_graph(model: Any, attached: Attachment) -> None:
    seen = []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append("after"))
    model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append("before"))
    with torch.no_grad():
        step(model)
    assert seen == ["before", "after"]
    assert (attached.stats()["compiled"], attached.stats()["eager"]) == (2, 0)


def everything(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What each part of a model holds, by identity."""
    return {name: {**vars(part)} for name, part in model.named_modules()}


def test_detach_restores_exactly(model: Any, decoder_bundle: Bundle, built_at: Settings) -> None:
    before = everything(model)
    hubaoti.attach(model, decoder_bundle, settings=built_at)
    assert everything(model) != before
    hubaoti.detach(model)
    after = everything(model)
    assert after.keys() == before.keys()
    for name, held in before.items():
        assert after[name].keys() == held.keys()
        assert all(after[name][key] is value for key, value in held.items() if key != "training")


def test_a_forward_that_somebody_gave_a_block_comes_back(
    model: Any, plain: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    block = model.model.layers[0]
    own = block.forward = block.forward
    hubaoti.attach(model, decoder_bundle, settings=built_at)
    with torch.no_grad():
        torch.testing.assert_close(step(model), step(plain), atol=1e-4, rtol=1e-4)
    assert not [*find_regions(copy.deepcopy(model))]
    hubaoti.detach(model)
    assert vars(block)["forward"] is own


def test_a_forward_that_somebody_put_over_ours_stays_and_calls_the_module(
    model: Any, plain: Any, attached: Attachment
) -> None:
    block = model.model.layers[0]
    ours = block.forward
    block.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with torch.no_grad():
        step(model)
    assert attached.stats()["compiled"] == 2
    attached.detach()
    assert "forward" in vars(block)
    with torch.no_grad():
        assert torch.equal(step(model), step(plain))


def test_a_model_that_nobody_has_any_more_is_gone_at_once(
    tiny_decoder: Path, decoder_bundle: Bundle, built_at: Settings
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    attachment = hubaoti.attach(model, decoder_bundle, settings=built_at)
    with torch.no_grad():
        step(model)
    assert attachment.stats()["compiled"] == 2
    del attachment
    gone = weakref.ref(model.model.layers[0].mlp.down_proj.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# Whom it is attached to


def test_a_model_is_attached_once(
    model: Any, attached: Attachment, decoder_bundle: Bundle, built_at: Settings
) -> None:
    with pytest.raises(AlreadyAttached, match=r"LlamaForCausalLM .* already, at model\.layers\.0"):
        hubaoti.attach(model, decoder_bundle, settings=built_at)
    with pytest.raises(AlreadyAttached):
        hubaoti.attach(model.model, decoder_bundle, settings=built_at)


def test_what_was_not_attached_is_not_detached(model: Any) -> None:
    with pytest.raises(NotAttached, match="LlamaForCausalLM has no graphs"):
        hubaoti.detach(model)


def test_another_config_is_refused_with_both_values(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    model.config.rms_norm_eps = 1e-3
    with pytest.raises(OtherProgram, match="rms_norm_eps is 0.001, the program's is 1e-06"):
        hubaoti.attach(model, decoder_bundle, settings=built_at)
    assert not [*find_regions(model)]


def test_what_counts_for_no_program_may_differ(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    model.config.use_cache = False
    model.config.bos_token_id = 17
    model.config._name_or_path = "somebody/fine-tuned-it"
    hubaoti.attach(model, decoder_bundle, settings=built_at).detach()


def test_constants_that_do_not_fit_are_all_named_and_nothing_is_touched(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(32, 63))
    layers[1].input_layernorm.double()
    del layers[0].self_attn.k_proj.weight
    before = everything(model)
    with pytest.raises(MissingConstant) as why:
        hubaoti.attach(model, decoder_bundle, settings=built_at)
    told = str(why.value)
    assert (
        "model.layers.0: self_attn.k_proj.weight is not there; expected is float32 [16, 32]" in told
    )
    assert "model.layers.1: mlp.down_proj.weight is torch.float32 [32, 63]" in told
    assert "model.layers.1: input_layernorm.weight is torch.float64 [32]" in told
    assert everything(model) == before


def test_a_model_in_another_dtype_is_told_so_once(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    with pytest.raises(MissingConstant) as why:
        hubaoti.attach(model.bfloat16(), decoder_bundle, settings=built_at)
    assert str(why.value) == (
        "LlamaForCausalLM has weights in bfloat16, the graphs have float32: 18 tensors, which fit "
        "otherwise"
    )
    assert "dtype=torch.float32; or compile it with --dtype bfloat16" in why.value.hint


def test_the_body_of_a_model_is_told_to_be_a_part_of_it(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    with pytest.raises(MissingConstant) as why:
        hubaoti.attach(model.model, decoder_bundle, settings=built_at)
    assert str(why.value) == (
        "LlamaModel is a part of the model that was compiled, a LlamaForCausalLM: it is model "
        "there, and model.layers.0 is layers.0 here"
    )
    assert "to the whole model" in why.value.hint


def test_of_many_tensors_that_do_not_fit_the_first_are_named(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    for part in model.model.layers[1].modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(MissingConstant, match=r"(?m)and 4 more$") as why:
        hubaoti.attach(model, decoder_bundle, settings=built_at)
    assert str(why.value).count("torch.float32 [3, 5]") == 3


def test_a_model_without_weights_is_refused(decoder_bundle: Bundle, built_at: Settings) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(decoder_bundle))
    with pytest.raises(MissingConstant, match=r"has no values: it is offloaded"):
        hubaoti.attach(model, decoder_bundle, settings=built_at)


def config_of(bundle: Bundle) -> Any:
    """The config of a bundle's program."""
    from transformers import AutoConfig

    config = {**bundle.manifest.program.config}
    return AutoConfig.for_model(config.pop("model_type"), **config)


def test_an_artifact_that_answers_texts_is_not_attached(
    model: Any, roberta_bundle: Bundle, built_at: Settings, tiny_roberta: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    texts = AutoModelForSequenceClassification.from_pretrained(tiny_roberta).eval()
    with pytest.raises(BadRequest, match="answers texts"):
        hubaoti.attach(texts, roberta_bundle, settings=built_at)


def test_graphs_that_serve_no_module_are_refused(decoder_bundle: Bundle, model: Any) -> None:
    manifest = decoder_bundle.manifest
    idle = tuple(msgspec.structs.replace(graph, modules=()) for graph in manifest.graphs)
    changed = msgspec.structs.replace(manifest, graphs=idle)
    parts = Parts(changed, decoder_bundle.path, lambda entry: decoder_bundle.path)
    with pytest.raises(BadRequest, match=r"graphs model\.layers serve no module"):
        attach_graphs(model, parts, strict=False, tries=False)
    assert not [*find_regions(model)]


def test_switched_off_it_touches_nothing(
    plain: Any, model: Any, decoder_bundle: Bundle, tmp_path: Path
) -> None:
    for name, value in (("AOTI_DISABLED", "1"), ("ENABLE_AOTI_COMPILATION", "0")):
        off = Settings.from_env({"HUBAOTI_HOME": str(tmp_path), name: value})
        before = everything(model)
        attachment = hubaoti.attach(model, decoder_bundle, settings=off)
        assert attachment.regions == ()
        assert everything(model) == before
        found = model.generate(**prompt("one text"), **STATIC)
        assert torch.equal(found, plain.generate(**prompt("one text"), **STATIC))


# Falling back


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Watched(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Named(torch.Tensor):
    pass


class Adapter(nn.Module):
    """A layer with two small matrices beside it, as peft puts them."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged = False
        self.more = nn.Parameter(torch.full_like(base_layer.weight, 0.02))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        extra = 0.0 if self.merged else x @ self.more.T
        return self.base_layer(x) + extra  # type: ignore[no-any-return]

    def merge(self) -> None:
        with torch.no_grad():
            self.base_layer.weight += self.more
        self.merged = True

    def unmerge(self) -> None:
        with torch.no_grad():
            self.base_layer.weight -= self.more
        self.merged = False


def trained(model: Any) -> Any:
    model.model.layers[0].mlp.train()


def hooked(model: Any) -> Any:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def patched(model: Any) -> Any:
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 2 * forward(x)


def swapped(model: Any) -> Any:
    model.model.layers[0].mlp.act_fn = nn.Tanh().eval()


def adapted(model: Any) -> Any:
    mlp = model.model.layers[0].mlp
    mlp.down_proj = Adapter(mlp.down_proj).eval()


def misfit(model: Any) -> Any:
    proj = model.model.layers[0].mlp.down_proj
    proj.weight = nn.Parameter((2 * proj.weight).T.contiguous().T)


def subclass(model: Any) -> Any:
    proj = model.model.layers[0].self_attn.q_proj
    proj.weight = nn.Parameter((2 * proj.weight).detach().as_subclass(Named))


def transposed(model: Any) -> Any:
    """In place: the tensor, and where it lies, stay the same."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.t()


def scaled(model: Any) -> Any:
    model.model.layers[0].self_attn.scaling *= 3


def emended(model: Any) -> Any:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def reclassed(model: Any) -> Any:
    block = model.model.layers[0]
    own = type(block).forward
    forward = lambda self, x, *args, **kwargs: 2 * own(self, x, *args, **kwargs)  # noqa: E731
    block.__class__ = type("Other", (type(block),), {"forward": forward})


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a part in train mode": (trained, "training"),
    "a hook inside": (hooked, "hooks"),
    "a forward inside": (patched, "changed"),
    "another part": (swapped, "changed"),
    "an adapter": (adapted, "adapters"),
    "a weight that lies otherwise": (misfit, "weights"),
    "a weight that is a subclass": (subclass, "weights"),
    "a number": (scaled, "changed"),
    "a number within": (emended, "changed"),
    "another class": (reclassed, "changed"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_block_that_was_changed_answers_itself(
    case: str, plain: Any, model: Any, attached: Attachment
) -> None:
    change, reason = CHANGES[case]
    change(plain)
    change(model)
    with torch.no_grad():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = step(model)
        assert f"model.layers.0 was not answered by a graph ({reason})" in str(said[0].message)
        torch.testing.assert_close(found, step(plain), atol=1e-4, rtol=1e-4)
    stats = attached.stats()["regions"]
    assert stats["model.layers.0"]["eager"] == {reason: 1}
    if reason != "weights":  # of a subclass comes a subclass
        assert stats["model.layers.1"]["eager"] == {}


@contextmanager
def hooks_everywhere() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


MODES: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "gradients": (torch.enable_grad, "gradients"),
    "a dispatch mode": (Watching, "modes"),
    "a function mode": (Watched, "modes"),
    "forward gradients": (torch.autograd.forward_ad.dual_level, "transforms"),
    "hooks on all modules": (hooks_everywhere, "hooks"),
}


@pytest.mark.parametrize("case", MODES)
def test_what_torch_does_around_a_call_is_left_to_the_module(
    case: str, plain: Any, model: Any, attached: Attachment
) -> None:
    mode, reason = MODES[case]
    with torch.no_grad():
        step(model)  # so that the call is one that was examined before
        with mode():
            with pytest.warns(Fallback, match=rf"\({reason}\)"):
                found = step(model)
            assert torch.equal(found, step(plain))
        step(model)
    stats = attached.stats()
    assert (stats["compiled"], stats["eager"]) == (4, 2)
    assert stats["regions"]["model.layers.1"]["eager"] == {reason: 1}


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("cpu"), nullcontext])
def test_what_changes_no_operation_is_no_reason(
    mode: Callable[[], AbstractContextManager[Any]], plain: Any, model: Any, attached: Attachment
) -> None:
    with torch.no_grad(), mode():
        torch.testing.assert_close(step(model), step(plain), atol=1e-4, rtol=1e-4)
    assert (attached.stats()["compiled"], attached.stats()["eager"]) == (2, 0)


def test_autocast_is_left_to_the_module(plain: Any, model: Any, attached: Attachment) -> None:
    """Which fails as it always does: over a static cache transformers' keys are of two dtypes."""
    for each in (plain, model):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fails = pytest.raises(RuntimeError, match="same dtype")
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), fails:
                step(each)
    assert "(autocast)" in str(told[0].message)


def test_train_mode_of_the_whole_model(plain: Any, model: Any, attached: Attachment) -> None:
    with torch.no_grad(), pytest.warns(Fallback, match=r"\(training\).*model\.eval"):
        step(model.train())
    assert attached.stats()["eager"] == 2
    with torch.no_grad():
        step(model.eval())
    assert attached.stats()["compiled"] == 2


def test_under_torch_func_the_module_answers(plain: Any, model: Any, attached: Attachment) -> None:
    block, rotary = model.model.layers[0], model.model.rotary_emb

    def called(hidden: torch.Tensor, by: Any) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=16)
        tables = rotary(hidden, torch.arange(3)[None])
        mask = torch.ones(1, 1, 3, 16, dtype=torch.bool).tril()
        return by(  # type: ignore[no-any-return]
            hidden, attention_mask=mask, position_embeddings=tables,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip

    hidden = torch.randn(2, 1, 3, 32)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        found = torch.func.vmap(lambda h: block.mlp(h))(hidden)
        assert torch.equal(found, torch.func.vmap(plain.model.layers[0].mlp)(hidden))
        called(hidden[0], block)
        try:
            torch.func.vmap(lambda h: called(h, block))(hidden)
        except RuntimeError as why:  # the cache itself cannot be written to under vmap
            assert "vmap" in str(why)
    assert attached.stats()["regions"]["model.layers.0"]["eager"] == {"transforms": 1}


def test_out_of_bounds_is_answered_counted_and_its_sizes_are_kept(
    plain: Any, model: Any, attached: Attachment, tmp_path: Path
) -> None:
    ids = torch.arange(3, 3 + 5 * 2).view(5, 2)
    with torch.no_grad():
        with pytest.warns(Fallback, match=r"batch is 5; graph model\.layers takes 1 to 4") as told:
            found = [step(model, ids), step(model, ids)]
        assert torch.equal(found[0], step(plain, ids))
        step(model, ids[:3])
    assert len(told) == 1
    assert attached.stats()["missed"] == [
        {
            "region": "model.layers.0",
            "regions": 2,
            "reason": "shape",
            "sizes": {"batch": 5, "seq": 2, "filled": 2, "cache": 32},
            "calls": 4,
        }
    ]
    attached.save_misses(tmp_path / "misses.json")
    saved = json.loads((tmp_path / "misses.json").read_text())
    assert saved["missed"] == attached.stats()["missed"]
    assert saved["build"]["dims"]["batch"] == [1, 4, 1]


def test_the_steps_of_a_decoder_are_missed_once_however_many_there_are(
    model: Any, attached: Attachment, tmp_path: Path
) -> None:
    ids = torch.full((5, 3), 7)
    with pytest.warns(Fallback, match="batch is 5"):
        model.generate(ids, attention_mask=torch.ones_like(ids), **STATIC)
    rows = {row["sizes"]["seq"]: row for row in attached.stats()["missed"]}
    assert (len(attached.stats()["missed"]), rows[3]["calls"], rows[1]["calls"]) == (2, 2, 38)
    assert (rows[3]["sizes"]["filled"], rows[1]["sizes"]["filled"]) == (3, 22)
    attached.save_misses(tmp_path / "misses.json")
    proposed = propose_dims(read_misses(tmp_path / "misses.json"))
    assert proposed is not None and proposed.dims["batch"] == (1, 5, 1)


def test_another_dtype_is_answered_by_the_module(
    plain: Any, model: Any, attached: Attachment
) -> None:
    plain.double()
    with torch.no_grad(), pytest.warns(Fallback, match=r"\(weights\).*float64") as told:
        assert torch.equal(step(model.double()), step(plain))
    assert "9 tensors" in str(told[0].message) and "model.to(torch.float32)" in str(told[0].message)
    assert "rebind" not in str(told[0].message)
    with torch.no_grad():
        torch.testing.assert_close(step(model.float()), step(plain.float()), atol=1e-4, rtol=1e-4)
    assert attached.stats()["compiled"] == 2


def test_a_cache_that_shares_its_memory_is_left_to_the_module(
    model: Any, attached: Attachment
) -> None:
    cache = StaticCache(config=model.config, max_cache_len=32)
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    layer: Any = cache.layers[0]
    layer.values = layer.keys
    with torch.no_grad(), pytest.warns(Fallback, match=r"\(overlap\)"):
        model(torch.tensor([[5, 6]]), past_key_values=cache)
    assert attached.stats()["regions"]["model.layers.1"]["eager"] == {}


def test_a_cache_that_is_a_view_is_left_to_the_module(model: Any, attached: Attachment) -> None:
    cache = StaticCache(config=model.config, max_cache_len=32)
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    layer: Any = cache.layers[0]
    layer.keys = torch.zeros(1, 2, 64, 8)[:, :, :32]
    with torch.no_grad(), pytest.warns(Fallback, match=r"\(layout\)"):
        model(torch.tensor([[5, 6]]), past_key_values=cache)


class Recording(StaticCache):
    calls = 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().update(*args, **kwargs)


def test_a_cache_with_an_update_of_its_own_is_left_to_the_module(
    plain: Any, model: Any, attached: Attachment
) -> None:
    ids = torch.tensor([[5, 6, 7]])
    recording = Recording(config=model.config, max_cache_len=32)
    with torch.no_grad(), pytest.warns(Fallback, match=r"\(cache\): the cache, a Recording"):
        model(ids, past_key_values=recording)
    assert recording.calls == len(model.model.layers)
    cache = StaticCache(config=model.config, max_cache_len=32)
    layer: Any = cache.layers[0]
    layer.update = layer.update
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert attached.stats()["regions"]["model.layers.0"]["eager"] == {"cache": 2}


def test_a_square_weight_that_is_transposed_where_it_lies_is_noticed(
    plain: Any, model: Any, attached: Attachment
) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.shape[0] == weight.shape[1]
    with torch.no_grad():
        step(model)
    transposed(plain)
    transposed(model)
    with torch.no_grad(), pytest.warns(Fallback, match=r"\(weights\)"):
        torch.testing.assert_close(step(model), step(plain), atol=1e-4, rtol=1e-4)


def test_a_forward_that_is_put_on_a_class_is_noticed(
    plain: Any, model: Any, attached: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(model.model.layers[0].mlp)
    own = kind.forward
    with torch.no_grad():
        step(model)
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * own(self, x))
    with torch.no_grad(), pytest.warns(Fallback, match=r"\(changed\): the forward of"):
        torch.testing.assert_close(step(model), step(plain), atol=1e-4, rtol=1e-4)


def test_strict_raises_and_says_why(model: Any, decoder_bundle: Bundle, built_at: Settings) -> None:
    with hubaoti.attach(model, decoder_bundle, strict=True, settings=built_at) as attachment:
        with (
            torch.no_grad(),
            pytest.raises(NotServed, match=r"model\.layers\.0 .*\(shape\)") as why,
        ):
            step(model, torch.ones(5, 2, dtype=torch.long))
        assert "--from-misses" in why.value.hint
        with pytest.raises(NotServed, match=r"\(gradients\)"):
            step(model)
        assert attachment.stats()["eager"] == 2


def test_it_is_warned_of_once_for_each_reason(model: Any, attached: Attachment) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            step(model)
        with torch.no_grad():
            step(model, torch.ones(5, 2, dtype=torch.long))
    assert [each.category for each in told] == [Fallback, Fallback]
    assert ADVICE["gradients"] in str(told[0].message)


def test_a_warning_points_at_whoever_called_the_model(model: Any, attached: Attachment) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7]]))  # of the reason "cache", called without one
        model.train().generate(**prompt("one text"), **STATIC)
    assert [each.filename for each in told] == [__file__, __file__]
    assert "model(torch.tensor" in linecache.getline(__file__, told[0].lineno)
    assert "model.train().generate" in linecache.getline(__file__, told[1].lineno)


def test_torch_compile_sees_the_module_itself(plain: Any, model: Any, attached: Attachment) -> None:
    def logits(model: Any) -> torch.Tensor:
        found = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="eager",
                              fullgraph=True)(torch.tensor([[5, 6, 7]]))  # fmt: skip
        return found  # type: ignore[no-any-return]

    with torch.no_grad(), pytest.warns(Fallback, match=r"\(tracing\)"):
        found = logits(model)
    with torch.no_grad():
        torch.testing.assert_close(found, logits(plain))
    assert attached.stats()["regions"]["model.layers.0"]["eager"] == {"tracing": 1}


def test_export_sees_the_module_itself(plain: Any, model: Any, attached: Attachment) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        torch.testing.assert_close(program.module()(ids, use_cache=False).logits,
                                   plain(ids, use_cache=False).logits)  # fmt: skip
    assert attached.stats()["compiled"] == 0
    assert attached.stats()["regions"]["model.layers.0"]["eager"] == {"tracing": 1}


# Other weights


def moved_away(model: Any) -> None:
    model.to(torch.float64).to(torch.float32)


def other_data(model: Any) -> None:
    for each in model.model.layers.parameters():
        each.data = each.data * 1.5


def replaced(model: Any) -> None:
    for block in model.model.layers:
        block.mlp.down_proj.weight = nn.Parameter(block.mlp.down_proj.weight * 1.5)


def in_place(model: Any) -> None:
    model.load_state_dict({name: each * 1.5 for name, each in model.state_dict().items()})


def assigned(model: Any) -> None:
    state = {name: each * 1.5 for name, each in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [moved_away, other_data, replaced, in_place, assigned])
def test_other_weights_are_noticed_at_the_next_call(
    change: Callable[[Any], None], plain: Any, model: Any, attached: Attachment
) -> None:
    with torch.no_grad():
        step(model)
        change(plain)
        change(model)
        torch.testing.assert_close(step(model), step(plain), atol=1e-4, rtol=1e-4)
    assert (attached.stats()["compiled"], attached.stats()["eager"]) == (4, 0)


def test_rebind_says_at_once_whether_weights_fit(model: Any, attached: Attachment) -> None:
    replaced(model)
    attached.rebind()
    misfit(model)
    with pytest.raises(MissingConstant, match=r"1 regions .*model\.layers\.0: mlp\.down_proj"):
        attached.rebind()


def test_an_adapter_is_served_while_it_is_merged(
    plain: Any, model: Any, attached: Attachment
) -> None:
    adapters = []
    for each in (plain, model):
        adapted(each)
        adapters.append(each.model.layers[0].mlp.down_proj)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        for change in ("merge", "unmerge", "merge"):
            for adapter in adapters:
                getattr(adapter, change)()
            torch.testing.assert_close(step(model), step(plain), atol=1e-4, rtol=1e-4)
        for each in (plain, model):  # as `merge_and_unload` does
            mlp = each.model.layers[0].mlp
            mlp.down_proj = mlp.down_proj.base_layer
        torch.testing.assert_close(step(model), step(plain), atol=1e-4, rtol=1e-4)
    counts = attached.stats()["regions"]["model.layers.0"]
    assert counts == {"compiled": {"model.layers": 3}, "eager": {"adapters": 1}}


# What a call asks for beside its answer


def ask(model: Any, **flags: Any) -> Any:
    """The answer to a prefill into a new static cache, with all that is asked for beside it."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **flags)


@pytest.mark.parametrize("layers", [True, [1]])
def test_hidden_states_of_blocks_are_collected_around_their_graphs(
    layers: Any, plain: Any, model: Any, attached: Attachment
) -> None:
    expected = ask(plain, output_hidden_states=layers).hidden_states
    found = ask(model, output_hidden_states=layers).hidden_states
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for _ in range(2):
        ask(model)
    assert (attached.stats()["compiled"], attached.stats()["eager"]) == (6, 0)


def test_what_only_the_module_has_is_collected_by_it_and_no_later_call_is(
    plain: Any, model: Any, attached: Attachment
) -> None:
    for each in (plain, model):
        each.set_attn_implementation("eager")
    with warnings.catch_warnings(action="ignore", category=Fallback):
        expected = ask(plain, output_attentions=True)
        found = ask(model, output_attentions=True)
    assert len(found.attentions) == 2
    torch.testing.assert_close(found.attentions, expected.attentions, atol=1e-4, rtol=1e-4)
    for each in (plain, model):
        each.set_attn_implementation("sdpa")
    torch.testing.assert_close(ask(model).logits, ask(plain).logits, atol=1e-4, rtol=1e-4)
    counts = attached.stats()["regions"]["model.layers.1"]
    assert counts == {"compiled": {"model.layers": 1}, "eager": {"outputs": 1}}


def test_a_model_that_collected_before_is_attached_and_served(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    ask(model, output_hidden_states=True)
    with hubaoti.attach(model, decoder_bundle, strict=True, settings=built_at) as attachment:
        ask(model)
        assert attachment.stats()["compiled"] == 2


def test_a_hook_inside_ends_serving_until_it_is_removed(
    plain: Any, model: Any, attached: Attachment
) -> None:
    ask(model, output_hidden_states=True)  # so that transformers' own are there, too
    attention = model.model.layers[0].self_attn
    with warnings.catch_warnings(action="ignore", category=Fallback):
        for register in (attention.register_forward_hook, attention.register_forward_pre_hook):
            heard: list[Any] = []
            handle = register(lambda *_, heard=heard: heard.append(None))
            ask(model)
            handle.remove()
            torch.testing.assert_close(ask(model).logits, ask(plain).logits, atol=1e-4, rtol=1e-4)
            assert len(heard) == 1
    counts = attached.stats()["regions"]["model.layers.0"]
    assert counts == {"compiled": {"model.layers": 3}, "eager": {"hooks": 2}}


def test_a_flag_that_a_block_reads_is_no_word_beside_its_answer(model: Any) -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor, output_attentions: bool = False) -> torch.Tensor:
            return x + output_attentions

    class LookedUp(nn.Module):
        def forward(self, x: torch.Tensor, **more: Any) -> torch.Tensor:
            return x + more.get("output_router_logits", 0)

    block = model.model.layers[0]
    assert find_unread_flags(block) == {*FLAGS}
    block.mlp = Named()
    assert find_unread_flags(block) == {*FLAGS} - {"output_attentions"}
    block.mlp = LookedUp()
    assert find_unread_flags(block) == {*FLAGS} - {"output_router_logits"}
    assert not find_unread_flags(model.model)  # it answers otherwise where one is given


def test_many_threads_get_their_own_answers(plain: Any, model: Any, attached: Attachment) -> None:
    prompts = [torch.arange(3 + n, 9 + 2 * n)[None] for n in range(6)]
    with torch.no_grad():
        expected = [step(plain, ids) for ids in prompts]
    wrong: list[int] = []

    def ask(at: int) -> None:
        for _ in range(5):
            with torch.no_grad():
                if not torch.allclose(step(model, prompts[at]), expected[at], atol=1e-4):
                    wrong.append(at)

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(prompts))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
    assert attached.stats()["compiled"] == 2 * 5 * len(prompts)


@pytest.fixture
def stored(decoder_bundle: Bundle, tmp_path: Path) -> tuple[Artifact, Settings]:
    """The decoder's artifact in a mirror of its own."""
    settings = Settings(home=tmp_path / "home", endpoint="http://127.0.0.1:9")
    with Mirror.open(settings.mirror) as mirror:
        return put_trusted(decoder_bundle, mirror), settings


def library_of(artifact: Artifact) -> Path:
    """The native library of an artifact's first graph."""
    folder = artifact.graph_folder(artifact.manifest.graphs[0])
    return next(folder.rglob("*.wrapper.so"))


def test_a_graph_that_is_removed_or_changed_while_it_is_open_answers_on(
    stored: tuple[Artifact, Settings], plain: Any, model: Any
) -> None:
    artifact, settings = stored
    library = library_of(artifact)
    with (
        hubaoti.attach(model, artifact, trust=True, settings=settings) as attachment,
        torch.no_grad(),
    ):
        shutil.move(library, library.with_suffix(".old"))
        library.write_bytes(b"no library")
        torch.testing.assert_close(step(model), step(plain), atol=1e-4, rtol=1e-4)
        shutil.rmtree(artifact.graphs)
        torch.testing.assert_close(step(model), step(plain), atol=1e-4, rtol=1e-4)
        assert (attachment.stats()["compiled"], attachment.stats()["eager"]) == (4, 0)


def test_an_artifact_that_was_changed_is_not_opened(
    stored: tuple[Artifact, Settings], model: Any
) -> None:
    artifact, settings = stored
    library = library_of(artifact)
    library.write_bytes(library.read_bytes()[:-1] + b"x")
    with pytest.raises(DigestMismatch):
        hubaoti.attach(model, artifact, trust=True, settings=settings)
    assert not [*find_regions(model)]


@pytest.mark.parametrize("how", ["train", "hook"])
def test_what_could_not_be_bound_at_attach_is_bound_at_its_first_call(
    how: str, plain: Any, model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    model.train(how == "train")
    with hubaoti.attach(model, decoder_bundle, settings=built_at) as attachment:
        handle.remove()
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(step(model), step(plain), atol=1e-4, rtol=1e-4)
        assert attachment.stats()["compiled"] == 2


def biased(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.ones(32))


def grown(model: Any) -> None:
    model.model.layers[0].mlp.more = nn.Linear(2, 2).eval()


def of_another_class(model: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model.model.layers[0].mlp.down_proj.__class__ = Doubled


def steered(model: Any) -> None:
    block = model.model.layers[0]
    forward = type(block).forward
    block.forward = lambda *args, **kwargs: forward(block, *args, **kwargs) + 1


@pytest.mark.parametrize("change", [biased, grown, of_another_class])
def test_what_no_graph_reads_is_noticed_too(
    change: Callable[[Any], None], plain: Any, model: Any, attached: Attachment
) -> None:
    with torch.no_grad(), warnings.catch_warnings(action="ignore", category=Fallback):
        step(model)
        change(plain)
        change(model)
        for _ in range(2):
            torch.testing.assert_close(step(model), step(plain), atol=1e-4, rtol=1e-4)
    counts = attached.stats()["regions"]
    assert counts["model.layers.0"] == {"compiled": {"model.layers": 1}, "eager": {"changed": 2}}
    assert counts["model.layers.1"] == {"compiled": {"model.layers": 3}, "eager": {}}


# Of a model whose code was patched, the first call of each graph is the module's own.
PATCHES: dict[str, tuple[Callable[[Any], None], dict[str, int], int]] = {
    "a bias": (biased, {"differs": 1}, 2),
    "a forward": (steered, {"changed": 2}, 1),
}


@pytest.mark.parametrize("case", PATCHES)
def test_what_the_config_does_not_tell_of_is_tried_or_left_to_the_module(
    case: str, plain: Any, model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    change, eager, compiled = PATCHES[case]
    change(plain)
    change(model)
    quiet = warnings.catch_warnings(action="ignore", category=Fallback)
    with hubaoti.attach(model, decoder_bundle, settings=built_at) as found, torch.no_grad(), quiet:
        for _ in range(2):
            torch.testing.assert_close(step(model), step(plain), atol=1e-4, rtol=1e-4)
        counts = found.stats()["regions"]
    first = {"compiled": {"model.layers": 0}, "eager": eager}
    second = {"compiled": {"model.layers": compiled}, "eager": {}}
    tried = first if "differs" in eager else second
    tried["compared"] = {"model.layers": 1}
    assert (counts["model.layers.0"], counts["model.layers.1"]) == (first, second)


def test_a_disabled_adapter_is_not_served(plain: Any, model: Any, attached: Attachment) -> None:
    for each in (plain, model):
        adapted(each)
        each.model.layers[0].mlp.down_proj.merge()
    with torch.no_grad(), warnings.catch_warnings(action="ignore", category=Fallback):
        step(model)
        model.model.layers[0].mlp.down_proj.disable_adapters = True
        step(model)
    assert attached.stats()["regions"]["model.layers.0"]["eager"] == {"adapters": 1}


def test_a_copied_cache_is_counted_by_itself(plain: Any, model: Any, attached: Attachment) -> None:
    answers = []
    for each in (plain, model):
        cache = StaticCache(config=each.config, max_cache_len=32)
        with torch.no_grad():
            each(torch.tensor([[5, 6, 7, 8]]), past_key_values=cache)
            cache = copy.deepcopy(cache)
            steps = [each(torch.tensor([[at]]), past_key_values=cache).logits for at in (3, 4, 5)]
            for layer in cache.layers:
                layer.cumulative_length.data.sub_(2)
            answers.append([*steps, each(torch.tensor([[9]]), past_key_values=cache).logits])
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (attached.stats()["compiled"], attached.stats()["eager"]) == (10, 0)


def test_a_cache_of_more_rows_than_the_call_is_not_filled_by_guessing(
    model: Any, attached: Attachment
) -> None:
    cache = StaticCache(config=model.config, max_cache_len=32)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), pytest.raises(RuntimeError):
        model(torch.tensor([[5, 6]]), past_key_values=cache)
    assert attached.stats()["compiled"] == 0
    assert attached.stats()["regions"]["model.layers.0"]["eager"] == {"shape": 1}


def test_detach_goes_on_where_a_part_is_gone(model: Any, attached: Attachment) -> None:
    with torch.no_grad():
        step(model)
    assert attached.stats()["compiled"] == 2
    model.model.layers = nn.ModuleList([model.model.layers[1]])
    attached.detach()
    assert not [*find_regions(model)]
    assert not any("forward" in vars(each) for each in model.modules())


def test_detach_finds_what_somebody_wrapped(model: Any, attached: Attachment) -> None:
    for block in model.model.layers:
        ours = block.forward
        block.forward = lambda *args, ours=ours, **kwargs: ours(*args, **kwargs)
    with pytest.raises(AlreadyAttached):
        refuse_attached(model)
    with torch.no_grad():
        step(model)
        assert attached.stats()["compiled"] == 2
        hubaoti.detach(model)
        step(model)
    assert (attached.stats()["compiled"], attached.stats()["eager"]) == (2, 0)


def test_weights_that_do_not_fit_any_more_are_let_go(model: Any, attached: Attachment) -> None:
    gone = [weakref.ref(each) for each in model.model.layers.parameters()]
    with torch.no_grad(), warnings.catch_warnings(action="ignore", category=Fallback):
        step(model)
        model.double()
        step(model)
    for region in find_regions(model):
        assert not any(graph._bound for graph in region.graphs)
    assert len(gone) == 18


# A window, and blocks without a cache

WINDOW = 12


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A decoder whose blocks look back twelve places."""
    config = MistralConfig(
        architectures=["MistralForCausalLM"],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=128,
        sliding_window=WINDOW,
    )
    torch.manual_seed(5)
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for each in model.parameters():
            each += 0.2 * torch.randn(each.shape)
    model.save_pretrained(tmp_path_factory.mktemp("windowed") / "model")
    return model


@pytest.fixture(scope="module")
def windowed_bundle(
    windowed: Any, built_at: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """A graph for a window that fills, and one for a window that is full.

    The cache that is asked for begins above the window, which has its own places all the same.
    """
    folder = tmp_path_factory.mktemp("windowed") / "config"
    windowed.config.save_pretrained(folder)
    return hubaoti.compile(
        folder,
        folder.parent / "bundle",
        task="generate",
        dims={"batch": (1, 4), "seq": (1, 40), "cache": (16, 64)},
        settings=built_at,
    )


@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("length", [4, WINDOW, WINDOW + 1, 20])
def test_over_a_window_it_goes_on_when_that_is_full(
    length: int, padded: int, windowed: Any, windowed_bundle: Bundle, built_at: Settings
) -> None:
    """A window becomes full in a step, in the prompt, or with it."""
    ids = torch.arange(3, 3 + 2 * length).view(2, length)
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    expected = windowed.generate(ids, attention_mask=mask, **STATIC)
    with hubaoti.attach(windowed, windowed_bundle, settings=built_at) as attachment:
        assert torch.equal(windowed.generate(ids, attention_mask=mask, **STATIC), expected)
        stats = attachment.stats()
    assert (stats["compiled"], stats["eager"]) == (40, 0)
    graphs = 1 if length > WINDOW else 2
    counts = [region["compiled"].values() for region in stats["regions"].values()]
    assert [sum(map(bool, each)) for each in counts] == [graphs, graphs]


@pytest.mark.parametrize("more", [1, 3, 9, WINDOW, 20])
def test_a_window_that_is_partly_filled_becomes_full_in_a_later_prompt(
    more: int, windowed: Any, windowed_bundle: Bundle, built_at: Settings
) -> None:
    """Of a conversation over one cache; and over the same one once it is emptied."""

    def talk() -> list[Any]:
        cache = StaticCache(config=windowed.config, max_cache_len=60)
        said = torch.tensor([[5, 6, 7], [8, 9, 10]])
        answers: list[Any] = []
        for new in (more, 2):
            said = windowed.generate(said, past_key_values=cache, **GREEDY | {"max_new_tokens": 5})
            answers.append(said)
            said = torch.cat([said, torch.full((2, new), 11)], 1)
        cache.reset()
        answers.append(windowed.generate(said[:, :20], past_key_values=cache, **GREEDY))
        return answers + [(layer.keys, layer.values) for layer in cache.layers]

    expected = talk()
    with hubaoti.attach(windowed, windowed_bundle, strict=True, settings=built_at) as attachment:
        found = talk()
        assert attachment.stats()["compiled"] == 60
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_first_call_in_which_a_window_becomes_full_is_compared_on_copies(
    windowed: Any, windowed_bundle: Bundle, built_at: Settings
) -> None:
    """The module's own answer is made of what its cache holds, not of what the graph is given."""
    ids = torch.arange(3, 43).view(2, 20)
    expected = windowed.generate(ids, **STATIC)
    with hubaoti.attach(windowed, windowed_bundle, strict=True, settings=built_at) as attachment:
        for region in attachment._regions:
            region._trials = FirstCallCheck(entry.id for entry in region.dispatcher.entries)
        cache = StaticCache(config=windowed.config, max_cache_len=60)
        head = windowed.generate(
            ids[:, :5], past_key_values=cache, **GREEDY | {"max_new_tokens": 1}
        )
        assert torch.equal(head[:, :5], ids[:, :5])
        found = windowed.generate(ids, past_key_values=cache, **GREEDY)
        assert (attachment.stats()["compiled"], attachment.stats()["eager"]) == (38, 0)
    assert torch.equal(found, expected)


def test_a_window_without_a_graph_for_a_full_one_says_so(
    windowed: Any, windowed_bundle: Bundle, built_at: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(3, 43).view(2, 20)
    with hubaoti.attach(windowed, windowed_bundle, strict=True, settings=built_at) as attachment:
        for region in attachment._regions:
            kept = [e for e in region.dispatcher.entries if e.cache.kind == "static"]
            monkeypatch.setattr(region.dispatcher, "entries", kept)
        with pytest.raises(NotServed, match=r"window"):
            windowed.generate(ids, **STATIC)


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("masked", [True, False])
def test_masks_that_are_left_out_and_tables_of_one_row_are_made_whole(
    case: str, masked: bool, tiny_decoder: Path, forward_bundle: Bundle, built_at: Settings
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    words = prompt(case) | {"use_cache": False}
    if not masked:
        del words["attention_mask"]
    with torch.no_grad():
        expected = model(**words)[0]
        with hubaoti.attach(model, forward_bundle, settings=built_at) as attachment:
            for _ in range(2):
                torch.testing.assert_close(model(**words)[0], expected, atol=1e-4, rtol=1e-4)
            assert (attachment.stats()["compiled"], attachment.stats()["eager"]) == (4, 0)


def test_a_mask_that_is_written_to_is_read_again(
    tiny_decoder: Path, forward_bundle: Bundle, built_at: Settings
) -> None:
    """What is made of a tensor is kept for the next block, and not for another mask."""
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    words = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "use_cache": False}
    with torch.no_grad():
        expected = []
        for last in (True, False):
            mask[0, 0, 2, 0] = last
            expected.append(model(**words, attention_mask=mask)[0].clone())
        with hubaoti.attach(model, forward_bundle, strict=True, settings=built_at) as attachment:
            for last, answer in zip((True, False), expected, strict=True):
                mask[0, 0, 2, 0] = last
                found = model(**words, attention_mask=mask)[0]
                torch.testing.assert_close(found, answer, atol=1e-4, rtol=1e-4)
            assert attachment.stats()["compiled"] == 4
    assert not torch.allclose(expected[0], expected[1], atol=1e-4)


# Modules without a config


class Cell(nn.Module):
    """A block whose size no tensor tells: `scale` is a plain number."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = scale

    def forward(self, x: torch.Tensor, *, again: bool = False) -> dict[str, torch.Tensor | None]:
        return {"y": self.scaled(x) + x, "more": None}

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.cells = nn.ModuleList([Cell(scale) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for cell in self.cells:
            x = cell(x)["y"]
        return x


@pytest.fixture(scope="module")
def stack_bundle(built_at: Settings, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Three equal cells, compiled once, from calls of two sizes."""
    stack = Stack().eval()
    with hubaoti.capture(stack) as calls, torch.no_grad():
        for rows in (2, 3):
            stack(torch.randn(rows, 8))
    output = tmp_path_factory.mktemp("stack") / "bundle"
    return hubaoti.compile(stack, output, calls=calls, settings=built_at, dims={"x_0": (1, 16)})


def test_the_first_call_of_a_module_without_config_is_its_own(
    stack_bundle: Bundle, built_at: Settings
) -> None:
    stack = Stack().eval()
    with torch.no_grad(), hubaoti.attach(stack, stack_bundle, settings=built_at) as attachment:
        expected = copy.deepcopy(stack)(torch.ones(4, 8))
        for _ in range(2):
            torch.testing.assert_close(stack(torch.ones(4, 8)), expected)
        counts = [each["compiled"] for each in attachment.stats()["regions"].values()]
        assert counts == [{"cells": 1}, {"cells": 1}, {"cells": 1}]
        assert attachment.stats()["eager"] == 0


def test_the_calls_that_were_compared_are_counted_where_there_were_some(
    stack_bundle: Bundle, built_at: Settings
) -> None:
    stack = Stack().eval()
    with torch.no_grad(), hubaoti.attach(stack, stack_bundle, settings=built_at) as attachment:
        assert "compared" not in attachment.stats()
        stack(torch.ones(4, 8))
        stats = attachment.stats()
        assert (stats["compiled"], stats["eager"], stats["compared"]) == (0, 0, 3)
        first = {"compiled": {"cells": 0}, "eager": {}, "compared": {"cells": 1}}
        assert stats["regions"]["cells.0"] == first
        stack(torch.ones(4, 8))
        assert (attachment.stats()["compiled"], attachment.stats()["compared"]) == (3, 3)
        assert [*stack.cells[0](torch.ones(4, 8))] == ["y", "more"]


def test_a_graph_that_answers_otherwise_than_the_module_is_not_asked_again(
    stack_bundle: Bundle, built_at: Settings
) -> None:
    stack = Stack(scale=3.0).eval()
    with torch.no_grad(), hubaoti.attach(stack, stack_bundle, settings=built_at) as attachment:
        expected = copy.deepcopy(stack)(torch.ones(4, 8))
        with pytest.warns(Fallback, match=r"\(differs\): graph cells: answer 0 is off by"):
            found = [stack(torch.ones(4, 8)) for _ in range(2)]
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], expected)
        assert attachment.stats()["compiled"] == 0
        assert attachment.stats()["eager"] == 3  # the first call was a trial


ARGUMENTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another constant": (lambda cell: cell(torch.ones(2, 8), again=True), "arguments"),
    "no tensor": (lambda cell: cell(torch.ones(2, 8).tolist()), "arguments"),
    "another rank": (lambda cell: cell(torch.ones(8)), "shape"),
    "a size that is fixed": (lambda cell: cell(torch.ones(2, 1)), "shape"),
    "another dtype": (lambda cell: cell(torch.ones(2, 8).double()), "dtype"),
    "another device": (lambda cell: cell(torch.ones(2, 8, device="meta")), "device"),
    "a subclass": (lambda cell: cell(torch.ones(2, 8).as_subclass(Named)), "subclass"),
    "a sparse tensor": (lambda cell: cell(torch.ones(2, 8).to_sparse()), "device"),
    "gradients of the input": (lambda cell: with_gradients(cell), "gradients"),
    "vmap": (lambda cell: torch.func.vmap(cell)(torch.ones(3, 2, 8))["y"], "transforms"),
    "autocast": (lambda cell: under_autocast(cell), "autocast"),
    "jit trace": (lambda cell: jit_traced(cell), "tracing"),
}


def with_gradients(cell: Any) -> Any:
    with torch.enable_grad():
        return cell(torch.ones(2, 8, requires_grad=True))


def under_autocast(cell: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return cell(torch.ones(2, 8))


def jit_traced(cell: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):
        one = torch.jit.trace(lambda x: cell(x)["y"], torch.ones(2, 8), check_trace=False)
        return one(torch.ones(2, 8))


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_call_that_no_graph_can_answer_is_the_module_s_own(
    case: str, stack_bundle: Bundle, built_at: Settings
) -> None:
    stack = Stack().eval().requires_grad_(False)
    call, reason = ARGUMENTS[case]
    with torch.no_grad():
        expected = outcome(call, copy.deepcopy(stack).cells[1])
        with hubaoti.attach(stack, stack_bundle, settings=built_at) as attachment:
            with warnings.catch_warnings(action="ignore"):
                stack(stack(torch.ones(2, 8)))
                found = outcome(call, stack.cells[1])
            stats = attachment.stats()["regions"]["cells.1"]
    assert stats == {"compiled": {"cells": 1}, "eager": {reason: 1}, "compared": {"cells": 1}}
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        if found["y"].device.type == "cpu" and type(found["y"]) is torch.Tensor:
            assert torch.equal(found["y"], expected["y"])


def outcome(call: Callable[[Any], Any], cell: Any) -> Any:
    """What a call answers, or the error that it raises."""
    try:
        return call(cell)
    except Exception as why:
        return why


def test_each_region_is_tried_by_itself(stack_bundle: Bundle, built_at: Settings) -> None:
    stack = Stack().eval()
    stack.cells[1].scale = 3.0
    expected = copy.deepcopy(stack)
    with torch.no_grad(), hubaoti.attach(stack, stack_bundle, settings=built_at) as attachment:
        with pytest.warns(Fallback, match=r"cells\.1 .*\(differs\)"):
            for _ in range(3):
                torch.testing.assert_close(stack(torch.ones(4, 8)), expected(torch.ones(4, 8)))
        counts = [sum(e["compiled"].values()) for e in attachment.stats()["regions"].values()]
    assert counts == [2, 0, 2]


@pytest.mark.parametrize("of", ["the block", "its class"])
def test_a_method_that_is_put_in_place_of_another_is_noticed(
    of: str, stack_bundle: Bundle, built_at: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, x = Stack().eval(), torch.ones(4, 8)
    plain = copy.deepcopy(stack)
    with torch.no_grad(), hubaoti.attach(stack, stack_bundle, settings=built_at):
        for _ in range(2):
            stack(x)
        if of == "its class":
            monkeypatch.setattr(Cell, "scaled", lambda self, x: 3 * x)
        else:
            for each in (stack, plain):
                each.cells[1].scaled = MethodType(lambda self, x: 3 * x, each.cells[1])
        with pytest.warns(Fallback, match=r"\(changed\): (the )?scaled of"):
            torch.testing.assert_close(stack(x), plain(x))


def test_gradients_of_an_input_are_never_dropped(stack_bundle: Bundle, built_at: Settings) -> None:
    stack = Stack().eval().requires_grad_(False)
    x = torch.ones(4, 8, requires_grad=True)
    with hubaoti.attach(stack, stack_bundle, settings=built_at):
        with torch.no_grad():
            stack(x)
            stack(x)
        with pytest.warns(Fallback, match=r"\(gradients\)"):
            assert stack(x).requires_grad


def test_functional_calls_are_the_module_s(stack_bundle: Bundle, built_at: Settings) -> None:
    stack = Stack().eval()
    plain = copy.deepcopy(stack)

    def grad(module: nn.Module) -> Any:
        cell: Any = module.cells[0]  # type: ignore[index]

        def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(cell, weights, torch.ones(2, 8))["y"].sum()

        return torch.func.grad(loss)({n: p.detach() for n, p in cell.named_parameters()})

    quiet = warnings.catch_warnings(action="ignore", category=Fallback)
    with hubaoti.attach(stack, stack_bundle, settings=built_at) as attachment, quiet:
        found = grad(stack)
        assert attachment.stats()["eager"] == 1
    assert torch.equal(found["linear.weight"], grad(plain)["linear.weight"])


def test_a_tensor_that_was_given_twice_has_to_be_given_twice() -> None:
    def forward(x: torch.Tensor, y: torch.Tensor) -> None: ...

    plan = CallPlan({"args": [{"tensor": 0}, {"tensor": 0}], "kwargs": {}}, 1, forward)
    one, other = torch.ones(1), torch.ones(1)
    assert plan.flatten((one, one), {})[0] is one
    with pytest.raises(CannotServe, match="y was one tensor with another argument"):
        plan.flatten((one, other), {})


class Keyword(Cell):
    """A block with the same tensors, which is called by name only."""

    def forward(self, *, x: torch.Tensor) -> dict[str, torch.Tensor | None]:  # type: ignore[override]
        return super().forward(x)


def test_a_module_that_is_called_otherwise_is_refused_and_not_touched(
    stack_bundle: Bundle, built_at: Settings
) -> None:
    stack = Stack().eval()
    stack.cells[1] = Keyword(2.0).eval()
    with pytest.raises(OtherProgram, match=r"cells\.1 is called otherwise.*1 positional") as why:
        hubaoti.attach(stack, stack_bundle, settings=built_at)
    assert "attach the artifact" in why.value.hint
    assert not [*find_regions(stack)] and not any("forward" in vars(each) for each in stack.cells)


def test_inputs_that_lie_otherwise_are_copied(stack_bundle: Bundle, built_at: Settings) -> None:
    stack = Stack().eval()
    x = torch.randn(8, 8)[:, ::2].T
    with torch.no_grad(), hubaoti.attach(stack, stack_bundle, settings=built_at) as attachment:
        expected = copy.deepcopy(stack)(x)
        stack(x)
        torch.testing.assert_close(stack(x), expected)
        shifted = torch.zeros(4 * 8 * 4 + 8, dtype=torch.uint8)[8:].view(torch.float32).view(4, 8)
        shifted.copy_(x)
        torch.testing.assert_close(stack(shifted), expected)
        assert (attachment.stats()["compiled"], attachment.stats()["eager"]) == (6, 0)


def test_pickled_it_is_the_plain_module(stack_bundle: Bundle, built_at: Settings) -> None:
    stack = Stack().eval()
    with torch.no_grad(), hubaoti.attach(stack, stack_bundle, settings=built_at) as attachment:
        expected = stack(torch.ones(2, 8))
        stack(torch.ones(2, 8))
        assert attachment.stats()["compiled"] == 3  # the first call was the module's own
        other = pickle.loads(pickle.dumps(stack))
        assert not [*find_regions(other)]
        assert torch.equal(other(torch.ones(2, 8)), expected)
        other.cells[0].linear.weight.zero_()
        assert not torch.equal(other(torch.ones(2, 8)), expected)
        hubaoti.attach(other, stack_bundle, settings=built_at).detach()


def test_a_shallow_copy_of_a_block_is_the_plain_block(
    stack_bundle: Bundle, built_at: Settings
) -> None:
    stack, x = Stack().eval(), torch.ones(2, 8)
    expected = copy.deepcopy(stack.cells[0])(x)
    with torch.no_grad(), hubaoti.attach(stack, stack_bundle, settings=built_at) as attachment:
        stack(x)
        before = attachment.stats()
        other = copy.copy(stack.cells[0])
        assert torch.equal(other(x)["y"], expected["y"])
        other.linear = nn.Linear(8, 8)
        assert not torch.equal(other(x)["y"], expected["y"])
        assert attachment.stats() == before
    del stack, attachment
    gc.collect()
    assert other(x)["y"].shape == (2, 8)


def test_a_block_that_is_moved_to_another_model_answers_by_its_own_weights(
    stack_bundle: Bundle, built_at: Settings
) -> None:
    stack, other, x = Stack().eval(), Stack().eval(), torch.ones(2, 8)
    cell: Any = stack.cells[0]
    expected = copy.deepcopy(cell)(x)
    with torch.no_grad():
        attachment = hubaoti.attach(stack, stack_bundle, settings=built_at)
        stack(x)
        stack(x)
        other.cells[0] = cell
        del stack
        gc.collect()
        before = attachment.stats()["compiled"]
        torch.testing.assert_close(other.cells[0](x)["y"], expected["y"])
        assert attachment.stats()["compiled"] == before + 1
        hubaoti.detach(other)
        assert torch.equal(other.cells[0](x)["y"], expected["y"])


# Two halves


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and a decoder, whose blocks look at themselves and at the encoder's answer."""
    config = BartConfig(
        architectures=["BartModel"],
        vocab_size=128,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("models") / "bart"
    BartModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bart_bundle(bart: Path, shared: Path, built_at: Settings) -> Bundle:
    """Both kinds of block, compiled once."""
    return hubaoti.compile(
        bart,
        shared / "bart",
        task="forward",
        dims={"batch": (1, 4), "seq": (1, 32), "target": (1, 32)},
        settings=built_at,
    )


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_both_halves_of_a_model_with_several_masks_answer_by_graphs(
    rows: int, bart: Path, bart_bundle: Bundle, built_at: Settings
) -> None:
    model = AutoModel.from_pretrained(bart).eval()
    model.config.use_cache = False  # which its encoder asks, whatever a call says
    words = {
        "input_ids": torch.arange(3, 3 + 7 * rows).reshape(rows, 7),
        "attention_mask": torch.ones(rows, 7).long(),
        "decoder_input_ids": torch.arange(40, 40 + 5 * rows).reshape(rows, 5),
        "decoder_attention_mask": torch.ones(rows, 5).long(),
        "use_cache": False,
    }
    words["attention_mask"][-1, 4:] = 0
    words["decoder_attention_mask"][-1, 3:] = 0
    with torch.no_grad():
        expected = model(**words).last_hidden_state
        with hubaoti.attach(model, bart_bundle, strict=True, settings=built_at) as attachment:
            found = model(**words).last_hidden_state
            stats = attachment.stats()
    torch.testing.assert_close(found, expected)
    assert (stats["compiled"], stats["eager"]) == (4, 0)
    assert {path.split(".")[0] for path in stats["regions"]} == {"encoder", "decoder"}


@pytest.mark.slow
def test_where_one_of_several_masks_is_left_out_the_block_answers_itself(
    bart: Path, bart_bundle: Bundle, built_at: Settings
) -> None:
    model = AutoModel.from_pretrained(bart).eval()
    model.config.use_cache = False
    ids = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[6, 7]])}
    with torch.no_grad():
        expected = model(**ids, use_cache=False).last_hidden_state
        with hubaoti.attach(model, bart_bundle, settings=built_at) as attachment:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                found = model(**ids, use_cache=False).last_hidden_state
            stats = attachment.stats()
    torch.testing.assert_close(found, expected)
    assert stats["compiled"] + stats["eager"] == 4
    assert stats["regions"]["decoder.layers.0"]["eager"] == {"arguments": 1}
    assert any("a mask is left out" in str(each.message) for each in told)


class Adding(nn.Module):
    """Writes into an input, if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
        if total is not None:
            total.add_(x)
        return x * self.weight


@pytest.mark.parametrize("writes", [False, True])
def test_a_graph_that_failed_is_answered_for_where_it_can_have_written_nothing(
    writes: bool, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Adding().eval()
    make = lambda rows: [torch.ones(rows, 4) for _ in range(1 + writes)]  # noqa: E731
    with torch.no_grad(), hubaoti.capture(module) as calls:
        for rows in (2, 3):
            module(*make(rows))
    bundle = api.compile(module, tmp_path / "adding", calls=calls, settings=settings)
    with (
        torch.no_grad(),
        hubaoti.attach(module, bundle, trust=True, settings=settings) as attachment,
    ):
        for _ in range(2):  # the first is compared
            module(*make(2))
        (region,) = find_regions(module)

        def fail(inputs: list[torch.Tensor]) -> None:
            raise RuntimeError("halfway")

        monkeypatch.setattr(region.graphs[0], "_run_short", fail)
        if writes:
            with pytest.raises(BadInput, match="halfway"):
                module(*make(2))
        else:
            with pytest.warns(Fallback, match="halfway"):
                assert torch.equal(module(*make(2)), torch.full((2, 4), 2.0))
        assert attachment.stats()["eager"] == (not writes)
