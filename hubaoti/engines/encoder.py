"""A model that embeds texts: by a graph that needs no transformers, or by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubaoti.engines.tokens import answer_by_length
from hubaoti.errors import BadInput, OutOfBounds
from hubaoti.program.model_files import choose_max_length
from hubaoti.runtime.text import TextEncoder, shorten_text

_MOST_TOKENS = 1 << 15
_BATCH_ROWS = 32


class Encoder:
    """A model of transformers whose `forward` gives one vector a row."""

    def __init__(self, model: nn.Module, folder: Path, config: Any, positions: int | None) -> None:
        """Raises ModelNotFound when the folder has no tokenizer.json."""
        self.model = model
        self._texts = TextEncoder(folder, config.pad_token_id, "embed")
        self._longest = choose_max_length(folder, config, positions, _MOST_TOKENS, "embed")

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """One vector for each text, on the CPU.

        Raises:
            OutOfBounds: a text is longer than the model's positions, or than its files say.
            BadInput: no text is given.
        """
        if not texts:
            raise BadInput("no text is given", hint="give one or more")
        return torch.stack(answer_by_length(texts, _BATCH_ROWS, self._embed_batch))

    def _embed_batch(self, texts: list[str]) -> torch.Tensor:
        """Vectors of some texts, of which the first is the longest."""
        device = next(self.model.parameters()).device
        encoded = self._texts.encode(texts)
        ids, mask = encoded.input_ids.to(device), encoded.attention_mask.to(device)
        if ids.shape[1] > self._longest:
            raise OutOfBounds(
                f"a text as {shorten_text(texts[0])!r} has {ids.shape[1]} tokens; the model takes "
                f"up to {self._longest}",
                hint="shorten it: cutting it off silently would change its vector",
            )
        vectors: torch.Tensor = self.model(ids, mask)[0]
        return vectors.float().cpu()
