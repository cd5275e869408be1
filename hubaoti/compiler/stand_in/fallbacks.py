"""CUDA's functions that nobody wrote for the stand-in: one each, made from CUDA's own headers.

torch, triton and extensions of them ask for a thousand functions, of which the stand-in's C has
those that give more than a status. Each of the others is declared in a header beside torch, and
its declaration says what it may do here: one that only takes values says success, as where a GPU
has been told something; one that makes a handle makes one; and one that would give its caller a
value, or memory, is an error with its own name, so that nothing goes on with what nobody wrote.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hubaoti.settings import merge_environment

HEADERS = (
    "cuda.h",
    "cuda_runtime_api.h",
    "cublas_v2.h",
    "cublasLt.h",
    "cusparse.h",
    "cusolverDn.h",
    "cufftXt.h",
    "curand.h",
    "cudnn.h",
)
# By the type of a library's status, the value that says "not supported".
_NOT_SUPPORTED = {
    "cudaError_t": 801,
    "CUresult": 801,
    "cublasStatus_t": 15,
    "cusparseStatus_t": 10,
    "cusolverStatus_t": 9,
    "cufftResult": 16,
    "curandStatus_t": 999,  # it has no such value: an internal error
    "cudnnStatus_t": 3000,
}
_NOISE = re.compile(r"__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)|\b(?:extern|__extension__)\b")
_DECLARATION = re.compile(
    rf"\b({'|'.join(_NOT_SUPPORTED)})\s+(\w+)\s*\(((?:[^();]|\([^()]*\))*)\)\s*;"
)
# Versions without a handle are the libraries' own to say.
_OWN = re.compile(r"\w+Get(?:Cudart)?(?:Version|Property)(?:_v\d)?")
# What moves or makes memory is never done by saying so.
_MEMORY = re.compile(
    r"Memcpy|Memset|Set(?:Vector|Matrix)|Malloc|Alloc(?!ation)|MemMap|ToSymbol|FromSymbol|ToArray"
)


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One parameter: its text, with a name, and whether the function may write where it points."""

    text: str
    name: str
    written: bool


def write_fallbacks(includes: Sequence[Path]) -> str:
    """C source of a weak definition of every function that the headers declare.

    Raises:
        subprocess.CalledProcessError: gcc does not take the headers.
        FileNotFoundError: there is no gcc.
    """
    listing = "".join(f'#include "{name}"\n' for name in HEADERS if _is_there(name, includes))
    flags = [f"-I{folder}" for folder in includes]
    done = subprocess.run(
        ["gcc", "-E", "-P", *flags, "-"],
        input=listing,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        env=merge_environment({"LC_ALL": "C"}),
    )
    found = {match[2]: match for match in _DECLARATION.finditer(_NOISE.sub("", done.stdout))}
    bodies = [
        _define(match[1], match[2], [*_read_parameters(match[3])]) for match in found.values()
    ]
    return "\n".join([listing, '#include "stand_in.h"', "", *filter(None, bodies), ""])


def _is_there(name: str, includes: Sequence[Path]) -> bool:
    return any((folder / name).is_file() for folder in includes)


def _read_parameters(text: str) -> Iterator[_Parameter]:
    """The parameters of a declaration, each with a name, as a definition needs them."""
    parts = re.split(r",(?![^()]*\))", text)
    for index, part in enumerate(" ".join(part.split()) for part in parts):
        if part in ("void", ""):
            return
        if "(" in part:  # a pointer to a function
            yield _Parameter(part, "", False)
            continue
        found = re.fullmatch(r"(.*?[\s*])(\w+)((?:\s*\[\w*\])*)", part)
        if found is None or found[2] in ("int", "char", "long", "unsigned", "const"):
            part, name, kind = f"{part} p{index}", f"p{index}", part
        else:
            name, kind = found[2], found[1] + ("*" if found[3] else "")
        yield _Parameter(part, name, _is_written(kind))


def _is_written(kind: str) -> bool:
    """Whether a type points at what may be changed: `int *`, `void **`, not `const int *`."""
    inner, star, _ = kind.rstrip().removesuffix("const").rpartition("*")
    return bool(star) and not re.search(r"\bconst\s*$|^\s*const\b[^*]*$", inner)


def _define(status: str, name: str, parameters: list[_Parameter]) -> str:
    """The definition of one function; nothing where the library's own serves."""
    first = parameters[0] if parameters else _Parameter("", "", False)
    if _OWN.fullmatch(name) and "andle" not in first.text:
        return ""
    head = f"__attribute__((weak)) {status} {name}({', '.join(p.text for p in parameters)})"
    refusal = f'({status})refuse_unknown("{name}", {_NOT_SUPPORTED[status]})'
    if status == "cudaError_t":
        refusal = f"keep({refusal})"
    if _MEMORY.search(name):
        return f"{head} {{ return {refusal}; }}"
    if "Destroy" in name and len(parameters) == 1 and not first.written:
        return f"{head} {{ drop_handle((void *)(size_t){first.name}); return 0; }}"
    written = [p for p in parameters if p.written and _gives_value(p, name)]
    if "Create" in name and len(written) == 1:
        made = f"make_handle({written[0].name}, sizeof *{written[0].name})"
        return f"{head} {{ return {made} ? 0 : {refusal}; }}"
    if not written:
        return f"{head} {{ return 0; }}"
    asked = " || ".join(f"is_host({p.name})" for p in written)
    return f"{head} {{ return {asked} ? {refusal} : 0; }}"


def _gives_value(parameter: _Parameter, name: str) -> bool:
    """Whether a caller would read there; a plain `void *` is a buffer, but where one asks."""
    return "Get" in name or not re.match(r"void\s*\*\s*\w+$", parameter.text)
