"""A program lowered for a GPU that need not be here: in a process of its own, under the stand-in.

That process has a device of the target's capability that computes nothing, so nothing is read back
from it: what a program holds comes from the CPU, where it was made, and weights have no values.

Where kernels are chosen by measuring them, it runs on a GPU of this machine instead.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hubaoti.artifact.schema import Input
from hubaoti.errors import CompileFailed, HubaotiError, first_line
from hubaoti.host.processes import collect_records, describe_exit, join_parent, list_search_path
from hubaoti.host.wire import ErrorRecord
from hubaoti.settings import merge_environment

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

# What a lowering leaves in its folder: the package, what lies in it, and what tells of its kernels.
PACKAGE, UNPACKED, KEEP = "package.pt2", "unpacked", "keep"
_TRACE = 20_000  # characters of a traceback that a report has
_SECONDS = 3600.0  # of lowering one program, at most


class LowerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A saved program, and the folder for its package and what tells of its kernels.

    It is lowered for the compute capability `sm`; `measures` says that the process has a real GPU.
    `inputs` and `bounds` are those of the program, a bound being low, high and step. Heads up to
    `widest` are FlashAttention-3's, where it is among the `kernels`. The rest is as
    `inductor.lower` has it; `ops` are modules that register ops of the program.
    """

    program: bytes
    folder: bytes
    sm: int
    measures: bool
    inputs: tuple[Input, ...]
    bounds: dict[str, tuple[int, int, int]]
    kernels: tuple[str, ...]
    widest: int
    level: str
    options: dict[str, Any]
    where: str
    root: str
    spec: tuple[str, str] | None
    ops: tuple[str, ...]
    search: list[bytes] = msgspec.field(default_factory=list_search_path)


class Lowered(msgspec.Struct, frozen=True, tag=True):
    """The constants that a library reads, its call spec, and the ops of ours that it calls.

    Where FlashAttention-3 was asked for, `not_fa3` is the attention that others compute.
    """

    fqns: tuple[str, ...]
    call_spec: tuple[str, ...]
    ops: tuple[str, ...] = ()
    not_fa3: tuple[str, ...] = ()


def lower_elsewhere(request: LowerRequest, environment: Mapping[str, str]) -> Lowered:
    """Lower a program in a process that has the environment, and its temporary files in the folder.

    Raises:
        HubaotiError: of the step that failed there.
        CompileFailed: the process ended without a word.
    """
    kind = Lowered | ErrorRecord
    # Of triton, ptxas and gcc, which clear nothing away when they are ended.
    own = merge_environment({**environment, "TMPDIR": os.fsdecode(request.folder)})
    output = collect_records(__name__, request, kind, _SECONDS, environment=own)
    if output.records:
        found: Lowered = output.records[0]
        return found
    raise CompileFailed(
        f"lower: {describe_exit(output.code)}{': ' * bool(output.last)}{output.last}",
        hint="is there memory for it? else try --dtype float32, and report it",
    )


def main() -> None:
    """The process that lowers one program."""
    channel = join_parent(is_awaited=True)
    try:
        channel.send(_lower(channel.receive(LowerRequest)))
    except HubaotiError as error:
        trace = "".join(traceback.format_exception(error))  # as long as inductor and g++ have it
        channel.send(ErrorRecord.of(error, trace[-_TRACE:]))


def _find_device(sm: int) -> torch.device:
    """The first GPU of this process that has a compute capability.

    Raises:
        CompileFailed: none has it.
    """
    import torch

    count = torch.cuda.device_count()
    for index in range(count):
        major, minor = torch.cuda.get_device_capability(index)
        if 10 * major + minor == sm:
            return torch.device("cuda", index)
    raise CompileFailed(
        f"lower: none of {count} GPUs here has the capability sm{sm}",
        hint="which does CUDA_VISIBLE_DEVICES show? see: hubaoti doctor",
    )


def _leave_int8_products() -> AbstractContextManager[None]:
    """Around a lowering: products with 8-bit weights stay products, of weights made wider before.

    Of what mkldnn's patterns rewrite one is meant for GPUs, too: as `_weight_int8pack_mm`, whose
    kernel of torch 2.11 (aten/src/ATen/native/cuda/int8mm.cu) has a thread for each value, in
    float32 and without tensor cores. Private, checked on torch 2.11 to 2.15: inductor asks for the
    flag when a process lowers for the first time.
    """
    import torch

    return torch.backends.mkldnn.flags(enabled=False)


def _lower(request: LowerRequest) -> Lowered:
    """Lower a program for the device of this process, and open what came of it."""
    from hubaoti.compiler.asserts import require_asserts_hold
    from hubaoti.compiler.flash_attention import list_other_attention
    from hubaoti.compiler.inductor import lower
    from hubaoti.compiler.request import Range
    from hubaoti.compiler.signature import CallSignature
    from hubaoti.compiler.stand_in import require_stand_in
    from hubaoti.runtime.attention_ops import FA3

    if not request.measures:
        require_stand_in()
    device, folder = _find_device(request.sm), Path(os.fsdecode(request.folder))
    program = _load(request, device)
    face = CallSignature({}, request.inputs)
    bounds = {name: Range(*each) for name, each in request.bounds.items()}
    require_asserts_hold(program, bounds, face)
    with _leave_int8_products():
        lower(
            program,
            request.level,
            request.options,
            folder / PACKAGE,
            request.where,
            request.spec,
            request.root,
            folder / KEEP,
        )
    require_asserts_hold(program, bounds, face)  # what lowering took for granted, too
    lowered = _open(folder, device)
    asked = FA3 in request.kernels
    return (
        msgspec.structs.replace(lowered, not_fa3=list_other_attention(program))
        if asked
        else lowered
    )


def _load(request: LowerRequest, device: torch.device) -> ExportedProgram:
    """The program on the device, its attention named."""
    from hubaoti.compiler.attention import name_attention
    from hubaoti.compiler.saved_program import load_program, put_on_device
    from hubaoti.runtime.custom_ops import register_ops

    register_ops(request.ops, request.search)
    try:
        program = put_on_device(load_program(Path(os.fsdecode(request.program))), device)
    except Exception as error:  # torch raises of many kinds, as where an op is not registered
        raise CompileFailed(
            f"lower: the program cannot be loaded: {type(error).__name__}: {first_line(error)}",
            hint="an op that only your process registers has to be in a module of its own",
        ) from error
    try:
        return name_attention(program, request.kernels, request.widest)
    except HubaotiError:
        raise
    except Exception as error:  # of torch, which goes through the whole program once more
        raise CompileFailed(
            f"lower: attention cannot be named: {type(error).__name__}: {first_line(error)}",
            hint="report it with the model's config",
        ) from error


def _open(folder: Path, device: torch.device) -> Lowered:
    """Open the package that was made, for what it says of itself."""
    from hubaoti.artifact.package import unpack_all
    from hubaoti.runtime.graph_ops import list_own_ops
    from hubaoti.runtime.library import Library
    from hubaoti.runtime.runners import open_native_runner

    unpacked = folder / UNPACKED
    unpack_all(folder / PACKAGE, unpacked)
    library = next(unpacked.rglob("*.wrapper.so"))
    runner = open_native_runner(unpacked, Library.at(library), device)
    return Lowered(
        fqns=tuple(sorted({*runner.get_constant_names_to_original_fqns().values()})),
        call_spec=tuple(runner.get_call_spec()),
        ops=list_own_ops(library),
    )
