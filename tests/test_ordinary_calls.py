"""Ordinary calls: a model that is called as its users call it is answered by its graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, PLAIN, VISION, Architecture
from ordinary import CALLS, asking, given

from hubaoti.compiler.plan import plan
from hubaoti.compiler.request import Request
from hubaoti.compiler.source import load

CPU = torch.device("cpu")
CASES = {
    **{name: ARCHITECTURES[name] for name in ("bert", "modernbert", "distilbert", "t5", "whisper")},
    **{name: ARCHITECTURES[name] for name in ("vit", "dinov2", "siglip", "clip", "llama", "gpt2")},
    "clip_text": Architecture("CLIPText", PLAIN),
    "clip_vision": Architecture("CLIPVision", VISION),
    "siglip_vision": Architecture("SiglipVision", VISION),
    "eurobert": Architecture("EuroBert", {**PLAIN, "pad_token_id": 0, "mask_token_id": 1}),
}
WORDS: tuple[dict[str, Any], ...] = (
    {},
    {"return_dict": True, "output_attentions": False, "output_hidden_states": False},
    {"use_cache": False},
)


@pytest.mark.parametrize("name", CASES)
def test_what_a_tokenizer_or_a_processor_gives_is_answered_by_graphs(
    name: str, tmp_path: Path
) -> None:
    """With words that say nothing, too; a decoder is told to use no cache."""
    architecture = CASES[name]
    architecture.config.save_pretrained(tmp_path)
    request = Request(task="forward", regions=architecture.regions)
    found = plan(load(tmp_path, request, CPU), request, CPU)
    model: Any = transformers.AutoModel.from_config(architecture.config).eval()
    own = {"use_cache": False} if architecture.generates else {}
    with torch.no_grad(), asking(model, found) as counts:
        for more in WORDS:
            for call in CALLS:
                model(**given(model.config, *call), **more | own)
    assert counts and counts == {"served": counts.total()}
