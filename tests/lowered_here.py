"""A program exported and lowered in a process of its own.

    python lowered_here.py DEVICE PACKAGE KEEP WHERE

With other variables, from another folder and as another build, the package has to be the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, export
from torch.export.passes import move_to_device_pass

from hubaoti.artifact.schema import Target
from hubaoti.compiler.inductor import choose_inductor_options, lower


class Block(nn.Module):
    """A block with a table of its own, sums over a dim, products, and a tensor that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.mix, self.up, self.down = nn.Linear(64, 192), nn.Linear(64, 256), nn.Linear(256, 64)
        self.register_buffer("table", torch.arange(512) / 512.0, persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """`x` is (batch, seq, 64), `mask` (batch, seq); `seen` counts how often each was masked."""
        seen.add_(mask.to(seen.dtype))
        a, b, c = self.mix(self.norm(x)).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        scores = a @ b.transpose(-1, -2) + self.table[: x.shape[1]]
        scores = scores.masked_fill(mask[:, None, None], -1e4).softmax(-1)
        x = x + (scores @ c).transpose(1, 2).reshape(x.shape)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)))) * x.mean(-1, keepdim=True)


def main(device: str, package: str, keep: str, where: str) -> None:
    """Export on the CPU, move, lower."""
    module = Block().eval().requires_grad_(False)
    inputs = (torch.randn(2, 12, 64), torch.zeros(2, 12, dtype=torch.bool), torch.zeros(2, 12))
    dims = {0: Dim("batch", min=1, max=8), 1: Dim("seq", min=2, max=512)}
    program = export(module, inputs, dynamic_shapes=(dims, dims, dims))
    if device == "cuda":
        program = move_to_device_pass(program, "cuda:0")
    target = Target(device=device, os="linux", level="x86_64_v3", torch="2.13.0", git="b" * 40)
    options = choose_inductor_options(target)
    lower(program, target.level, options, Path(package), where, None, "block", keep=Path(keep))


if __name__ == "__main__":
    main(*sys.argv[1:])
