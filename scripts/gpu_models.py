"""The whole road of a model: compiled, pushed, pulled, opened, answered, run, timed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_road import Check, Failed, Finding, Road, milliseconds, stopwatch

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

    def sizes(self, road: Road) -> tuple[tuple[int, int], ...]:
        """The shapes that are looked at; the last is the largest."""
        return self.shapes if road.cuda else ((1, 8), (2, 16))


SMALLEST = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 128}
ENCODER = Model(
    name="encoder",
    kind="bert",
    config={"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    | {"intermediate_size": 1536, "vocab_size": 30522},
    tiny=SMALLEST | {"num_attention_heads": 2},
    dtype="float32",
    shapes=((1, 16), (8, 64), (32, 128)),
)
CAUSAL_LM = Model(
    name="causal-lm",
    kind="llama",
    config={"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "intermediate_size": 1408, "vocab_size": 8000},
    tiny=SMALLEST | {"num_attention_heads": 2, "num_key_value_heads": 1},
    dtype="bfloat16",
    shapes=((1, 16), (1, 256), (8, 256)),
)


def write_model(road: Road, model: Model) -> Path:
    """A model's folder, as it would come from the Hub: config, weights, tokenizer."""
    import tokenizers
    import torch
    import transformers

    from hubaoti.compiler.from_config import silence_transformers

    folder = road.folder / "models" / model.name
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model.kind, **(model.config if road.cuda else model.tiny), max_position_embeddings=512
    )
    sentences = model.kind == "bert"
    auto = transformers.AutoModel if sentences else transformers.AutoModelForCausalLM
    with silence_transformers():
        auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = {word: at for at, word in enumerate(("[PAD]", "[UNK]", *" ".join(TEXTS).split()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    if sentences:
        kinds = ("Transformer", "Pooling", "Normalize")
        steps = [
            {"idx": at, "path": f"{at}_{kind}", "type": f"sentence_transformers.models.{kind}"}
            for at, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(steps))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def eager_model(road: Road, model: Model, dtype: str = "float32") -> Any:
    """The same weights through transformers, on the device that is checked."""
    import torch

    from hubaoti.compiler import from_config
    from hubaoti.compiler.request import CompileRequest

    folder, device = road.made[model.name, "folder"], torch.device(road.device)
    asked = CompileRequest(dtype=dtype, regions="none")
    return from_config.load_source(folder, asked, device, weights=True).model


def inputs_of(road: Road, model: Model, batch: int, seq: int) -> tuple[Any, Any]:
    """Token ids, and a mask whose last row is padded on the right where there are two or more."""
    import torch

    vocabulary = (model.config if road.cuda else model.tiny)["vocab_size"]
    generator = torch.Generator().manual_seed(batch * 1000 + seq)
    ids = torch.randint(2, vocabulary, (batch, seq), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, seq // 2 :] = 0
    return ids.to(road.device), mask.to(road.device)


def distance(found: Any, expected: Any, mask: Any = None) -> float:
    """The largest difference, as a part of the largest value; padded positions do not count."""
    found, expected = found.double(), expected.double()
    if mask is not None and found.dim() == 3:
        found, expected = found[mask.bool()], expected[mask.bool()]
    return ((found - expected).abs().max() / expected.abs().max()).item()


def require(error: float, allowed: float, what: str) -> None:
    """Fail where an error is above what its dtype allows, or is not a number."""
    if not error <= allowed:
        raise Failed(f"{what} is {error:.1e} away from float32 eager; {allowed:.0e} is allowed")


# The road of one model


def compiled(road: Road, model: Model) -> Finding:
    """Compile from the config alone; hubaoti compares with eager of the same dtype itself."""
    from hubaoti import api

    folder = road.made[model.name, "folder"] = write_model(road, model)
    batch, seq = model.sizes(road)[-1]
    bundle = api.compile(
        folder,
        road.folder / "bundles" / model.name,
        dims={"batch": (1, batch), "seq": (2, seq)},
        dtype=model.dtype if road.cuda else "float32",
        device=road.device,
        settings=road.made["settings"],
    )
    road.made[model.name, "bundle"] = bundle
    found = bundle.manifest
    worst = max(check.max_relative for check in found.checks)
    said = f"{found.built.seconds:.1f} s, {found.size / 1e6:.1f} MB, largest error {worst:.1e}"
    facts = {"recipe": str(found.recipe), "variant": str(found.variant), "bytes": found.size}
    members = [member.path for member in found.graphs[0].members]
    built = {"seconds": found.built.seconds, "peak_bytes": found.built.peak_bytes}
    needs = {"needs": asdict(found.requires), "members": members}
    return Finding(said, facts | built | needs | {"largest_error": worst})


def pushed(road: Road, model: Model) -> Finding:
    """Push the bundle."""
    from hubaoti import api

    bundle, settings = road.made[model.name, "bundle"], road.made["settings"]
    commit = api.push(bundle, model.repo, settings=settings)
    return Finding(f"{commit.path} at {commit.commit[:12]}", {"path": commit.path})


def pulled(road: Road, model: Model) -> Finding:
    """Pull what fits this host best: what was pushed."""
    from hubaoti import api

    found = api.pull(model.repo, trust=True, settings=road.made["settings"])
    if found.artifact.digest != road.made[model.name, "bundle"].manifest.digest:
        raise Failed(f"another artifact came back: {found.place}")
    road.made[model.name, "artifact"] = found.artifact
    notes = "; ".join(f"{note.need}, here {note.have}" for note in found.verdict.notes)
    said = f"{found.verdict.fit}{': ' if notes else ''}{notes}"
    return Finding(said, {"verdict": found.verdict.to_dict()})


def opened(road: Road, model: Model) -> Finding:
    """Open with the container runner, the device's index given; and as torch's loader does."""
    import torch
    from torch._inductor import aoti_load_package

    from hubaoti.runtime.graph import open_graph

    artifact, device = road.made[model.name, "artifact"], torch.device(road.device)
    entry = artifact.manifest.graphs[0]
    with stopwatch() as first:
        graph = open_graph(artifact.graph_folder(entry), entry, device)
    runner = type(graph._runner).__name__
    if runner != ("AOTIModelContainerRunnerCuda" if road.cuda else "AOTIModelContainerRunnerCpu"):
        raise Failed(f"it was opened by {runner}, not by torch's container runner")
    with stopwatch() as second:
        open_graph(artifact.graph_folder(entry), entry, device)
    package = str(road.made[model.name, "bundle"].path / entry.file)
    with stopwatch() as public:
        aoti_load_package(package, device_index=-1 if device.index is None else device.index)
    road.made[model.name, "graph"] = graph
    times = {"first_ms": first[0], "second_ms": second[0], "aoti_load_package_ms": public[0]}
    said = f"{first[0]:.2f} ms, again {second[0]:.2f} ms, aoti_load_package {public[0]:.0f} ms"
    return Finding(said, {"runner": runner} | times)


def answered(road: Road, model: Model) -> Finding:
    """Bind the weights, and compare with float32 eager of the same weights at every shape."""
    import torch

    from hubaoti.runtime.weights import Checkpoint, load_constants

    graph, artifact = road.made[model.name, "graph"], road.made[model.name, "artifact"]
    folder = road.made[model.name, "folder"]
    with stopwatch() as bound:
        checkpoint = Checkpoint(folder, graph.device)
        graph.bind(load_constants(graph.entry, artifact.path, checkpoint, graph.device))
    eager, errors = eager_model(road, model), {}
    for batch, seq in model.sizes(road):
        ids, mask = inputs_of(road, model, batch, seq)
        with torch.no_grad():
            expected = eager(ids, mask)[0]
        errors[f"{batch}x{seq}"] = distance(graph(ids, mask)[0], expected, mask)
    dtype, worst = artifact.manifest.build.dtype, max(errors.values())
    require(worst, TOLERANCE[dtype], dtype)
    said = f"{dtype} is {worst:.1e} from float32 eager, bound in {bound[0]:.1f} ms"
    return Finding(said, {"dtype": dtype, "errors": errors, "bind_ms": bound[0]})


def ran(road: Road, model: Model) -> Finding:
    """`hubaoti run`, as a user would: texts in, the right answers out."""
    import torch

    from hubaoti import api
    from hubaoti.runtime.text import TextEncoder

    folder, settings = road.made[model.name, "folder"], road.made["settings"]
    answer = api.run(model.repo, folder, TEXTS, device=road.device, settings=settings)
    encoded = TextEncoder(folder).encode(TEXTS)
    ids, mask = encoded.input_ids.to(road.device), encoded.attention_mask.to(road.device)
    with torch.no_grad():
        expected = eager_model(road, model)(ids, mask)[0].cpu()
    error = distance(answer.values, expected, encoded.attention_mask)
    dtype = road.made[model.name, "artifact"].manifest.build.dtype
    require(error, TOLERANCE[dtype], "the answer")
    return Finding(f"{answer.task}: {list(answer.values.shape)}, error {error:.1e}")


def timed(road: Road, model: Model) -> Finding:
    """A call through eager, `torch.compile` and hubaoti, all in the recipe's dtype."""
    import torch

    graph, artifact = road.made[model.name, "graph"], road.made[model.name, "artifact"]
    eager = eager_model(road, model, artifact.manifest.build.dtype)
    torch._dynamo.reset()
    calls = {"eager": eager, "torch.compile dynamic": torch.compile(eager, dynamic=True)}
    if road.cuda:  # on a CPU one more takes long, and is the same line
        calls["torch.compile"] = torch.compile(eager, dynamic=False)
    calls["hubaoti"] = graph
    facts, said = {}, []
    for batch, seq in model.sizes(road) if road.cuda else model.sizes(road)[-1:]:
        times = milliseconds(road, calls, inputs_of(road, model, batch, seq))
        facts[f"{batch}x{seq}"] = times
        shown = ", ".join(f"{name} {found['median']:.2f}" for name, found in times.items())
        said.append(f"{batch}x{seq}: {shown} ms")
    return Finding("; ".join(said), facts)


def road_of(model: Model) -> Iterator[Check]:
    """The checks of one model, each needing the one before; a time needs no text."""
    steps = {"compile": compiled, "push": pushed, "pull": pulled, "open": opened}
    before = "serve"
    for step, function in (steps | {"answer": answered, "run": ran, "time": timed}).items():
        needs = f"{model.name} answer" if step == "time" else before
        before = f"{model.name} {step}"
        yield Check(before, lambda road, does=function: does(road, model), (needs,))
