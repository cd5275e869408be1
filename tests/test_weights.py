"""Weights: a checkpoint's tensors by name, mapped where they can be used as they are."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from bundles import describe, make_bundle
from safetensors.torch import save_file

from hubaoti.artifact.schema import Constant, ConstantOrigin
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.errors import BadInput, MissingConstant
from hubaoti.runtime.weights import (
    INDEX,
    Checkpoint,
    align_tensor,
    cast_weight,
    find_checkpoint_files,
    load_constants,
    load_from_checkpoint,
)

CPU = torch.device("cpu")
VALUES = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4), "n": torch.arange(3)}


def sharded(folder: Path, weight_map: object, files: dict[str, list[str]]) -> Path:
    """A checkpoint of several files, and an index that may say something else."""
    for file, names in files.items():
        save_file({name: VALUES[name] for name in names}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def constant(
    fqn: str,
    *names: str,
    shape: tuple[int, ...] = (2, 3),
    dtype: str = "float32",
    transform: str | None = None,
) -> Constant:
    origin = ConstantOrigin(checkpoint=names, transform=transform)
    strides = tuple(torch.empty(shape).stride())
    return Constant(fqn=fqn, dtype=dtype, shape=shape, stride=strides, origin=origin)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file(VALUES, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path, CPU)


def test_a_tensor_is_found_by_the_first_of_its_names(checkpoint: Checkpoint) -> None:
    found = load_from_checkpoint(constant("x", "head.a", "a", "b"), checkpoint, CPU)
    assert torch.equal(found, VALUES["a"])


def test_a_checkpoint_in_parts_is_one_checkpoint(tmp_path: Path) -> None:
    parts = {"model-1.safetensors": ["a"], "model-2.safetensors": ["b", "n"]}
    weight_map = {name: file for file, names in parts.items() for name in names}
    checkpoint = Checkpoint(sharded(tmp_path, weight_map, parts), CPU)
    assert all(name in checkpoint for name in VALUES)
    assert all(torch.equal(checkpoint[name], value) for name, value in VALUES.items())


def test_a_file_outside_of_the_folder_is_never_opened(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(VALUES, tmp_path / "secret.safetensors")
    outside = {"a": "../secret.safetensors", "b": str(tmp_path / "secret.safetensors")}
    sharded(folder, outside | {"n": "in.safetensors"}, {"in.safetensors": ["n"]})
    assert find_checkpoint_files(folder) == [folder / "in.safetensors"]
    with pytest.raises(MissingConstant, match="no tensor for x"):
        load_from_checkpoint(constant("x", "a"), Checkpoint(folder, CPU), CPU)
    (folder / INDEX).write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(MissingConstant, match="no safetensors file"):
        find_checkpoint_files(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(MissingConstant, match=INDEX) as caught:
        Checkpoint(tmp_path, CPU)
    assert caught.value.hint


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingConstant, match=r"has no model\.safetensors") as caught:
        Checkpoint(tmp_path, CPU)
    assert "--model" in caught.value.hint


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, {"one.safetensors": ["a"]})
    with pytest.raises(MissingConstant, match=r"has no two\.safetensors"):
        Checkpoint(tmp_path, CPU)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: b"x" * 99])
def test_a_damaged_file_is_named(damage: object, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(VALUES, file)
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(MissingConstant, match=r"model\.safetensors is not a whole") as caught:
        Checkpoint(tmp_path, CPU)
    assert caught.value.hint


def test_a_tensor_of_another_shape_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(MissingConstant, match=r"a has shape \[2, 3\].*for \[3, 2\]") as caught:
        load_from_checkpoint(constant("x", "a", shape=(3, 2)), checkpoint, CPU)
    assert "another model" in caught.value.hint


def test_a_missing_tensor_is_named_with_all_that_was_looked_for(checkpoint: Checkpoint) -> None:
    with pytest.raises(MissingConstant, match="no tensor for x: looked for y, z; not there"):
        load_from_checkpoint(constant("x", "y", "z"), checkpoint, CPU)


def test_a_constant_that_transformers_makes_is_refused_though_a_tensor_has_its_name(
    checkpoint: Checkpoint,
) -> None:
    made = constant("x", "a", transform="made of several tensors")
    with pytest.raises(MissingConstant, match="transformers makes it") as caught:
        load_from_checkpoint(made, checkpoint, CPU)
    assert "--eager" in caught.value.hint


def test_a_bfloat16_checkpoint_serves_a_float32_graph(tmp_path: Path) -> None:
    half = VALUES["a"].to(torch.bfloat16)
    save_file({"a": half}, tmp_path / "model.safetensors")
    found = load_from_checkpoint(constant("x", "a"), Checkpoint(tmp_path, CPU), CPU)
    assert found.dtype == torch.float32
    assert torch.equal(found, half.float())


@pytest.mark.parametrize(("name", "dtype"), [("n", "float32"), ("b", "int64")])
def test_whole_and_broken_numbers_are_not_exchanged(
    name: str, dtype: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(BadInput, match=f"{name} is torch") as caught:
        cast_weight(name, checkpoint[name], getattr(torch, dtype))
    assert caught.value.hint


def test_a_tensor_is_used_where_the_file_is_mapped(tmp_path: Path) -> None:
    save_file({"a": VALUES["a"]}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, CPU)
    mapped = checkpoint["a"]
    assert align_tensor(mapped, CPU).data_ptr() == mapped.data_ptr()


def test_a_tensor_at_an_odd_address_is_copied() -> None:
    raw = memoryview(bytearray(33))[1:33]
    odd = torch.frombuffer(raw, dtype=torch.float32)
    assert odd.data_ptr() % 4
    assert align_tensor(odd, CPU).data_ptr() % 4 == 0
    assert align_tensor(torch.ones(8)[1:], torch.device("cuda", 0)).data_ptr() % 16 == 0


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    make_bundle(tmp_path / "bundle")
    return describe(tmp_path / "bundle", "root")


def test_constants_of_the_artifact_come_from_its_own_file(
    tmp_path: Path, entry: Entry, checkpoint: Checkpoint
) -> None:
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    save_file({"table": torch.full((4,), 7.0)}, artifact / "buffers.safetensors")
    shipped = msgspec.structs.replace(
        constant("table", shape=(4,)), origin=ConstantOrigin(file="buffers.safetensors")
    )
    whole = msgspec.structs.replace(entry, constants=(constant("x", "a"), shipped))
    found = load_constants(whole, artifact, checkpoint, CPU)
    assert torch.equal(found["x"], VALUES["a"])
    assert torch.equal(found["table"], torch.full((4,), 7.0))


def test_an_artifact_s_file_that_is_no_safetensors_is_an_error_that_says_so(
    tmp_path: Path, entry: Entry, checkpoint: Checkpoint
) -> None:
    (tmp_path / "buffers.safetensors").write_bytes(b"garbage")
    shipped = msgspec.structs.replace(
        constant("table"), origin=ConstantOrigin(file="buffers.safetensors")
    )
    whole = msgspec.structs.replace(entry, constants=(shipped,))
    with pytest.raises(MissingConstant, match="buffers.safetensors of the artifact") as caught:
        load_constants(whole, tmp_path, checkpoint, CPU)
    assert "compile it again" in caught.value.hint


def test_a_constant_that_the_artifact_s_file_lacks_is_an_error_that_says_so(
    tmp_path: Path, entry: Entry, checkpoint: Checkpoint
) -> None:
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    save_file({"other": torch.ones(1)}, artifact / "buffers.safetensors")
    shipped = msgspec.structs.replace(
        constant("table", shape=(4,)), origin=ConstantOrigin(file="buffers.safetensors")
    )
    whole = msgspec.structs.replace(entry, constants=(shipped,))
    with pytest.raises(MissingConstant, match="table") as caught:
        load_constants(whole, artifact, checkpoint, CPU)
    assert caught.value.hint
