"""Small models of random weights: as folders, on a device, their inputs, and their errors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from gpu.place import Place
from hubaoti.artifact.bundle import Bundle
from hubaoti.compiler import from_config
from hubaoti.compiler.request import CompileRequest
from hubaoti.program.silence import silence_transformers

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # against float32, as a part of the largest value
TEXTS = ("a cat sits on the warm windowsill", "central banks raise interest rates")


@dataclass(frozen=True, slots=True)
class Model:
    """A model with random weights: its config on CUDA and on a CPU, and how it is compiled."""

    name: str
    kind: str
    config: dict[str, int]
    tiny: dict[str, int]
    dtype: str
    shapes: tuple[tuple[int, int], ...]  # (batch, seq), for times

    @property
    def repo(self) -> str:
        """Where it is pushed."""
        return f"local/{self.name}"

    def list_sizes(self, device: torch.device) -> tuple[tuple[int, int], ...]:
        """The shapes that are looked at; the last is the largest."""
        return self.shapes if device.type == "cuda" else ((1, 8), (2, 16))

    def choose_config(self, device: torch.device) -> dict[str, int]:
        """Its sizes: on a CPU they are tiny."""
        return self.config if device.type == "cuda" else self.tiny


_SMALLEST = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 128}
ENCODER = Model(
    name="encoder",
    kind="bert",
    config={"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    | {"intermediate_size": 1536, "vocab_size": 30522},
    tiny=_SMALLEST | {"num_attention_heads": 2},
    dtype="float32",
    shapes=((1, 16), (8, 64), (32, 128)),
)
CAUSAL_LM = Model(
    name="causal-lm",
    kind="llama",
    config={"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "intermediate_size": 1408, "vocab_size": 8000},
    tiny=_SMALLEST | {"num_attention_heads": 2, "num_key_value_heads": 1},
    dtype="bfloat16",
    shapes=((1, 16), (1, 256), (8, 256)),
)


def make_config(device: torch.device, model: Model) -> Any:
    """A model's config."""
    return transformers.AutoConfig.for_model(
        model.kind,
        **model.choose_config(device),
        max_position_embeddings=512,
        architectures=["BertModel" if model.kind == "bert" else "LlamaForCausalLM"],
    )


def write_model(device: torch.device, model: Model, folder: Path) -> Path:
    """A model's folder, as it would come from the Hub: weights, and all else."""
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    if model.kind == "bert":
        auto = transformers.AutoModel
    with silence_transformers():
        auto.from_config(make_config(device, model), dtype=torch.float32).save_pretrained(folder)
    return write_files(device, model, folder)


def write_files(device: torch.device, model: Model, folder: Path) -> Path:
    """What stands beside the weights: config, tokenizer, and how texts become vectors."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").is_file():
        make_config(device, model).save_pretrained(folder)
    words = {word: index for index, word in enumerate(("[PAD]", "[UNK]", *" ".join(TEXTS).split()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    if model.kind == "bert":
        kinds = ("Transformer", "Pooling", "Normalize")
        steps = [
            {
                "idx": index,
                "path": f"{index}_{kind}",
                "type": f"sentence_transformers.models.{kind}",
            }
            for index, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(steps))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def compile_model(place: Place, model: Model) -> Bundle:
    """Compiled from the config alone; hubaoti compares with eager of the same dtype itself."""
    batch, seq = model.list_sizes(place.device)[-1]
    return place.compile(
        model.name,
        write_files(place.device, model, place.folder / "models" / model.name),
        dims={"batch": (1, batch), "seq": (2, seq)},
        dtype=choose_dtype(model, place.device),
    )


def choose_dtype(model: Model, device: torch.device) -> str:
    """What a model is compiled in."""
    return model.dtype if device.type == "cuda" else "float32"


def load_eager(device: torch.device, folder: Path, dtype: str = "float32") -> Any:
    """The same weights through transformers, on the device that is checked."""
    request = CompileRequest(dtype=dtype, regions="none")
    return from_config.load_source(folder, request, device, weights=True).model


def make_inputs(
    device: torch.device, model: Model, batch: int, seq: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and a mask whose last row is padded on the right where there are two or more."""
    vocabulary = model.choose_config(device)["vocab_size"]
    generator = torch.Generator().manual_seed(batch * 1000 + seq)
    ids = torch.randint(2, vocabulary, (batch, seq), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, seq // 2 :] = 0
    return ids.to(device), mask.to(device)


def measure_largest(found: Any, expected: Any, mask: Any = None) -> float:
    """The largest difference, as a part of the largest value; padded positions do not count."""
    found, expected = found.double(), expected.double()
    if mask is not None and found.dim() == 3:
        found, expected = found[mask.bool()], expected[mask.bool()]
    return float((found - expected).abs().max() / expected.abs().max())


def require_near(error: float, allowed: float, what: str) -> None:
    """Fail where an error is above what its dtype allows, or is not a number."""
    words = f"{what} is {error:.1e} away from float32 eager; {allowed:.0e} is allowed"
    assert error <= allowed, words
