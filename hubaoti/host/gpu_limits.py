"""What NVIDIA GPUs can have, by capability."""

from __future__ import annotations

# Bytes of shared memory that one block can have, by sm: "Maximum amount of shared memory per
# thread block" in the CUDA C++ Programming Guide, Technical Specifications per Compute Capability.
_SHARED_MEMORY = {
    **dict.fromkeys((50, 52, 53, 60, 61, 62), 48 << 10),
    75: 64 << 10,
    **dict.fromkeys((70, 72), 96 << 10),
    **dict.fromkeys((86, 89, 120, 121), 99 << 10),
    **dict.fromkeys((80, 87), 163 << 10),
    **dict.fromkeys((90, 100, 101, 103, 110), 227 << 10),
}
# What every GPU has; all that may be assumed of one that is not in the table.
_LEAST_SHARED_MEMORY = 48 << 10


def count_shared_memory(sm: int) -> int:
    """The bytes of shared memory that one block can have on a capability, 90 for 9.0."""
    return _SHARED_MEMORY.get(sm, _LEAST_SHARED_MEMORY)
