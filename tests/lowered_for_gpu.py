"""A saved program lowered in this process, which runs under the stand-in; or lowered wrongly.

    python lowered_for_gpu.py PROGRAM FOLDER DAMAGE

A damage is what a compiler, or we, could do wrong and no look at the package would see.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hubaoti.artifact.package import unpack_all
from hubaoti.artifact.schema import Target
from hubaoti.compiler.attention import choose_kernels, name_attention
from hubaoti.compiler.inductor import choose_inductor_options, lower
from hubaoti.compiler.patched import patch_attribute
from hubaoti.compiler.saved_program import load_program, put_on_device
from hubaoti.runtime.library import Library
from hubaoti.runtime.runners import open_native_runner

FOLDED = "a value that was read back"
SHORT = "a grid that is one short"


@contextmanager
def damage_grids(damage: str) -> Iterator[None]:
    """Have host code launch one block less than it takes."""
    from torch._inductor.runtime.triton_heuristics import GridExpr

    ceildiv = GridExpr.ceildiv

    def subtract_one(self: GridExpr, *args: object) -> str:
        return f"({ceildiv(self, *args)} - 1)"

    with patch_attribute(GridExpr, "ceildiv", subtract_one if damage == SHORT else ceildiv):
        yield


def main(path: str, folder: str, damage: str) -> None:
    """Lower it; what there is to know of the package stands in `fqns.json`."""
    device, made = torch.device("cuda", 0), Path(folder)
    capability = torch.cuda.get_device_capability(device)
    sm = 10 * capability[0] + capability[1]
    target = Target(
        device="cuda",
        os="linux",
        level="x86_64_v3",
        torch=torch.__version__,
        git="",
        cuda=torch.version.cuda,
        sm=sm,
    )
    options = choose_inductor_options(target)
    options["joint_graph_constant_folding"] = damage == FOLDED
    program = put_on_device(load_program(Path(path)), device)
    program = name_attention(program, choose_kernels("float32", sm))
    (made / "keep").mkdir(parents=True)
    with damage_grids(damage):
        lower(
            program,
            target.level,
            options,
            made / "package.pt2",
            folder,
            None,
            "root",
            keep=made / "keep",
        )
    unpack_all(made / "package.pt2", made / "unpacked")
    library = next((made / "unpacked").rglob("*.wrapper.so"))
    runner = open_native_runner(made / "unpacked", Library.at(library), device)
    names = sorted(runner.get_constant_names_to_original_fqns().values())
    (made / "fqns.json").write_text(json.dumps(names))


if __name__ == "__main__":
    main(*sys.argv[1:])
