"""What `spaces.aoti_load` 0.51 and `aokit.load` 0.1 do with a package, by torch's own loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubaoti.compiler.capture import replace_forward


@contextmanager
def patched(module: nn.Module, package: Path) -> Iterator[list[int]]:
    """A package answers for a module, or each child of a list, with what its `state_dict` has.

    Gives a list of which the one item counts the calls.
    """
    loaded = torch._inductor.aoti_load_package(str(package))
    names, calls = loaded.get_constant_fqns(), [0]

    def answering(part: nn.Module) -> Callable[..., Any]:
        saved = part.state_dict()

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            constants = {name: saved[name] for name in names if name in saved}
            loaded.load_constants(constants, check_full_update=True, user_managed=True)
            return loaded(*args, **kwargs)

        return forward

    with ExitStack() as around:
        for part in module if isinstance(module, nn.ModuleList) else [module]:
            around.enter_context(replace_forward(part, answering(part)))
        yield calls
