"""The whole road of a model: compiled, pushed, pulled, opened, answered, run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import aoti_load_package

from gpu.conftest import Found
from gpu.measure import stopwatch, summarize
from gpu.models import (
    CAUSAL_LM,
    ENCODER,
    TEXTS,
    TOLERANCE,
    Model,
    choose_dtype,
    compile_model,
    load_eager,
    make_inputs,
    measure_largest,
    require_near,
    write_model,
)
from gpu.place import Place, describe
from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.hub.push import Commit
from hubaoti.runtime.graph import open_graph
from hubaoti.runtime.text import TextEncoder
from hubaoti.runtime.weights import Checkpoint, load_constants
from hubaoti.server import serve_in_thread
from hubaoti.settings import Settings


def list_cases(every: bool) -> tuple[Model, ...]:
    """A model that embeds, and one that generates; on a CPU the first stands for both."""
    return (ENCODER, CAUSAL_LM) if every else (ENCODER,)


@pytest.fixture(scope="module")
def settings(place: Place) -> Iterator[Settings]:
    """An endpoint of our own on loopback."""
    with serve_in_thread(place.folder / "hub") as endpoint:
        yield Settings(place.folder / "home", endpoint.url, endpoint.token)


@pytest.fixture(scope="module")
def weights(case: Model, place: Place) -> Path:
    """The model's folder, as it would come from the Hub."""
    return write_model(place.device, case, place.folder / "weights" / case.name)


@pytest.fixture(scope="module")
def repo(case: Model) -> str:
    """Where it is pushed."""
    return f"local/{case.name}"


@pytest.fixture(scope="module")
def bundle(place: Place, case: Model) -> Bundle:
    """Compiled from the config alone."""
    return place.get_bundle(case.name, lambda at: compile_model(at, case))


@pytest.fixture(scope="module")
def commit(bundle: Bundle, repo: str, settings: Settings) -> Commit:
    """It is pushed."""
    return api.push(bundle, repo, as_is=True, settings=settings)


@pytest.fixture(scope="module")
def pulled(commit: Commit, repo: str, settings: Settings) -> Any:
    """What fits this host best is pulled."""
    return api.pull(repo, trust=True, settings=settings)


@pytest.fixture(scope="module")
def opened(pulled: Any, device: torch.device) -> tuple[Any, float]:
    """Its graph, the device's index given, and the milliseconds that opening took."""
    entry = pulled.artifact.manifest.graphs[0]
    with stopwatch() as spent:
        graph = open_graph(pulled.artifact.graph_folder(entry), entry, device)
    return graph, spent[0]


@pytest.fixture(scope="module")
def bound(opened: tuple[Any, float], pulled: Any, weights: Path) -> tuple[Any, float]:
    """The graph, bound to the model's weights, and the milliseconds that it took."""
    graph, _ = opened
    with stopwatch() as spent:
        checkpoint = Checkpoint(weights, graph.device)
        path = pulled.artifact.path
        graph.bind(load_constants(graph.entry, path, checkpoint, graph.device))
    return graph, spent[0]


def test_built(bundle: Bundle, found: Found) -> None:
    said, facts = describe(bundle)
    found(said, **facts, needs=asdict(bundle.manifest.requires))


def test_push(commit: Commit, found: Found) -> None:
    found(f"{commit.path} at {commit.commit[:12]}", path=commit.path)


def test_pull(pulled: Any, bundle: Bundle, found: Found) -> None:
    """What fits this host best is what was pushed."""
    notes = "; ".join(f"{note.need}, here {note.have}" for note in pulled.verdict.notes)
    words = f"{pulled.verdict.fit}{': ' if notes else ''}{notes}"
    found(words, verdict=pulled.verdict.to_dict())
    digest = pulled.artifact.digest
    assert digest == bundle.manifest.digest, f"another artifact came back: {pulled.place}"


def test_open(
    opened: tuple[Any, float], pulled: Any, bundle: Bundle, device: torch.device, found: Found
) -> None:
    """It is opened by the library's own interface, beside torch's own loader."""
    graph, first = opened
    with stopwatch() as second:
        open_graph(pulled.artifact.graph_folder(graph.entry), graph.entry, device)
    package = str(bundle.path / graph.entry.file)
    with stopwatch() as public:
        aoti_load_package(package, device_index=-1 if device.index is None else device.index)
    runner = type(graph._runner).__name__
    times = {"first_ms": first, "second_ms": second[0], "aoti_load_package_ms": public[0]}
    words = f"{first:.2f} ms, again {second[0]:.2f} ms, aoti_load_package {public[0]:.0f} ms"
    found(words, runner=runner, **times)
    expected = "Container" if device.type == "cuda" else "OnCpu"
    assert runner == expected, f"it was opened by {runner}, not by the library's own interface"


def test_answer(
    bound: tuple[Any, float], device: torch.device, case: Model, weights: Path, found: Found
) -> None:
    """It answers as float32 eager of the same weights does, at every shape."""
    graph, spent = bound
    eager, errors = load_eager(device, weights), dict[str, float]()
    for batch, seq in case.list_sizes(device):
        ids, mask = make_inputs(device, case, batch, seq)
        with torch.no_grad():
            expected = eager(ids, mask)[0]
        errors[f"{batch}x{seq}"] = measure_largest(graph(ids, mask)[0], expected, mask)
    dtype, worst = choose_dtype(case, device), max(errors.values())
    words = f"{dtype} is {worst:.1e} from float32 eager, bound in {spent:.1f} ms"
    found(words, dtype=dtype, errors=errors, bind_ms=spent)
    require_near(worst, TOLERANCE[dtype], dtype)


@pytest.fixture
def answer(pulled: Any, device: torch.device, weights: Path, repo: str, settings: Settings) -> Any:
    """What `hubaoti run` answers to texts."""
    return api.run(repo, weights, TEXTS, device=str(device), settings=settings)


def test_run(answer: Any, device: torch.device, case: Model, weights: Path, found: Found) -> None:
    """`hubaoti run`, as a user would: texts in, the right answers out."""
    encoded = TextEncoder(weights).encode(TEXTS)
    ids, mask = encoded.input_ids.to(device), encoded.attention_mask.to(device)
    with torch.no_grad():
        expected = load_eager(device, weights)(ids, mask)[0].cpu()
    error = measure_largest(answer.values, expected, encoded.attention_mask)
    found(f"{answer.task}: {list(answer.values.shape)}, error {error:.1e}")
    require_near(error, TOLERANCE[choose_dtype(case, device)], "the answer")


# What the checks would see


def test_answers_that_are_no_numbers_are_not_near() -> None:
    nothing, one = torch.full((2,), float("nan")), torch.ones(2)
    with pytest.raises(AssertionError):
        require_near(measure_largest(nothing, one), 1e-4, "float32")


def test_padded_positions_do_not_count() -> None:
    expected, found = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    found[0, 1] = 7
    assert measure_largest(found, expected, torch.tensor([[1, 0]])) == 0
    assert measure_largest(found, expected, torch.tensor([[1, 1]])) == 6


def test_the_median_lies_in_its_interval() -> None:
    found = summarize([float(number) for number in range(101)])
    assert (found["median"], found["low"], found["high"]) == (50, 40, 60)
