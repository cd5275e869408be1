"""Patched: what is loaded is what the files say, or it is in the key, and compared."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from test_identity import flux
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, activations, cache_utils, masking_utils
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama import modeling_llama as llama

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.attachment.stats import Fallback
from hubaoti.errors import BadRequest
from hubaoti.program.changed_attributes import is_as_built
from hubaoti.program.identity import (
    collect_config_classes,
    identify_module_program,
    identify_program,
    list_read_attributes,
    matches_program,
)
from hubaoti.program.model_code import Code, collect_code
from hubaoti.program.monkey_patches import find_patches
from hubaoti.settings import Settings

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
GREEDY: dict[str, Any] = {
    "max_new_tokens": 20,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "cache_implementation": "static",
}


def code_in(model: Any) -> Code:
    """The code of a model of transformers."""
    return collect_code(model, collect_config_classes(model.config))


def made(**changes: Any) -> Any:
    """A small Llama without memory."""
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **changes)).eval()


def as_built(model: Any) -> bool:
    """Whether nobody set an attribute of a model."""
    code = code_in(model)
    return is_as_built(model, code, "generate", list_read_attributes(code, "generate"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_of_an_architecture_counts_as_patched(name: str) -> None:
    asked = ARCHITECTURES[name]
    auto = transformers.AutoModelForCausalLM if asked.generates else transformers.AutoModel
    with torch.device("meta"):
        model = auto.from_config(asked.config)
    assert find_patches(model, code_in(model)) == {}
    assert as_built(model)


def test_nothing_of_a_diffusion_transformer_counts_as_patched() -> None:
    with torch.device("meta"):
        model = flux()
    assert find_patches(model, code_in(model)) == {}
    assert as_built(model)


def test_a_model_that_was_loaded_moved_and_hooked_is_as_it_was_built(tiny_decoder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable()
    model.generation_config.max_length = 7
    model.name_or_path = "somewhere/else"
    model.model.layers[0].mlp._hf_hook = "accelerate's"
    model.model.layers[0].mlp.forward = functools.partial(llama.LlamaMLP.forward)
    model.register_forward_hook(lambda *_: None)
    assert as_built(model.half().eval())


def mine(*args: Any, **kwargs: Any) -> Any:
    """What somebody puts in the place of something."""
    return args[-1]


class Mine(nn.Module):
    """A class that somebody puts in the place of another."""

    def forward(self, x: Any) -> Any:
        return x


def wrapped(function: Any) -> Any:
    """A function that says that it is another."""
    return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))


PATCHES: dict[str, tuple[Any, str, Any]] = {
    "a method": (llama.LlamaMLP, "forward", mine),
    "a method, wrapped": (llama.LlamaMLP, "forward", wrapped(llama.LlamaMLP.forward)),
    "a decorated method": (llama.LlamaModel, "forward", wrapped(llama.LlamaModel.forward)),
    "a method that is added": (llama.LlamaMLP, "__call__", mine),
    "a property in the way": (llama.LlamaRMSNorm, "weight", property(lambda self: 1.0)),
    "a constructor": (llama.LlamaDecoderLayer, "__init__", mine),
    "a method of a base": (llama.GradientCheckpointingLayer, "__call__", mine),
    "a function": (llama, "rotate_half", mine),
    "a decorated function": (llama, "apply_rotary_pos_emb", mine),
    "another function of the file": (llama, "rotate_half", llama.repeat_kv),
    "a function of C": (llama, "rotate_half", torch.neg),
    "fewer arguments": (llama, "repeat_kv", functools.partial(llama.repeat_kv, n_rep=1)),
    "other code": (llama.rotate_half, "__code__", mine.__code__),
    "other defaults": (llama.eager_attention_forward, "__defaults__", (0.5,)),
    "a class": (llama, "LlamaRMSNorm", Mine),
    "a module": (llama, "nn", types.SimpleNamespace(functional=functional)),
    "an import": (llama, "create_causal_mask", mine),
    "a registry": (llama, "ALL_ATTENTION_FUNCTIONS", {"sdpa": mine}),
    "torch's function": (functional, "silu", mine),
    "torch's other function": (functional, "silu", functional.gelu),
    "torch's function of C": (torch, "rsqrt", torch.sqrt),
    "torch's attention": (functional, "scaled_dot_product_attention", mine),
    "a layer of torch": (nn.Linear, "forward", mine),
    "every module": (nn.Module, "__call__", mine),
    "a method of tensors": (torch.Tensor, "unsqueeze", mine),
    "a cache": (cache_utils.StaticLayer, "update", mine),
    "a property of the config": (transformers.LlamaConfig, "head_dim", property(mine)),
}


@pytest.mark.parametrize("name", PATCHES)
def test_what_was_patched_is_in_the_key_and_is_compared(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made()
    plain = identify_program(model, model.config, "generate", ())
    alive = identify_module_program(model)
    assert matches_program(model, plain, whole=False)
    owner, attribute, value = PATCHES[name]
    monkeypatch.setattr(owner, attribute, value, raising=False)
    found = find_patches(model, code_in(model))
    if name != "a property of the config":  # by which the config itself is another
        changed = identify_program(model, model.config, "generate", ())
        assert changed.code != plain.code
        assert identify_module_program(model).code != alive.code
        assert not matches_program(model, plain, whole=False)
        assert not matches_program(model, changed, whole=False)
    monkeypatch.undo()
    assert len(found) == 1
    assert identify_program(model, model.config, "generate", ()) == plain
    assert identify_module_program(model) == alive


ENTRIES: dict[str, tuple[Any, str, Any]] = {
    "an attention of one model": (llama.ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", mine),
    "an attention": (AttentionInterface._global_mapping, "sdpa", mine),
    "another attention": (
        AttentionInterface._global_mapping,
        "sdpa",
        llama.eager_attention_forward,
    ),
    "a mask": (masking_utils.AttentionMaskInterface._global_mapping, "sdpa", mine),
    "an activation": (activations.ACT2FN, "silu", nn.GELU),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_of_a_registry_counts_where_the_model_asks_by_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, key, value = ENTRIES[name]
    model = made()
    with monkeypatch.context() as patch:
        patch.setitem(entries, key, value)
        assert find_patches(model, code_in(model))
    with monkeypatch.context() as patch:
        patch.setitem(entries, "of_another_model", value)
        assert find_patches(model, code_in(model)) == {}
    assert find_patches(model, code_in(model)) == {}


def test_an_attention_that_somebody_registered_is_in_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = made()
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", mine)
    model.config._attn_implementation = "mine"
    assert [*find_patches(model, code_in(model))] == [
        "transformers.modeling_utils.AttentionInterface._global_mapping"
    ]


def test_two_patches_of_one_place_have_two_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(x: torch.Tensor) -> torch.Tensor:
        return functional.silu(x) * 0.5

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return functional.silu(x) * 2.0

    model, codes = made(), set()
    named = functools.wraps(functional.silu)
    for function in (halved, doubled, named(lambda x: x + 1), named(lambda x: x + 2), halved):
        monkeypatch.setattr(llama, "rotate_half", function)
        codes.add(identify_program(model, model.config, "generate", ()).code)
    assert len(codes) == 4


class Odd:
    """What cannot be told from others of its class."""

    def tobytes(self) -> str:
        return "no bytes"


def test_a_patch_that_no_key_can_tell_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "rotate_half", Odd())
    model = made()
    with pytest.raises(BadRequest, match=r"modeling_llama\.rotate_half was replaced .* by a Odd"):
        identify_program(model, model.config, "generate", ())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, as it is imported
def test_what_torch_compile_wraps_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.LlamaMLP, "forward", torch.compile(llama.LlamaMLP.forward))
    model = made()
    assert find_patches(model, code_in(model)) == {}


OWN = """
import functools
import importlib.util
import os.path as paths
import torch
import torch.utils.checkpoint
from torch import nn
try:
    from acme_fast import fast
