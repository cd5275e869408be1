"""Transformers of diffusers, tiny: captured in a pipeline, planned, compiled, and put back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from loaders import patched
from opened import opened, unpacked
from serving import matched
from torch import nn

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.compiler.capture import Calls, Frozen, make_call, replace_forward, thaw
from hubaoti.hub.zerogpu import lay_out_packages
from hubaoti.program.silence import silence_transformers
from hubaoti.runtime.graph import Graph
from hubaoti.settings import Settings

with silence_transformers(), warnings.catch_warnings(action="ignore"):
    import diffusers

TOLERANCE = 1e-4
STEPS = 2  # of a pipeline

Sizes = tuple[int, int, int, int]  # rows, height and width in patches, tokens of text
SEEN: tuple[Sizes, ...] = ((1, 2, 3, 6), (2, 3, 3, 7), (3, 3, 4, 11))
UNSEEN: Sizes = (2, 2, 5, 9)


def flux(rows: int, height: int, width: int, text: int) -> dict[str, Any]:
    """What FluxPipeline gives its transformer: packed latents, and ids of places."""
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).float()
    return {
        "hidden_states": torch.randn(rows, height * width, 4),
        "encoder_hidden_states": torch.randn(rows, text, 32),
        "pooled_projections": torch.randn(rows, 32),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "timestep": torch.full((rows,), 0.5),
    }


def sd3(rows: int, height: int, width: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(rows, 4, height, width),
        "encoder_hidden_states": torch.randn(rows, text, 32),
        "pooled_projections": torch.randn(rows, 64),
        "timestep": torch.full((rows,), 500),
    }


def wan(rows: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Two frames; a patch is two by two."""
    return {
        "hidden_states": torch.randn(rows, 4, 2, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(rows, text, 16),
        "timestep": torch.full((rows,), 500),
    }


def qwen(rows: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Its last row has less text than the others."""
    mask = torch.ones(rows, text, dtype=torch.long)
    mask[-1, -2:] = 0
    return {
        "hidden_states": torch.randn(rows, height * width, 16),
        "encoder_hidden_states": torch.randn(rows, text, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((rows,), 0.5),
        "img_shapes": [(1, height, width)] * rows,
    }


@dataclass(frozen=True)
class Kind:
    """A class of diffusers with a tiny config, how it is called, and what is compiled of it."""

    cls: str
    config: dict[str, Any]
    given: Callable[..., dict[str, Any]]
    region: str
    members: tuple[str, ...]  # the blocks that the region's graph is right for

    def make(self) -> Any:
        """The model, with the same random weights each time."""
        torch.manual_seed(11)
        with silence_transformers():
            return getattr(diffusers, self.cls)(**self.config).eval()

    def pipeline(self, model: nn.Module, *sizes: int) -> torch.Tensor:
        """Some steps of a sampler, as a pipeline makes them."""
        torch.manual_seed(sum(sizes))
        given = self.given(*sizes)
        answer = torch.zeros(())
        for _ in range(STEPS):
            with torch.no_grad():
                answer = model(**given, return_dict=False)[0]
            wide = answer.shape == given["hidden_states"].shape
            given["hidden_states"] = given["hidden_states"] - 0.5 * (answer if wide else 1)
        return answer

    def calls(self, model: nn.Module) -> Calls:
        """What the pipeline calls the model with, at three sizes."""
        with hubaoti.capture(model) as calls:
            for sizes in SEEN:
                self.pipeline(model, *sizes)
        return calls


KINDS = {
    "flux": Kind(
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
        flux,
        "transformer_blocks",
        ("transformer_blocks.0", "transformer_blocks.1"),
    ),
    "sd3": Kind(
        "SD3Transformer2DModel",
        {
            "sample_size": 32,
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 64,
            "out_channels": 4,
        },
        sd3,
        "transformer_blocks.0",
        ("transformer_blocks.0", "transformer_blocks.1"),
    ),
    "wan": Kind(
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 256,
            "ffn_dim": 32,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        wan,
        "blocks",
        ("blocks.0", "blocks.1"),
    ),
    "qwen": Kind(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        qwen,
        "transformer_blocks",
        ("transformer_blocks.0", "transformer_blocks.1"),
    ),
}
ROWS, IMAGE, TEXT = "hidden_states_0", "hidden_states_1", "encoder_hidden_states_1"
JOINT = {
    "hidden_states": [ROWS, IMAGE, 32],
    "encoder_hidden_states": [ROWS, TEXT, 32],
    "temb": [ROWS, 32],
}
ROTARY = {f"image_rotary_emb_{at}": [f"{TEXT}+{IMAGE}", 16] for at in range(2)}
# Each graph's blocks, and what they take.
PLANS: dict[str, dict[str, tuple[list[str], dict[str, list[Any]]]]] = {
    "flux": {
        "transformer_blocks": (
            ["transformer_blocks.0", "transformer_blocks.1"],
            JOINT | ROTARY,
        ),
        "single_transformer_blocks": (
            ["single_transformer_blocks.0", "single_transformer_blocks.1"],
            JOINT | ROTARY,
        ),
    },
    "sd3": {  # the last block gives no text
        "transformer_blocks.jointtransformerblock0": (
            ["transformer_blocks.0", "transformer_blocks.1"],
            JOINT,
        ),
        "transformer_blocks.jointtransformerblock2": (["transformer_blocks.2"], JOINT),
    },
    "wan": {
        "blocks": (
            ["blocks.0", "blocks.1"],
            {
                "hidden_states": [ROWS, IMAGE, 24],
                "encoder_hidden_states": [ROWS, TEXT, 24],
                "temb": [ROWS, 6, 24],
                "rotary_emb_0": [1, IMAGE, 1, 12],
                "rotary_emb_1": [1, IMAGE, 1, 12],
            },
        ),
    },
    "qwen": {
        "transformer_blocks": (
            ["transformer_blocks.0", "transformer_blocks.1"],
            {
                "hidden_states": [ROWS, IMAGE, 48],
                "encoder_hidden_states": [ROWS, TEXT, 48],
                "encoder_hidden_states_mask": [ROWS, TEXT],
                "temb": [ROWS, 48],
                "image_rotary_emb_0": [IMAGE, 8],
                "image_rotary_emb_1": [TEXT, 8],
            },
        ),
    },
}
TOKENS = {"flux": "6:12", "sd3": "6:12", "wan": "12:24", "qwen": "6:12"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Where this file's models are compiled."""
    folder = tmp_path_factory.mktemp("diffusers")
    return Settings(home=folder / "home", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("name", KINDS)
def test_blocks_are_grouped_by_what_they_compute_and_take(name: str, home: Settings) -> None:
    kind = KINDS[name]
    model = kind.make()
    found = hubaoti.explain(model, calls=kind.calls(model), settings=home)
    assert model.config == kind.make().config, "it is a dictionary of a kind of its own"
    assert found.left_out == ()
    graphs = {graph["id"]: (graph["modules"], graph["inputs"]) for graph in found.graphs}
    assert graphs == PLANS[name]
    for graph in found.graphs:
        assert graph["dims"] == {ROWS: "1:3", IMAGE: TOKENS[name], TEXT: "6:11"}


@pytest.fixture(scope="module")
def compiled(home: Settings) -> Callable[[str], Bundle]:
    """Compiles the blocks of one kind, once."""

    @cache
    def compile_blocks(name: str) -> Bundle:
        kind = KINDS[name]
        model = kind.make()
        return hubaoti.compile(
            model,
            home.home.parent / name,
            calls=kind.calls(model),
            regions=kind.region,
            layout="zerogpu" if name == "flux" else None,
            jobs=1,
            settings=home,
        )

    return compile_blocks


@contextmanager
def answering(model: nn.Module, graphs: dict[str, Graph], counts: dict[str, int]) -> Iterator[None]:
    """Blocks of a model answer by graphs, each of which must answer as the block does."""

    def around(path: str, block: nn.Module) -> Callable[..., Any]:
        graph, eager = graphs[path], block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = make_call(eager, args, kwargs)
            places = dict(matched(graph.entry.call, call.template))
            found = graph(*(call.tensors[places[at]] for at in sorted(places)))
            expected = Frozen()
            expected.freeze(eager(*args, **kwargs), "output")
            for ours, theirs in zip(found, expected.tensors, strict=True):
                assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
            counts[path] += 1
            return thaw(graph.entry.outputs.template, found, {})

        return forward

    with ExitStack() as all_of_them:
        for path in graphs:
            block = model.get_submodule(path)
            all_of_them.enter_context(replace_forward(block, around(path, block)))
        yield


@pytest.mark.parametrize(
    "name",
    ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd3", "wan", "qwen"))],
)
def test_a_pipeline_whose_blocks_are_compiled_answers_as_before(
    name: str, compiled: Callable[[str], Bundle], tmp_path: Path
) -> None:
    """One graph for all members, each with its own weights, at recorded sizes and at others."""
    kind, bundle = KINDS[name], compiled(name)
    bundle.check()
    (entry,) = bundle.manifest.graphs
    folder = unpacked(bundle, tmp_path)[entry.id]
    model = kind.make()
    for parameter in model.parameters():
        parameter.data.mul_(1.25)  # no weights that it was compiled with
    graphs = {
        path: opened(bundle, entry, folder, model.get_submodule(path)) for path in kind.members
    }
    for sizes in (*SEEN, UNSEEN):
        expected = kind.pipeline(model, *sizes)
        counts = dict.fromkeys(kind.members, 0)
        with answering(model, graphs, counts):
            found = kind.pipeline(model, *sizes)
        assert set(counts.values()) == {STEPS}
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_flux_s_blocks_answer_by_the_loaders_that_know_no_manifest(
    compiled: Callable[[str], Bundle],
) -> None:
    kind, bundle = KINDS["flux"], compiled("flux")
    ((path, file),) = lay_out_packages(bundle.manifest).items()
    assert path == "package/submodules/transformer_blocks/package.pt2"
    model = kind.make()
    for sizes in (SEEN[0], UNSEEN):
        expected = kind.pipeline(model, *sizes)
        with patched(model.transformer_blocks, bundle.path / file) as calls:
            found = kind.pipeline(model, *sizes)
        assert calls == [STEPS * len(model.transformer_blocks)]
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.slow
def test_complex_inputs_are_inputs_like_others(compiled: Callable[[str], Bundle]) -> None:
    """Qwen-Image gives its blocks rotary embeddings as complex numbers."""
    (entry,) = compiled("qwen").manifest.graphs
    assert [item.name for item in entry.inputs if item.dtype == "complex64"] == [
        "image_rotary_emb_0",
        "image_rotary_emb_1",
    ]
    assert entry.golden is not None


def test_a_pipeline_answers_after_its_model_was_planned_without_being_run(home: Settings) -> None:
    kind = KINDS["qwen"]
    model, fresh = kind.make(), kind.make()
    with hubaoti.capture(model, n=len(SEEN), run=False) as calls:
        for sizes in SEEN:
            model(**kind.given(*sizes))
    hubaoti.explain(model, calls=calls, settings=home)
    assert torch.equal(kind.pipeline(model, *SEEN[0]), kind.pipeline(fresh, *SEEN[0]))
