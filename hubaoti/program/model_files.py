"""What a model's own files say of it: its config as it stands, what follows the encoder.

Read without torch or transformers, so that a runtime can see whether a model is of the program that
a graph was compiled for: equal shapes bind without complaint, and answer something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import msgspec

from hubaoti.artifact.schema import Program
from hubaoti.errors import ModelNotFound, OtherProgram, UnknownTask

_NO_LIMIT = 1 << 20  # tokenizers write 1e30 where a model has no limit
# Where sentence-transformers says how texts are read, by the names that it looks for in this order.
_SENTENCE_CONFIGS = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
POOLING = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def refuse_other_program(folder: Path, program: Program) -> None:
    """See that a model's files say nothing else than the program says.

    Only what both say is compared: a config leaves out what is at its default.

    Raises:
        OtherProgram: they differ; the message has every difference.
    """
    ours = flatten_config(read_json(folder / "config.json"))
    compiled = flatten_config(program.config)
    found = [
        f"{name} is {ours[name]!r}, the graph has {compiled[name]!r}"
        for name in sorted(ours.keys() & compiled.keys())
        if ours[name] != compiled[name]
    ]
    if program.task == "embed" and (folder / "modules.json").is_file():
        steps = read_sentence_steps(folder)
        if steps != program.steps:
            found.append(f"it ends with {list(steps)}, the graph with {list(program.steps)}")
    if found:
        raise OtherProgram(
            f"{folder.name} is not of the program that was compiled: {'; '.join(found)}",
            hint="compile this model, or answer with --eager",
        )


def flatten_config(config: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a config by their names, at any depth; a name of two values is left out.

    By name alone, because transformers moves some: `rope_theta` into `rope_parameters`.
    """
    values: dict[str, Any] = {}
    ambiguous = set()
    for name, value in _walk_config(config):
        if name in values and values[name] != value:
            ambiguous.add(name)
        values[name] = value
    return {name: value for name, value in values.items() if name not in ambiguous}


