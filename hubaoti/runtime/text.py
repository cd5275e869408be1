"""Text in, tensors out, without transformers: a tokenizer, an open graph, and its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers

from hubaoti.errors import BadInput, ModelNotFound, OutOfBounds
from hubaoti.program.model_files import TextRules, flatten_config, read_json, read_text_rules
from hubaoti.runtime.graph import Graph


@dataclass(frozen=True, slots=True)
class Encoded:
    """Texts as a graph takes them: ids and mask of (batch, seq), int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class TextEncoder:
    """A model's own tokenizer, that neither truncates nor pads further than asked.

    To embed, texts are read as sentence-transformers reads them: after the model's default prompt,
    and up to the length that its files say. Beyond that they are refused, which it cuts off.
    """

    def __init__(self, folder: Path, pad_id: int | None = None, task: str = "") -> None:
        """Read `tokenizer.json`; `pad_id` is the model's, where it computes with it.

        Raises:
            ModelNotFound: the folder has none, or one that cannot be read.
            UnknownTask: its files say of texts what is not done here.
        """
        self._folder = folder
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelNotFound(
                f"{folder} has no tokenizer.json",
                hint="--model takes the model's folder or Hub id; slow tokenizers need --eager",
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            message = f"{file} cannot be read: {error}"
            raise ModelNotFound(message, hint="download it again") from error
        padding = self._tokenizer.padding or {}
        self._pad_id = int(padding.get("pad_id", 0)) if pad_id is None else pad_id
        self._left = padding.get("direction") == "left"
        # Silent truncation would change answers: a text that is too long is an error here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._rules = read_text_rules(folder, task)
        if self._rules.lowers:
            _lower_first(self._tokenizer)

    def encode(self, texts: Sequence[str], low: int = 1, high: int | None = None) -> Encoded:
        """Token ids of the texts, padded to the longest, and to `low` at least.

        Raises:
            OutOfBounds: a text has more than `high` tokens, or than the model's files say.
            BadInput: a text is not Unicode, as what a shell passed on byte by byte.
        """
        for text in texts:
            if not isinstance(text, str):
                raise BadInput(f"{text!r:.80} is no text", hint="give texts")
            require_unicode(text)
        rules = self._rules
        whole = [rules.prompt + text for text in texts] if rules.prompt else list(texts)
        rows = [item.ids for item in self._tokenizer.encode_batch(whole)]
        for text, row in zip(texts, rows, strict=True):
            refuse_too_long(text, len(row), rules)
            if high is not None and len(row) > high:
                raise OutOfBounds(
                    f"the text {shorten_text(text)!r} has {len(row)} tokens; it takes seq up to "
                    f"{high}",
                    hint=self._advise_on_length(low, len(row)),
                )
        return Encoded(*pad_rows(rows, self._pad_id, left=self._left, low=low))

    def _advise_on_length(self, low: int, length: int) -> str:
        """What to do about a text of so many tokens: no graph gives a model more positions."""
        config = flatten_config(read_json(self._folder / "config.json"))
        positions = config.get("max_position_embeddings", config.get("n_positions"))
        if isinstance(positions, int) and length > positions:
            return f"shorten it, or take another model: this one has {positions} positions"
        return (
            "shorten it; a model that has more positions is compiled for them with "
            f"--dim seq={low}:{length}"
        )


class TextModel:
    """An open graph that answers texts: `embed`, `classify` and `logits` alike."""

    def __init__(self, graph: Graph, encoder: TextEncoder, task: str = "") -> None:
        """`task` is what the graph does, for who looks at it.

        Raises:
            BadInput: the graph takes something else than ids and a mask.
        """
        taken = {item.name: item.shape for item in graph.entry.inputs}
        shapes = {*taken.values()}
        if not taken.keys() <= {"input_ids", "attention_mask"} or shapes != {("batch", "seq")}:
            raise BadInput(
                f"graph {graph.entry.id} takes {', '.join(sorted(taken)) or 'nothing'}, not texts "
                "of any batch and seq",
                hint="call it from Python with its tensors",
            )
        self.graph = graph
        self._encoder = encoder
        self._task = task

    def __repr__(self) -> str:
        entry = self.graph.entry
        bounds = (f"{dim} {low} to {high}" for dim, (low, high) in entry.bounds.items())
        named = [self._task] if self._task else []
        each = (*named, f"graph {entry.id}", *bounds, str(self.graph.device))
        return f"TextModel({', '.join(each)})"

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """The graph's first output for one text or some, in their order, as a CPU tensor.

        Raises:
            OutOfBounds: a text is longer than the graph's `seq`.
            BadInput: no text is given.
        """
        if isinstance(texts, str):
            texts = [texts]
        if not texts:
            raise BadInput("no text is given", hint='give one or more: --text "…"')
        low, high = self.graph.entry.bounds["seq"]
        encoded = self._encoder.encode(texts, low, high)
        self._refuse_foreign(encoded)
        parts = [self._run(encoded, rows, real) for rows, real in self._split_batches(len(texts))]
        return torch.cat(parts)

    def _refuse_foreign(self, encoded: Encoded) -> None:
        """On a GPU an id that the model does not have would end the process, not the call."""
        largest = int(encoded.input_ids.max())
        for item in self.graph.entry.inputs:
            bound = item.values.removeprefix("ids<")
            if bound.isdigit() and largest >= int(bound):
                raise BadInput(
                    f"the tokenizer gives the id {largest}, the model knows ids below {bound}",
                    hint="--model takes the folder of a model that has this program",
                )

    def _split_batches(self, count: int) -> Iterator[tuple[list[int], int]]:
        """Row numbers of each batch, and how many of them count; a short one repeats its last."""
        low, high = self.graph.entry.bounds["batch"]
        for start in range(0, count, high):
            rows = list(range(start, min(start + high, count)))
            yield rows + [rows[-1]] * (low - len(rows)), len(rows)

    def _run(self, encoded: Encoded, rows: list[int], real: int) -> torch.Tensor:
        """The graph's answers to these rows, the first `real` of them, on the CPU."""
        device = self.graph.device
        whole = {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}
        inputs = [whole[item.name][rows].to(device) for item in self.graph.entry.inputs]
        return self.graph(*inputs)[0][:real].cpu()


def refuse_too_long(text: str, length: int, rules: TextRules) -> None:
    """See that a text has no more tokens than the model's files say.

    Raises:
        OutOfBounds: it has.
    """
    if rules.most is not None and length > rules.most:
        prompt = " with the model's default prompt" if rules.prompt else ""
        raise OutOfBounds(
            f"the text {shorten_text(text)!r} has {length} tokens{prompt}; the model's files end "
            f"a text at {rules.most} ({rules.source})",
            hint="shorten it: cut off silently, as sentence-transformers does, it would have the "
            "vector of another text",
        )


def _lower_first(tokenizer: Any) -> None:
    """Have a tokenizer read small letters, unless that is a step of its own already."""
    given = tokenizer.normalizer
    is_sequence = isinstance(given, normalizers.Sequence)
    inner = [*given] if is_sequence else [given] if given else []
    if not any(isinstance(each, normalizers.Lowercase) for each in inner):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *inner])


def pad_rows(
    rows: Sequence[Sequence[int]],
    pad: int,
    device: torch.device | str = "cpu",
    *,
    left: bool,
    low: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask of (rows, the longest), int64; with less than `low` tokens, of `low`."""
    width = max(low, *map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.int64)
        mask[index, place] = 1
    return ids.to(device), mask.to(device)


def require_unicode(text: str) -> None:
    """See that a text has no half characters.

    Raises:
        BadInput: it has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the text {shorten_text(text)!r} is not UTF-8"
        raise BadInput(message, hint="give it in the encoding UTF-8") from error


def shorten_text(text: str) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= 40 else f"{text[:39]}…"
