"""GPUs as torch counts them, in this process: what they are, and which of them an artifact fits.

Torch's order is CUDA's, of those that `CUDA_VISIBLE_DEVICES` shows, and by default the fastest
first; the driver lists all of them by their places on the bus. So what was judged by the driver's
list is judged once more by torch's, where a graph is opened.
"""

from __future__ import annotations

import torch

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.requirements import Requirements
from hubaoti.errors import NoMatch
from hubaoti.host.match import Refusal, judge_gpus
from hubaoti.host.probe import STAND_IN, Gpu
from hubaoti.runtime.graph import choose_graph_device


def query_gpu(device: torch.device) -> Gpu:
    """A GPU's name, compute capability and memory; torch makes a context for it."""
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, 10 * found.major + found.minor, found.total_memory)


def computes(device: torch.device) -> bool:
    """Whether a device computes at all, which one that stands in for a GPU does not."""
    return device.type != "cuda" or not query_gpu(device).name.endswith(STAND_IN)


def choose_device(manifest: Manifest, wanted: str | None = None) -> torch.device:
    """Where an artifact's graphs are opened: where that is asked, else on the CPU or what fits.

    Raises:
        BadRequest: what is asked for is no device, or one of another kind.
        NoMatch: no GPU fits, with every reason.
    """
    if wanted is None and manifest.target.device == "cuda":
        return _choose_gpu(manifest.requires)
    device = choose_graph_device(manifest.target.device, wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise _describe_no_gpu(manifest.requires, f"no {device}")
    return device


def _choose_gpu(requires: Requirements) -> torch.device:
    """The GPU that fits an artifact best, the first of equals.

    Raises:
        NoMatch: none does, with every reason.
    """
    count = torch.cuda.device_count()
    verdict = judge_gpus(requires, [query_gpu(torch.device("cuda", i)) for i in range(count)])
    if not count:
        raise _describe_no_gpu(requires, "none")
    _refuse(verdict.refusals)
    return torch.device("cuda", verdict.device or 0)


def _describe_no_gpu(requires: Requirements, what: str) -> NoMatch:
    """The error of a GPU that torch does not see."""
    return NoMatch(
        f"the artifact needs an NVIDIA GPU of sm_{requires.sm}; torch {torch.__version__} sees "
        f"{what}",
        hint="see what is here with hubaoti doctor: a torch without CUDA sees none, and none that "
        "CUDA_VISIBLE_DEVICES hides",
    )


def require_gpu(requires: Requirements, device: torch.device) -> None:
    """See that a GPU is of a kind that an artifact was built for; of a CPU nothing is asked.

    Raises:
        NoMatch: it is not, with every reason.
    """
    if device.type == "cuda":
        _refuse(judge_gpus(requires, [query_gpu(device)]).refusals)


def _refuse(refusals: tuple[Refusal, ...]) -> None:
    if refusals:
        reasons = "; ".join(f"needs {each.need}, here is {each.have}" for each in refusals)
        raise NoMatch(f"the artifact {reasons}", hint=refusals[0].advice)
