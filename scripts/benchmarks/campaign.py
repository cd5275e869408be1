"""What models cost that answer in turn: held by LightweightEngine, and loaded for each task."""

from __future__ import annotations

import gc
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.figures import Figure, divide_pairs, make_figure
from benchmarks.memory import measure_leaks
from benchmarks.minilm import find_minilm
from benchmarks.models import ModelCase
from hubaoti import LightweightEngine
from hubaoti.engines.decoder import Decoder
from hubaoti.engines.messages import Item, Sampling
from hubaoti.program.silence import silence_transformers
from hubaoti.settings import Settings

_CHOICES = 4  # of a question
_DIMS = {"batch": (1, 8), "seq": (1, 128), "cache": (16, 256)}
_WIDTH: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
_SPOKEN = {"vocab_size": 30522, "n_embd": 256, "n_layer": 8, "n_head": 8, "n_positions": 256}
# Its loading says most of what is around it.
_TINY = {**_WIDTH, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_WORDS = ("river", "stone", "paper", "winter", "engine", "music", "garden", "window", "copper")


def _make_decoder(kind: str, **sizes: Any) -> ModelCase:
    """A model that generates."""
    config = getattr(transformers, f"{kind}Config")
    architectures = [f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"]
    return ModelCase(
        config(architectures=architectures, **sizes), {"task": "generate", "dims": _DIMS}
    )


def _make_models() -> list[ModelCase]:
    """Those that answer in turn."""
    with silence_transformers():  # GPT2's config speaks of the ids of its own tokenizer
        return [
            _make_decoder("Llama", **_WIDTH),
            _make_decoder("Qwen3", **_WIDTH, head_dim=32),
            _make_decoder("GPT2", **_SPOKEN),
        ]


@dataclass(frozen=True)
class Sizes:
    """The models, and how much is asked of them."""

    models: Sequence[ModelCase] = field(default_factory=_make_models)
    tiny: ModelCase = _make_decoder("Llama", **_TINY)
    tasks: int = 20
    questions: int = 200
    times: int = 1000  # loaded and unloaded


def bench_campaign(
    scratch: Path, settings: Settings, rounds: int, sizes: Sizes | None = None
) -> Iterator[Figure]:
    """Tasks over three models whose graphs are in the mirror."""
    sizes = sizes or Sizes()
    folders = [
        _publish(scratch / f"{index}-{each.config.model_type}", each, settings)
        for index, each in enumerate(sizes.models)
    ]
    tiny = _publish(scratch / "tiny", sizes.tiny, settings)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        tempfile.tempdir = folder
        try:
            yield from _measure_tasks(folders, settings, sizes.tasks, rounds)
            yield from _measure_switches(folders, settings, rounds)
            yield _count_same_choices(folders[0], settings, sizes.questions)
            yield from _measure_unloading(tiny, settings, Path(folder), sizes.times)
        finally:
            tempfile.tempdir = None


def _publish(folder: Path, case: ModelCase, settings: Settings) -> Path:
    """A model of random weights, with MiniLM's tokenizer, whose graphs are in the mirror."""
    case.compile(folder, settings)
    with silence_transformers():
        case.make_model().save_pretrained(folder)
    shutil.copy(find_minilm() / "tokenizer.json", folder)
    return folder


def _load(folder: Path) -> Decoder:
    """A model as it is loaded for a task alone: the same code over it, without graphs."""
    with silence_transformers():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return Decoder(model.eval(), folder, ())


def _draw_tasks(folders: list[Path], count: int) -> list[tuple[Path, list[str]]]:
    """Who is asked what: a few prompts each, no model twice in a row."""
    chance, order = random.Random(7), list[tuple[Path, list[str]]]()
    for _ in range(count):
        others = [folder for folder in folders if not order or folder != order[-1][0]]
        prompts = [" ".join(chance.choices(_WORDS, k=chance.randint(3, 12))) for _ in range(4)]
        order.append((chance.choice(others), prompts))
    return order


def _answer_by_engine(folders: list[Path], settings: Settings, order: Any) -> list[Any]:
    """All tasks, by one engine."""
    with LightweightEngine(settings) as engine:
        for folder in folders:
            if engine.load(folder).state != "compiled":
                raise SystemExit(f"{folder.name} has no graphs: {engine.models()}")
        return [
            [answer.tokens for answer in engine.generate(folder, prompts, **_choose_greedily(16))]
            for folder, prompts in order
        ]


def _answer_alone(order: Any, tokens: int = 16) -> list[Any]:
    """All tasks, each by a model that is loaded for it."""
    found = []
    for folder, prompts in order:
        answers = _load(folder).generate(prompts, Sampling.of(**_choose_greedily(tokens)))
        found.append([answer.tokens for answer in answers])
        gc.collect()
    return found


def _choose_greedily(tokens: int) -> dict[str, Any]:
    """How tokens are generated that can be compared."""
    return {"max_new_tokens": tokens, "do_sample": False}


def _time_call(run: Callable[[], Any]) -> tuple[float, Any]:
    """How long something takes, and what it answers."""
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


def _measure_tasks(
    folders: list[Path], settings: Settings, count: int, rounds: int
) -> Iterator[Figure]:
    """The whole campaign; the engine's loading is in it."""
    order = _draw_tasks(folders, count)
    ours, theirs, same = [], [], []
    for index in range(rounds + 1):
        spent, found = _time_call(lambda: _answer_by_engine(folders, settings, order))
        alone, expected = _time_call(lambda: _answer_alone(order))
        if index:  # before, everything is imported
            ours.append(spent)
            theirs.append(alone)
            same.append(sum(a == b for a, b in zip(found, expected, strict=True)) / count)
    name = f"{count} tasks over {len(folders)} models"
    yield make_figure("campaign", f"{name}, loaded each time", theirs, "s")
    over = divide_pairs(ours, theirs)
    yield make_figure("campaign", f"{name}, by an engine", over, "times", ("at most", 0.5))
    yield make_figure("campaign", "tasks with the same tokens", same, "of all", ("at least", 1))


def _measure_switches(folders: list[Path], settings: Settings, rounds: int) -> Iterator[Figure]:
    """From one model to another, up to its first token."""
    ours, theirs = [], []
    with LightweightEngine(settings) as engine:
        for folder in folders:
            engine.load(folder)
        for index in range(6 * rounds):
            folder = folders[index % len(folders)]
            held = partial(engine.generate, folder, "river stone", **_choose_greedily(1))
            ours.append(_time_call(held)[0])
            theirs.append(_time_call(partial(_answer_alone, [(folder, ["river stone"])], 1))[0])
    over = divide_pairs(theirs, ours)
    yield make_figure(
        "campaign", "a switch, loaded each time to held", over, "times", ("at least", 3)
    )


def _count_same_choices(folder: Path, settings: Settings, questions: int) -> Figure:
    """How many of the choices by score are those of the model without graphs."""
    chance, items = random.Random(3), []
    for _ in range(questions):
        context = " ".join(chance.choices(_WORDS, k=chance.randint(4, 20)))
        items += [
            Item(context, " " + " ".join(chance.choices(_WORDS, k=chance.randint(1, 4))))
            for _ in range(_CHOICES)
        ]
    with LightweightEngine(settings) as engine:
        engine.load(folder)
        ours = engine.score(folder, items)
        state = engine.state(folder)
    if state.eager or not state.compiled:
        raise SystemExit(f"the graphs did not score: {state}")
    theirs = _load(folder).score(items)
    same = [a == b for a, b in zip(_pick_likeliest(ours), _pick_likeliest(theirs), strict=True)]
    name = f"choices by score of {questions} items that are eager's"
    return make_figure("campaign", name, [sum(same) / questions], "of all", ("at least", 1))


def _pick_likeliest(answers: list[Any]) -> list[int]:
    """The most likely continuation of each item."""
    logprobs = torch.tensor([answer.logprob for answer in answers])
    return logprobs.view(-1, _CHOICES).argmax(1).tolist()


def _measure_unloading(
    folder: Path, settings: Settings, temporary: Path, times: int
) -> Iterator[Figure]:
    """What is left of models that are loaded, answer and are unloaded."""
    with LightweightEngine(settings) as engine:

        def once() -> None:
            engine.load(folder)
            engine.generate(folder, "river stone", **_choose_greedily(2))
            engine.unload(folder)

        name = f"{times} times loaded and unloaded"
        yield from measure_leaks("campaign", name, once, times, temporary)