except ImportError:
    fast = None
try:
    import acme_kernels.fast as kernels
except ImportError:
    kernels = None

def twice(function):
    @functools.wraps(function)
    def inner(*args):
        return 2 * function(*args)
    return inner

SCALE = 0.5
TABLE = {"half": 0.5}

@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x + 1

@torch.library.custom_op("acme_own::shift", mutates_args=())
def shift(x: torch.Tensor) -> torch.Tensor:
    return x + 1

def helper(x):
    if fast is not None or kernels is not None or not paths.sep or importlib is None:
        return torch.utils.checkpoint.checkpoint(fast, x)
    return shift(scripted(x)) * SCALE * TABLE["half"]

class Net(nn.Module):
    slope = 0.25
    __call__ = nn.Module.__call__

    @twice
    @torch.no_grad()
    def forward(self, x):
        return helper(x) * self.slope * self.factor

    @property
    def factor(self):
        return 3.0
"""
CHANGES = {
    "nothing": "pass",
    "a constant": "own.SCALE = 2.0",
    "an entry": "own.TABLE['half'] = 2.0",
    "an attribute of the class": "own.Net.slope = 1.0",
    "a decorated method": "own.Net.forward = own.twice(own.Net.factor.fget)",
    "an import": "own.torch = __import__('types').SimpleNamespace(**vars(own.torch))",
    "what was not there": "own.fast = abs",
    "a property": "own.Net.factor = property(lambda self: 1.0)",
    "a scripted function": "own.scripted = abs",
    "a custom op": "own.shift = lambda x: x",
    "the file": "__import__('pathlib').Path(own.__file__).write_text('def helper(x): return x')",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.script
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_patched_of_a_file_of_ones_own_is_found(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"acme_own_{[*CHANGES].index(change)}"
    (tmp_path / f"{name}.py").write_text(OWN.replace("acme_own", name))
    monkeypatch.syspath_prepend(str(tmp_path))
    own: Any = importlib.import_module(name)
    net = own.Net()
    exec(CHANGES[change], {"own": own})
    found = find_patches(net, collect_code(net))
    assert bool(found) == (change != "nothing"), found
    del sys.modules[name]


SET: dict[str, tuple[str, str, Any]] = {
    "a scale": ("model.layers.1.self_attn", "scaling", 0.3),
    "whether it looks ahead": ("model.layers.1.self_attn", "is_causal", False),
    "an epsilon": ("model.layers.0.input_layernorm", "variance_epsilon", 1e-3),
    "a method": ("model.layers.0.mlp", "forward", mine),
    "a bound method": ("model.layers.0.mlp", "forward", types.MethodType(mine, 1)),
    "a part": ("model.layers.0", "input_layernorm", nn.SiLU()),
    "a factor of positions": ("model.rotary_emb", "attention_scaling", 2.0),
    "a config of its own": (
        "model.layers.0.self_attn",
        "config",
        transformers.LlamaConfig(hidden_size=32),
    ),
}


@pytest.mark.parametrize("name", SET)
def test_an_attribute_that_somebody_set_is_seen(name: str) -> None:
    model = made()
    path, attribute, value = SET[name]
    assert as_built(model)
    before = getattr(model.get_submodule(path), attribute)
    setattr(model.get_submodule(path), attribute, value)
    assert not as_built(model)
    if attribute != "forward":
        setattr(model.get_submodule(path), attribute, before)
        assert as_built(model)


def test_a_model_made_without_a_part_is_as_built() -> None:
    config = transformers.BertConfig(**SIZES)
    with torch.device("meta"):
        assert as_built(transformers.BertModel(config, add_pooling_layer=False))


def doubling(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Another MLP."""
    return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def test_a_patched_model_is_not_found_under_the_plain_key(
    tiny_decoder: Path,
    decoder_bundle: Bundle,
    built_at: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {
        "task": "generate",
        "dims": {"batch": (1, 4), "seq": (1, 40), "cache": (16, 64)},
        "settings": built_at,
    }
    plain = hubaoti.explain(tiny_decoder, **asked)
    assert plain.built == "the mirror"
    monkeypatch.setattr(llama.LlamaMLP, "forward", doubling)
    patched = hubaoti.explain(tiny_decoder, **asked)
    assert patched.key != plain.key
    assert patched.built is None
    monkeypatch.undo()
    assert hubaoti.explain(tiny_decoder, **asked) == plain


@pytest.mark.parametrize("where", ["the class", "the function", "an instance", "a scale"])
def test_a_model_that_was_patched_before_attach_answers_as_patched(
    where: str,
    tiny_decoder: Path,
    decoder_bundle: Bundle,
    built_at: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    plain = model.generate(torch.tensor([[5, 6, 7]]), **GREEDY)
    if where == "the class":
        monkeypatch.setattr(llama.LlamaMLP, "forward", doubling)
    elif where == "the function":
        monkeypatch.setattr(llama, "apply_rotary_pos_emb", lambda q, k, *_: (k.new_ones(()) * q, k))
    elif where == "an instance":
        mlp = model.model.layers[1].mlp
        mlp.forward = types.MethodType(doubling, mlp)
    else:
        for layer in model.model.layers:
            layer.self_attn.scaling = 3.0
    patched = model.generate(torch.tensor([[5, 6, 7]]), **GREEDY)
    assert patched.tolist() != plain.tolist()
    with (
        pytest.warns(Fallback),
        hubaoti.attach(model, decoder_bundle, settings=built_at) as attachment,
    ):
        answer = model.generate(torch.tensor([[5, 6, 7]]), **GREEDY)
        regions = attachment.stats()["regions"].values()
    assert answer.tolist() == patched.tolist()
    reasons = {reason for each in regions for reason in each["eager"]}
    assert reasons and "shape" not in reasons


def test_an_attach_of_a_plain_model_compares_nothing(
    tiny_decoder: Path, decoder_bundle: Bundle, built_at: Settings
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    with hubaoti.attach(model, decoder_bundle, settings=built_at) as attachment:
        model.generate(torch.tensor([[5, 6, 7]]), **GREEDY)
    assert attachment.stats()["eager"] == 0
