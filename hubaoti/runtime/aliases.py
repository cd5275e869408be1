"""Tensors that stand for others and do not keep them: what torch's containers are bound to.

A container never gives back what it was bound to (`update_constant_buffer` with `user_managed`,
torch 2.11 to 2.15): each tensor stays for as long as the process, and so would the weights of every
model that was attached. So it is given tensors without memory of their own, which whoever binds
keeps alive; and they are used again, since they are never given back either.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch

# By dtype and device; nobody has them now. Appending and popping are safe in threads.
FREE: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}


class Bound(dict[str, torch.Tensor]):
    """What a container is bound to, by its own names; `aliases` is what it is given instead.

    Whoever calls the container holds this until the call has ended. Then its aliases are free, so
    a container is bound anew, or never called again, before this is let go.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__({name: tensor.detach() for name, tensor in tensors.items()})
        with torch.inference_mode(False), torch.no_grad():  # in which one is made says nothing
            self.aliases = {name: _alias_tensor(tensor) for name, tensor in self.items()}
        weakref.finalize(self, _recycle_aliases, [*self.aliases.values()]).atexit = False


def _recycle_aliases(lent: Sequence[torch.Tensor]) -> None:
    """Have aliases used again; whatever they point to may be gone, and nobody looks."""
    for alias in lent:
        FREE.setdefault((alias.dtype, alias.device), []).append(alias)


def _alias_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor at the place of another, which it does not keep.

    Private, checked on torch 2.11 to 2.15: `torch._C._construct_storage_from_data_pointer`, which
    CUDA graphs of inductor are made with. Without it the tensor itself is given, and kept.
    """
    if not hasattr(torch._C, "_construct_storage_from_data_pointer"):
        return tensor.detach()
    size = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    place = tensor.data_ptr(), tensor.device, int(size)
    storage = torch._C._construct_storage_from_data_pointer(*place)
    alias = _take_free_alias(tensor.dtype, tensor.device)
    return alias.set_(storage, 0, tensor.shape, tensor.stride())


def _take_free_alias(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An alias that nobody has, or a new one."""
    try:
        return FREE[dtype, device].pop()
    except (KeyError, IndexError):
        return torch.empty(0, dtype=dtype, device=device)
