"""A CUDA device that is not there: what stands before CUDA's libraries in a process of its own.

Its C is built once for each torch, and kept below the home. In a process under it torch finds GPUs
of any capability, whose host code runs as on a real one and whose kernels do not.
"""

from hubaoti.compiler.stand_in.build import build_stand_in
from hubaoti.compiler.stand_in.environment import CAPABILITIES, StandIn, require_stand_in

__all__ = ["CAPABILITIES", "StandIn", "build_stand_in", "require_stand_in"]
