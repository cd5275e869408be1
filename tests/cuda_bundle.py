"""A bundle of a small graph for the GPU of this process, made without hubaoti's own compile.

Run under the stand-in of a GPU: `python cuda_bundle.py FOLDER`. The golden answers are the CPU's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch
from bundles import MEMBERS, changed, make_bundle
from safetensors.torch import save_file

from hubaoti.artifact.bundle import Bundle, make_file_entry
from hubaoti.artifact.package import list_members
from hubaoti.artifact.schema import Input, Output, Outputs
from hubaoti.host.probe import probe_host
from hubaoti.runtime.golden import describe_golden, make_golden_inputs
from hubaoti.settings import Settings


class Net(torch.nn.Module):
    """Without constants: what is tried is that it opens and launches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * 2 + 1


def make_cuda_bundle(folder: Path) -> Bundle:
    """A bundle for device 0 and this host, as `compile` would leave it."""
    major, minor = torch.cuda.get_device_capability(0)
    host = probe_host(Settings.from_env())
    target = {"device": "cuda", "os": host.os, "level": host.level, "cuda": torch.version.cuda}
    target |= {"torch": str(torch.__version__), "sm": 10 * major + minor}
    bundle = make_bundle(folder, target, MEMBERS)
    package = folder / bundle.manifest.graphs[0].file
    package.unlink()
    _compile(package)
    (golden,) = bundle.manifest.files
    file = make_file_entry(folder, str(package.relative_to(folder)))
    entry = msgspec.structs.replace(
        bundle.manifest.graphs[0],
        sha256=file.sha256,
        size=file.size,
        members=list_members(package),
        inputs=(Input(name="x", dtype="float32", shape=("batch", 8), values="real"),),
        outputs=Outputs(
            template={"tensor": 0},
            tensors=(Output(name="embedding", dtype="float32", shape=("batch", 8)),),
        ),
    )
    answers = {"root/embedding": Net()(*make_golden_inputs(entry, {"batch": 1}))}
    save_file(answers, folder / golden.path)
    entry = msgspec.structs.replace(entry, golden=describe_golden(entry, answers))
    golden = make_file_entry(folder, golden.path)
    return changed(bundle, graphs=(entry,), files=(golden,))


def _compile(package: Path) -> None:
    example = (torch.zeros(4, 8, device="cuda"),)
    batch = ({0: torch.export.Dim("batch", min=1, max=8)},)
    program = torch.export.export(Net(), example, dynamic_shapes=batch)
    torch._inductor.aoti_compile_and_package(program, package_path=str(package))


if __name__ == "__main__":
    make_cuda_bundle(Path(sys.argv[1]))
