"""Tiny models that are compiled for GPUs, and called on one: an encoder, a decoder, a DiT."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.program.silence import silence_transformers
from hubaoti.settings import Settings

SMS = (80, 90, 120)

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class GpuModel:
    """How a model is made and called, and the options that it is compiled with.

    `served` are the regions that graphs answer for; where it is `live` the module itself is
    compiled, of calls that it received. That several GPUs are built for at once is one model's to
    show.
    """

    make: Callable[[], Any]
    call: Callable[[Any, int, int], Any]  # the model, rows, and places or tokens
    served: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    live: bool = False
    sms: tuple[int, ...] = (90,)

    def compile(self, folder: Path, settings: Settings) -> tuple[Bundle, ...]:
        """Its bundles, one for each capability, in one compilation."""
        model, source, words = self.make(), folder / "model", dict[str, Any](self.options)
        if not self.live:
            model.config.save_pretrained(source)
            place = folder / "bundles"
            return hubaoti.compile_for(source, self.sms, place, settings=settings, **words)
        with warnings.catch_warnings(action="ignore"):  # of its own, as of a norm in bfloat16
            with hubaoti.capture(model) as calls:
                for rows, places in ((1, 4), (2, 6), (3, 9)):
                    self.call(model, rows, places)
            words["calls"] = calls
            place = folder / "bundles"
            return hubaoti.compile_for(model, self.sms, place, settings=settings, **words)

    def make_on(self, device: str) -> Any:
        """The model on a device, for answers only."""
        return self.make().eval().requires_grad_(False).to(device)


def make_bert() -> Any:
    """An encoder in float32, whose texts may be padded."""
    config = transformers.BertConfig(
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=96,
        num_hidden_layers=2,
        vocab_size=128,
        max_position_embeddings=64,
        architectures=["BertModel"],
    )
    torch.manual_seed(1)
    return transformers.BertModel(config)


def call_bert(model: Any, rows: int, places: int) -> Any:
    """Texts, the first of which is shorter than the others."""
    ids = torch.ones(rows, places, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, places - 1 :] = 0
    given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    with torch.no_grad():
        return model(**given).last_hidden_state


def make_qwen2() -> Any:
    """A decoder in bfloat16, of which four heads share two of keys."""
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )
    torch.manual_seed(2)
    return transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)


def call_qwen2(model: Any, rows: int, places: int) -> Any:
    """A prompt, and one token after it, over a static cache."""
    ids = torch.ones(rows, places, dtype=torch.long).to(model.device)
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids, past_key_values=cache, position_ids=_number(0, ids))
        last = ids[:, :1]
        return model(last, past_key_values=cache, position_ids=_number(places, last)).logits


def _number(first: int, ids: torch.Tensor) -> torch.Tensor:
    """The places of tokens after `first`, made where nothing has to be computed for it."""
    return torch.arange(first, first + ids.shape[1])[None].to(ids.device)


def make_flux() -> Any:
    """A transformer of diffusers in bfloat16, compiled as a module of Python."""
    torch.manual_seed(3)
    with silence_transformers(), warnings.catch_warnings(action="ignore"):
        from diffusers import FluxTransformer2DModel

        model: Any = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        )
    return model.to(torch.bfloat16).eval()


def call_flux(model: Any, rows: int, places: int) -> Any:
    """What a pipeline gives: latents of three rows of patches, and ids of their places."""
    width, tokens = places, places + 2
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(3), torch.arange(width))
    given = {
        "hidden_states": torch.ones(rows, 3 * width, 4),
        "encoder_hidden_states": torch.ones(rows, tokens, 32),
        "pooled_projections": torch.ones(rows, 32),
        "timestep": torch.full((rows,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(tokens, 3),
    }
    ours = {name: each.to(model.device, model.dtype) for name, each in given.items()}
    with torch.no_grad():
        return model(**ours, return_dict=False)[0]


_GENERATE = {"task": "generate", "dims": {"batch": (1, 3), "seq": (1, 24), "cache": (16, 32)}}
MODELS = {
    "bert": GpuModel(
        make_bert,
        call_bert,
        ("encoder.layer.0", "encoder.layer.1"),
        {"task": "forward", "dims": {"batch": (1, 4), "seq": (2, 40)}, "regions": "encoder.layer"},
        sms=SMS,
    ),
    "qwen2": GpuModel(make_qwen2, call_qwen2, ("model.layers.0", "model.layers.1"), _GENERATE),
    "flux": GpuModel(
        make_flux,
        call_flux,
        ("transformer_blocks.0", "transformer_blocks.1"),
        {"regions": "transformer_blocks"},
        live=True,
    ),
}


def iterate_sizes() -> Iterator[tuple[int, int]]:
    """Rows and places of calls."""
    yield from ((1, 5), (2, 7))


def capture_served(model: Any, kind: GpuModel) -> None:
    """A CUDA graph of what is served, called as the model calls it; it is replayed, and given back.

    What each part is given comes from a call of the whole model before.
    """
    calls = {path: _record_call(model, path, kind) for path in kind.served}
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for path, (args, words) in calls.items():
            model.get_submodule(path)(*args, **words)
    graph.replay()


def _record_call(model: Any, path: str, kind: GpuModel) -> Call:
    """What a part is last given while its model is called: of a decoder's, one token.

    Its prompt comes without a mask, over a cache of which no replay knows whether it is empty.
    """
    found: list[Call] = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args, words: found.append((args, words)), with_kwargs=True
    )
    kind.call(model, 1, 5)
    hook.remove()
    return found[-1]
