"""A causal language model over texts: generate, score and embed, by its graphs or by itself.

With graphs, every call gets a static cache of a length that they serve; without, the model's own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hubaoti.artifact.manifest import Manifest
from hubaoti.engines.messages import Generation, Item, Likelihood, Message, Prompt, Sampling
from hubaoti.engines.tokens import (
    Pair,
    answer_by_length,
    find_common_prefix,
    find_starting_tokens,
    load_tokenizer,
    shorten_prompt,
)
from hubaoti.errors import BadInput, BadRequest, OutOfBounds, UnknownTask, first_line
from hubaoti.program.model_files import read_text_rules
from hubaoti.program.pooling import pool
from hubaoti.program.silence import silence_transformers
from hubaoti.runtime.call_template import choose_cache_word
from hubaoti.runtime.text import pad_rows, refuse_too_long, require_unicode, shorten_text

_DEFAULT_ROWS = 8  # prompts of a batch, where no graph says how many
LOGITS = 1 << 28  # bytes of float32 logits that scoring holds at a time


@dataclass(frozen=True, slots=True)
class ServedSizes:
    """What graphs serve: batches up to `rows`, static caches of `low` to `high` places, by `step`.

    Without graphs the caches are the model's own, and `high` is what it has positions for.
    """

    rows: int = _DEFAULT_ROWS
    low: int | None = None
    high: int | None = None
    step: int = 1

    @classmethod
    def of(cls, manifest: Manifest) -> ServedSizes:
        """What the graphs of a `generate` artifact serve."""
        rows = manifest.build.dims.get("batch", (1, _DEFAULT_ROWS, 1))[1]
        low, high, step = manifest.build.dims.get("cache", (None, None, 1))
        return cls(rows, low, high, step)

    def round_up(self, needed: int) -> int:
        """The length of a cache that has so many places."""
        assert self.low is not None
        return max(self.low, -(-needed // self.step) * self.step)


class Decoder:
    """A model of transformers that generates, with its own tokenizer."""

    def __init__(
        self, model: nn.Module, folder: Path, steps: tuple[str, ...], trust: bool = False
    ) -> None:
        """`steps` are what follows the last hidden state where texts are embedded; with `trust` the
        tokenizer's own code may run.

        Raises:
            ModelNotFound: the folder has no tokenizer that transformers can read.
        """
        self.model: Any = model
        # How long, over which cache and in which form is said by each call. `generate` fills in
        # from here what a call leaves out, so it must not stand here either.
        own: Any = self.model.generation_config
        own.max_length = own.min_length = own.cache_implementation = None
        own.return_dict_in_generate, own.num_return_sequences = False, 1
        self.steps = steps
        self._folder = folder
        self.served = self.own = ServedSizes(high=_read_positions(model))
        self._replays = False
        self._kept: tuple[tuple[int, int], Any] | None = None
        self._tokenizer = load_tokenizer(folder, trust)
        self._begin = find_starting_tokens(self._tokenizer)
        self._takes = inspect.signature(model.forward).parameters
        self._cache_word = choose_cache_word(self._takes)

    def serve(self, manifest: Manifest | None, replays: bool = False) -> None:
        """Graphs answer from now on, or the model itself.

        Where steps are replayed the last cache is kept: they are captured over it.
        """
        self.served = self.own if manifest is None else ServedSizes.of(manifest)
        self._replays, self._kept = replays, None

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        """What follows each prompt, in their order.

        Raises:
            OutOfBounds: a prompt and its new tokens are longer than the cache; nothing was
                generated.
            BadInput: a prompt has no token, or is not Unicode.
        """
        rows = self.measure(prompts, sampling)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        answer = partial(self._continue_rows, sampling=sampling)
        return answer_by_length(rows, self.served.rows, answer)

    def measure(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
        """The tokens of each prompt, for whose answers there is room.

        Raises:
            OutOfBounds, BadInput: as `generate`.
        """
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True), 1):
            subject = f"prompt {index} ({shorten_prompt(prompt)!r})"
            self._require_room(subject, len(row), sampling.max_new_tokens)
        return rows

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """A prompt's tokens; of a conversation, as the model's chat template writes it."""
        if isinstance(prompt, str):
            require_unicode(prompt)
            ids = self._tokenizer(prompt)["input_ids"]
        else:
            ids = self._conversation_ids(prompt)
        if not ids:
            raise BadInput(
                f"the prompt {shorten_prompt(prompt)!r} has no token",
                hint="say something to go on with",
            )
        return [int(token) for token in ids]

    def _conversation_ids(self, messages: list[Message]) -> Sequence[int]:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise BadRequest(
                "the model's tokenizer has no chat template, so it takes texts and no messages",
                hint='give {"prompt": "..."}',
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template raises what it likes
            raise BadRequest(
                f"the model's chat template refuses the messages: {first_line(error)}",
                hint='messages are {"role": "user", "content": "..."}',
            ) from error
        ids: Sequence[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _require_room(self, subject: str, length: int, new: int) -> None:
        """Refuse what is longer than the cache, before anything is generated."""
        what = f"{subject} has {length} tokens" + (f" and {new} are to follow" if new else "")
        own, most = self.own.high, self.served.high
        if own is not None and length + new > own:
            raise OutOfBounds(
                f"{what}; the model has {own} positions",
                hint="shorten it, or ask for fewer new tokens (max_new_tokens)",
            )
        if most is not None and length + new > most:
            raise OutOfBounds(
                f"{what}; the graphs' cache has up to {most} places",
                hint="shorten it, ask for fewer new tokens (max_new_tokens), or compile with "
                f"--dim cache={self.served.low}:{length + new}",
            )

    def _continue_rows(self, rows: list[list[int]], sampling: Sampling) -> list[Generation]:
        """What follows a batch of prompts, padded on the left."""
        ids, mask = pad_rows(rows, self._pad, self.device, left=True)
        width = ids.shape[1]
        config = self._make_config(sampling)
        kwargs: dict[str, Any] = {"generation_config": config}
        if self.served.low is not None:
            places = width + sampling.max_new_tokens
            kwargs[self._cache_word] = self._find_cache(len(rows), places, config.num_beams or 1)
        if sampling.stop:
            kwargs |= {"stop_strings": [*sampling.stop], "tokenizer": self._tokenizer}
        with silence_transformers():
            found = self.model.generate(ids, attention_mask=mask, **kwargs)
        pairs = zip(found[:, width:].tolist(), rows, strict=True)
        return [self._make_answer(new, len(prompt), sampling) for new, prompt in pairs]

    def _make_config(self, sampling: Sampling) -> Any:
        """The model's own generation config, with what was asked."""
        own = copy.deepcopy(self.model.generation_config)
        own.max_new_tokens = sampling.max_new_tokens
        own.pad_token_id = self._pad
        for name in sampling.__struct_fields__:
            value = getattr(sampling, name)
            if value is not None and name not in {"max_new_tokens", "seed", "stop"}:
                setattr(own, name, value)
        return own

    def _make_answer(self, row: list[int], prompt_tokens: int, sampling: Sampling) -> Generation:
        """A row of new tokens up to where it ended; after that a batch has padding."""
        ends = [index for index, token in enumerate(row) if token in self._ends]
        if ends:
            row = row[: ends[0] + 1]
        stopped = bool(ends) or len(row) < sampling.max_new_tokens
        text: str = self._tokenizer.decode(row, skip_special_tokens=True)
        if any(stop in text for stop in sampling.stop):
            row, text = self._cut_before(row, sampling.stop)
            stopped = True
        return Generation(text, row, prompt_tokens, "stop" if stopped else "length")

    def _cut_before(self, row: list[int], stops: tuple[str, ...]) -> tuple[list[int], str]:
        """The tokens up to the one that ends a text to stop at, and what comes before that text."""
        for few in range(1, len(row) + 1):
            text: str = self._tokenizer.decode(row[:few], skip_special_tokens=True)
            if places := [text.find(stop) for stop in stops if stop in text]:
                return row[:few], text[: min(places)]
        return row, text

    @torch.no_grad()
    def score(self, items: Sequence[Item]) -> list[Likelihood]:
        """The log-likelihood of each continuation after its context, in their order.

        As evaluation harnesses count it: spaces at the end of a context are its continuation's,
        and an empty context is the token that begins texts.

        Raises:
            OutOfBounds: an item is longer than the cache; nothing was scored.
            BadInput: a continuation has no token.
        """
        pairs = [self._split_item(item) for item in items]
        for index, (first, rest) in enumerate(pairs, 1):
            subject = f"item {index} ({shorten_text(items[index - 1].context)!r})"
            self._require_room(subject, len(first) + len(rest) - 1, 0)
        return answer_by_length(
            pairs, self.served.rows, self._score_pairs, lambda pair: len(pair[0]) + len(pair[1])
        )

    def _split_item(self, item: Item) -> Pair:
        """The tokens of a context and of its continuation."""
        require_unicode(item.context + item.continuation)
        context = item.context.rstrip()
        continuation = item.context[len(context) :] + item.continuation
        if not context:
            first = self._first
            rest = self._tokenizer(continuation, add_special_tokens=False)["input_ids"]
        else:
            # Encoded together, since a token may begin in one and end in the other.
            first, whole = self._encode(context), self._encode(context + continuation)
            if len(whole) <= len(first):  # its last token goes on in the continuation
                first = find_common_prefix(first, whole)
            first, rest = first or self._first, whole[len(first) :]
        if not rest:
            raise BadInput(
                f"the continuation {shorten_text(item.continuation)!r} has no token of its own",
                hint="an item is a context and what may follow it",
            )
        return first, rest

    def _encode(self, text: str) -> list[int]:
        """A text's tokens, begun as the model's texts begin, and not ended."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._begin + [int(token) for token in ids]

    def _score_pairs(self, pairs: list[Pair]) -> Iterator[Likelihood]:
        """Of a batch, padded on the right: what comes later is not looked at."""
        whole = [(first + rest)[:-1] for first, rest in pairs]
        ids, _ = pad_rows(whole, self._pad, self.device, left=False)
        width = ids.shape[1]
        keeps = "logits_to_keep" in self._takes
        begin = min(len(first) for first, _ in pairs) - 1 if keeps else 0
        kept = {"logits_to_keep": width - begin} if keeps else {}
        few = max(1, LOGITS // max(1, (width - begin) * self._vocabulary * 4))
        for start in range(0, len(pairs), few):
            rows = slice(start, start + few)
            logits = self.model(input_ids=ids[rows], **kept, **self._make_call_kwargs(width)).logits
            for found, (first, rest) in zip(logits, pairs[rows], strict=True):
                place = len(first) - 1 - begin
                yield _score_tokens(found[place : place + len(rest)], rest)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """One vector for each text, on the CPU: the last hidden states, pooled.

        Raises:
            OutOfBounds: a text is longer than the cache, or than the model's files say.
            BadInput: no text is given, or one has no token.
            UnknownTask: its files say of texts what is not done here.
        """
        if not texts:
            raise BadInput("no text is given", hint="give one or more")
        rules = read_text_rules(self._folder, "embed")
        if rules.lowers:
            raise UnknownTask(
                f"{self._folder.name} embeds small letters alone (do_lower_case), which is not "
                "done by a model that generates",
                hint='load it to embed: engine.load(…, task="embed")',
            )
        rows = [self.prompt_ids(rules.prompt + text) for text in texts]
        for index, row in enumerate(rows, 1):
            refuse_too_long(texts[index - 1], len(row), rules)
            self._require_room(f"text {index} ({shorten_text(texts[index - 1])!r})", len(row), 0)
        return torch.stack(answer_by_length(rows, self.served.rows, self._embed_rows))

    def _embed_rows(self, rows: list[list[int]]) -> torch.Tensor:
        """Of a batch, padded on the right."""
        ids, mask = pad_rows(rows, self._pad, self.device, left=False)
        kwargs = self._make_call_kwargs(ids.shape[1])
        hidden = self.model.base_model(input_ids=ids, **kwargs)[0]
        modes = [step for step in self.steps if step != "normalize"]
        pooled = torch.cat([pool(mode, hidden, mask) for mode in modes], 1)
        if "normalize" in self.steps:
            pooled = nn.functional.normalize(pooled, dim=1)
        return pooled.float().cpu()

    def _make_call_kwargs(self, width: int) -> dict[str, Any]:
        """What a call gets beside its tokens."""
        if self.served.low is None:
            return {"use_cache": False}
        return {"use_cache": True, self._cache_word: self._make_cache(width)}

    def _find_cache(self, rows: int, places: int, beams: int) -> Any:
        """The last cache, emptied, if it is of so many rows and places; else a new one.

        One for beams is not kept: they change its tensors at each step.
        """
        size = rows, self.served.round_up(places)
        if self._kept is not None and self._kept[0] == size and beams == 1:
            self._kept[1].reset()
            return self._kept[1]
        self._kept = None  # before another takes memory
        cache = self._make_cache(places)
        if self._replays and beams == 1:
            self._kept = size, cache
        return cache

    def _make_cache(self, places: int) -> Any:
        """A static cache, of a length that the graphs serve."""
        length = self.served.round_up(places)
        return transformers.StaticCache(config=self.model.config, max_cache_len=length)

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter, where its inputs go, too."""
        found: torch.device = next(self.model.parameters()).device
        return found

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def _ends(self) -> set[int]:
        """The ids of the tokens that end an answer; empty where the model names none."""
        found = self.model.generation_config.eos_token_id
        return {*found} if isinstance(found, (list, tuple)) else {found} - {None}

    @property
    def _first(self) -> list[int]:
        """The token before a text that follows nothing."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        own = (getattr(self._tokenizer, name, None) for name in names)
        return self._begin or [next((int(token) for token in own if token is not None), 0)]

    @property
    def _pad(self) -> int:
        """What fills short rows; nobody looks at it, but it has to be in the vocabulary."""
        own = (self._tokenizer.pad_token_id, self.model.generation_config.pad_token_id, *self._ends)
        known = (token for token in own if token is not None and 0 <= token < self._vocabulary)
        return next((int(token) for token in known), 0)


def _read_positions(model: nn.Module) -> int | None:
    """How many positions a model has; None where its config does not say."""
    config: Any = model.config
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _score_tokens(logits: torch.Tensor, tokens: list[int]) -> Likelihood:
    """How likely tokens are, each after those before it."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    wanted = torch.tensor(tokens, device=logits.device)
    summed = logprobs.gather(1, wanted.unsqueeze(1)).double().sum()
    return Likelihood(float(summed), len(tokens), bool((logprobs.argmax(1) == wanted).all()))
