"""A model that sees, whose text decoder is a hybrid: what attends in it is served, as a user calls.

One compile shows both: graphs of a part of a larger model, and blocks beside recurrent ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hubaoti
from hubaoti.settings import Settings

IMAGE = 90  # the id that stands for a part of an image
GREEDY: dict[str, Any] = {
    "max_new_tokens": 8,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "cache_implementation": "static",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LFM2-VL, tiny, of random weights."""
    config = transformers.Lfm2VlConfig(
        text_config={
            "model_type": "lfm2",
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "layer_types": ["conv", "full_attention"] * 2,
        },
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_patches": 16,
            "patch_size": 4,
        },
        image_token_id=IMAGE,
        downsample_factor=2,
    )
    place = tmp_path_factory.mktemp("models") / "tiny-eyes"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.Lfm2VlForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(place)
    return place


def prompts() -> dict[str, dict[str, torch.Tensor]]:
    """A batch of texts of which one is padded, and a text with an image of four parts."""
    ids = torch.arange(5, 19).view(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    seen = torch.arange(5, 17).view(1, 12)
    seen[0, 3:7] = IMAGE
    return {
        "text": {"input_ids": ids, "attention_mask": mask},
        "image": {
            "input_ids": seen,
            "attention_mask": torch.ones_like(seen),
            "pixel_values": torch.linspace(-1, 1, 16 * 48).view(1, 16, 48),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int64),
        },
    }


def test_the_whole_model_generates_as_before_and_what_attends_is_served(
    folder: Path, built_at: Settings, tmp_path: Path
) -> None:
    bundle = hubaoti.compile(
        folder,
        tmp_path / "bundle",
        task="generate",
        dims={"batch": (1, 2), "seq": (1, 40), "cache": (16, 64)},
        settings=built_at,
    )
    model = transformers.Lfm2VlForConditionalGeneration.from_pretrained(folder).eval()
    expected = {name: model.generate(**words, **GREEDY) for name, words in prompts().items()}
    with hubaoti.attach(model, bundle, settings=built_at) as attachment:
        for name, words in prompts().items():
            assert torch.equal(model.generate(**words, **GREEDY), expected[name]), name
        stats = attachment.stats()["regions"]
    layers = [f"model.language_model.layers.{at}" for at in (1, 3)]
    assert {path: each["eager"] for path, each in stats.items()} == dict.fromkeys(layers, {})
    assert [sum(stats[path]["compiled"].values()) for path in layers] == [16, 16]
