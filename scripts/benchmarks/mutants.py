"""Manifests that somebody changed in one place: each is read as what it says, or refused in words.

Half of them have another value, or none, and are written canonically; of the others some bytes are
other ones.
"""

from __future__ import annotations

import copy
import hashlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from bundles import make_bundle, make_host

from benchmarks.figures import Figure, make_figure
from hubaoti.artifact.canonical import encode_canonical
from hubaoti.artifact.manifest import parse_manifest
from hubaoti.errors import HubaotiError
from hubaoti.host.match import judge
from hubaoti.settings import Settings

_VALUES: tuple[Any, ...] = (None, 7, -1, 2**70, 1e300, True, "x", "../x", "\x1b[2J", [], [7], {})
_GONE = object()


def bench_mutants(
    scratch: Path, settings: Settings, rounds: int, mutants: int = 100_000
) -> Iterator[Figure]:
    """How many were not dealt with, and how many in a second."""
    text, chance = make_bundle(scratch / "bundle").manifest.to_json(), random.Random(0)
    value, wrong, accepted, began = msgspec.json.decode(text), 0, 0, time.perf_counter()
    for _ in range(mutants):
        mutant = _change_value(value, chance) if chance.random() < 0.5 else _flip(text, chance)
        try:
            accepted += _read(mutant)
        except Exception:
            wrong += 1
    name = f"{mutants} manifests changed in one place"
    yield make_figure("mutants", f"{name}, wrong after", [float(wrong)], "", ("at most", 0))
    yield make_figure(
        "mutants", f"{name}, share that says something else", [accepted / mutants], ""
    )
    yield make_figure("mutants", f"{name}, a second", [mutants / (time.perf_counter() - began)], "")


def _read(text: bytes) -> bool:
    """Whether a text is a manifest, which can be judged then, and has the digest of its bytes.

    Raises:
        AssertionError: it is read as something else than it says, or refused without advice.
    """
    try:
        manifest = parse_manifest(text, "a mutant")
    except HubaotiError as why:
        assert why.hint and "\x1b" not in str(why)
        return False
    assert hashlib.sha256(text).hexdigest() == manifest.digest
    judge(manifest.requires, make_host())
    assert str(manifest.variant) and str(manifest.recipe) and manifest.size >= 0
    return True


def _change_value(value: Any, chance: random.Random) -> bytes:
    """The canonical form of a value with another one, or none, at a place."""
    changed = copy.deepcopy(value)
    inner = changed
    while True:
        places = [*inner] if isinstance(inner, dict) else [*range(len(inner))]
        place = chance.choice(places)
        below = inner[place]
        if not isinstance(below, dict | list) or not below or chance.random() < 0.2:
            break
        inner = below
    new = chance.choice((*_VALUES, _GONE))
    if new is _GONE:
        del inner[place]
    else:
        inner[place] = new
    return encode_canonical(changed)


def _flip(text: bytes, chance: random.Random) -> bytes:
    """A text with one to three other bytes."""
    changed = bytearray(text)
    for _ in range(chance.randint(1, 3)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)
