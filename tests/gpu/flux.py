"""Blocks of FLUX.1's shape: hidden 3072, 24 heads, 512 words and 4096 patches; tiny on a CPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import hubaoti
from gpu.place import Place
from hubaoti.artifact.bundle import Bundle
from hubaoti.program.silence import silence_transformers

_NAMES = ("transformer_blocks", "single_transformer_blocks")
WORDS, PATCHES = 512, 64  # of a text, and of each side of an image of 1024 x 1024


def make_flux(device: torch.device, where: str | None = None) -> Any:
    """A transformer of diffusers with two blocks of each kind, on its device or elsewhere."""
    with silence_transformers(), warnings.catch_warnings(action="ignore"):
        pytest.importorskip("diffusers", reason="diffusers is not installed")
        from diffusers import FluxTransformer2DModel

        small: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}
        small |= {
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        }
        large: dict[str, Any] = {"attention_head_dim": 128, "num_attention_heads": 24}
        torch.manual_seed(0)
        with torch.device(where or device), torch.no_grad():
            model: Any = FluxTransformer2DModel(  # type: ignore[no-untyped-call]
                in_channels=64 if device.type == "cuda" else 4,
                num_layers=2,
                num_single_layers=4,
                **(large if device.type == "cuda" else small),
            )
            for tensor in model.parameters():
                tensor.normal_(0.0, tensor.shape[-1] ** -0.5)
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def make_inputs(model: Any, rows: int, words: int, side: int) -> dict[str, Any]:
    """What a pipeline gives a model for square images of so many patches on a side."""
    config, draw = model.config, torch.Generator().manual_seed(words * side)
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side))
    given = {
        "hidden_states": torch.randn(rows, side * side, config.in_channels, generator=draw),
        "encoder_hidden_states": torch.randn(
            rows, words, config.joint_attention_dim, generator=draw
        ),
        "pooled_projections": torch.randn(rows, config.pooled_projection_dim, generator=draw),
        "timestep": torch.full((rows,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(words, 3),
    }
    return {name: each.to(model.device, model.dtype) for name, each in given.items()}


def compile_flux(place: Place, name: str, **words: Any) -> Bundle:
    """The blocks as a module of Python with a few calls of small images, for images up to ours."""
    model = make_flux(place.device, "cpu")
    if place.is_gpu:  # as capturing names them; what is seen there ends at 25 and 12
        most = {"hidden_states_1": (9, PATCHES**2), "encoder_hidden_states_1": (8, WORDS)}
        words |= {"dims": most}
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        with hubaoti.capture(model) as calls:
            for rows, length, side in ((1, 8, 3), (2, 10, 4), (1, 12, 5)):
                model(**make_inputs(model, rows, length, side), return_dict=False)
        return place.compile(name, model, calls=calls, **words)


def answer(model: Any, given: dict[str, Any]) -> Any:
    """The model's answer."""
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


def list_blocks(model: Any) -> list[Any]:
    """The blocks that repeat."""
    return [block for name in _NAMES for block in getattr(model, name)]
