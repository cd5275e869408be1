"""Compiling on the GPU's own machine, for comparison: the same block that was made elsewhere."""

from __future__ import annotations

import pytest

from gpu.conftest import Found
from gpu.measure import stopwatch
from gpu.place import Place, describe
from gpu.test_blocks import FORMS


@pytest.mark.gpu("what is compiled there is compared with what was made elsewhere")
def test_compile(place: Place, found: Found) -> None:
    with stopwatch() as spent:
        bundle = FORMS[0].compile(place)
    said, facts = describe(bundle)
    if (made := place.made) and place.is_gpu:
        other = place.get_bundle(FORMS[0].name, FORMS[0].compile)
        same = other.manifest.key == bundle.manifest.key
        said += f"; {'the same key' if same else 'another key'} as what was made beforehand"
        facts |= {"made": str(made.name), "same_key": same}
    found(f"{spent[0] / 1000:.1f} s; {said}", **facts, seconds_here=spent[0] / 1000)
