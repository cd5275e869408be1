"""Where bundles for the checks come from: made beforehand on another machine, or compiled here.

A GPU is at hand for minutes, and compiling takes those of a CPU. So `scripts/gpu_build` makes all
bundles where there is no GPU, from the same descriptions that the checks have, into a folder of
`bundles/`, `models/` (configs), and `hub/`: an endpoint's files, with the kernels that are called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import HubaotiError
from hubaoti.settings import Settings

KERNEL = "local/fa3-fwd"
_REPORT = 20_000  # characters of a compiler's report that are kept


@dataclass(frozen=True, slots=True)
class Place:
    """A device, real or `cuda` for one that is elsewhere; a folder; what was made beforehand."""

    device: torch.device
    folder: Path
    settings: Settings
    made: Path | None = None  # what gpu_build left
    sm: int | None = None  # of the GPU that bundles are made for here

    @property
    def is_gpu(self) -> bool:
        """Whether sizes are those of real models."""
        return self.device.type == "cuda"

    def get_bundle(self, name: str, make: Callable[[Place], Bundle]) -> Bundle:
        """The bundle of a name, as it was made beforehand, or else made now, once.

        Of what was made beforehand what is missing is left out: a card's time is not for compiling.
        """
        folder = find_bundle(self.made or self.folder, name)
        if folder is None and self.made is not None:
            pytest.skip(f"{name} is not among what was made beforehand")
        return Bundle.read(folder) if folder else make(self)

    def write_config(self, name: str, config: Any) -> Path:
        """A model's folder that has a config and nothing else."""
        folder = self.folder / "models" / name
        if not (folder / "config.json").is_file():
            config.save_pretrained(folder)
        return folder

    def compile(self, name: str, model: Path | nn.Module, **words: Any) -> Bundle:
        """A bundle; where there is none, the compiler's report is a note of its error."""
        output = self.folder / "bundles" / name
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self.sm is not None:
                sm = f"sm{self.sm}"
                return api.compile_for(model, sm, output, settings=self.settings, **words)[0]
            device = str(self.device)
            return api.compile(model, output, device=device, settings=self.settings, **words)
        except HubaotiError as error:
            report = output.with_name(f"{output.name}.report.txt")
            error.add_note(f"hint: {error.hint}")
            error.add_note(report.read_text()[-_REPORT:] if report.is_file() else "no report")
            raise

    def require_attention(self, name: str) -> dict[str, Any]:
        """The words with which a bundle has an attention; skips where fa3's kernel is not here."""
        if name == "sdpa":
            return {}
        if self.sm is None and not (self.made and (self.made / "hub").is_dir()):
            pytest.skip("no kernel is here: scripts/gpu_build brings PyPI's fa3-fwd")
        return {"attention": name, "kernel": KERNEL}


def find_bundle(made: Path, name: str) -> Path | None:
    """Where a bundle stands: in a folder of its name, or below that in one of its variant's."""
    folder = made / "bundles" / name
    found = sorted([*folder.glob("hubaoti.json"), *folder.glob("*/hubaoti.json")])
    return found[0].parent if found else None


def describe(bundle: Bundle) -> tuple[str, dict[str, Any]]:
    """What a bundle took where it was made, in words and as facts."""
    found, built = bundle.manifest, bundle.manifest.built
    worst = max((check.max_relative for check in found.checks), default=0.0)
    said = f"{built.seconds:.1f} s, {found.size / 1e6:.1f} MB, largest error {worst:.1e}"
    facts = {"recipe": str(found.recipe), "variant": str(found.variant), "bytes": found.size}
    facts |= {"seconds": built.seconds, "peak_bytes": built.peak_bytes, "host": built.host}
    return said, facts | {"graphs": [graph.id for graph in found.graphs], "largest_error": worst}
