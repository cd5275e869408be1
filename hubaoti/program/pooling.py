"""Sentence vectors, made of what a model says of each token."""

from __future__ import annotations

import torch


def pool(mode: str, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One vector a row from (batch, seq, width) and a (batch, seq) mask.

    As the Pooling of sentence-transformers 6 computes it: padding may stand on either side, and
    half types are summed in float32.
    """
    first = mask.argmax(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    if mode == "max":
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1)
    if mode in {"cls", "lasttoken"}:
        index = first if mode == "cls" else (mask * places).argmax(1)
        return hidden.take_along_dim(index.view(-1, 1, 1), 1).squeeze(1)
    if mode == "weightedmean":
        mask = mask * (places + 1 - first.unsqueeze(1))
    precise = torch.promote_types(hidden.dtype, torch.float32)
    weights = mask.unsqueeze(-1).to(precise)
    count = weights.sum(1).clamp(min=1e-9)
    if mode == "mean_sqrt_len_tokens":
        count = count.sqrt()
    return ((hidden * weights).sum(1) / count).to(hidden.dtype)