def _walk_config(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every number and word of a config with its own name."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _walk_config(value)
        elif isinstance(value, (bool, int, float, str)):
            yield name, value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is no such file.

    Raises:
        ModelNotFound: the file is not JSON.
    """
    value = _decode_json_file(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def _decode_json_file(path: Path) -> Any:
    """What a JSON file says."""
    try:
        return msgspec.json.decode(path.read_bytes())
    except msgspec.DecodeError as error:
        raise ModelNotFound(f"{path} cannot be read: {error}", hint="download it again") from error


def read_sentence_steps(folder: Path) -> tuple[str, ...]:
    """What follows the encoder, as the sentence-transformers files say; mean pooling without them.

    Raises:
        UnknownTask: a module that a graph cannot hold yet, or no pooling.
        ModelNotFound: a file says nothing of the kind.
    """
    listing = folder / "modules.json"
    if not listing.is_file():
        return ("mean",)
    steps: list[str] = []
    for kind, path in _read_sentence_modules(listing)[1:]:
        if kind == "Pooling":
            steps += parse_pooling_modes(read_json(folder / path / "config.json"))
        elif kind == "Normalize":
            steps.append("normalize")
        else:
            raise UnknownTask(
                f"{folder.name} ends with {kind}, which embed does not know",
                hint="embed takes Pooling and Normalize",
            )
    if not set(steps) & set(POOLING):
        raise UnknownTask(
            f"{folder.name} ends without a Pooling", hint="embed gives one vector a sentence"
        )
    return tuple(steps)


def _read_sentence_modules(listing: Path) -> list[tuple[str, str]]:
    """The kinds and folders of a sentence-transformers model's modules."""
    try:
        found = [
            (m["type"].rpartition(".")[2], m.get("path", "")) for m in _decode_json_file(listing)
        ]
        if any(".." in Path(path).parts or Path(path).is_absolute() for _, path in found):
            raise ValueError("a module's path leads outside")
        return found
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ModelNotFound(
            f"{listing} is no list of modules: {error!r}", hint="download it again"
        ) from error


def parse_pooling_modes(config: dict[str, Any]) -> list[str]:
    """The poolings that a sentence-transformers config turns on, in the order they are joined."""
    named = config.get("pooling_mode")
    if named is None:
        spelled = {each: f"{each}_tokens" for each in ("max", "mean", "weightedmean")}
        spelled["cls"] = "cls_token"
        modes = [m for m in POOLING if config.get(f"pooling_mode_{spelled.get(m, m)}")]
        return modes or ["mean"]
    modes = [named] if isinstance(named, str) else list(named)
    if not modes or not set(modes) <= {*POOLING}:
        raise UnknownTask(
            f"the model's pooling is {named}, which embed does not know",
            hint=f"embed takes {', '.join(POOLING)}",
        )
    return modes


@dataclass(frozen=True, slots=True)
class TextRules:
    """How a model's files say that texts are read before it answers them.

    Before each stands the `prompt`. A text has `most` tokens, where the file `source` says so.
    Where it `lowers`, a tokenizer that does not do so by itself is given small letters.
    """

    prompt: str = ""
    most: int | None = None
    source: str = ""
    lowers: bool = False


def read_text_rules(folder: Path, task: str) -> TextRules:
    """What sentence-transformers does with texts, as a model's files say; none but to embed.

    It cuts a text off at its end silently; who reads this is to refuse it, and change no vector.

    Raises:
        UnknownTask: a prompt's own tokens are to be left out of the pooling.
        ModelNotFound: a file is not JSON.
    """
    if task != "embed":
        return TextRules()
    has_list = (folder / "modules.json").is_file()
    modules = _read_sentence_modules(folder / "modules.json") if has_list else []
    first = folder / (modules[0][1] if modules else "")
    name = next((each for each in _SENTENCE_CONFIGS if (first / each).is_file()), "")
    own = read_json(first / name) if name else {}
    said = [
        (own.get("max_seq_length"), f"{name}: max_seq_length"),
        (_read_tokenizer_length(folder), "tokenizer_config.json: model_max_length"),
    ]
    limits = [(int(n), where) for n, where in said if _is_length(n)]
    most, source = limits[0] if limits else (None, "")
    prompt = _read_default_prompt(folder)
    if prompt:
        _refuse_unpooled_prompt(folder, modules)
    return TextRules(prompt, most, source, own.get("do_lower_case") is True)


def _read_default_prompt(folder: Path) -> str:
    """The prompt that stands before a text where nobody names one."""
    config = read_json(folder / "config_sentence_transformers.json")
    prompts, name = config.get("prompts"), config.get("default_prompt_name")
    found = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    return found if isinstance(found, str) else ""


def _refuse_unpooled_prompt(folder: Path, modules: list[tuple[str, str]]) -> None:
    """Refuse a pooling without the prompt's tokens: a graph pools what its mask shows it."""
    poolings = [folder / path / "config.json" for kind, path in modules if kind == "Pooling"]
    for config in map(read_json, poolings):
        if config.get("include_prompt") is False:
            raise UnknownTask(
                f"{folder.name} has a default prompt whose tokens are left out of its pooling "
                "(include_prompt is false), which embed does not know",
                hint="embed with sentence-transformers, or with a model whose pooling has them all",
            )


def _read_tokenizer_length(folder: Path) -> Any:
    """How many tokens a tokenizer says that a text may have."""
    return read_json(folder / "tokenizer_config.json").get("model_max_length")


def _is_length(value: Any) -> TypeGuard[int | float]:
    return type(value) in {int, float} and 2 <= value < _NO_LIMIT


def padding_id(program: Program) -> int | None:
    """The padding id, of a program that computes with it."""
    pad = program.config.get("pad_token_id")
    return pad if isinstance(pad, int) and pad >= 0 else None


def choose_max_length(
    folder: Path, config: Any, positions: int | None, most: int, task: str
) -> int:
    """The largest default for a length: less where the model or its tokenizer ends before.

    To embed, what sentence-transformers says of texts stands in the tokenizer's place.
    """
    names = ("max_position_embeddings", "max_seq_len")
    limits = [most, positions, *(getattr(config.get_text_config(), name, None) for name in names)]
    embeds = task == "embed"
    limits.append(read_text_rules(folder, task).most if embeds else _read_tokenizer_length(folder))
    return min(int(n) for n in limits if _is_length(n))
