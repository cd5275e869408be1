"""What the mirror counted, and what it advises."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import make_bundle
from commands import inside
from test_mirror_store import put

from hubaoti.artifact.canonical import encode_canonical
from hubaoti.artifact.sizes import format_size
from hubaoti.mirror import Artifact, Mirror
from hubaoti.mirror.answers import BUILT, HUB, MIRROR
from hubaoti.settings import Settings


@pytest.fixture
def mirror(settings: Settings) -> Iterator[Mirror]:
    with Mirror.open(settings.mirror) as found:
        yield found


@pytest.fixture
def artifact(mirror: Mirror, tmp_path: Path) -> Artifact:
    return put(mirror, make_bundle(tmp_path / "one"))


def stats(settings: Settings, *words: object) -> dict[str, object]:
    found: dict[str, object] = json.loads(inside(settings, "mirror", "stats", "--json", *words).out)
    return found


def test_an_empty_mirror_has_nothing_to_say(settings: Settings) -> None:
    found = stats(settings)
    assert (found["artifacts"], found["hit_rate"], found["unused"]) == (0, None, [])
    words = inside(settings, "mirror", "stats").out
    assert "nothing was asked for yet" in words and "would have taken" not in words


def test_hits_are_counted_by_tier_with_what_they_saved(
    mirror: Mirror, artifact: Artifact, settings: Settings
) -> None:
    for tier in (MIRROR, MIRROR, HUB, BUILT):
        mirror.answers.record(tier, artifact.manifest)
    found = stats(settings)
    assert found["hit_rate"] == 0.5
    assert found["saved_compile_seconds"] == pytest.approx(4.5)  # of 1.5 s each
    assert found["saved_bytes"] == 2 * artifact.manifest.size
    words = inside(settings, "mirror", "stats").out
    assert "mirror 2, hub 1, built 1, nobody 0; 50% hits" in words
    size = format_size(2 * artifact.manifest.size)
    assert (
        "a compile for each of 3 answers by mirror or hub would have taken 4.5 s in all, "
        f"a download for each of 2 answers by mirror {size}\n"
    ) in words
    assert "saved" not in words, "nobody would have compiled one artifact three times"


def test_prometheus_reads_every_line(
    mirror: Mirror, artifact: Artifact, settings: Settings
) -> None:
    mirror.answers.record(MIRROR, artifact.manifest)
    text = inside(settings, "mirror", "stats", "--prometheus").out
    line = re.compile(r"# (HELP|TYPE) \w+ .+|hubaoti_mirror_\w+(\{\w+=\"\w+\"\})? [0-9.e+]+")
    assert all(line.fullmatch(each) for each in text.splitlines())
    assert 'hubaoti_mirror_answers_total{tier="mirror"} 1' in text


def test_what_nobody_opened_for_a_week_is_named_with_why_it_stays(
    mirror: Mirror, artifact: Artifact, settings: Settings
) -> None:
    assert stats(settings)["unused"] == []
    with mirror.index.writing() as db:
        db.execute("update artifacts set added = ?", (time.time() - 8 * 24 * 3600,))
    mirror.index.record_built(artifact.manifest)
    with mirror.index.writing() as db:
        db.execute("delete from origins")
    (unused,) = stats(settings)["unused"]  # type: ignore[misc]
    assert unused["digest"] == artifact.digest and unused["kept"] == "built here, and not pushed"
    assert artifact.digest[:12] in inside(settings, "mirror", "stats").out
    mirror.usage.record_open(artifact.digest)
    assert stats(settings)["unused"] == []


def test_recorded_misses_say_which_dims_to_compile(settings: Settings, tmp_path: Path) -> None:
    missed = [{"region": "", "reason": "shape", "sizes": {"seq": 96}, "calls": 7}]
    build = {"dims": {"seq": [1, 64, 1]}, "buckets": [], "model": "acme/tiny", "task": "embed"}
    file = tmp_path / "misses.json"
    file.write_bytes(
        encode_canonical({"schema": 1, "build": build, "missed": missed, "regions": {}})
    )
    found = stats(settings, "--misses", file)
    assert found["compile_next"] == [
        "hubaoti compile acme/tiny --task embed --dim seq=1:96 -o bundle"
    ]
    assert inside(settings, "mirror", "stats", "--misses", tmp_path / "none").code == 2
