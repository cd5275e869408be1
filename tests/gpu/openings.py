"""Opens one package on a device, says each step, and where a crash was, if one comes.

    python tests/gpu/openings.py DEVICE FOLDER

`FOLDER` is a bundle, or has `plain.pt2`, a package that torch itself made. The last line of stdout
that begins with `step` is how far it came; a crash prints a native trace, by torch's own handler.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from pathlib import Path

import torch

_NATIVE = ("libcuda", "libcudart", "libnvidia", "libstdc++", "libgomp", "libtorch_cuda")
_START = time.perf_counter()


def say(step: str) -> None:
    """How far it came, and after how many milliseconds; a crash may follow."""
    sys.stdout.write(f"step {1000 * (time.perf_counter() - _START):.0f} ms {step}\n")
    sys.stdout.flush()


def list_mapped() -> list[str]:
    """The native libraries that decide what a package meets."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in lines if "/" in line}
    return sorted(path for path in paths if any(each in path for each in _NATIVE))


def open_plain(package: Path, device: torch.device) -> None:
    """A package with its weights inside, through torch's own loader."""
    from torch._inductor import aoti_load_package

    loaded = aoti_load_package(str(package), device_index=-1 if device.type == "cpu" else 0)
    say("opened")
    loaded(torch.ones(4, 256, device=device))
    say("called")


def open_bundle(folder: Path, device: torch.device) -> None:
    """Each graph of a bundle, bound to zeros, and called with numbers."""
    from hubaoti.api import get_artifact
    from hubaoti.api.attaching import require_kernels
    from hubaoti.artifact.bundle import Bundle
    from hubaoti.mirror import Mirror
    from hubaoti.progress import report_nothing
    from hubaoti.runtime.golden import choose_smallest_dims, make_golden_inputs
    from hubaoti.runtime.graph import open_graph
    from hubaoti.runtime.input_checks import parse_dtype
    from hubaoti.runtime.kernels import open_kernels
    from hubaoti.settings import Settings

    settings = Settings.from_env()
    artifact = get_artifact(Bundle.read(folder), True, settings, report_nothing)
    with Mirror.open(settings.mirror) as mirror:
        require_kernels(artifact, mirror, settings, report_nothing)
    if pins := artifact.manifest.requires.kernels:
        open_kernels(pins, artifact.kernels, device)
        say("kernels opened")
    for entry in artifact.manifest.graphs:
        graph = open_graph(artifact.graph_folder(entry), entry, device)
        say(f"{entry.id} opened")
        zeros = {
            each.fqn: torch.empty_strided(
                each.shape, each.stride, dtype=parse_dtype(each.dtype), device=device
            ).zero_()
            for each in entry.constants
        }
        graph.bind(zeros)
        say(f"{entry.id} bound")
        inputs = make_golden_inputs(entry, choose_smallest_dims(entry))
        graph(*(each.to(device) for each in inputs))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        say(f"{entry.id} called")


def main() -> None:
    """Open it, and wait for the device at the end."""
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    faulthandler.enable(all_threads=False)
    device, folder = torch.device(sys.argv[1]), Path(sys.argv[2])
    torch.zeros(1, device=device)
    say("the device is there")
    for path in list_mapped():
        sys.stdout.write(f"mapped {path}\n")
    if (folder / "plain.pt2").is_file():
        open_plain(folder / "plain.pt2", device)
    else:
        open_bundle(folder, device)
    say("done")


if __name__ == "__main__":
    main()
