"""Kernels repos with a small attention on the CPU, in each schema of FlashAttention-3.

One library is compiled for all of them: its namespace and its schema are filled in.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants

from hubaoti.server import Endpoint

SOURCE = Path(__file__).with_name("kernel_attention.cpp")
_TENSORS = (
    *("Tensor? q_v", "Tensor?{out} out", "Tensor? cu_seqlens_q", "Tensor? cu_seqlens_k"),
    *("Tensor? cu_seqlens_k_new", "Tensor? seqused_q", "Tensor? seqused_k", "int? max_seqlen_q"),
    *("int? max_seqlen_k", "Tensor? page_table", "Tensor? kv_batch_idx", "Tensor? leftpad_k"),
    *("Tensor? rotary_cos", "Tensor? rotary_sin", "Tensor? seqlens_rotary", "Tensor? q_descale"),
    *("Tensor? k_descale", "Tensor? v_descale"),
)
_NUMBERS = ("bool is_causal", "int window_size_left", "int window_size_right")
_LAST = (
    *("float softcap", "bool is_rotary_interleaved", "Tensor? scheduler_metadata"),
    *("int num_splits", "bool? pack_gqa", "int sm_margin"),
)
_PLAIN = [each.format(out="") for each in _TENSORS]
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"


def _defaulted(argument: str) -> str:
    """An argument with the default that the libraries of flash-attn3 give it."""
    values = {"bool ": "False", "float ": "0.0", "int ": "0"}
    if "window" in argument:
        return f"{argument} = -1"
    return f"{argument} = {next((v for k, v in values.items() if argument.startswith(k)), 'None')}"


_UPSTREAM = [
    *("Tensor(k_new!)? k_new", "Tensor(v_new!)? v_new"),
    *(each.replace("Tensor? out", "Tensor(out!)? out") for each in _PLAIN),
    *("float? softmax_scale", *_NUMBERS, "int attention_chunk", *_LAST),
]
_UPSTREAM_SCHEMA = (
    f"fwd(Tensor q,Tensor k,Tensor v,{','.join(map(_defaulted, _UPSTREAM))}) -> "
    "(Tensor(out!), Tensor, Tensor, Tensor)"
)
# As their libraries spell them; PyPI's fa3-fwd has that of flash-attn3.
SCHEMAS = {
    "flash-attn3": _UPSTREAM_SCHEMA,
    "fa3-fwd": _UPSTREAM_SCHEMA,
    "vllm-flash-attn3": "fwd(Tensor!  q,    Tensor   k,    Tensor   v,    "
    + ",    ".join(
        ["Tensor? k_new", "Tensor? v_new"]
        + [each.replace("Tensor? out", "Tensor!? out") for each in _PLAIN]
        + ["float softmax_scale", *_NUMBERS, *_LAST, "Tensor? s_aux"]
    )
    + ") -> Tensor[]",
    "sgl-flash-attn3": "fwd(Tensor   q,    Tensor   k,    Tensor   v,    "
    + ",    ".join(
        ["Tensor?  k_new", "Tensor?  v_new", *_PLAIN]
        + ["float? softmax_scale", *_NUMBERS, "int attention_chunk", *_LAST, "Tensor?  sinks"]
    )
    + f") -> {_FOUR}",
}


def variant_here(torch_version: str | None = None) -> str:
    """The variant that kernels loads on this machine's CPU, or one for another torch ("29.1")."""
    major, minor, *_ = (torch_version or torch.__version__).split(".")
    return f"torch{major}{minor}-cpu-{platform.machine()}-{platform.system().lower()}"


def compile_library(folder: Path) -> Path:
    """The library with its namespace and schema left open; 20 s by g++."""
    library, here = folder / "open.so", Path(torch.__file__).parent
    includes = (here / "include", here / "include/torch/csrc/api/include")
    python = sysconfig.get_paths()["include"]
    subprocess.run(
        [
            *("g++", "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(library)),
            *(f"-I{each}" for each in (*includes, python)),
            *(f"-L{here / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
        ],
        check=True,
        capture_output=True,
    )
    return library


def write_build(
    library: Path,
    folder: Path,
    namespace: str,
    schema: str,
    *,
    variant: str | None = None,
    archs: tuple[str, ...] = (),
    **metadata: object,
) -> Path:
    """A repo's folder with one build, laid out as kernel-builder does; the build's folder."""
    build = folder / "build" / (variant or variant_here())
    build.mkdir(parents=True)
    content = bytearray(library.read_bytes())
    for name, text in ((b"@namespace@", namespace), (b"@schema@", schema)):
        assert content.count(name) == 1
        at, filled = content.index(name), f"{text}\0".encode()
        content[at : at + len(filled)] = filled
    (build / "_C.abi3.so").write_bytes(content)
    (build / "_ops.py").write_text(
        f"import torch\nfrom . import _C\n\nops = torch.ops.{namespace}\n"
    )
    (build / "__init__.py").write_text("from ._ops import ops\n\n__all__ = ['ops']\n")
    (build / "_late.py").write_text("")  # what it imports when it is called
    backend = {"type": "cpu", **({"archs": [*archs]} if archs else {})}
    facts = {
        **{"id": namespace, "name": "tiny-attention", "version": 1, "license": "Apache-2.0"},
        **{"python-depends": [], "backend": backend, **metadata},
    }
    (build / "metadata.json").write_text(json.dumps(facts))
    return build


def lay_out_fa3(folder: Path) -> Path:
    """PyPI's fa3-fwd, which has to be installed, as the folder of a kernels repo."""
    spec = importlib.util.find_spec("fa3_fwd")
    assert spec is not None and spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    build = folder / "build" / "torch-stable-abi29-cu130-x86_64-linux"
    build.mkdir(parents=True)
    shutil.copy(package / "_C.abi3.so", build)
    shutil.copy(package.parent / "fa3_fwd_config.py", build)
    (build / "__init__.py").write_text(
        "import torch\n\nfrom . import _C\n\nops = torch.ops.fa3_fwd\n"
    )
    facts = {"id": "fa3_fwd", "name": "fa3-fwd", "version": 1, "license": "BSD-3-Clause"}
    facts |= {"python-depends": [], "backend": {"type": "cuda", "archs": ["9.0a"]}}
    (build / "metadata.json").write_text(json.dumps(facts))
    return folder


def push_kernel(endpoint: Endpoint, name: str, folder: Path) -> None:
    """A folder becomes the head of a kernels repo."""
    hub = HfApi(endpoint.url, token=endpoint.token)
    hub.create_repo(name, repo_type="kernel", exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:  # huggingface_hub 1.33 reads them, and 2 writes
        patch.setattr(constants, "REPO_TYPES", constants.REPO_TYPES_WITH_KERNEL)
        hub.upload_folder(repo_id=name, folder_path=folder, repo_type="kernel", delete_patterns="*")
