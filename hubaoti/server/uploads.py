"""Which files are large: they are sent apart from their commit, and git would keep a pointer."""

from __future__ import annotations

from pathlib import PurePosixPath

_LARGE = 1_000_000
"""From this size on (bytes) a file is large, whatever it is."""

_SUFFIXES = """
    .arrow .bin .ckpt .gguf .gz .h5 .jpeg .jpg .msgpack .npy .npz .onnx .ot .parquet .pb .pickle
    .pkl .png .pt .pt2 .pth .safetensors .so .tar .tgz .tflite .webp .xz .zip .zst
"""

LFS_SUFFIXES = frozenset(_SUFFIXES.split())
"""Always large: formats that no one reads as text. New repos name them in `.gitattributes`."""


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether this file goes by LFS (or Xet); empty ones never do."""
    if size == 0:
        return False
    return size >= _LARGE or b"\0" in sample or PurePosixPath(path).suffix.lower() in LFS_SUFFIXES
