"""A model that embeds texts: by a graph that needs no transformers, or by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubaoti.compiler.tasks import choose_max_length
from hubaoti.engines.tokens import batch_by_length
from hubaoti.errors import BadInput, OutOfBounds
from hubaoti.runtime.text import TextEncoder, shorten_text

_LONGEST = 1 << 15
_ROWS = 32


class Encoder:
    """A model of transformers whose `forward` gives one vector a row."""

    def __init__(self, model: nn.Module, folder: Path, config: Any, positions: int | None) -> None:
        """Raises ModelNotFound when the folder has no tokenizer.json."""
        self.model = model
        self._texts = TextEncoder(folder, config.pad_token_id)
        self._longest = choose_max_length(folder, config, positions, _LONGEST)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """One vector for each text, on the CPU.

        Raises:
            OutOfBounds: a text is longer than the model's positions.
            BadInput: no text is given.
        """
        if not texts:
            raise BadInput("no text is given", hint="give one or more")
        device = next(self.model.parameters()).device
        vectors: dict[int, torch.Tensor] = {}
        for batch in batch_by_length([*map(len, texts)], _ROWS):
            encoded = self._texts.encode([texts[index] for index in batch])
            ids, mask = encoded.input_ids.to(device), encoded.attention_mask.to(device)
            self._require_positions(texts[batch[0]], ids.shape[1])
            vectors |= zip(batch, self.model(ids, mask)[0].float().cpu(), strict=True)
        return torch.stack([vectors[index] for index in range(len(texts))])

    def _require_positions(self, text: str, tokens: int) -> None:
        """Refuse what the model has no positions for."""
        if tokens > self._longest:
            raise OutOfBounds(
                f"a text as {shorten_text(text)!r} has {tokens} tokens; the model takes up to "
                f"{self._longest}",
                hint="shorten it: cutting it off silently would change its vector",
            )
